//! Dead letters: refused records, unchanged, with the reason in headers.

use std::sync::Arc;

use bytes::Bytes;
use prometheus::IntCounter;

use crate::consumer::Record;
use crate::producer::Batching;
use crate::{Error, KafkaConfig, Producer};

/// Headers that a dead letter adds to those of its record; the last one only if the record was truncated.
const HEADERS: [&str; 7] = [
    "barid-code",
    "barid-reason",
    "barid-topic",
    "barid-partition",
    "barid-offset",
    "barid-timestamp",
    "barid-truncated",
];

/// A refused record.
#[derive(Debug, Clone)]
pub struct DeadLetter<'a> {
    /// The original record.
    pub record: &'a Record,
    /// The code of the refusal.
    pub code: &'a str,
    /// The reason, for people.
    pub reason: &'a str,
}

/// Produces dead letters. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    producer: Producer,
    topic: Arc<str>,
    /// Size of the producer's queue, bytes. A larger letter would never fit.
    queue_bytes: usize,
    dropped: IntCounter,
}

/// Sizes to which a letter that is too large for its topic is truncated, step by step: first below Kafka's default
/// limit of a megabyte, at last to the headers that describe the record.
const CUTS: [usize; 3] = [900_000, 64 * 1024, 0];

/// How much of a record its letter contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// All of it.
    Whole,
    /// Key and value, each truncated to this many bytes; with 0, the original headers are dropped as well.
    To(usize),
    /// The key, and the headers that describe the record.
    Headers,
}

impl DeadLetters {
    /// Produces dead letters through `producer`; `dropped` counts those that Kafka refuses for good.
    pub fn new(producer: Producer, config: &KafkaConfig, dropped: IntCounter) -> Self {
        let queue_bytes = config.producer_queue_kbytes_max as usize * 1024;
        let topic = Arc::from(config.topics.dead.as_str());
        Self { producer, topic, queue_bytes, dropped }
    }

    /// Produces a letter, and waits until all replicas have it, however long that takes. It has the original key,
    /// value and headers, plus `barid-code`, `barid-reason` and where the record came from. A letter that is too
    /// large for the topic is truncated, and `barid-truncated` has the original size. A letter that the topic refuses
    /// for another reason (a schema, a policy, a missing key) is reduced to its headers. A letter that is refused
    /// even then is logged and counted, and its partition continues (P6).
    pub async fn write(&self, letter: &DeadLetter<'_>) {
        let mut refused = match letter.record.bytes() < self.queue_bytes {
            true => self.send(letter, Cut::Whole, Batching::Shared).await,
            false => Err(Error::TooLarge),
        };
        for bytes in CUTS {
            let (cut, batching) = match refused {
                Ok(()) => return,
                // Truncating does not help against a refusal for another reason than size.
                Err(Error::Rejected(_)) if bytes > 0 => continue,
                // It was in a batch of its own already, and would get other records rejected.
                Err(Error::Rejected(_)) => (Cut::Headers, Batching::Alone),
                Err(_) => (Cut::To(bytes), Batching::Shared),
            };
            refused = self.send(letter, cut, batching).await;
        }
        let Err(error) = refused else { return };
        self.dropped.inc();
        tracing::error!(
            %error,
            topic = &*letter.record.topic,
            partition = letter.record.partition,
            offset = letter.record.offset,
            code = letter.code,
            "dead letter cannot be produced"
        );
    }

    async fn send(
        &self,
        letter: &DeadLetter<'_>,
        cut: Cut,
        batching: Batching,
    ) -> Result<(), Error> {
        let record = letter.record;
        let numbers = [
            record.partition.to_string(),
            record.offset.to_string(),
            record.timestamp_ms.unwrap_or(-1).to_string(),
            record.value.len().to_string(),
        ];
        let values: [&[u8]; HEADERS.len()] = [
            letter.code.as_bytes(),
            letter.reason.as_bytes(),
            record.topic.as_bytes(),
            numbers[0].as_bytes(),
            numbers[1].as_bytes(),
            numbers[2].as_bytes(),
            numbers[3].as_bytes(),
        ];
        let added = if cut == Cut::Whole { HEADERS.len() - 1 } else { HEADERS.len() };
        let mut headers: Vec<(&str, &[u8])> = HEADERS.into_iter().zip(values).take(added).collect();
        let (mut key, mut value) = (record.key.clone(), record.value.clone());
        match cut {
            Cut::Whole => {}
            Cut::To(max) => {
                (key, value) = (key.map(|key| truncate(&key, max)), truncate(&value, max));
            }
            Cut::Headers => value = Bytes::new(),
        }
        // The original headers may be what makes the letter too large.
        if !matches!(cut, Cut::To(0) | Cut::Headers) {
            // A dead letter that is produced again still has the headers of its earlier refusal. They are dropped,
            // because readers may use the first or the last header of a name.
            let original = record.headers.iter().filter(|(name, _)| !HEADERS.contains(&&**name));
            headers.extend(original.map(|(name, value)| (name.as_str(), &**value)));
        }
        let key = key.as_deref();
        self.producer.send_until_delivered(&self.topic, key, value, &headers, batching).await
    }
}

/// A payload, truncated to `max` bytes.
fn truncate(payload: &Bytes, max: usize) -> Bytes {
    payload.slice(..payload.len().min(max))
}
