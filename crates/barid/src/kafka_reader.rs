//! Reads topics as a bystander: joins no group and commits nothing.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rdkafka::consumer::{BaseConsumer, Consumer, StreamConsumer};
use rdkafka::error::KafkaError;
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message as _, Offset, TopicPartitionList};

use tokio::time::sleep;

use crate::output::Coded;
use crate::values::{KafkaArgs, kafka_client};

/// Wait after an error that passes.
const RETRY: Duration = Duration::from_millis(100);

/// The records that come after the time of opening.
pub struct Tail {
    consumer: StreamConsumer,
}

impl Tail {
    /// Opens the topic, within `limit`. With `eager`, records arrive within milliseconds, for five times as many
    /// requests: for a short wait.
    pub async fn open(
        kafka: &KafkaArgs,
        topic: &str,
        limit: Duration,
        eager: bool,
    ) -> anyhow::Result<Self> {
        let (args, brokers, name) = (kafka.clone(), kafka.brokers()?.join(","), topic.to_owned());
        let opened = tokio::task::spawn_blocking(move || {
            let mut client = settings(&brokers);
            if eager {
                client.set("fetch.wait.max.ms", "5").set("fetch.queue.backoff.ms", "5");
            }
            let consumer: StreamConsumer = kafka_client(client, &args.properties)?;
            let deadline = Instant::now() + limit;
            let ends = starts(&consumer, &name, deadline, |_, end| end)?;
            consumer.assign(&ends)?;
            anyhow::Ok(Self { consumer })
        });
        opened.await?.with_context(|| unreadable(kafka, topic))
    }

    /// The next record for which `decode` returns something. Waits while Kafka is away: librdkafka reconnects.
    pub async fn next<T>(
        &self,
        decode: impl Fn(&BorrowedMessage<'_>) -> Option<T>,
    ) -> anyhow::Result<T> {
        loop {
            match self.consumer.recv().await {
                Ok(record) => {
                    if let Some(decoded) = decode(&record) {
                        return Ok(decoded);
                    }
                }
                Err(error) => match barid_bus::Error::from(error.clone()) {
                    barid_bus::Error::Away(_) => sleep(RETRY).await,
                    _ => return Err(error).context("cannot read from Kafka"),
                },
            }
        }
    }
}

/// The newest `count` records for which `decode` returns something, with their timestamps (ms), the newest first. Looks
/// at the last `depth` records of each partition. `limit` bounds the wait for the next record.
pub async fn newest<T: Send + 'static>(
    kafka: &KafkaArgs,
    topic: &str,
    (count, depth): (usize, usize),
    limit: Duration,
    decode: impl Fn(&BorrowedMessage<'_>) -> Option<T> + Send + 'static,
) -> anyhow::Result<Vec<(u64, T)>> {
    let (args, brokers, name) = (kafka.clone(), kafka.brokers()?.join(","), topic.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        let mut client = settings(&brokers);
        client.set("enable.partition.eof", "true").set("queued.max.messages.kbytes", "16384");
        let consumer: BaseConsumer = kafka_client(client, &args.properties)?;
        read_newest(&consumer, &name, (count, depth), limit, decode)
    });
    read.await?.with_context(|| unreadable(kafka, topic))
}

fn read_newest<T>(
    consumer: &BaseConsumer,
    topic: &str,
    (count, depth): (usize, usize),
    limit: Duration,
    decode: impl Fn(&BorrowedMessage<'_>) -> Option<T>,
) -> anyhow::Result<Vec<(u64, T)>> {
    let depth = i64::try_from(depth).unwrap_or(i64::MAX);
    let list = starts(consumer, topic, Instant::now() + limit, |low, end| {
        low.max(end.saturating_sub(depth))
    })?;
    let mut unread = list.count();
    consumer.assign(&list)?;
    let mut found: Vec<(u64, T)> = Vec::new();
    let keep_newest = |found: &mut Vec<(u64, T)>| {
        found.sort_by_key(|(at_ms, _)| std::cmp::Reverse(*at_ms));
        found.truncate(count);
    };
    // A partition is read once its end is reached: transactions leave offsets without a record.
    while unread > 0 {
        match consumer.poll(limit) {
            Some(Ok(record)) => {
                let at_ms = record.timestamp().to_millis().and_then(|ms| u64::try_from(ms).ok());
                if let Some(decoded) = decode(&record) {
                    found.push((at_ms.unwrap_or(0), decoded));
                }
                if found.len() > 2 * count {
                    keep_newest(&mut found);
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => unread -= 1,
            Some(Err(error)) => return Err(error.into()),
            None => bail!("no answer within {limit:?}"),
        }
    }
    keep_newest(&mut found);
    Ok(found)
}

/// Where to begin in each partition: `from` of its first offset and its end.
fn starts(
    consumer: &impl Consumer,
    topic: &str,
    deadline: Instant,
    from: impl Fn(i64, i64) -> i64,
) -> anyhow::Result<TopicPartitionList> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let metadata = consumer.fetch_metadata(Some(topic), left())?;
    let partitions = metadata.topics().first().map(|t| t.partitions()).unwrap_or_default();
    if partitions.is_empty() {
        bail!(Coded::config("the topic does not exist"));
    }
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        let (low, end) = consumer.fetch_watermarks(topic, partition.id(), left())?;
        list.add_partition_offset(topic, partition.id(), Offset::Offset(from(low, end)))?;
    }
    Ok(list)
}

/// Settings of a consumer that joins no group, commits nothing and logs nothing.
fn settings(brokers: &str) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", brokers)
        .set("client.id", "barid-cli")
        .set("group.id", "barid-cli")
        .set("enable.auto.commit", "false")
        .set_log_level(rdkafka::config::RDKafkaLogLevel::Emerg);
    client
}

fn unreadable(kafka: &KafkaArgs, topic: &str) -> String {
    let brokers = kafka.brokers().unwrap_or_default().join(",");
    format!("cannot read topic {topic} of Kafka at {brokers}")
}
