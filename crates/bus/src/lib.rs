//! Access to Kafka: the consumer, which gives partitions back only when they are finished; the ledger of offsets that
//! may be committed; followers of compacted topics; producers of receipts and dead letters; topics. It knows nothing of
//! what records contain.

mod check;
mod config;
pub mod consumer;
mod context;
mod dead;
mod embedded;
mod error;
mod ffi;
mod follower;
pub mod ledger;
mod metadata;
mod probe;
mod producer;
mod receipts;
mod stuck;
mod topics;

pub use check::check_topic;
pub use config::{GroupProtocol, KafkaConfig, Properties, Topics};
pub use dead::{DeadLetter, DeadLetters};
pub use embedded::EmbeddedKafka;
pub use error::Error;
pub use follower::{Change, Followed, Follower};
pub use ledger::{Confirmed, Ledger};
pub use metadata::{EPOCHS_MAX, Memory, Metadata, TopicSource};
pub use probe::{probe, probe_revocations};
pub use producer::{Held, Producer};
pub use receipts::Receipts;
pub use stuck::Stuck;
pub use topics::{
    Topic, describe_revocations, describe_topics, describe_topics_anew, ensure_topics,
};
