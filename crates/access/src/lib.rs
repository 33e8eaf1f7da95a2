//! The access role: it holds the devices' sockets. Handshake and authentication, sessions, sync from
//! the mailbox, acknowledgements, heartbeats, draining.
//!
//! ```text
//! handshake ──▶ connection (one task a socket) ──▶ session (pure)
//!                  ▲ inbox of its handle             │ effects: frames, reads, acks
//! grpc ─ registry ─┤                                 ▼
//! wheel ───────────┘                         socket, mailbox
//! ```

mod acceptors;
mod admission;
pub mod auth;
mod balance;
pub mod config;
mod connection;
mod error;
mod fanout;
mod frames;
mod grpc;
mod handle;
mod handshake;
mod kick;
mod memory;
mod metrics;
mod node;
mod peers;
mod proxy;
mod registry;
mod service;
pub mod session;
pub mod socket;
mod stream;
mod tls;
mod upstream;
mod wheel;

pub use config::Config;
pub use error::Error;

use barid_runtime::{Context, Role, RunError, Stopped};

/// The role.
pub struct Access;

impl Role for Access {
    const NAME: &'static str = "access";
    type Config = Config;

    fn check(config: &Config) -> Result<(), String> {
        config.check()
    }

    async fn run(config: Config, context: Context) -> Result<Stopped, RunError> {
        Ok(service::run(config, context).await?)
    }
}
