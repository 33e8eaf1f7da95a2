//! The business: records for users in turn, at a fixed rate or as fast as they are shown.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use barid_core::{AppId, MessageId, UserId};
use barid_wire::record::{BodyKind, Format, Push, RecordLimits, encode_push};
use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};

use crate::audit::Audit;

/// How long the last records may take to be with Kafka.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// An idempotent producer is given its id by Kafka in the background, and tells nobody when.
const PRODUCER_ID_TIME: Duration = Duration::from_secs(1);

/// What is produced.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `host:port` of Kafka's brokers.
    pub brokers: String,
    /// Where to.
    pub topic: String,
    /// Tenant of the users.
    pub app: String,
    /// Bytes of each payload.
    pub payload_bytes: u32,
    /// How long records wait for others of their batch, milliseconds; more makes larger batches.
    pub linger_ms: u32,
}

/// When records are produced.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// So many, each when it is due.
    Scheduled(u64),
    /// As long as `time` lasts, never more than `window` beyond what was shown.
    Window { window: u64, time: Duration },
    /// So many, never more than `window` beyond what was shown, and none after `limit`.
    Counted { window: u64, total: u64, limit: Duration },
}

/// The name of a user by number.
pub fn user(number: u64) -> String {
    format!("user-{number}")
}

/// Counts what Kafka did not take.
#[derive(Debug, Default)]
struct Failures(AtomicU64);

impl ClientContext for Failures {}

impl ProducerContext for Failures {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_err() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the producer has a thread of its own")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// What a business service has: a producer that is kept.
pub struct Business {
    kafka: ThreadedProducer<Failures>,
    plan: Plan,
    app: AppId,
    text: Bytes,
}

impl Business {
    /// Connects, and waits until the first record would leave at once.
    ///
    /// # Errors
    /// The topic is not there.
    pub async fn open(plan: &Plan) -> anyhow::Result<Arc<Self>> {
        let kafka: ThreadedProducer<_> = ClientConfig::new()
            .set("bootstrap.servers", &plan.brokers)
            .set("enable.idempotence", "true")
            .set("linger.ms", plan.linger_ms.to_string())
            .set("queue.buffering.max.messages", "500000")
            .create_with_context(Failures::default())?;
        // Text of a kind that compresses like text, for who measures compression as well.
        let words =
            "your parcel 4711 has left the depot and will be with you between two and four ";
        let text: String = words.chars().cycle().take(plan.payload_bytes as usize).collect();
        let (app, text) = (AppId::new(&plan.app)?, text.into());
        let business = Arc::new(Self { kafka, plan: plan.clone(), app, text });
        let asking = Arc::clone(&business);
        let ask = move || {
            asking.kafka.client().fetch_metadata(Some(&asking.plan.topic), FLUSH_LIMIT).map(drop)
        };
        tokio::task::spawn_blocking(ask).await?.context("Kafka does not answer")?;
        tokio::time::sleep(PRODUCER_ID_TIME).await;
        Ok(business)
    }

    /// Produces on a thread of its own until everything is with Kafka; tells how many records.
    ///
    /// # Errors
    /// Kafka did not take everything.
    pub async fn produce(self: &Arc<Self>, pace: Pace, audit: &Arc<Audit>) -> anyhow::Result<u64> {
        let (business, audit) = (Arc::clone(self), Arc::clone(audit));
        let (done, outcome) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("producer".into()).spawn(move || {
            let _ = done.send(business.run(pace, &audit));
        })?;
        outcome.await.context("the producing thread is gone")?
    }

    fn run(&self, pace: Pace, audit: &Audit) -> anyhow::Result<u64> {
        pause(audit.early());
        let mut number = 0;
        while self.awaited(pace, audit, number) {
            self.send(audit, number)?;
            number += 1;
        }
        self.kafka.flush(FLUSH_LIMIT).context("Kafka did not take everything")?;
        let failed = self.kafka.context().0.swap(0, Ordering::Relaxed);
        ensure!(failed == 0, "Kafka refused {failed} of {number} records");
        Ok(number)
    }

    /// Waits until record `number` is due; `false`: it is one too many.
    fn awaited(&self, pace: Pace, audit: &Audit, number: u64) -> bool {
        match pace {
            Pace::Scheduled(total) => {
                let due = audit.due(number).unwrap_or_default();
                let early = due.saturating_sub(audit.elapsed());
                if number < total && !early.is_zero() {
                    pause(early);
                }
                number < total
            }
            Pace::Window { window, time } => {
                while audit.elapsed() < time {
                    if number < audit.settled() + window {
                        return true;
                    }
                    pause(Duration::from_micros(500));
                }
                false
            }
            Pace::Counted { window, total, limit } => {
                let in_time = || audit.elapsed() < limit;
                while number < total && number >= audit.settled() + window && in_time() {
                    pause(Duration::from_micros(500));
                }
                number < total && in_time()
            }
        }
    }

    fn send(&self, audit: &Audit, number: u64) -> anyhow::Result<()> {
        let (id, user) =
            (MessageId::new(&audit.id(number))?, UserId::new(&user(audit.user_of(number)))?);
        let push = Push::new(id, self.app.clone(), user, BodyKind::Text, self.text.clone());
        let value = encode_push(&push, Format::Protobuf, &RecordLimits::HIGHEST)?;
        let mut record = BaseRecord::to(&self.plan.topic).key(push.key()).payload(&value[..]);
        record.timestamp = audit.timestamp_ms(number).and_then(|ms| i64::try_from(ms).ok());
        while let Err((error, again)) = self.kafka.send(record) {
            let full = KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull);
            ensure!(error == full, "producing: {error}");
            pause(Duration::from_millis(1));
            record = again;
        }
        Ok(())
    }
}
