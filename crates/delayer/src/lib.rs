//! The delayer claims due retry timers, and asks dispatchers to re-send the messages.
//!
//! Any number of delayers may run at once, without dividing the shards between them: a claim is one atomic script, so
//! that no timer is claimed twice. A claim that cannot be sent to a dispatcher is given back and does not count as an
//! attempt, because an outage inside Barid is not the device's failure.

mod config;
mod error;
mod lane;
mod metrics;
mod schedule;
mod service;

pub use config::Config;
pub use error::Error;
pub use metrics::Metrics;
pub use service::Service;

use std::time::Duration;

use barid_mesh::{Credentials, Party};
use barid_runtime::{Context, Probe, Role, RunError, Stopped, bounds};

/// The delayer's [`Role`](barid_runtime::Role).
pub struct Delayer(Service);

impl Role for Delayer {
    const NAME: &'static str = "delayer";
    const ABOUT: &'static str = "Re-sends messages that no device has acknowledged, when their retry timers in Redis are due.";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        let credentials = Credentials::read(&config.internal_tls, Party::Delayer).map(drop);
        bounds::all([config.check(), credentials])
    }

    async fn probe(config: &Config, timeout: Duration) -> Vec<Probe> {
        barid_mailbox::probe(&config.redis, timeout).await
    }

    async fn start(config: Config, context: Context) -> Result<Option<Self>, RunError> {
        Ok(Service::start(config, context).await?.map(Self))
    }

    async fn work(self) -> Result<Stopped, RunError> {
        Ok(self.0.work().await)
    }
}
