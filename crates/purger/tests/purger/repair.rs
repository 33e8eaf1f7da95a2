//! Messages that Redis lost are brought back from Kafka: by whichever purger holds the partition, once, and no
//! more than is still owed.

use std::time::{Duration, Instant};

use barid_core::ReceiptSet;
use barid_runtime::{Context, Stopped};
use barid_testkit::records;
use barid_wire::record::{Push, ReceiptKind};
use rdkafka::TopicPartitionList;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::topic_partition_list::Offset;

use super::support::*;

/// OffsetFetch, by Kafka's numbers.
const OFFSET_FETCH: i16 = 9;

impl World {
    /// Redis forgets everything of a user's shard.
    async fn forget_shard_of(&self, user: &str) {
        let tag = format!("{{{}}}:*", self.mailbox.shard_of(&key(user)));
        let script = "for _, k in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('DEL', k) end";
        let _: Option<i64> = self.redis.query(&["EVAL", script, "0", &tag]).await.unwrap();
    }

    /// Retention removes the first records of partition 0.
    async fn remove_below(&self, offset: i64) {
        let mut config = rdkafka::ClientConfig::new();
        config.set("bootstrap.servers", self.config.kafka.brokers.join(","));
        let admin: AdminClient<DefaultClientContext> = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        let topic = &self.config.kafka.topics.push;
        list.add_partition_offset(topic, 0, Offset::Offset(offset)).unwrap();
        admin.delete_records(&list, &AdminOptions::new()).await.unwrap();
    }
}

