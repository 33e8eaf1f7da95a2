//! The access role, which serves the devices' sockets: handshakes and authentication, sessions, sync from the mailbox,
//! acknowledgements, heartbeats, draining.
//!
//! ```text
//! handshake ──▶ connection (a task per socket) ──▶ session (pure)
//!                  ▲ inbox of its handle             │ effects: frames, reads, acks
//! grpc ─ registry ─┤                                 ▼
//! wheel ───────────┘                         socket, mailbox
//! ```

mod acceptors;
mod admission;
pub mod auth;
mod clock;
pub mod config;
mod connection;
mod error;
mod fanout;
mod frames;
mod grpc;
mod handle;
mod handshake;
mod http;
mod kick;
mod labels;
mod mailboxes;
mod memory;
mod metrics;
mod names;
mod node;
mod offer;
mod peers;
mod policy;
mod proxy;
mod registry;
mod revocations;
mod service;
mod sessions;
mod shedding;
pub mod socket;
mod stream;
mod tls;
mod upstream;
mod wheel;

pub use config::Config;
pub use error::Error;
pub use handshake::accept_anybody;
pub use revocations::{Table as RevocationTable, key_hash, revokes};

use std::time::Duration;

use barid_mailbox::NodeRole;
use barid_mesh::{Credentials, Party};
use barid_runtime::{Context, Probe, Role, RunError, Stopped, bounds};

/// The role.
pub struct Access(service::Service);

impl Role for Access {
    const NAME: &'static str = "access";
    const ABOUT: &'static str = "Keeps the devices' connections: checks tokens, writes messages to devices, takes their acknowledgements.";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        let credentials = Credentials::read(&config.internal_tls, Party::Access).map(drop);
        bounds::all([config.check(), policy::Policy::check(config), credentials])
    }

    fn check_late_files(config: &Config) -> Result<(), String> {
        policy::Policy::check_late_files(config)
    }

    async fn probe(config: &Config, timeout: Duration) -> Vec<Probe> {
        let names = &config.kafka.topics;
        let used = [(config.receipts, &names.receipts), (config.revocations, &names.revocations)];
        let topics: Vec<_> =
            used.into_iter().filter(|(used, _)| *used).map(|(_, name)| name.clone()).collect();
        let kafka = async {
            match topics.is_empty() {
                true => Vec::new(),
                false => vec![barid_bus::probe(&config.kafka, topics, timeout).await],
            }
        };
        let redis = barid_mailbox::probe(&config.redis, timeout);
        let keys = auth::probe(&config.auth, timeout);
        let lease = config.lease();
        let name = lease.probe(NodeRole::Access, config.grpc_listen, &config.redis, timeout);
        let (kafka, redis, name, keys) = tokio::join!(kafka, redis, name, keys);
        // Only of a topic that exists.
        let unfit = match config.revocations && kafka.iter().all(|probe| probe.found.is_ok()) {
            true => barid_bus::probe_revocations(&config.kafka, timeout).await,
            false => None,
        };
        let (unfit, name) = (unfit.into_iter().collect(), name.into_iter().collect());
        [kafka, unfit, redis, name, keys].concat()
    }

    async fn start(config: Config, context: Context) -> Result<Option<Self>, RunError> {
        Ok(service::Service::start(config, context).await?.map(Self))
    }

    async fn work(self) -> Result<Stopped, RunError> {
        Ok(self.0.work().await)
    }
}
