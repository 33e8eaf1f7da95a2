//! Errors of Kafka.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// Why a request to Kafka failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A setting is invalid.
    #[error("kafka configuration: {0}")]
    Config(String),
    /// No broker, or no leader of the partition, answered in time. A retry may succeed.
    #[error("kafka is away: {0}")]
    Away(String),
    /// The record is larger than its topic, or this client, accepts.
    #[error("the record is larger than its topic accepts")]
    TooLarge,
    /// The broker refused, and an operator can fix it: a permission or a topic is missing.
    #[error("kafka refused: {0}")]
    Refused(String),
    /// The topic will never accept this record.
    #[error("the topic does not accept the record: {0}")]
    Rejected(String),
}

impl Error {
    /// Whether waiting may help: a broker may become available.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Away(_))
    }
}

impl From<KafkaError> for Error {
    fn from(error: KafkaError) -> Self {
        use RDKafkaErrorCode as Code;
        match (&error, error.rdkafka_error_code()) {
            (KafkaError::ClientConfig(..) | KafkaError::ClientCreation(_), _) => {
                Self::Config(error.to_string())
            }
            (
                _,
                Some(
                    Code::MessageSizeTooLarge
                    | Code::InvalidMessageSize
                    | Code::MessageBatchTooLarge,
                ),
            ) => Self::TooLarge,
            (
                _,
                Some(
                    Code::InvalidRecord | Code::PolicyViolation | Code::UnsupportedForMessageFormat,
                ),
            ) => Self::Rejected(error.to_string()),
            (
                _,
                Some(
                    Code::UnknownTopicOrPartition
                    | Code::UnknownTopic
                    | Code::UnknownPartition
                    | Code::TopicAuthorizationFailed
                    | Code::GroupAuthorizationFailed
                    | Code::ClusterAuthorizationFailed
                    | Code::Authentication
                    | Code::InvalidTopic,
                ),
            ) => Self::Refused(error.to_string()),
            _ => Self::Away(error.to_string()),
        }
    }
}
