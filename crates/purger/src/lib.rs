//! The purger: takes what businesses produce to Kafka, refuses what is wrong, accepts the rest into
//! mailboxes, hands on what is for users who are online, and only then commits. The only role that
//! consumes Kafka, and the only one that accepts.
//!
//! `service` is the loop; `partitions` and the bus's ledger know what may be committed and what is
//! read again; `errands` waits for Kafka; `lanes` accept; `intake` decodes.

mod config;
mod errands;
mod error;
mod flight;
pub mod history;
mod intake;
mod lanes;
mod metrics;
mod oldest;
mod partitions;
mod ports;
mod service;
mod skips;

use std::time::Duration;

use barid_bus::ensure_topics;
use barid_mailbox::{Mailbox, NodeRole, NodeTable};
use barid_mesh::{DispatchPool, MeshMetrics};
use barid_runtime::{Condition, Context, Role, RunError, Stopped};

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
        let redis = context.health.condition("redis");
        let kafka = context.health.condition("kafka");
        let Some(mailbox) = prepare(&config, &context, &kafka, &redis).await? else {
            return Ok(Stopped::Clean);
        };
        let refresh = Duration::from_millis(config.nodes_refresh_ms);
        let dispatchers = NodeTable::watch(&mailbox, NodeRole::Dispatcher, refresh);
        let metrics = MeshMetrics::new(&context.metrics, "barid_purger")?;
        let pool = DispatchPool::new(dispatchers, config.mesh.clone(), metrics)?;
        let service = Service::new(config, mailbox, pool, &context)?;
        context.announce_done();
        Ok(service.run(&context).await?)
    }
}

/// Creates topics if configured, and opens the mailboxes; waits while Kafka or Redis is away. `None`: it was
/// told to drain meanwhile.
async fn prepare(
    config: &Config,
    context: &Context,
    kafka: &Condition,
    redis: &Condition,
) -> Result<Option<Mailbox>, Error> {
    if config.kafka.create_topics {
        let create = || ensure_topics(&config.kafka, Duration::from_secs(10));
        if context.until_there(kafka, barid_bus::Error::is_away, create).await?.is_none() {
            return Ok(None);
        }
    }
    let open = || Mailbox::open(&config.redis, &context.metrics);
    Ok(context.until_there(redis, barid_mailbox::Error::is_away, open).await?)
}
