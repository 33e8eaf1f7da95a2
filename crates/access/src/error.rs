//! Errors that end an access node.

use std::net::SocketAddr;

/// Why an access node cannot start or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configured token keys cannot be used.
    #[error(transparent)]
    Keys(#[from] crate::auth::KeyError),
    /// Redis refused a call.
    #[error(transparent)]
    Mailbox(#[from] barid_mailbox::Error),
    /// A configured value is invalid.
    #[error("{0}")]
    Config(String),
    /// The Kafka client cannot be created.
    #[error(transparent)]
    Bus(#[from] barid_bus::Error),
    /// A listener cannot be bound.
    #[error("cannot listen on {key} {address}: {error}")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// A metric is registered already.
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The node's name is invalid.
    #[error(transparent)]
    Name(#[from] barid_core::InvalidName),
}
