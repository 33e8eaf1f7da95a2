//! Self-signed certificates for 127.0.0.1, good until 2130, which prove nothing, their keys being public; and
//! authorities that are made when they are wanted.

use std::sync::Arc;

use anyhow::{Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
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

/// An authority of its own, whose key nobody keeps.
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
    /// Makes one.
    ///
    /// # Errors
    /// No key can be made.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        // Another name than what it signs: OpenSSL takes those of one name for self-signed.
        params.distinguished_name.push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// Its own certificate, PEM: trust this.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for 127.0.0.1, for servers and for clients.
    ///
    /// # Errors
    /// No key can be made.
    pub fn issue(&self) -> Result<Issued> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()])?;
        Ok(Issued { pem: params.signed_by(&key, &self.0)?.pem(), key: key.serialize_pem() })
    }
}
