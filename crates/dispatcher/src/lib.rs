//! The dispatcher receives batches from purgers and delayers, finds the access nodes of the recipients' sessions, and
//! streams the items to those nodes. Its state can be rebuilt, and it may drop any item: mailbox, retry timer and
//! sync keep the promises.

mod config;
pub mod deliver;
mod error;
pub mod grpc;
pub mod metrics;
pub mod nodes;
pub mod reap;
mod redis_routes;
pub mod resolve;
mod service;

pub use config::{Config, L1Config, ReapConfig};
pub use error::Error;
pub use redis_routes::{RedisRoutes, follow_tracking};
pub use service::Service;

use std::time::Duration;

use barid_mailbox::NodeRole;
use barid_mesh::{Credentials, Party};
use barid_runtime::{Context, Probe, Role, RunError, Stopped, bounds};

/// The dispatcher's [`Role`](barid_runtime::Role).
pub struct Dispatcher(Service);

impl Role for Dispatcher {
    const NAME: &'static str = "dispatcher";
    const ABOUT: &'static str = "Finds the access node of a user's devices, and sends it what purgers and delayers hand over.";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        let credentials = Credentials::read(&config.internal_tls, Party::Dispatcher).map(drop);
        bounds::all([config.check(), credentials])
    }

    async fn probe(config: &Config, timeout: Duration) -> Vec<Probe> {
        let lease = config.lease();
        let name = lease.probe(NodeRole::Dispatcher, config.listen, &config.redis, timeout);
        let (mut probes, name) = tokio::join!(barid_mailbox::probe(&config.redis, timeout), name);
        probes.extend(name);
        probes
    }

    async fn start(config: Config, context: Context) -> Result<Option<Self>, RunError> {
        Ok(Service::start(config, context).await?.map(Self))
    }

    async fn work(self) -> Result<Stopped, RunError> {
        Ok(self.0.work().await)
    }
}
