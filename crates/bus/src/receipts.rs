//! Receipts for the business.

use std::sync::Arc;

use barid_wire::record::{CONTENT_TYPE, Format, encode_receipt};
use barid_wire::v1::Receipt;
use prometheus::IntCounter;
use tokio::time::Instant;

use crate::producer::Batching;
use crate::{KafkaConfig, Producer};

/// Produces receipts, keyed by message id. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Receipts {
    producer: Producer,
    topic: Arc<str>,
    format: Format,
    dropped: IntCounter,
}

impl Receipts {
    /// Produces receipts through `producer`; `dropped` counts those that are not delivered.
    pub fn new(producer: Producer, config: &KafkaConfig, dropped: IntCounter) -> Self {
        let topic = Arc::from(config.topics.receipts.as_str());
        Self { producer, topic, format: config.receipts_format, dropped }
    }

    /// Queues a receipt if there is room; otherwise drops and counts it. Never waits.
    pub fn offer(&self, receipt: &Receipt) {
        let payload = encode_receipt(receipt, self.format);
        if self
            .producer
            .try_send(&self.topic, Some(receipt.id.as_bytes()), &payload, &self.headers())
            .is_err()
        {
            self.dropped.inc();
        }
    }

    /// Produces a receipt, and waits until all replicas have it, however long Kafka is unavailable. A receipt that
    /// Kafka rejects is logged and counted as dropped.
    pub async fn deliver(&self, receipt: &Receipt) {
        let payload = encode_receipt(receipt, self.format);
        let headers = self.headers();
        let key = Some(receipt.id.as_bytes());
        let (producer, topic) = (&self.producer, &self.topic);
        let sent = producer.send_until_delivered(topic, key, payload, &headers, Batching::Shared);
        if let Err(error) = sent.await {
            tracing::error!(%error, id = receipt.id, "receipt rejected by kafka");
            self.dropped.inc();
        }
    }

    /// Waits until all offered receipts are delivered. Returns how many are not at the deadline.
    pub async fn flush(&self, deadline: Instant) -> usize {
        self.producer.flush(deadline).await
    }

    fn headers(&self) -> [(&'static str, &'static [u8]); 1] {
        [(CONTENT_TYPE, self.format.content_type().as_bytes())]
    }
}
