//! The infrastructure that all roles share: configuration, logs, metrics, health, admin endpoints, signals and
//! draining. It knows nothing of messages.

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
pub use tasks::{Spawner, Tasks};
pub use trace::{TraceEvent, Tracer};
pub use workers::Workers;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use crate::bounds::Bounded;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a role's run ended early.
pub type RunError = Box<dyn std::error::Error + Send + Sync>;

/// A role, as [`main`] runs it.
pub trait Role: Sized + Send + 'static {
    /// The name in `barid-<name>` and `BARID_<NAME>_…`.
    const NAME: &'static str;
    /// Its configuration; an empty file means `Config::default()`.
    type Config: DeserializeOwned + Serialize + Default + HasCommon + Bounded + Send + 'static;

    /// Checks the configuration. It may read files that the configuration names. Called before anything starts.
    ///
    /// # Errors
    /// Returns what is wrong, with the keys.
    fn check(config: &Self::Config) -> Result<(), String>;

    /// Connects, listens, and announces the listeners. Waits while Kafka or Redis is unavailable. `None`: draining
    /// began meanwhile.
    ///
    /// # Errors
    /// The role cannot start.
    fn start(
        config: Self::Config,
        context: Context,
    ) -> impl Future<Output = Result<Option<Self>, RunError>> + Send;

    /// Runs until draining begins, then finishes the work in flight.
    ///
    /// # Errors
    /// The role cannot continue.
    fn work(self) -> impl Future<Output = Result<Stopped, RunError>> + Send;

    /// [`Self::start`], then [`Self::work`].
    ///
    /// # Errors
    /// The role cannot start or continue.
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

/// How a role ended after draining.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// Everything was finished.
    Clean,
    /// The deadline cut something off; exit code 3.
    Cut {
        /// The kind of work: `sessions`, `records` and so on.
        what: String,
        /// How many.
        count: u64,
    },
}

/// The services of the process to its role. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    /// The beginning and the deadline of draining.
    pub shutdown: Shutdown,
    /// The registry of metrics.
    pub metrics: prometheus::Registry,
    /// The conditions of readiness.
    pub health: Health,
    /// How long a loop of the role may make no progress until its condition fails.
    pub stalled_after: Duration,
    /// Logs sampled messages.
    pub tracer: Tracer,
    announcements: Announcements,
}

impl Context {
    /// Creates a new context, for a role in `barid dev` or in a test.
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

    /// Adds a condition that `deed` has to renew; see [`Health::lapsing`].
    pub fn progress(&self, name: &'static str, deed: &'static str) -> Condition {
        self.health.lapsing(name, deed, self.stalled_after)
    }

    /// Announces the address of a listener (`grpc`, `ws` and so on).
    pub fn announce(&self, listener: &'static str, address: SocketAddr) {
        tracing::info!(listener, %address, "listening");
        self.announcements.add(listener, address);
    }

    /// Ends the announcements, and writes the ready file if one is configured.
    pub fn announce_done(&self) {
        if let Err(error) = self.announcements.done() {
            tracing::error!(%error, "cannot write the ready file");
        }
    }

    /// The announced listeners.
    pub fn announcements(&self) -> &Announcements {
        &self.announcements
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}
