//! Why a purger cannot start, or not go on.

/// A purger's end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration makes no sense.
    #[error("configuration: {0}")]
    Config(String),
    /// Kafka.
    #[error(transparent)]
    Kafka(#[from] barid_bus::Error),
    /// Redis.
    #[error(transparent)]
    Redis(#[from] barid_mailbox::Error),
    /// Metrics are registered twice.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// No broker answers the consumer's client, and a new client is answered.
    #[error("no broker has answered this process for {} s, and a new client is answered: it must be started again", .0.as_secs())]
    BrokenClient(std::time::Duration),
    /// The consumer cannot go on: librdkafka says so.
    #[error("the consumer cannot go on: {0}")]
    Fatal(String),
}
