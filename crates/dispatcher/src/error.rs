//! Why a dispatcher does not start.

/// It could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis refused, or is not one that may be used.
    #[error(transparent)]
    Redis(#[from] barid_mailbox::Error),
    /// The node's name is invalid.
    #[error(transparent)]
    Name(#[from] barid_core::InvalidName),
    /// A setting makes no sense.
    #[error("configuration: {0}")]
    Config(String),
    /// Metrics are registered already: two dispatchers in one registry.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        error: std::io::Error,
    },
}
