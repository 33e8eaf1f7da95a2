//! What every role needs and no role is about: configuration, logs, metrics, health, admin
//! endpoints, signals and draining. No domain.

pub mod admin;
mod announce;
pub mod bounds;
pub mod config;
pub mod exposition;
mod health;
mod hops;
mod latency;
mod main_role;
mod metric_set;
mod pem_file;
mod secret_url;
mod shutdown;
mod tasks;
pub mod telemetry;
mod trace;
mod until_there;
mod workers;

pub use announce::Announcements;
pub use config::{AdminConfig, Common, HasCommon, LogConfig, LogFormat};
pub use health::{Condition, Health};
pub use hops::{Hop, Hops};
pub use latency::{BOUNDS_US, Latency, register_latencies};
pub use main_role::main;
pub use metric_set::MetricSet;
pub use pem_file::PemFile;
pub use secret_url::SecretUrl;
pub use shutdown::Shutdown;
pub use tasks::Tasks;
pub use trace::{Sighting, Tracer};
pub use workers::Workers;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use crate::bounds::Bounded;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a role's run ended early.
pub type RunError = Box<dyn std::error::Error + Send + Sync>;

/// One of the four roles: all that [`main`] has to know of it.
pub trait Role: Sized + Send + 'static {
    /// As in `barid-<name>` and `BARID_<NAME>_…`.
    const NAME: &'static str;
    /// Its configuration; an empty file means `Config::default()`.
    type Config: DeserializeOwned + Serialize + Default + HasCommon + Bounded + Send + 'static;

    /// Checks relations between settings that types cannot; run before a port binds.
    ///
    /// # Errors
    /// What is wrong, naming the keys.
    fn check(config: &Self::Config) -> Result<(), String>;

    /// Connects, listens, and announces its listeners. Waits while Kafka or Redis is away; `None`: it was told to
    /// drain meanwhile.
    ///
    /// # Errors
    /// The role cannot start.
    fn start(
        config: Self::Config,
        context: Context,
    ) -> impl Future<Output = Result<Option<Self>, RunError>> + Send;

    /// Works until its context drains it, then finishes what it began.
    ///
    /// # Errors
    /// The role cannot go on.
    fn work(self) -> impl Future<Output = Result<Stopped, RunError>> + Send;

    /// [`Self::start`], then [`Self::work`].
    ///
    /// # Errors
    /// The role cannot start, or cannot go on.
    fn run(
        config: Self::Config,
        context: Context,
    ) -> impl Future<Output = Result<Stopped, RunError>> + Send {
        async {
            match Self::start(config, context).await? {
                Some(role) => role.work().await,
                None => Ok(Stopped::Clean),
            }
        }
    }
}

/// How a role ended after it was told to drain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// Everything was finished.
    Clean,
    /// The deadline cut something off; exit code 3.
    Cut {
        /// What: `sessions`, `records`, …
        what: String,
        /// How many.
        count: u64,
    },
}

/// What a role is given by the process that it runs in. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    /// Tells when to drain, and until when.
    pub shutdown: Shutdown,
    /// Where its metrics are registered.
    pub metrics: prometheus::Registry,
    /// Its conditions of readiness.
    pub health: Health,
    /// For how long a loop of the role may show no progress until its condition fails.
    pub stalled_after: Duration,
    /// Logs sampled messages.
    pub tracer: Tracer,
    announcements: Announcements,
}

impl Context {
    /// A context of its own, as each role of `barid dev` and of tests has.
    pub fn new() -> Self {
        Self::of(&AdminConfig::default(), &LogConfig::default(), None)
    }

    fn of(admin: &AdminConfig, log: &LogConfig, ready_file: Option<std::path::PathBuf>) -> Self {
        let metrics = prometheus::Registry::new();
        Self {
            shutdown: Shutdown::new(),
            tracer: Tracer::new(&metrics, log.traces_per_second).expect("the registry is empty"),
            metrics,
            health: Health::new(),
            stalled_after: Duration::from_secs(admin.stalled_after_seconds),
            announcements: Announcements::new(ready_file),
        }
    }

    /// A condition of readiness that `deed` has to keep true: see [`Health::lapsing`].
    pub fn progress(&self, name: &'static str, deed: &'static str) -> Condition {
        self.health.lapsing(name, deed, self.stalled_after)
    }

    /// Tells where a listener was bound (`grpc`, `ws`, …).
    pub fn announce(&self, listener: &'static str, address: SocketAddr) {
        tracing::info!(listener, %address, "listening");
        self.announcements.add(listener, address);
    }

    /// Tells that every listener was announced; the ready file appears now, if one is configured.
    pub fn announce_done(&self) {
        if let Err(error) = self.announcements.done() {
            tracing::error!(%error, "cannot write the ready file");
        }
    }

    /// The listeners; waits for [`Self::announce_done`].
    pub fn announcements(&self) -> &Announcements {
        &self.announcements
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}
