//! The certificate authorities that are trusted for `wss://`.

use std::sync::Arc;

use barid_core::pem;
use rustls::crypto::aws_lc_rs;
use tokio_tungstenite::Connector;
use ureq::tls::{Certificate, RootCerts};

/// Authorities that replace the public ones.
#[derive(Clone)]
pub(crate) struct Trust {
    config: Arc<rustls::ClientConfig>,
    roots: RootCerts,
}

impl Trust {
    /// Reads the authorities from a PEM text.
    ///
    /// # Errors
    /// The text holds no certificate, or an invalid one.
    pub(crate) fn new(text: &[u8]) -> Result<Self, String> {
        let certificates = pem::certificates(text).map_err(|error| error.to_string())?;
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
        assert!(refused("nothing").starts_with("it holds no certificate; write"));
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(refused(broken).contains("BadEncoding"), "{}", refused(broken));
        assert!(!refused("-----BEGIN CERTIFICATE-----\n*\n").is_empty());
    }
}
