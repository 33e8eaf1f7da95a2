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

impl From<Error> for barid_runtime::RunError {
    fn from(error: Error) -> Self {
        let is_config = match &error {
            Error::Keys(_) | Error::Config(_) | Error::Name(_) => true,
            Error::Bus(barid_bus::Error::Config(_)) => true,
            Error::Mailbox(error) => error.is_config(),
            _ => false,
        };
        Self::new(is_config, error)
    }
}
