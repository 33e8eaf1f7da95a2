//! TLS on the devices' port. The certificate is reloaded when its files change.

use std::path::PathBuf;
use std::sync::Arc;

use barid_runtime::{FileWatch, PemFile, expires_s};
use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};

use crate::config::TlsConfig;
use crate::labels::CertificateRead;
use crate::metrics::Metrics;

/// The TLS acceptor with the current certificate. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ServerConfig>,
    current: Arc<Current>,
}

/// The current certificate. It is replaced as a whole; handshakes under way keep the one they began with.
#[derive(Debug)]
struct Current {
    files: Files,
    watch: FileWatch<2>,
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
    /// Reads the configured certificate; `None`: TLS is not configured.
    ///
    /// # Errors
    /// The files cannot be read, or hold no certificate with its key.
    pub fn new(config: &TlsConfig) -> Result<Option<Self>, String> {
        let (Some(certificate), Some(key)) = (&config.certificate_file, &config.key_file) else {
            if config.certificate_file.is_some() || config.key_file.is_some() {
                return Err("tls.certificate_file and tls.key_file belong together".into());
            }
            return Ok(None);
        };
        let files = Files { certificate: certificate.clone(), key: key.clone() };
        let watch = FileWatch::new([certificate.clone(), key.clone()]);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let key = RwLock::new(Arc::new(files.read(&provider)?));
        let current = Arc::new(Current { files, watch, provider: Arc::clone(&provider), key });
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("tls: {error}"))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // No session resumption, by cache or ticket: every reconnect is a full handshake.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Some(Self { config: Arc::new(config), current }))
    }

    /// Reads the client's first message, which costs the node little.
    ///
    /// # Errors
    /// It is malformed, or the peer has gone.
    pub async fn hello(stream: TcpStream) -> std::io::Result<StartHandshake<TcpStream>> {
        LazyConfigAcceptor::new(Acceptor::default(), stream).await
    }

    /// Signs, and waits for the client's next message.
    ///
    /// # Errors
    /// The handshake failed, or the peer has gone.
    pub async fn accept(
        &self,
        hello: StartHandshake<TcpStream>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        hello.into_stream(Arc::clone(&self.config)).await
    }

    /// Reloads the files when one of them changes, and at SIGHUP. If they cannot be used, that is counted and logged,
    /// and the last good certificate stays. Never returns.
    pub async fn keep_fresh(self, metrics: Metrics) {
        let Current { files, watch, provider, key } = &*self.current;
        let expires = &metrics.certificate_expires;
        expires.set(expires_s(&key.read().cert));
        let apply = |new: Option<CertifiedKey>| match new {
            Some(new) => {
                expires.set(expires_s(&new.cert));
                *key.write() = Arc::new(new);
                metrics.certificate_read(CertificateRead::Read);
            }
            None => metrics.certificate_read(CertificateRead::Failed),
        };
        watch.clone().reload("certificate", || files.read(provider), apply).await;
    }
}

impl Files {
    fn read(&self, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
        let [certificate, key] = PemFile::read_all([
            ("tls.certificate_file", &self.certificate),
            ("tls.key_file", &self.key),
        ])?;
        CertifiedKey::from_der(certificate.certificates()?, key.private_key()?, provider)
            .map_err(|error| key.error(error))
    }
}
