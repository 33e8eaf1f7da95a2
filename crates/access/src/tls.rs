//! TLS on the devices' port, with a certificate that is read again when its files change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::TlsConfig;
use crate::labels::CertificateRead;
use crate::metrics::Metrics;

/// How often the files' times are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// The certificate in force and how to speak with it. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    current: Arc<Current>,
}

/// What is served, replaced as a whole: handshakes that began go on with what they began with.
#[derive(Debug)]
struct Current {
    files: Files,
    provider: Arc<CryptoProvider>,
    key: RwLock<Arc<CertifiedKey>>,
}

#[derive(Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.key.read()))
    }
}

impl Tls {
    /// As configured; `None`: plain.
    ///
    /// # Errors
    /// The files cannot be read, or hold no certificate and the key that belongs to it.
    pub fn new(config: &TlsConfig) -> Result<Option<Self>, String> {
        let (Some(certificate), Some(key)) = (&config.certificate_file, &config.key_file) else {
            if config.certificate_file.is_some() || config.key_file.is_some() {
                return Err("tls.certificate_file and tls.key_file belong together".into());
            }
            return Ok(None);
        };
        let files = Files { certificate: certificate.clone(), key: key.clone() };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let key = RwLock::new(Arc::new(files.read(&provider)?));
        let current = Arc::new(Current { files, provider: Arc::clone(&provider), key });
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("tls: {error}"))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Nothing is remembered of sessions, here or in tickets: reconnects are full handshakes.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Some(Self { acceptor: TlsAcceptor::from(Arc::new(config)), current }))
    }

    /// A handshake.
    ///
    /// # Errors
    /// It failed, or the peer went away.
    pub async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(stream).await
    }

    /// Reads the files again whenever one of them changes and at SIGHUP; what cannot be used is counted
    /// and logged, and the last good certificate stays.
    pub async fn keep_fresh(self, metrics: Metrics) {
        let mut hangup = signal(SignalKind::hangup()).ok();
        let mut look = interval(LOOK);
        let mut known = self.current.files.changed_at();
        loop {
            let asked = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = look.tick() => {
                    let now = self.current.files.changed_at();
                    if now == known {
                        continue;
                    }
                    known = now;
                }
                _ = asked => known = self.current.files.changed_at(),
            }
            match self.current.files.read(&self.current.provider) {
                Ok(key) => {
                    *self.current.key.write() = Arc::new(key);
                    metrics.certificate_read(CertificateRead::Read);
                    tracing::info!("the certificate was read again");
                }
                Err(error) => {
                    metrics.certificate_read(CertificateRead::Failed);
                    tracing::error!(
                        error,
                        "the certificate cannot be used; the last good one stays"
                    );
                }
            }
        }
    }
}

impl Files {
    fn read(&self, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
        let wrong = |key: &str, path: &Path, error: &dyn std::fmt::Display| {
            format!("{key} {}: {error}", path.display())
        };
        let bad_chain =
            |error: &dyn std::fmt::Display| wrong("tls.certificate_file", &self.certificate, error);
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&self.certificate)
            .and_then(Iterator::collect)
            .map_err(|error| bad_chain(&error))?;
        if chain.is_empty() {
            return Err(bad_chain(&"it holds no certificate"));
        }
        let bad_key = |error: &dyn std::fmt::Display| wrong("tls.key_file", &self.key, error);
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| bad_key(&error))?;
        CertifiedKey::from_der(chain, key, provider).map_err(|error| bad_key(&error))
    }

    /// Links are followed: a mounted secret is a link that is put elsewhere.
    fn changed_at(&self) -> [Option<SystemTime>; 2] {
        [&self.certificate, &self.key]
            .map(|path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok())
    }
}
