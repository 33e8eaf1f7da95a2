//! Whose certificates a `wss://` server may have.

use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio_tungstenite::Connector;
use ureq::tls::{Certificate, RootCerts};

/// Certificates that are trusted instead of the public ones.
#[derive(Clone)]
pub(crate) struct Trust {
    config: Arc<rustls::ClientConfig>,
    roots: RootCerts,
}

impl Trust {
    /// Those of a PEM text.
    ///
    /// # Errors
    /// It holds none, or one that is broken.
    pub(crate) fn new(pem: &[u8]) -> Result<Self, String> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        if certificates.is_empty() {
            return Err("it holds no certificate".into());
        }
        let mut store = rustls::RootCertStore::empty();
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|error| error.to_string())?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(store)
            .with_no_client_auth();
        let roots = certificates.iter().map(|der| Certificate::from_der(der).to_owned()).into();
        Ok(Self { config: Arc::new(config), roots })
    }

    /// For WebSockets.
    pub(crate) fn connector(&self) -> Connector {
        Connector::Rustls(Arc::clone(&self.config))
    }

    /// For plain HTTPS.
    pub(crate) fn roots(&self) -> RootCerts {
        self.roots.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_no_certificate_is_refused() {
        let refused = |pem: &str| Trust::new(pem.as_bytes()).err().unwrap_or_default();
        assert_eq!(refused("nothing"), "it holds no certificate");
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(refused(broken).contains("BadEncoding"), "{}", refused(broken));
        assert!(!refused("-----BEGIN CERTIFICATE-----\n*\n").is_empty());
    }
}
