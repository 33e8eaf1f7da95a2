//! Why an access node cannot run.

use std::net::SocketAddr;

/// Ends the role.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Keys cannot be used.
    #[error(transparent)]
    Keys(#[from] crate::auth::KeyError),
    /// Redis refused, or was away at start.
    #[error(transparent)]
    Mailbox(#[from] barid_mailbox::Error),
    /// A key does not fit.
    #[error("{0}")]
    Config(String),
    /// Kafka's client cannot be made.
    #[error(transparent)]
    Bus(#[from] barid_bus::Error),
    /// A port cannot be bound.
    #[error("cannot listen on {key} {address}: {error}")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// A metric exists already.
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The node's name is invalid.
    #[error(transparent)]
    Name(#[from] barid_core::InvalidName),
}
