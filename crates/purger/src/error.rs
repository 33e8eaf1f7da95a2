//! Errors that end a purger.

/// Why a purger cannot start or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is invalid.
    #[error("configuration: {0}")]
    Config(String),
    /// Kafka refused a request.
    #[error(transparent)]
    Kafka(#[from] barid_bus::Error),
    /// Redis refused a call.
    #[error(transparent)]
    Redis(#[from] barid_mailbox::Error),
    /// A metric is registered already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// No broker answers the consumer's client, but one answers a new client.
    #[error("no broker has answered this process for {} s, but one answers a new client: restart the process", .0.as_secs())]
    BrokenClient(std::time::Duration),
    /// librdkafka reported a fatal error of the consumer.
    #[error("fatal error of the kafka consumer: {0}")]
    Fatal(String),
}

impl From<Error> for barid_runtime::RunError {
    fn from(error: Error) -> Self {
        let is_config = match &error {
            Error::Config(_) | Error::Kafka(barid_bus::Error::Config(_)) => true,
            Error::Redis(error) => error.is_config(),
            _ => false,
        };
        Self::new(is_config, error)
    }
}
