//! The producer: idempotent, acknowledged by all replicas, without lingering.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barid_core::Backoff;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _};
use tokio::time::{Instant, sleep};

use crate::context::Logged;
use crate::{Error, KafkaConfig};

/// Produces records. Cheap to clone; clones share one bounded queue.
#[derive(Clone)]
pub struct Producer {
    config: Arc<KafkaConfig>,
    together: Arc<RwLock<Option<FutureProducer<Logged>>>>,
    /// A client that puts each record into its own batch; created at first use.
    alone: Arc<RwLock<Option<FutureProducer<Logged>>>>,
    held: Arc<Mutex<BTreeMap<(Instant, u64), Refusal>>>,
}

/// Which records share a batch. Kafka rejects a whole batch for one of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batching {
    /// All records that are sent at the same time.
    Shared,
    /// None, so that a rejection concerns this record.
    Alone,
}

/// A record that waits for a retry.
#[derive(Debug)]
struct Refusal {
    topic: String,
    reason: String,
}

/// The records that are being retried.
#[derive(Debug, Clone)]
pub struct Held {
    /// How many.
    pub records: usize,
    /// The topic of the oldest.
    pub topic: String,
    /// Why the oldest was not delivered.
    pub reason: String,
    /// How long the oldest has waited.
    pub age: Duration,
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").field("brokers", &self.config.brokers).finish()
    }
}

/// A record to produce.
pub(crate) type Out<'a> = FutureRecord<'a, [u8], [u8]>;

