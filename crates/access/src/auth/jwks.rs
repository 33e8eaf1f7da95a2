//! Key sets (JWKS) from a file or a URL. They are read again periodically; if that fails, the last one stays for a
//! bounded time.

use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barid_core::AppId;
use barid_runtime::words::shown_path;
use barid_runtime::{PemFile, SecretUrl, files};
use jsonwebtoken::jwk::Jwk;
use parking_lot::{Mutex, RwLock};
use prometheus::IntCounter;
use tokio::sync::watch;
use tokio::time::Instant;
use ureq::tls::{Certificate, RootCerts};

use crate::auth::keys::{Key, apps};
use crate::config::JwksConfig;

const BYTES_MAX: u64 = 1 << 20;
/// Shortest time until a set that could not be read is read again.
const RETRY: Duration = Duration::from_secs(1);

/// One key set.
#[derive(Debug)]
pub(super) struct Jwks {
    set: Arc<Set>,
    refresh: Duration,
    refresh_min: Duration,
    reading: Mutex<Option<Reading>>,
}

/// The last reading of a set.
#[derive(Debug, Clone)]
struct Reading {
    begun: Instant,
    /// Its sender is dropped at the end.
    under_way: watch::Receiver<()>,
}

/// A set and what was read of it.
#[derive(Debug)]
struct Set {
    source: Source,
    apps: Vec<AppId>,
    age_max: Duration,
    keys_max: usize,
    read: RwLock<Option<Read>>,
    failed: AtomicBool,
    skipped: IntCounter,
}

/// The last set that was read.
#[derive(Debug)]
struct Read {
    keys: Arc<Vec<Key>>,
    at: Instant,
}

/// A key set with unparsed keys, so that one unreadable key does not fail the others.
#[derive(serde::Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

#[derive(Debug, Clone)]
enum Source {
    File(PathBuf),
    Url { url: SecretUrl, timeout: Duration, roots: RootCerts, https_only: bool },
}

impl Jwks {
    /// `at`: its place in `auth.jwks`. `skipped` counts keys that cannot be read.
    pub(super) fn new(at: usize, config: &JwksConfig, skipped: IntCounter) -> Result<Self, String> {
        let fail = |problem: &str| format!("auth.jwks[{at}]{problem}");
        let source = match (&config.file, config.url.expose()) {
            (Some(path), "") => Source::File(path.clone()),
            (None, url) if url.starts_with("http://") && !config.insecure_http => {
                return Err(fail(
                    ".url: an http url lets anybody in between choose the keys; write an https url, or set \
                     insecure_http",
                ));
            }
            (None, url) if url.starts_with("https://") || url.starts_with("http://") => {
                let timeout = Duration::from_millis(config.timeout_ms);
                let roots = roots(config).map_err(|problem| fail(&format!(".{problem}")))?;
                let https_only = !config.insecure_http;
                Source::Url { url: SecretUrl::new(url), timeout, roots, https_only }
            }
            _ => return Err(fail(": needs either file or an http(s) url")),
        };
        let set = Set {
            source,
            apps: apps(&config.apps).map_err(|problem| fail(&format!(".apps: {problem}")))?,
            age_max: Duration::from_secs(config.age_max_seconds),
            keys_max: config.keys_max,
            read: RwLock::default(),
            failed: AtomicBool::new(false),
            skipped,
        };
        Ok(Self {
            set: Arc::new(set),
            refresh: Duration::from_secs(config.refresh_seconds),
            refresh_min: Duration::from_secs(config.refresh_min_seconds),
            reading: Mutex::default(),
        })
    }

    /// The keys; `None`: the set was never read, or too long ago.
    pub(super) fn keys(&self) -> Option<Arc<Vec<Key>>> {
        let read = self.set.read.read();
        let age_max = self.set.age_max;
        let read =
            read.as_ref().filter(|read| age_max.is_zero() || read.at.elapsed() <= age_max)?;
        Some(Arc::clone(&read.keys))
    }

    /// Time since the set was read; `None`: it never was.
    pub(super) fn age(&self) -> Option<Duration> {
        self.set.age()
    }

    pub(super) async fn refresh_if_due(&self) {
        let failed = self.set.failed.load(Ordering::Relaxed);
        let due = if failed { self.refresh_min.max(RETRY) } else { self.refresh };
        if let Some(reading) = self.start(due) {
            reading.finished().await;
        }
    }

    /// Reads the set if that is allowed now, or waits for the reading that is under way. Returns whether it was read
    /// since the caller looked: a token may name a key that was added minutes ago.
    pub(super) async fn refresh_for_unknown_key(&self) -> bool {
        match self.start(self.refresh_min) {
            Some(reading) => {
                reading.finished().await;
                true
            }
            None => false,
        }
    }

    /// The reading that is under way, or else a new one; `None` if the last one began less than `pause` ago. It ends
    /// although nobody waits for it: the handshake that asked may go away, and the next one needs the keys as well.
    fn start(&self, pause: Duration) -> Option<Reading> {
        let mut last = self.reading.lock();
        if let Some(reading) = &*last {
            if reading.is_under_way() {
                return Some(reading.clone());
            }
            if reading.begun.elapsed() < pause {
                return None;
            }
        }
        let (sender, under_way) = watch::channel(());
        let set = Arc::clone(&self.set);
        tokio::spawn(async move {
            set.read().await;
            drop(sender);
        });
        *last = Some(Reading { begun: Instant::now(), under_way });
        last.clone()
    }

