//! Errors at the start of a delayer.

/// Why a delayer cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis refused a call, or cannot be used.
    #[error(transparent)]
    Redis(#[from] barid_mailbox::Error),
    /// A setting is invalid.
    #[error("configuration: {0}")]
    Config(String),
    /// A metric is registered already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl From<Error> for barid_runtime::RunError {
    fn from(error: Error) -> Self {
        let is_config = match &error {
            Error::Config(_) => true,
            Error::Redis(error) => error.is_config(),
            _ => false,
        };
        Self::new(is_config, error)
    }
}
