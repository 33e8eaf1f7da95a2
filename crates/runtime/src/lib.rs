//! The infrastructure that all roles share: configuration, logs, metrics, health, admin endpoints, signals and
//! draining. It knows nothing of messages.

pub mod admin;
mod announce;
pub mod bounds;
pub mod config;
mod context;
pub mod exit;
pub mod exposition;
mod file_watch;
pub mod files;
mod health;
mod hops;
mod latency;
mod listening;
mod main_role;
mod metric_set;
mod pem_file;
mod process;
pub mod repeats;
mod role;
mod secret_url;
mod shutdown;
mod tasks;
pub mod telemetry;
mod trace;
mod until_there;
pub mod words;
mod workers;

pub use announce::Announcements;
pub use config::{AdminConfig, Common, HasCommon, LogConfig, LogFormat};
pub use context::Context;
pub use file_watch::FileWatch;
pub use health::{Condition, Health};
pub use hops::{Hop, Hops};
pub use latency::{BOUNDS_US, Latency, register_latencies};
pub use main_role::main;
pub use metric_set::MetricSet;
pub use pem_file::{PemFile, expires_s};
pub use role::{Probe, Role, RunError, Stopped, Unfit};
pub use secret_url::SecretUrl;
pub use shutdown::Shutdown;
pub use tasks::{Spawner, Tasks};
pub use trace::{TraceEvent, Tracer};
pub use workers::Workers;
