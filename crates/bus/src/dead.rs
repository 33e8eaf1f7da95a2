//! Dead letters: what was refused, as it came, with the reason beside it.

use std::sync::Arc;

use bytes::Bytes;
use prometheus::IntCounter;

use crate::consumer::Record;
use crate::producer::Company;
use crate::{Error, KafkaConfig, Producer};

/// Headers that a dead letter adds to those of its record; the last one only where the record was cut.
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
    /// Size of the producer's queue, bytes. A larger letter would wait for room for ever.
    queue_bytes: usize,
    dropped: IntCounter,
}

/// Bytes to which a letter that is too large for its topic is cut, step by step: first below Kafka's
/// default limit of a megabyte, at last to the headers that describe the record.
const CUTS: [usize; 3] = [900_000, 64 * 1024, 0];

/// How much of a record goes into its letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// All of it.
    Whole,
    /// Key and value, each cut to so many bytes; with 0 bytes, the original headers are dropped, too.
    To(usize),
    /// The key, and the headers that say what it was.
    Headers,
}

impl DeadLetters {
    /// Dead letters through `producer`; `dropped` counts those that their topic never takes.
    pub fn new(producer: Producer, config: &KafkaConfig, dropped: IntCounter) -> Self {
        let queue_bytes = config.producer_queue_kbytes_max as usize * 1024;
        let topic = Arc::from(config.topics.dead.as_str());
        Self { producer, topic, queue_bytes, dropped }
    }

    /// Produces a letter and waits until all replicas have it, for as long as that takes: original
    /// key, bytes and headers, plus `barid-code`, `barid-reason` and where it came from. One that
    /// is too large for the topic is cut, and `barid-truncated` says from how many bytes; one that the
    /// topic refuses for another reason (a schema, a policy, no key where one is asked for) is cut to
    /// its headers. What is refused even so is logged and counted, and its partition goes on (P6).
    pub async fn write(&self, letter: &DeadLetter<'_>) {
        let mut refused = match letter.record.bytes() < self.queue_bytes {
            true => self.send(letter, Cut::Whole, Company::Any).await,
            false => Err(Error::TooLarge),
        };
        for bytes in CUTS {
            let (cut, company) = match refused {
                Ok(()) => return,
                // Cutting does not help where the topic refuses the record for another reason than size.
                Err(Error::Rejected(_)) if bytes > 0 => continue,
                // It was alone already, and would have others rejected with it.
                Err(Error::Rejected(_)) => (Cut::Headers, Company::Alone),
                Err(_) => (Cut::To(bytes), Company::Any),
            };
            refused = self.send(letter, cut, company).await;
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

    async fn send(&self, letter: &DeadLetter<'_>, cut: Cut, company: Company) -> Result<(), Error> {
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
            // A dead letter that is produced again still has the headers of its former refusal. They are
            // dropped: some readers take the first header of a name, some the last.
            let original = record.headers.iter().filter(|(name, _)| !HEADERS.contains(&&**name));
            headers.extend(original.map(|(name, value)| (name.as_str(), &**value)));
        }
        let key = key.as_deref();
        self.producer.send_until_delivered(&self.topic, key, value, &headers, company).await
    }
}

/// A payload cut to `max` bytes.
fn truncate(payload: &Bytes, max: usize) -> Bytes {
    payload.slice(..payload.len().min(max))
}
