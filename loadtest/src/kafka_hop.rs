//! The floor of latency: the same records at the same rate through the same Kafka, to a bare consumer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use barid_wire::v1::PushRecord;
use hdrhistogram::Histogram;
use prost::Message as _;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::audit::{Audit, SETTLE, Start};
use crate::producer::{Business, Pace, Plan};

/// How often the consumer checks whether it shall end.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);

/// Produces `rate` records per second for `seconds` to the plan's topic, which must have `partitions` and no
/// other consumer. Returns how long each record took, µs.
pub async fn measure(
    plan: &Plan,
    partitions: i32,
    users: u32,
    rate: u32,
    seconds: u64,
) -> anyhow::Result<Histogram<u64>> {
    let audit = Arc::new(Audit::new(users, Some(rate)));
    let total = u64::from(rate) * seconds;
    audit.expect(total);
    let business = Business::open(plan).await?;
    let is_over = Arc::new(AtomicBool::new(false));
    let consuming = {
        let (audit, is_over) = (Arc::clone(&audit), Arc::clone(&is_over));
        let consumer = consumer(plan, partitions)?;
        tokio::task::spawn_blocking(move || consume(&consumer, &audit, &is_over))
    };
    audit.start(Start::after(Duration::ZERO));
    business.produce(Pace::Scheduled(total), &audit).await?;
    audit.all_settled(SETTLE).await;
    is_over.store(true, Ordering::Relaxed);
    consuming.await??;
    Ok(audit.latencies_us())
}

fn consumer(plan: &Plan, partitions: i32) -> anyhow::Result<BaseConsumer> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &plan.brokers)
        .set("group.id", "floor")
        .set("enable.auto.commit", "false")
        .set("fetch.queue.backoff.ms", "5")
        .create()?;
    let mut list = TopicPartitionList::new();
    for partition in 0..partitions {
        list.add_partition_offset(&plan.topic, partition, Offset::End)?;
    }
    consumer.assign(&list)?;
    Ok(consumer)
}

fn consume(consumer: &BaseConsumer, audit: &Audit, is_over: &AtomicBool) -> anyhow::Result<()> {
    while !is_over.load(Ordering::Relaxed) {
        let Some(record) = consumer.poll(POLL_TIMEOUT) else { continue };
        let record = match record {
            // librdkafka reconnects; what takes too long then shows in the latencies.
            Err(KafkaError::MessageConsumption(
                RDKafkaErrorCode::AllBrokersDown | RDKafkaErrorCode::BrokerTransportFailure,
            )) => continue,
            record => record?,
        };
        let record = PushRecord::decode(record.payload().context("record without value")?)?;
        let user = record.to.context("record without recipient")?.user;
        let number = user.strip_prefix("user-").context("record of another run")?.parse()?;
        audit.shown(number, &record.id);
    }
    Ok(())
}