    /// Reads the set once, and returns the number of usable keys.
    pub(super) async fn probe(&self) -> Result<usize, String> {
        let source = self.set.source.clone();
        let read = tokio::task::spawn_blocking(move || source.read()).await;
        let set = read.map_err(|error| error.to_string())??;
        let keys = set.keys.into_iter().filter_map(|jwk| serde_json::from_value::<Jwk>(jwk).ok());
        Ok(keys.filter_map(|jwk| Key::from_jwk(&jwk, &self.set.apps)).count())
    }
}

/// Reads a set once if it is a file.
pub(super) fn check_file(config: &JwksConfig) -> Result<(), String> {
    let Some(path) = &config.file else { return Ok(()) };
    let source = Source::File(path.clone());
    source.read().map(drop).map_err(|why| format!("{source}: {why}"))
}

impl Reading {
    fn is_under_way(&self) -> bool {
        self.under_way.has_changed().is_ok()
    }

    async fn finished(mut self) {
        while self.under_way.changed().await.is_ok() {}
    }
}

impl Set {
    fn age(&self) -> Option<Duration> {
        self.read.read().as_ref().map(|read| read.at.elapsed())
    }

    /// Reads the set. A failure leaves the last keys.
    async fn read(&self) {
        let source = self.source.clone();
        let read = tokio::task::spawn_blocking(move || source.read()).await;
        let read = read.map_err(|error| error.to_string()).and_then(|read| read);
        let taken = read.and_then(|set| self.take(&set));
        self.failed.store(taken.is_err(), Ordering::Relaxed);
        if let Err(error) = taken {
            let age_seconds = self.age().map(|age| age.as_secs());
            tracing::warn!(source = %self.source, error, age_seconds, "cannot read key set");
        }
    }

    /// Replaces the keys, also by none.
    fn take(&self, set: &KeySet) -> Result<(), String> {
        let count = set.keys.len();
        if count > self.keys_max {
            return Err(format!("the set has {count} keys, the limit is {}", self.keys_max));
        }
        let mut unreadable = false;
        let keys = set.keys.iter().filter_map(|jwk| {
            // An unreadable key is skipped. `from_jwk` skips keys of other types and uses.
            let jwk = serde_json::from_value::<Jwk>(jwk.clone()).inspect_err(|error| {
                self.skipped.inc();
                unreadable = true;
                tracing::warn!(source = %self.source, %error, "key set has an unreadable key, which is skipped");
            });
            Key::from_jwk(&jwk.ok()?, &self.apps)
        });
        let keys: Vec<Key> = keys.collect();
        if keys.is_empty() && unreadable {
            return Err("none of its keys is readable".into());
        }
        if keys.is_empty() {
            tracing::warn!(source = %self.source, "key set has no key for tokens: all are refused");
        }
        tracing::debug!(source = %self.source, keys = keys.len(), "key set read");
        *self.read.write() = Some(Read { keys: Arc::new(keys), at: Instant::now() });
        Ok(())
    }
}

impl std::fmt::Display for Jwks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.set.source.fmt(f)
    }
}

impl Source {
    fn read(&self) -> Result<KeySet, String> {
        let bytes = match self {
            Self::File(path) => files::read(path).map_err(|error| error.to_string())?,
            Self::Url { url, timeout, roots, https_only } => {
                fetch(url, *timeout, roots, *https_only)?
            }
        };
        // The error's own text may repeat a value.
        serde_json::from_slice(&bytes).map_err(|error| match error.is_data() {
            true => "not a key set: it has no list named keys".into(),
            false => {
                let (line, column) = (error.line(), error.column());
                format!("not a key set: no JSON at line {line}, column {column}")
            }
        })
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.write_str(&shown_path(path)),
            Self::Url { url, .. } => url.fmt(f),
        }
    }
}

/// The certificate authorities that a fetch trusts.
fn roots(config: &JwksConfig) -> Result<RootCerts, String> {
    let Some(path) = &config.ca_file else { return Ok(RootCerts::WebPki) };
    if !config.url.expose().starts_with("https://") {
        return Err("ca_file: it is for an https url".into());
    }
    let file = PemFile::read("ca_file", path)?;
    let certificates = file.certificates()?;
    // ureq drops unusable certificates silently: they are an error here.
    let mut store = rustls::RootCertStore::empty();
    for certificate in &certificates {
        store.add(certificate.clone()).map_err(|error| file.error(error))?;
    }
    let owned = certificates.iter().map(|der| Certificate::from_der(der).to_owned());
    Ok(RootCerts::Specific(Arc::new(owned.collect())))
}

fn fetch(
    url: &SecretUrl,
    timeout: Duration,
    roots: &RootCerts,
    https_only: bool,
) -> Result<Vec<u8>, String> {
    let tls = ureq::tls::TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .root_certs(roots.clone())
        .build();
    let agent = ureq::Agent::new_with_config(
        ureq::Agent::config_builder()
            .tls_config(tls)
            .timeout_global(Some(timeout))
            // A redirect may lead to a host or a scheme that the operator did not name.
            .max_redirects(0)
            .https_only(https_only)
            .build(),
    );
    let response = agent.get(url.expose()).call();
    // Some errors repeat the URL.
    let masked = |error: ureq::Error| error.to_string().replace(url.expose(), &url.to_string());
    let response = response.map_err(masked)?;
    if response.status() != 200 {
        return Err(format!("answered with {}, which is not followed", response.status()));
    }
    let mut bytes = Vec::new();
    let mut body = response.into_body();
    body.as_reader().take(BYTES_MAX).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}
