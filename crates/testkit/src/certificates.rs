//! Self-signed certificates for 127.0.0.1, valid until 2130, whose keys are public; and certificate
//! authorities made for one test.

use std::sync::Arc;

use anyhow::{Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

/// A certificate and its key, PEM.
#[derive(Debug, Clone, Copy)]
pub struct Certificate {
    /// The certificate.
    pub pem: &'static str,
    /// The private key.
    pub key: &'static str,
}

/// One.
pub const ONE: Certificate = Certificate {
    pem: include_str!("../certificates/one.pem"),
    key: include_str!("../certificates/one.key"),
};

/// Another.
pub const TWO: Certificate = Certificate {
    pem: include_str!("../certificates/two.pem"),
    key: include_str!("../certificates/two.key"),
};

/// A TLS client that trusts only these certificates (PEM).
///
/// # Errors
/// Returns an error if there is no certificate, or an invalid one.
pub fn trusting(pem: &str) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate?)?;
    }
    ensure!(!roots.is_empty(), "no certificate to trust");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate that an [`Authority`] signed, and its key, PEM.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate.
    pub pem: String,
    /// Its key.
    pub key: String,
}

impl Authority {
    /// Creates an authority with a new key.
    ///
    /// # Errors
    /// Returns an error if no key can be generated.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        // Its name differs from those that it signs: OpenSSL takes equal names for self-signed.
        params.distinguished_name.push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// The authority's own certificate, PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Issues a certificate for 127.0.0.1, for servers and clients.
    ///
    /// # Errors
    /// Returns an error if no key can be generated.
    pub fn issue(&self) -> Result<Issued> {
        self.issue_for(&["127.0.0.1", "localhost"])
    }

    /// Issues a certificate for these names, for servers and clients.
    ///
    /// # Errors
    /// Returns an error if a name is invalid, or no key can be generated.
    pub fn issue_for(&self, names: &[&str]) -> Result<Issued> {
        let key = KeyPair::generate()?;
        let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let params = CertificateParams::new(names)?;
        Ok(Issued { pem: params.signed_by(&key, &self.0)?.pem(), key: key.serialize_pem() })
    }
}
