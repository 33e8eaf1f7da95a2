//! TLS of `rediss://` connections: trusted authorities and client certificates.

use barid_runtime::PemFile;
use fred::types::config::TlsConnector;
use redis::{Client, ClientTlsConfig, RedisError, TlsCertificates};
use rustls::{ClientConfig, RootCertStore};

use crate::RedisConfig;

/// The contents of `redis.ca_file`, `redis.certificate_file` and `redis.key_file`.
#[derive(Default)]
struct Files {
    ca: Option<PemFile>,
    /// Certificate and key.
    client: Option<(PemFile, PemFile)>,
}

impl Files {
    fn read(config: &RedisConfig) -> Result<Self, String> {
        let ca = config.ca_file.as_deref().map(|path| PemFile::read("redis.ca_file", path));
        let client = match (&config.certificate_file, &config.key_file) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => {
                let files = [
                    ("redis.certificate_file", certificate.as_path()),
                    ("redis.key_file", key.as_path()),
                ];
                PemFile::read_all(files).map(|[certificate, key]| Some((certificate, key)))
            }
            _ => Err("redis.certificate_file and redis.key_file belong together".to_owned()),
        };
        match (ca.transpose(), client) {
            (Ok(ca), Ok(client)) => Ok(Self { ca, client }),
            (ca, client) => {
                Err([ca.err(), client.err()].into_iter().flatten().collect::<Vec<_>>().join("\n"))
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.ca.is_none() && self.client.is_none()
    }

    /// Trusts Mozilla's roots if `ca_file` is not set.
    fn rustls(&self) -> Result<ClientConfig, String> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Some(ca) => {
                for root in ca.certificates()? {
                    roots.add(root).map_err(|error| ca.error(error))?;
                }
            }
        }
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let config = ClientConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("redis: {error}"))?
            .with_root_certificates(roots);
        let Some((certificate, key)) = &self.client else {
            return Ok(config.with_no_client_auth());
        };
        config
            .with_client_auth_cert(certificate.certificates()?, key.private_key()?)
            .map_err(|error| format!("redis.certificate_file and redis.key_file: {error}"))
    }
}

/// Checks the files before a connection is made.
///
/// # Errors
/// Returns an error that names the key of the invalid file.
pub(crate) fn check(config: &RedisConfig) -> Result<(), String> {
    let files = Files::read(config)?;
    let urls = std::iter::once(&config.url).chain(&config.urls);
    if !files.is_empty()
        && let Some(plain) = urls.into_iter().find(|url| !is_tls(url.expose()))
    {
        return Err(format!(
            "redis.url {plain} is not encrypted: redis.ca_file, redis.certificate_file and \
             redis.key_file need rediss://"
        ));
    }
    files.rustls().map(drop)
}

fn is_tls(url: &str) -> bool {
    url.starts_with("rediss://") || url.starts_with("valkeys://")
}

/// A client of one of the configured URLs.
pub(crate) fn client(config: &RedisConfig, url: &str) -> Result<Client, RedisError> {
    let invalid = |why| RedisError::from((redis::ErrorKind::InvalidClientConfig, "TLS", why));
    let Files { ca, client } = Files::read(config).map_err(invalid)?;
    if !is_tls(url) || (ca.is_none() && client.is_none()) {
        return Client::open(url);
    }
    let client_tls = client.map(|(certificate, key)| ClientTlsConfig {
        client_cert: certificate.bytes,
        client_key: key.bytes,
    });
    Client::build_with_tls(url, TlsCertificates { client_tls, root_cert: ca.map(|ca| ca.bytes) })
}

/// The TLS connector of the subscriber ([`crate::announcements`]).
pub(crate) fn connector(config: &RedisConfig) -> Result<Option<TlsConnector>, String> {
    if !is_tls(config.url.expose()) {
        return Ok(None);
    }
    Ok(Some(Files::read(config)?.rustls()?.into()))
}
