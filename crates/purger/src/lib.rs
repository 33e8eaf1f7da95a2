//! The purger reads the records that businesses produce to Kafka, refuses invalid ones, accepts the others into
//! mailboxes, hands messages of online users on to dispatchers, and then commits. It is the only role that consumes
//! from Kafka and the only one that accepts.
//!
//! - `service` is the loop, which never waits; `errands` are its requests to Kafka.
//! - `membership` joins partitions and gives them back; `repairs` reads messages again that shards have forgotten;
//!   `topics` watches for topics that are missing or were recreated, and `client_watch` for a client that reaches no
//!   broker any more; `readiness` sets the conditions of `/readyz`, for which `oldest` finds the oldest record in flight.
//! - `pipeline` moves records from the log into the lanes, within the `window`; `intake` decodes them; `skips` are the
//!   records that are left in the log for an unavailable master.
//! - `partitions`, with the bus's ledger, keeps which offsets may be committed and which are read again.
//! - `lanes` accept messages and hand them on, with one or several lanes for each Redis master; [`history`] is the
//!   positions that a lane's shards have confirmed; `flight` is a record on its way; `ports` are the interfaces to Redis
//!   and the dispatchers.

mod client_watch;
mod config;
mod errands;
mod error;
mod flight;
pub mod history;
mod intake;
mod lanes;
mod membership;
mod metrics;
mod oldest;
mod partitions;
mod pipeline;
mod ports;
mod readiness;
mod repairs;
mod service;
mod skips;
mod topics;
mod window;

use std::time::Duration;

use barid_bus::ensure_topics;
use barid_mailbox::{Mailbox, NodeRole, NodeTable};
use barid_mesh::{Credentials, DispatchPool, MeshMetrics, Party};
use barid_runtime::{Condition, Context, Probe, Role, RunError, Stopped, bounds};

pub use config::{CompressionConfig, Config, LimitsConfig, WindowConfig};
pub use error::Error;
pub use metrics::Metrics;
pub use ports::{Handoff, Mailboxes};
pub use service::Service;

/// The purger's [`Role`].
pub struct Purger(Service<Mailbox, DispatchPool>);

impl Role for Purger {
    const NAME: &'static str = "purger";
    const ABOUT: &'static str = "Reads messages from Kafka, puts them into the mailboxes in Redis, and hands them to dispatchers.";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        let credentials = Credentials::read(&config.internal_tls, Party::Purger).map(drop);
        bounds::all([config.check(), credentials])
    }

    async fn probe(config: &Config, timeout: Duration) -> Vec<Probe> {
        let kafka = barid_bus::probe(&config.kafka, config.kafka.topics.of_purgers(), timeout);
        let (kafka, redis) = tokio::join!(kafka, barid_mailbox::probe(&config.redis, timeout));
        [vec![kafka], redis].concat()
    }

    async fn start(config: Config, context: Context) -> Result<Option<Self>, RunError> {
        let redis = context.health.condition("redis");
        let kafka = context.health.condition("kafka");
        let Some(mailbox) = prepare(&config, &context, &kafka, &redis).await? else {
            return Ok(None);
        };
        let refresh = Duration::from_millis(config.nodes_refresh_ms);
        let dispatchers = NodeTable::watch(&mailbox, NodeRole::Dispatcher, refresh);
        let metrics = MeshMetrics::new(&context.metrics, "barid_purger").map_err(Error::from)?;
        let credentials =
            Credentials::read(&config.internal_tls, Party::Purger).map_err(Error::Config)?;
        let fresh = credentials.keep_fresh(&context).map_err(Error::from)?;
        let pool = DispatchPool::new(dispatchers, credentials, config.mesh.clone(), metrics);
        let pool = pool.map_err(Error::Config)?;
        let service = Service::start(config, mailbox, pool, context.clone())?;
        service.spawner().spawn(Credentials::TASK, fresh);
        context.announce_done();
        Ok(Some(Self(service)))
    }

    async fn work(self) -> Result<Stopped, RunError> {
        Ok(self.0.work().await?)
    }
}

/// Creates topics if configured, and opens the mailboxes. Waits while Kafka or Redis is unavailable. `None`: draining
/// began meanwhile.
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
