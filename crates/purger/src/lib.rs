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

/// Creates topics if it shall, and opens the mailboxes; waits while Kafka or Redis is away. `None`:
/// it was told to drain meanwhile.
async fn prepare(
    config: &Config,
    context: &Context,
    kafka: &Condition,
    redis: &Condition,
) -> Result<Option<Mailbox>, Error> {
    let mut topics = config.kafka.create_topics;
    loop {
        if topics {
            match ensure_topics(&config.kafka, Duration::from_secs(10)).await {
                Ok(()) => topics = false,
                Err(error @ barid_bus::Error::Away(_)) => kafka.failing(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        } else {
            match Mailbox::open(&config.redis, &context.metrics).await {
                Ok(mailbox) => return Ok(Some(mailbox)),
                Err(error @ barid_mailbox::Error::Away(_)) => redis.failing(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            () = context.shutdown.draining() => return Ok(None),
        }
    }
}
