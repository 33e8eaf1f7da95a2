//! Dead letters: what was refused, as it came, with the reason beside it.

use std::sync::Arc;

use bytes::Bytes;

use crate::consumer::Record;
use crate::receipts::{truncate, until_delivered};
use crate::{Error, KafkaConfig, Producer};

/// A refused record.
#[derive(Debug, Clone)]
pub struct DeadLetter<'a> {
    /// As it was taken.
    pub record: &'a Record,
    /// The stable word.
    pub code: &'a str,
    /// For people.
    pub reason: &'a str,
}

/// Produces dead letters. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    producer: Producer,
    topic: Arc<str>,
    /// What the producer's queue can hold, bytes: more would wait for room for ever.
    queue_bytes: usize,
}

/// What is left of a letter that its topic does not take, step by step: first below Kafka's default
/// limit of a megabyte, at last only the headers that say what it was.
const CUTS: [usize; 3] = [900_000, 64 * 1024, 0];

impl DeadLetters {
    /// Dead letters through `producer`.
    pub fn new(producer: Producer, config: &KafkaConfig) -> Self {
        let queue_bytes = config.producer_queue_kbytes_max as usize * 1024;
        Self { producer, topic: Arc::from(config.topics.dead.as_str()), queue_bytes }
    }

    /// Produces a letter and waits until all replicas have it, for as long as that takes: original
    /// key, bytes and headers, plus `barid-code`, `barid-reason` and where it came from. One that
    /// the topic does not take is cut, and `barid-truncated` says from how many bytes.
    pub async fn write(&self, letter: &DeadLetter<'_>) {
        if letter.record.bytes() < self.queue_bytes && self.send(letter, None).await.is_ok() {
            return;
        }
        for cut in CUTS {
            if self.send(letter, Some(cut)).await.is_ok() {
                return;
            }
        }
        // The partition goes on (P6); what it was stands in the log.
        tracing::error!(
            topic = &*letter.record.topic,
            partition = letter.record.partition,
            offset = letter.record.offset,
            code = letter.code,
            "dead letter cannot be produced"
        );
    }

    async fn send(&self, letter: &DeadLetter<'_>, cut: Option<usize>) -> Result<(), Error> {
        let record = letter.record;
        let numbers = [
            record.partition.to_string(),
            record.offset.to_string(),
            record.timestamp_ms.unwrap_or(-1).to_string(),
            record.value.len().to_string(),
        ];
        let mut headers: Vec<(&str, &[u8])> = vec![
            ("barid-code", letter.code.as_bytes()),
            ("barid-reason", letter.reason.as_bytes()),
            ("barid-topic", record.topic.as_bytes()),
            ("barid-partition", numbers[0].as_bytes()),
            ("barid-offset", numbers[1].as_bytes()),
            ("barid-timestamp", numbers[2].as_bytes()),
        ];
        let (mut key, mut value) = (record.key.clone(), record.value.clone());
        if let Some(max) = cut {
            headers.push(("barid-truncated", numbers[3].as_bytes()));
            (key, value) = (key.map(|key| truncate(&key, max)), truncate(&value, max));
        }
        // A letter is cut to nothing because its headers are too large, or with them.
        if cut != Some(0) {
            let original = record.headers.iter();
            headers
                .extend(original.map(|(name, value): &(String, Bytes)| (name.as_str(), &**value)));
        }
        let send =
            || self.producer.send_as_it_came(&self.topic, key.as_deref(), value.clone(), &headers);
        until_delivered(send).await
    }
}