impl Producer {
    /// Creates a producer. Brokers need not be available yet.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn new(config: &KafkaConfig) -> Result<Self, Error> {
        let together = Arc::new(RwLock::new(Some(create(config, Batching::Shared)?)));
        let config = Arc::new(config.clone());
        Ok(Self { config, together, alone: Arc::default(), held: Arc::default() })
    }

    /// Sends a record, and waits until all replicas have it. Waits for room if the queue is full, up to the delivery
    /// timeout.
    ///
    /// # Errors
    /// [`Error::Away`] after the delivery timeout; [`Error::TooLarge`], [`Error::Refused`] and [`Error::Rejected`] at
    /// once.
    pub async fn send(
        &self,
        topic: &str,
        key: &[u8],
        payload: Bytes,
        headers: &[(&str, &[u8])],
    ) -> Result<(), Error> {
        self.send_with_key(topic, Some(key), Some(payload), headers, Batching::Shared).await
    }

    /// As [`Self::send`], for a tombstone, after which a compacted topic has no value of the key.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn delete(&self, topic: &str, key: &[u8]) -> Result<(), Error> {
        self.send_with_key(topic, Some(key), None, &[], Batching::Shared).await
    }

    /// As [`Self::send`], but retries while Kafka is unavailable or the topic or the permission to write is missing;
    /// [`Self::held`] reports it meanwhile. A record that is rejected together with others is sent again in its own
    /// batch, which delays no other record.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Rejected`] and [`Error::Config`], which no retry can fix.
    pub(crate) async fn send_until_delivered(
        &self,
        topic: &str,
        key: Option<&[u8]>,
        payload: Bytes,
        headers: &[(&str, &[u8])],
        mut batching: Batching,
    ) -> Result<(), Error> {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 0.2)
            .expect("constants in range");
        let (mut failures, mut holding) = (0, None);
        loop {
            match self.send_with_key(topic, key, Some(payload.clone()), headers, batching).await {
                Err(Error::Rejected(_)) if batching == Batching::Shared => {
                    batching = Batching::Alone
                }
                Err(error @ (Error::Away(_) | Error::Refused(_))) => {
                    let holding = holding.get_or_insert_with(|| Holding::new(self));
                    holding.refused(topic, &error);
                    sleep(backoff.delay(failures)).await;
                    failures += 1;
                }
                done => return done,
            }
        }
    }

    /// The records that are being retried, if there are any.
    pub fn held(&self) -> Option<Held> {
        let held = self.held.lock();
        let ((since, _), Refusal { topic, reason }) = held.first_key_value()?;
        let (topic, reason) = (topic.clone(), reason.clone());
        Some(Held { records: held.len(), topic, reason, age: since.elapsed() })
    }

    /// As [`Self::send`], for a record without a key, too.
    pub(crate) async fn send_with_key(
        &self,
        topic: &str,
        key: Option<&[u8]>,
        payload: Option<Bytes>,
        headers: &[(&str, &[u8])],
        batching: Batching,
    ) -> Result<(), Error> {
        let deadline =
            Instant::now() + Duration::from_millis(u64::from(self.config.delivery_timeout_ms));
        loop {
            match self.try_send_in(batching, topic, key, payload.as_deref(), headers) {
                Ok(delivery) => {
                    let canceled = || Error::Away("the producer was closed".into());
                    let delivered = delivery.await.map_err(|_| canceled())?;
                    return match delivered {
                        Ok(_) => Ok(()),
                        Err((error, _)) => Err(self.failed(batching, error)),
                    };
                }
                Err(error) if is_queue_full(&error) && Instant::now() < deadline => {
                    sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(self.failed(batching, error)),
            }
        }
    }

    fn of(&self, batching: Batching) -> &RwLock<Option<FutureProducer<Logged>>> {
        match batching {
            Batching::Shared => &self.together,
            Batching::Alone => &self.alone,
        }
    }

    /// Queues a record. The future resolves when all replicas have it.
    pub(crate) fn try_send(
        &self,
        topic: &str,
        key: Option<&[u8]>,
        payload: &[u8],
        headers: &[(&str, &[u8])],
    ) -> Result<DeliveryFuture, KafkaError> {
        self.try_send_in(Batching::Shared, topic, key, Some(payload), headers)
    }

    fn try_send_in(
        &self,
        batching: Batching,
        topic: &str,
        key: Option<&[u8]>,
        payload: Option<&[u8]>,
        headers: &[(&str, &[u8])],
    ) -> Result<DeliveryFuture, KafkaError> {
        let owned = headers
            .iter()
            .fold(OwnedHeaders::new_with_capacity(headers.len()), |owned, (key, value)| {
                owned.insert(Header { key, value: Some(*value) })
            });
        let mut record: Out<'_> = FutureRecord::to(topic).headers(owned);
        (record.key, record.payload) = (key, payload);
        if let Some(producer) = &*self.of(batching).read() {
            return producer.send_result(record).map_err(|(error, _)| error);
        }
        let mut unmade = self.of(batching).write();
        let producer = match &mut *unmade {
            Some(producer) => producer,
            unmade => unmade.insert(create(&self.config, batching)?),
        };
        producer.send_result(record).map_err(|(error, _)| error)
    }

    /// Waits until every queued record is delivered or has failed. Returns how many are left at the deadline.
    pub async fn flush(&self, deadline: Instant) -> usize {
        loop {
            let left = [Batching::Shared, Batching::Alone].map(|batching| {
                let queued = self.of(batching).read().as_ref().map_or(0, |p| p.in_flight_count());
                usize::try_from(queued).unwrap_or(0)
            });
            let left = left.iter().sum();
            if left == 0 || Instant::now() >= deadline {
                return left;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Replaces the client after a fatal error: an idempotent producer that has lost its sequence numbers cannot be
    /// used again.
    fn failed(&self, batching: Batching, error: KafkaError) -> Error {
        let mut used = self.of(batching).write();
        if let Some((code, reason)) = used.as_ref().and_then(|used| used.client().fatal_error()) {
            tracing::warn!(%code, reason, "replaced the kafka producer");
            match create(&self.config, batching) {
                Ok(fresh) => *used = Some(fresh),
                Err(error) => tracing::error!(%error, "cannot replace the kafka producer"),
            }
        }
        error.into()
    }
}

/// Registers a record as waiting, until it is dropped.
struct Holding<'a> {
    producer: &'a Producer,
    key: (Instant, u64),
}

impl<'a> Holding<'a> {
    fn new(producer: &'a Producer) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { producer, key: (Instant::now(), NEXT.fetch_add(1, Ordering::Relaxed)) }
    }

    /// Logs only the first record that waits for a topic.
    fn refused(&self, topic: &str, error: &Error) {
        let mut held = self.producer.held.lock();
        if !held.values().any(|refusal| refusal.topic == topic) {
            tracing::warn!(%error, topic, "record not delivered, repeating it");
        }
        let refusal = Refusal { topic: topic.to_owned(), reason: error.to_string() };
        held.insert(self.key, refusal);
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.producer.held.lock().remove(&self.key);
    }
}

pub(crate) fn is_queue_full(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull)
}

fn create(config: &KafkaConfig, batching: Batching) -> Result<FutureProducer<Logged>, KafkaError> {
    let mut client = settings(config);
    if batching == Batching::Alone {
        client.set("batch.num.messages", "1");
    }
    FutureProducer::from_config_and_context(&client, Logged)
}

/// librdkafka's settings of a producer.
pub(crate) fn settings(config: &KafkaConfig) -> ClientConfig {
    let mut client = config.client();
    client
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("linger.ms", "0")
        .set("compression.type", "none")
        // The topics' own limits decide, not this client's.
        .set("message.max.bytes", "100000000")
        .set("queue.buffering.max.messages", config.producer_queue_records_max.to_string())
        .set("queue.buffering.max.kbytes", config.producer_queue_kbytes_max.to_string())
        .set("delivery.timeout.ms", config.delivery_timeout_ms.to_string());
    config.overlay(client)
}
