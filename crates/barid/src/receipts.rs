//! Reads `barid.receipts`, for the receipts of messages that were just sent.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_wire::record::decode_receipt;
use barid_wire::v1::Receipt;
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::{Message as _, Offset, TopicPartitionList};

use crate::values;

/// Reads the topic from its end at the time of opening. Joins no group and commits nothing.
pub struct Receipts {
    consumer: StreamConsumer,
}

impl Receipts {
    /// Opens the topic, within `limit`; `properties` are further settings of librdkafka.
    pub async fn open(
        brokers: &[String],
        topic: &str,
        properties: Vec<(String, String)>,
        limit: Duration,
    ) -> anyhow::Result<Self> {
        let (brokers, topic) = (brokers.join(","), topic.to_owned());
        let opened = tokio::task::spawn_blocking(move || {
            open(&brokers, &topic, properties, limit)
                .with_context(|| format!("cannot read topic {topic} of Kafka at {brokers}"))
        });
        opened.await?
    }

    /// The next receipt. Invalid records are ignored.
    pub async fn next(&self) -> anyhow::Result<Receipt> {
        loop {
            let record = self.consumer.recv().await.context("cannot read receipts")?;
            if let Some(payload) = record.payload()
                && let Ok(receipt) = decode_receipt(payload)
            {
                return Ok(receipt);
            }
        }
    }
}

fn open(
    brokers: &str,
    topic: &str,
    properties: Vec<(String, String)>,
    limit: Duration,
) -> anyhow::Result<Receipts> {
    let deadline = Instant::now() + limit;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut client = values::reader_config(brokers);
    client.set("fetch.wait.max.ms", "5").set("fetch.queue.backoff.ms", "5");
    let consumer: StreamConsumer = values::kafka_client(client, &properties)?;
    let metadata = consumer.fetch_metadata(Some(topic), left())?;
    let partitions = metadata.topics().first().map(|t| t.partitions()).unwrap_or_default();
    if partitions.is_empty() {
        bail!("the topic does not exist");
    }
    let mut ends = TopicPartitionList::new();
    for partition in partitions {
        let (_, end) = consumer.fetch_watermarks(topic, partition.id(), left())?;
        ends.add_partition_offset(topic, partition.id(), Offset::Offset(end))?;
    }
    consumer.assign(&ends)?;
    Ok(Receipts { consumer })
}
