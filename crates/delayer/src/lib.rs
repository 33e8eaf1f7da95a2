//! The delayer: claims due retry timers and hands what is behind to dispatchers, to be sent again.
//!
//! Any number may run at once: a claim is one atomic script, so nothing is re-sent twice, and
//! whose turn a shard is is nobody's business. What cannot be handed on is given back without
//! counting as a try: an outage inside Barid is not the device's failure to answer.

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

use barid_runtime::{Context, Role, RunError, Stopped};

/// The role, for `barid_runtime::main` and for `barid dev`.
pub struct Delayer(Service);

impl Role for Delayer {
    const NAME: &'static str = "delayer";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        config.check()
    }

    async fn start(config: Config, context: Context) -> Result<Option<Self>, RunError> {
        Ok(Service::start(config, context).await?.map(Self))
    }

    async fn work(self) -> Result<Stopped, RunError> {
        Ok(self.0.work().await)
    }
}
