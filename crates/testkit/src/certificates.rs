//! Self-signed certificates for 127.0.0.1, good until 2130, and their keys. They prove nothing: the keys are
//! public.

use std::sync::Arc;

use anyhow::{Result, ensure};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

/// A certificate and its key, PEM.
#[derive(Debug, Clone, Copy)]
pub struct Certificate {
    /// To be trusted, and served.
    pub pem: &'static str,
    /// To be served with.
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

/// A client that trusts these certificates (PEM) and no others.
///
/// # Errors
/// There is none, or a broken one.
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
