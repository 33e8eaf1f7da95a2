//! The business: produces records for users in turn, at a fixed rate or as fast as they are delivered.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use barid_core::{AppId, Audience, MessageId, UserId};
use barid_wire::record::{BodyKind, Format, Push, Recipients, RecordLimits, encode_push};
use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};

use crate::audit::Audit;

/// How long Kafka may take to accept the last records.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// An idempotent producer gets its id from Kafka in the background, and does not report when.
const PRODUCER_ID_TIME: Duration = Duration::from_secs(1);

/// Settings of the producer and of its messages.
#[derive(Debug, Clone)]
pub struct Plan {
    pub brokers: String,
    pub topic: String,
    pub app: String,
    pub payload_bytes: u32,
    /// How long the producer waits to fill a batch, ms.
    pub linger_ms: u32,
}

/// When records are produced.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// This many records, each when it is due.
    Scheduled(u64),
    /// For `time`, with at most `window` undelivered records.
    Window { window: u64, time: Duration },
    /// `total` records, with at most `window` undelivered ones, and none after `limit`.
    Counted { window: u64, total: u64, limit: Duration },
}

/// A user's id by number.
pub fn user(number: u64) -> String {
    format!("user-{number}")
}

/// The number of records that Kafka refused.
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

#[expect(clippy::disallowed_methods, reason = "the producer runs in its own thread")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// A business service: one long-lived producer.
pub struct Business {
    kafka: ThreadedProducer<Failures>,
    plan: Plan,
    app: AppId,
    text: Bytes,
}

impl Business {
    /// Connects, and waits until the first record would be sent without delay. Fails if the topic does not
    /// exist.
    pub async fn open(plan: &Plan) -> anyhow::Result<Arc<Self>> {
        let kafka: ThreadedProducer<_> = ClientConfig::new()
            .set("bootstrap.servers", &plan.brokers)
            .set("enable.idempotence", "true")
            .set("linger.ms", plan.linger_ms.to_string())
            .set("queue.buffering.max.messages", "500000")
            .create_with_context(Failures::default())?;
        // Natural text, so that compression has a realistic effect.
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

    /// Produces in a separate thread until Kafka has accepted everything. Returns the number of records.
    pub async fn produce(self: &Arc<Self>, pace: Pace, audit: &Arc<Audit>) -> anyhow::Result<u64> {
        let (business, audit) = (Arc::clone(self), Arc::clone(audit));
        let (done, outcome) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("producer".into()).spawn(move || {
            let _ = done.send(business.run(pace, &audit));
        })?;
        outcome.await.context("the producing thread has ended")?
    }

    /// Produces messages for everyone of the app, whose numbers make their ids, until Kafka has accepted them.
    pub async fn broadcast(self: &Arc<Self>, numbers: Range<u64>) -> anyhow::Result<()> {
        let business = Arc::clone(self);
        let send = move || {
            let mut sent = numbers;
            sent.try_for_each(|number| {
                business.send_to(Audience::Everyone, &format!("everyone-{number}"), None)
            })?;
            business.flush()
        };
        tokio::task::spawn_blocking(send).await?
    }

    fn run(&self, pace: Pace, audit: &Audit) -> anyhow::Result<u64> {
        pause(audit.wait());
        let mut number = 0;
        while self.wait_for(pace, audit, number) {
            self.send(audit, number)?;
            number += 1;
        }
        self.flush()?;
        Ok(number)
    }

    /// Waits until Kafka has accepted everything.
    fn flush(&self) -> anyhow::Result<()> {
        self.kafka.flush(FLUSH_LIMIT).context("Kafka did not accept everything in time")?;
        let failed = self.kafka.context().0.swap(0, Ordering::Relaxed);
        ensure!(failed == 0, "Kafka refused {failed} records");
        Ok(())
    }

    /// Waits until record `number` is due; returns false if there is no such record.
    fn wait_for(&self, pace: Pace, audit: &Audit, number: u64) -> bool {
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
        let user = UserId::new(&user(audit.user_of(number)))?;
        let due_ms = audit.timestamp_ms(number).and_then(|ms| i64::try_from(ms).ok());
        self.send_to(user, &audit.id(number), due_ms)
    }

    fn send_to(
        &self,
        to: impl Into<Recipients>,
        id: &str,
        timestamp_ms: Option<i64>,
    ) -> anyhow::Result<()> {
        let (id, app, text) = (MessageId::new(id)?, self.app.clone(), self.text.clone());
        let push = Push::new(id, app, to, BodyKind::Text, text);
        let value = encode_push(&push, Format::Protobuf, &RecordLimits::HIGHEST)?;
        let mut record = BaseRecord::to(&self.plan.topic).key(push.key()).payload(&value[..]);
        record.timestamp = timestamp_ms;
        while let Err((error, again)) = self.kafka.send(record) {
            let full = KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull);
            ensure!(error == full, "producing: {error}");
            pause(Duration::from_millis(1));
            record = again;
        }
        Ok(())
    }
}