async fn committed(purger: &Running) {
    purger.until("committed", |p| p.metric("lag_records") == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_26_a_successor_brings_back_what_lies_below_its_commit() {
    let mut world = World::new(false).await;
    let first = world.start().await;
    world.produce_to_alice(0, 10).await;
    world.has("alice", 10).await;
    let _: String = world.redis.query(&["SAVE"]).await.unwrap();
    world.produce_to_alice(10, 10).await;
    world.has("alice", 20).await;
    assert_eq!(first.stop().await, Stopped::Clean);
    world.redis.kill().unwrap();
    world.redis.restart().await.unwrap();
    let second = world.start().await;
    // One message more would hide the hole, were it not for `prev`.
    world.produce_to_alice(20, 1).await;
    world.has("alice", 21).await;
    assert_eq!(world.ids("alice").await, expected(21));
    second.until("raised", |p| p.metric("shards_repairing") == 0.0).await;
    assert_eq!((second.metric("gaps_total"), second.metric("repairs_total")), (1.0, 1.0));
    assert_eq!(second.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_48_what_the_log_no_longer_holds_is_missed_once_and_not_for_ever() {
    let mut world = World::new(false).await;
    world.config.window.probe_interval_ms = 200;
    let producer = world.raw_producer();
    let send = async |id: usize| {
        let value = record(&id.to_string(), "alice");
        world.produce_raw(&producer, Some("alice"), Some(&value), &[]).await
    };
    for id in 0..10 {
        send(id).await;
    }
    let first = world.start().await;
    world.has("alice", 10).await;
    assert_eq!(first.stop().await, Stopped::Clean);
    let _: () = world.redis.query(&["FLUSHALL"]).await.unwrap();
    world.remove_below(10).await;
    let second = world.start().await;
    send(10).await;
    world.has("alice", 1).await;
    second.until("raised", |p| p.metric("shards_repairing") == 0.0).await;
    assert_eq!((second.metric("gaps_total"), second.metric("repairs_total")), (1.0, 1.0));
    assert_eq!(second.stop().await, Stopped::Clean);
    // The next owner has nothing to repair, and reads nothing twice.
    let third = world.start().await;
    send(11).await;
    world.has("alice", 2).await;
    assert_eq!((third.metric("gaps_total"), third.metric("repairs_total")), (0.0, 0.0));
    assert_eq!(third.metric("records_taken_total"), 1.0);
    assert_eq!(third.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_48_what_has_expired_is_told_so_and_not_brought_back() {
    let world = World::new(false).await;
    let purger = world.start().await;
    let receipts = ReceiptSet::ACCEPTED.with(ReceiptSet::EXPIRED);
    let old = Push { receipts, ttl_ms: 1_000, ..message("old", "alice") };
    world.produce("alice", records::json(&old)).await;
    world.produce("alice", asking("lasting", "alice", receipts)).await;
    world.has("alice", 2).await;
    tokio::time::sleep(Duration::from_millis(1_100)).await; // its time to live
    let _: () = world.redis.query(&["FLUSHALL"]).await.unwrap();
    world.produce("alice", record("new", "alice")).await;
    world.has("alice", 2).await;
    assert_eq!(world.ids("alice").await, ["lasting", "new"]);
    let receipts = world.receipts(4).await;
    let told: Vec<_> = receipts.iter().map(|r| (r.id.as_str(), r.kind())).collect();
    use ReceiptKind::{Accepted, Expired};
    // In the order of their kinds; what was accepted anew is told anew.
    let (old, lasting) = ([("old", Accepted), ("old", Expired)], [("lasting", Accepted); 2]);
    assert_eq!(told, [lasting, old].concat());
    assert_eq!(purger.metric_of("messages_total", "expired"), 1.0);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_45_shards_that_forgot_nothing_are_not_told_twice() {
    let world = World::new(false).await;
    let purger = world.start().await;
    let users = |id: usize| {
        let to = r#""to":{"users":["alice","bob"]}"#;
        format!(r#"{{"id":"{id}","app":"demo",{to},"text":"","receipts":["accepted"]}}"#)
    };
    for id in 0..5 {
        world.produce("k", users(id)).await;
    }
    world.has("bob", 5).await;
    world.has("alice", 5).await;
    world.produce("k", "not a record").await; // a dead letter, once
    assert_eq!(world.letters(1).await.len(), 1);
    world.forget_shard_of("alice").await;
    world.produce("k", record("5", "alice")).await;
    world.has("alice", 6).await;
    assert_eq!(world.ids("alice").await, expected(6));
    assert_eq!(world.ids("bob").await, expected(5));
    // Alice's first five were accepted, and told, twice; bob's, and the refusal, once.
    let receipts = world.receipts(16).await;
    let of = |user: &str| receipts.iter().filter(|r| r.user == user).count();
    assert_eq!((of("bob"), of("alice"), of("")), (5, 10, 1));
    assert_eq!(purger.metric_of("messages_total", "known"), 5.0);
    assert_eq!(purger.metric("records_refused_total"), 1.0);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// Everything of 64 shards is forgotten at once: each log is read again once, not once a shard.
#[tokio::test(flavor = "multi_thread")]
async fn hazard_45_a_redis_that_forgot_everything_is_filled_by_one_reading() {
    let mut world = World::new(false).await;
    world.config.window.probe_interval_ms = 500;
    let purger = world.start().await;
    let count: usize = match std::env::var("BARID_FLUSHED") {
        Ok(count) => count.parse().unwrap(),
        Err(_) => 1_000,
    };
    let sent =
        (0..count).map(|i| {
            let value = record(&i.to_string(), &format!("u{}", i % 200));
            let (producer, topic) = (&world.producer, &world.config.kafka.topics.push);
            async move {
                producer.send(topic, format!("{}", i % 200).as_bytes(), value, &[]).await.unwrap()
            }
        });
    futures::future::join_all(sent).await;
    let accepted = |p: &Running| p.metric_of("messages_total", "accepted");
    purger.until("accepted", |p| accepted(p) >= count as f64).await;
    committed(&purger).await;
    let _: () = world.redis.query(&["FLUSHALL"]).await.unwrap();
    let begun = Instant::now();
    purger.until("accepted again", |p| accepted(p) == 2.0 * count as f64).await;
    let (took, taken) = (begun.elapsed(), purger.metric("records_taken_total"));
    let (gaps, repairs) = (purger.metric("gaps_total"), purger.metric("repairs_total"));
    eprintln!(
        "{count} messages again in {took:?}: {taken} records, {gaps} gaps, {repairs} repairs"
    );
    assert!(repairs <= 8.0, "{repairs} readings of four partitions");
    assert!(taken <= 2.5 * count as f64, "{taken} records taken for {count}");
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_40_partitions_that_are_taken_up_stop_no_other() {
    let world = World::new(true).await;
    let mut context = Context::new();
    // Less than the coordinator is waited for.
    context.stalled_after = Duration::from_secs(3);
    let first = world.start_with(context).await;
    first.until("assigned", |p| p.metric("partitions") == 12.0).await;
    let second = world.start().await;
    second.until("shared", |p| p.metric("partitions") >= 1.0).await;
    first.until("shared", |p| p.metric("partitions") < 12.0).await;
    // The coordinator does not say in time where the second's partitions stand.
    world.embedded.as_ref().unwrap().delay_answers(OFFSET_FETCH, 1, Duration::from_secs(6));
    assert_eq!(second.stop().await, Stopped::Clean);
    let (begun, mut sent) = (Instant::now(), 0);
    while first.metric("partitions") < 12.0 {
        let wedged = first.context.health.not_ready();
        let wedged: Vec<_> = wedged.iter().filter(|(name, _)| *name == "consumer").collect();
        assert!(wedged.is_empty(), "{wedged:?}");
        world.produce(&format!("{sent}"), record(&sent.to_string(), "alice")).await;
        sent += 1;
        assert!(begun.elapsed() < LIMIT, "not taken up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(begun.elapsed() > Duration::from_secs(3), "the coordinator was not late");
    first.until("taken", |p| p.metric("records_taken_total") >= f64::from(sent)).await;
    assert_eq!(first.stop().await, Stopped::Clean);
}
