//! The floor of a message's first hop: the same records at the same rate through the same Kafka, with
//! nothing behind it but a loop that takes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use barid_wire::v1::PushRecord;
use hdrhistogram::Histogram;
use prost::Message as _;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::audit::{Audit, SETTLE};
use crate::producer::{Business, Pace, Plan};

/// How long the consumer looks for its end while nothing comes.
const LOOK: Duration = Duration::from_millis(100);

/// Produces `rate` records a second for `seconds` to the plan's topic, which has `partitions` and no
/// other consumer, and tells how long each took to arrive,
/// microseconds.
///
/// # Errors
/// Kafka does not take or give them.
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
    let over = Arc::new(AtomicBool::new(false));
    let taking = {
        let (audit, over) = (Arc::clone(&audit), Arc::clone(&over));
        let consumer = consumer(plan, partitions)?;
        tokio::task::spawn_blocking(move || take(&consumer, &audit, &over))
    };
    audit.start();
    business.produce(Pace::Scheduled(total), &audit).await?;
    audit.all_settled(SETTLE).await;
    over.store(true, Ordering::Relaxed);
    taking.await??;
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

fn take(consumer: &BaseConsumer, audit: &Audit, over: &AtomicBool) -> anyhow::Result<()> {
    while !over.load(Ordering::Relaxed) {
        let Some(record) = consumer.poll(LOOK) else { continue };
        let record = record?;
        let record = PushRecord::decode(record.payload().context("an empty record")?)?;
        let user = record.to.context("a record to nobody")?.user;
        let number = user.strip_prefix("user-").context("another's record")?.parse()?;
        audit.shown(number, &record.id);
    }
    Ok(())
}
