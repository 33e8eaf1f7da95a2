//! The services of a process to its role.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tracing::Span;

use crate::announce::Announcements;
use crate::config::{AdminConfig, LogConfig};
use crate::health::{Condition, Health};
use crate::shutdown::Shutdown;
use crate::telemetry;
use crate::trace::Tracer;

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
    /// Whether the process is this role only, and not one in `barid dev` or a test.
    alone: bool,
}

impl Context {
    /// Creates a new context, for a role in `barid dev` or in a test.
    pub fn new() -> Self {
        Self::within(Span::none())
    }

    /// As [`Self::new`]; `span` names the role in the lines about its conditions.
    pub fn within(span: Span) -> Self {
        let context = Self::of(&AdminConfig::default(), &LogConfig::default(), None);
        let health = Health::within(context.shutdown.clone(), span);
        Self { alone: false, health, ..context }
    }

    pub(crate) fn of(admin: &AdminConfig, log: &LogConfig, ready_file: Option<PathBuf>) -> Self {
        let metrics = prometheus::Registry::new();
        let shutdown = Shutdown::new();
        Self {
            health: Health::new(shutdown.clone()),
            shutdown,
            tracer: Tracer::new(&metrics, log.traces_per_second).expect("the registry is empty"),
            metrics,
            stalled_after: Duration::from_secs(admin.stalled_after_seconds),
            announcements: Announcements::new(ready_file),
            alone: true,
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

    /// Names the role's node in the lines of the process's log from now on.
    pub fn known_as(&self, node: &str) {
        if self.alone {
            telemetry::set_node(node);
        }
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
