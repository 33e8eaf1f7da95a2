//! The TLS credentials of a process towards the other roles. They are reloaded when their files change.

use std::path::PathBuf;
use std::sync::Arc;

use barid_runtime::{Context, FileWatch, MetricSet, PemFile, expires_s};
use parking_lot::RwLock;
use prometheus::{IntCounterVec, IntGauge};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::UnixTime;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use crate::Party;

const READS: [&str; 2] = ["read", "failed"];

/// Keys under `internal_tls`: mutual TLS between the roles. All three files, or none: then the streams between the
/// roles are plain text, which needs listeners on loopback addresses or `grpc.insecure`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InternalTlsConfig {
    /// Authorities that sign the certificates of all roles, PEM. Reloaded when it changes, and on SIGHUP, as the other
    /// two are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Certificate of this process and its chain, PEM. It names the role: `purger.barid.internal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_file: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
}

impl InternalTlsConfig {
    /// Whether files are configured.
    pub fn is_set(&self) -> bool {
        self.ca_file.is_some() || self.certificate_file.is_some() || self.key_file.is_some()
    }
}

/// The credentials; plain text if none are configured. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Credentials(Option<Arc<Current>>);

#[derive(Debug)]
struct Current {
    files: Files,
    watch: FileWatch<3>,
    loaded: RwLock<Loaded>,
}

#[derive(Debug)]
struct Files {
    /// The role that the certificate must name.
    own: Party,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Debug, Clone)]
struct Loaded {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    /// When the certificate expires, s since the Unix epoch.
    expires_s: i64,
}

impl Credentials {
    /// Name of the task that runs [`Self::keep_fresh`].
    pub const TASK: &str = "the internal certificate refresh";

    /// No credentials: plain text in both directions.
    pub fn none() -> Self {
        Self(None)
    }

    /// Reads the configured files. The certificate must name `own`.
    ///
    /// # Errors
    /// One is missing or cannot be used; the text names its key.
    pub fn read(config: &InternalTlsConfig, own: Party) -> Result<Self, String> {
        let InternalTlsConfig { ca_file, certificate_file, key_file } = config;
        let (Some(ca), Some(certificate), Some(key)) = (ca_file, certificate_file, key_file) else {
            if config.is_set() {
                return Err("internal_tls.ca_file, internal_tls.certificate_file and \
                            internal_tls.key_file belong together; write all three"
                    .into());
            }
            return Ok(Self::none());
        };
        let [ca, certificate, key] = [ca, certificate, key].map(PathBuf::clone);
        let watch = FileWatch::new([&ca, &certificate, &key].map(PathBuf::clone));
        let files = Files { own, ca, certificate, key };
        let loaded = RwLock::new(files.read()?);
        Ok(Self(Some(Arc::new(Current { files, watch, loaded }))))
    }

    /// Whether there are any.
    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn server(&self) -> Option<Arc<ServerConfig>> {
        self.0.as_ref().map(|current| Arc::clone(&current.loaded.read().server))
    }

    pub(crate) fn client(&self) -> Option<Arc<ClientConfig>> {
        self.0.as_ref().map(|current| Arc::clone(&current.loaded.read().client))
    }

    /// Reloads the files when one of them changes, and at SIGHUP; open connections stay as they are. If the files
    /// cannot be used, that is counted and logged, and the last good ones stay. The future ends when draining begins.
    ///
    /// # Errors
    /// The metric is registered already.
    pub fn keep_fresh(
        &self,
        context: &Context,
    ) -> Result<impl Future<Output = ()> + Send + use<>, prometheus::Error> {
        let set = MetricSet::new(&context.metrics, "barid_internal_certificate");
        let reads = set.counters(
            "reads_total",
            "Reloads of the files of internal_tls, by result.",
            "result",
            &READS,
        )?;
        let expires = set
            .gauge("expires_timestamp_seconds", "When the certificate of internal_tls expires.")?;
        expires.set(self.0.as_ref().map_or(0, |current| current.loaded.read().expires_s));
        let (credentials, shutdown) = (self.clone(), context.shutdown.clone());
        Ok(async move {
            tokio::select! {
                () = credentials.reload(reads, expires) => {}
                () = shutdown.draining() => {}
            }
        })
    }

    /// Never returns.
    async fn reload(self, reads: IntCounterVec, expires: IntGauge) {
        let Some(current) = self.0 else { return std::future::pending().await };
        let apply = |loaded: Option<Loaded>| {
            let result = if loaded.is_some() { "read" } else { "failed" };
            reads.with_label_values(&[result]).inc();
            if let Some(loaded) = loaded {
                expires.set(loaded.expires_s);
                *current.loaded.write() = loaded;
            }
        };
        let watch = current.watch.clone();
        watch.reload("internal certificate", || current.files.read(), apply).await;
    }
}

impl Files {
    fn read(&self) -> Result<Loaded, String> {
        let [ca, certificate, key] = PemFile::read_all([
            ("internal_tls.ca_file", &self.ca),
            ("internal_tls.certificate_file", &self.certificate),
            ("internal_tls.key_file", &self.key),
        ])?;
        let mut roots = RootCertStore::empty();
        for root in ca.certificates()? {
            roots.add(root).map_err(|error| ca.error(error))?;
        }
        let roots = Arc::new(roots);
        let chain = certificate.certificates()?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        // Peers would refuse it later, and at each connection.
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| ca.error(error))?
            .verify_server_cert(
                &chain[0],
                &chain[1..],
                &self.own.server_name(),
                &[],
                UnixTime::now(),
            )
            .map_err(|error| {
                let name = self.own.dns_name();
                certificate.error(format!("peers with this ca_file refuse it as {name}: {error}"))
            })?;
        if !Party::named_by(&chain[0]).contains(&self.own) {
            let name = self.own.dns_name();
            let why = format!("it does not name {name} in full; wildcards do not count");
            return Err(certificate.error(why));
        }
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| ca.error(error))?;
        verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()).map_err(|error| {
            certificate.error(format!("peers with this ca_file refuse it as a client: {error}"))
        })?;
        let protocols = &[&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(protocols)
            .map_err(|error| format!("internal_tls: {error}"))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.private_key()?)
            .map_err(|error| key.error(error))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        // Connections are few and long: no resumption, by cache or ticket.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(protocols)
            .map_err(|error| format!("internal_tls: {error}"))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key.private_key()?)
            .map_err(|error| key.error(error))?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        let expires_s = expires_s(&chain);
        Ok(Loaded { server: Arc::new(server), client: Arc::new(client), expires_s })
    }
}
