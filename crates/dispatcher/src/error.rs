//! Errors at the start of a dispatcher.

/// Why a dispatcher cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis refused a call, or cannot be used.
    #[error(transparent)]
    Redis(#[from] barid_mailbox::Error),
    /// The node's name is invalid.
    #[error(transparent)]
    Name(#[from] barid_core::InvalidName),
    /// A setting is invalid.
    #[error("configuration: {0}")]
    Config(String),
    /// A metric is registered already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The listener cannot be bound.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// The error.
        error: std::io::Error,
    },
}

impl From<Error> for barid_runtime::RunError {
    fn from(error: Error) -> Self {
        let is_config = match &error {
            Error::Config(_) | Error::Name(_) => true,
            Error::Redis(error) => error.is_config(),
            _ => false,
        };
        Self::new(is_config, error)
    }
}
