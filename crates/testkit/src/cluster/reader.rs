//! Reads a topic that Barid writes to.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::message::{BorrowedMessage, Headers as _};
use rdkafka::{ClientConfig, Message as _};
use serde_json::Value as Json;

use crate::kafka::unique;

/// A record of a topic.
#[derive(Debug, Clone)]
pub struct Record {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The headers, as text.
    pub headers: BTreeMap<String, String>,
}

impl Record {
    /// The value as JSON.
    ///
    /// # Errors
    /// Returns an error if the value is not JSON.
    pub fn json(&self) -> Result<Json> {
        Ok(serde_json::from_slice(&self.value)?)
    }
}

/// Reads a topic from its beginning.
pub struct Reader {
    consumer: StreamConsumer,
}

impl Reader {
    pub(super) fn new(mut client: ClientConfig, topic: &str) -> Result<Self> {
        client.set("group.id", unique("reader")).set("auto.offset.reset", "earliest");
        let consumer: StreamConsumer = client.create()?;
        consumer.subscribe(&[topic])?;
        Ok(Self { consumer })
    }

    /// The next record.
    ///
    /// # Errors
    /// Returns an error if the topic has no further record within `limit`.
    pub async fn next(&self, limit: Duration) -> Result<Record> {
        let received = tokio::time::timeout(limit, self.consumer.recv()).await;
        let message = received.with_context(|| format!("no record within {limit:?}"))??;
        Ok(record(&message))
    }
}

fn record(message: &BorrowedMessage<'_>) -> Record {
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into();
    let headers = message.headers().map(|headers| {
        headers.iter().map(|header| (header.key.to_owned(), text(header.value))).collect()
    });
    Record {
        key: text(message.key()),
        value: message.payload().unwrap_or_default().to_vec(),
        headers: headers.unwrap_or_default(),
    }
}
