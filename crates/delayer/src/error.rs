//! Why a delayer does not start.

/// It could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis refused, or is not one that may be used.
    #[error(transparent)]
    Redis(#[from] barid_mailbox::Error),
    /// A setting makes no sense.
    #[error("configuration: {0}")]
    Config(String),
    /// Metrics are registered already: two delayers in one registry.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}
