//! The parties that call each other inside a cluster, as their certificates name them.

use rustls::pki_types::{CertificateDer, ServerName};
use webpki::EndEntityCert;

/// A role, or an operator. A certificate names one or more of them as DNS names: `purger.barid.internal`. The names
/// are fixed, so certificates do not depend on addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// A purger.
    Purger,
    /// A dispatcher.
    Dispatcher,
    /// A delayer.
    Delayer,
    /// An access node.
    Access,
    /// A person or a tool that closes sessions.
    Operator,
}

impl Party {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Purger, Self::Dispatcher, Self::Delayer, Self::Access, Self::Operator];

    /// In one word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Purger => "purger",
            Self::Dispatcher => "dispatcher",
            Self::Delayer => "delayer",
            Self::Access => "access",
            Self::Operator => "operator",
        }
    }

    /// The DNS name in its certificate.
    pub const fn dns_name(self) -> &'static str {
        match self {
            Self::Purger => "purger.barid.internal",
            Self::Dispatcher => "dispatcher.barid.internal",
            Self::Delayer => "delayer.barid.internal",
            Self::Access => "access.barid.internal",
            Self::Operator => "operator.barid.internal",
        }
    }

    pub(crate) fn server_name(self) -> ServerName<'static> {
        ServerName::try_from(self.dns_name()).expect("a DNS name")
    }

    /// Those that a certificate names. The signature must have been verified before. Only whole names count: a wildcard
    /// (`*.barid.internal`), which TLS accepts for a server, would name every role.
    pub(crate) fn named_by(certificate: &CertificateDer<'_>) -> Vec<Self> {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Vec::new() };
        let names: Vec<_> = certificate.valid_dns_names().collect();
        let is_named =
            |party: &Self| names.iter().any(|name| name.eq_ignore_ascii_case(party.dns_name()));
        Self::ALL.into_iter().filter(is_named).collect()
    }
}
