//! The purger: takes what businesses produce to Kafka, refuses what is wrong, accepts the rest into
//! mailboxes, hands on what is for users who are online, and only then commits. The only role that
//! consumes Kafka, and the only one that accepts.
//!
//! `service` is the loop; `partitions` and the bus's ledger know what may be committed; `lane`
//! accepts; `intake` decodes.

mod config;
mod error;
mod flight;
mod intake;
mod lane;
mod metrics;
mod partitions;
mod ports;
mod service;

use std::time::Duration;

use barid_bus::ensure_topics;
use barid_mailbox::Mailbox;
use barid_mesh::{DispatchPool, MeshMetrics};
use barid_runtime::{Context, Role, RunError, Stopped};

pub use config::{CompressionConfig, Config, LimitsConfig, WindowConfig};
pub use error::Error;
pub use metrics::Metrics;
pub use ports::{Handoff, Mailboxes};
pub use service::Service;

/// The role.
pub struct Purger;

impl Role for Purger {
    const NAME: &'static str = "purger";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        config.check()
    }

    async fn run(config: Config, context: Context) -> Result<Stopped, RunError> {
        if config.kafka.create_topics {
            ensure_topics(&config.kafka, Duration::from_secs(30)).await?;
        }
        let mailbox = Mailbox::open(&config.redis, &context.metrics).await?;
        let (_peers, dispatchers) = tokio::sync::watch::channel(Vec::new());
        let metrics = MeshMetrics::new(&context.metrics, "barid_purger")?;
        let pool = DispatchPool::over(dispatchers, config.mesh.clone(), metrics)?;
        let service = Service::new(config, mailbox, pool, &context)?;
        context.announce_done();
        Ok(service.run(&context).await?)
    }
}
