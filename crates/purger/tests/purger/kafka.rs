//! Purgers and Kafka: every codec, unreadable partitions, missing topics, topics that take no receipts or dead
//! letters, and the assignment of partitions.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use barid_bus::{GroupProtocol, ensure_topics};
use barid_core::ReceiptSet;
use barid_runtime::Stopped;
use barid_testkit::kafka::KafkaOptions;
use barid_testkit::{Kafka, records};
use barid_wire::record::{Push, ReceiptKind};
use rdkafka::producer::FutureRecord;

use super::support::*;

/// Where the last batch of the first partition's log begins, and its codec.
fn last_batch(kafka: &Kafka, topic: &str) -> (usize, u8) {
    let bytes = std::fs::read(log_of(kafka, topic)).unwrap();
    let (mut at, mut last) = (0, 0);
    // First offset, length, …, attributes: codecs are their lowest bits.
    while at + 61 <= bytes.len() {
        last = at;
        let size = u32::from_be_bytes(bytes[at + 8..at + 12].try_into().unwrap());
        at += 12 + size as usize;
    }
    (last, bytes[last + 22] & 7)
}

fn log_of(kafka: &Kafka, topic: &str) -> PathBuf {
    kafka.data().join(format!("{topic}-0")).join("00000000000000000000.log")
}

/// Produces to alice until the log shows a batch of this codec, from id `first`: the broker packs what
/// arrives, whatever the producer can do, once it has heard of it. The next id.
async fn produce_packed(
    world: &World,
    kafka: &Kafka,
    first: usize,
    name: &str,
    codec: u8,
) -> usize {
    let push = &world.config.kafka.topics.push;
    let producer = world.raw_producer();
    world.configure(push, "compression.type", name).await;
    for id in first.. {
        // Long enough that it is worth while.
        let payload = "hello ".repeat(200).into();
        let value = records::json(&Push { payload, ..message(&id.to_string(), "alice") });
        world.produce_raw(&producer, None, Some(&value), &[]).await;
        if last_batch(kafka, push).1 == codec {
            return id + 1;
        }
        assert!(id < first + 100, "the broker does not pack with {name}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    unreachable!()
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_50_every_codec_of_kafka_is_read() {
    let world = World::new(false).await;
    let purger = world.start().await;
    let mut count = 0;
    for (name, codec) in [("gzip", 1), ("snappy", 2), ("lz4", 3), ("zstd", 4), ("uncompressed", 0)]
    {
        count = produce_packed(&world, Kafka::shared().await, count, name, codec).await;
        world.has("alice", count).await;
    }
    assert_eq!(world.ids("alice").await, expected(count));
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// The last batch is damaged on disk, where Kafka hands it out unseen.
fn damage(kafka: &Kafka, topic: &str) {
    let (batch, _) = last_batch(kafka, topic);
    let mut bytes = std::fs::read(log_of(kafka, topic)).unwrap();
    // Behind the batch's header of 61 bytes and gzip's of 10.
    for byte in &mut bytes[batch + 71..batch + 91] {
        *byte ^= 0x55;
    }
    std::fs::write(log_of(kafka, topic), bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_50_a_partition_that_cannot_be_fetched_is_not_ready_and_named() {
    let mut kafka = Kafka::start().await.unwrap();
    let world = World::on(&kafka).await;
    let push = world.config.kafka.topics.push.clone();
    let first = produce_packed(&world, &kafka, 0, "gzip", 1).await;
    let bad = produce_packed(&world, &kafka, first, "gzip", 1).await - 1;
    kafka.stop().await.unwrap();
    damage(&kafka, &push);
    kafka.restart().await.unwrap();
    let purger = world.start().await;
    world.has("alice", bad).await;
    let place = format!("{push}/0 cannot be fetched at offset {bad}: ");
    let reason = purger.fails("fetching", &[&place]).await;
    assert!(reason.len() > place.len() + 10, "the cause: {reason}");
    assert_eq!(purger.metric("partitions_stuck"), 1.0);
    // The others go on.
    let others = record("2", "bob");
    let producer = world.raw_producer();
    let mut elsewhere = FutureRecord::to(&push).partition(1);
    elsewhere.payload = Some(&others[..]);
    elsewhere.key = None::<&[u8]>;
    producer.send(elsewhere, LIMIT).await.unwrap();
    world.has("bob", 1).await;
    purger.fails("fetching", &[&place]).await;
    // An operator who deletes the topic is rid of it.
    kafka.delete_topics(&[&push]).await.unwrap();
    ensure_topics(&world.config.kafka, LIMIT).await.unwrap();
    purger.ready().await;
    assert_eq!(purger.metric("partitions_stuck"), 0.0);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

async fn topics_that_are_missing(protocol: GroupProtocol) {
    let mut world = World::bare(Kafka::shared().await).await;
    world.config.kafka.group_protocol = protocol;
    let purger = world.start().await;
    let topics = world.config.kafka.topics.of_purgers();
    let mut words: Vec<&str> = topics.iter().map(String::as_str).collect();
    words.push("create it");
    purger.fails("topics", &words).await;
    assert_eq!(purger.metric("topics_missing"), 5.0);
    ensure_topics(&world.config.kafka, LIMIT).await.unwrap();
    world.produce_to_alice(0, 3).await;
    world.has("alice", 3).await;
    purger.ready().await;
    assert_eq!(world.ids("alice").await, expected(3));
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_51_missing_topics_are_named_and_taken_once_they_are_there() {
    topics_that_are_missing(GroupProtocol::Auto).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_51_missing_topics_are_named_and_taken_once_they_are_there_classic() {
    topics_that_are_missing(GroupProtocol::Classic).await;
}

/// Waits until the purgers hold all twelve partitions, of each topic as many as the next, give or
/// take one.
async fn shared_out(world: &World, purgers: &[Running]) {
    let topics = world.config.kafka.topics.pushes();
    let shares = || -> Vec<Vec<f64>> {
        let of = |purger: &Running| {
            topics.iter().map(|topic| purger.gauge_of("partitions", topic)).collect()
        };
        purgers.iter().map(of).collect()
    };
    let fair = |shares: &[Vec<f64>]| {
        (0..3).all(|topic| {
            let of_topic: Vec<f64> = shares.iter().map(|share| share[topic]).collect();
            let most = of_topic.iter().copied().fold(0.0, f64::max);
            let least = of_topic.iter().copied().fold(f64::MAX, f64::min);
            of_topic.iter().sum::<f64>() == 4.0 && most - least <= 1.0
        })
    };
    let end = Instant::now() + LIMIT;
    while !fair(&shares()) {
        assert!(Instant::now() < end, "{:?}", shares());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn each_topic_is_shared_out(world: World) {
    let mut purgers = vec![world.start().await];
    shared_out(&world, &purgers).await;
    for _ in 0..2 {
        purgers.push(world.start().await);
        shared_out(&world, &purgers).await;
    }
    assert_eq!(purgers.remove(0).stop().await, Stopped::Clean);
    shared_out(&world, &purgers).await;
    world.produce_to_alice(0, 20).await;
    world.has("alice", 20).await;
    for purger in purgers {
        assert_eq!(purger.stop().await, Stopped::Clean);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_44_every_topic_is_shared_out_among_purgers() {
    each_topic_is_shared_out(World::new(false).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_44_every_topic_is_shared_out_among_purgers_classic() {
    let mut world = World::new(false).await;
    world.config.kafka.group_protocol = GroupProtocol::Classic;
    each_topic_is_shared_out(world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_44_a_broker_without_the_range_assignor_is_used_all_the_same() {
    let uniform = "org.apache.kafka.coordinator.group.assignor.UniformAssignor";
    let assignors = ("group.consumer.assignors".to_owned(), uniform.to_owned());
    let options = KafkaOptions { properties: vec![assignors], ..Default::default() };
    let kafka = Kafka::start_with(options).await.unwrap();
    let world = World::on(&kafka).await;
    let purger = world.start().await;
    world.produce_to_alice(0, 5).await;
    world.has("alice", 5).await;
    assert_eq!(purger.metric("assignor_missing"), 1.0, "and says so");
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// Waits until the topic of dead letters refuses a record without a key, of so many bytes; how many it
/// took before.
async fn taken_before(world: &World, bytes: usize) -> usize {
    let (producer, dead) = (world.raw_producer(), &world.config.kafka.topics.dead);
    let value = "x".repeat(bytes);
    for count in 0..100 {
        let record = FutureRecord::<[u8], str>::to(dead).payload(&value);
        if producer.send(record, LIMIT).await.is_err() {
            return count;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{dead} takes everything");
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_33_what_a_topic_never_takes_holds_nothing_up() {
    let world = World::new(false).await;
    let topics = &world.config.kafka.topics;
    // Compacted topics take no record without a key, whatever is left of it.
    world.configure(&topics.dead, "cleanup.policy", "compact").await;
    let taken = taken_before(&world, 1).await;
    let purger = world.start().await;
    let producer = world.raw_producer();
    world.produce_raw(&producer, None, Some(b"{}"), &[]).await;
    world.produce_raw(&producer, Some("k"), Some(b"{}"), &[]).await;
    let good = record("0", "alice");
    world.produce_raw(&producer, None, Some(&good), &[]).await;
    world.has("alice", 1).await;
    purger.until("committed", |p| p.metric("in_flight_records") == 0.0).await;
    purger.until("counted", |p| p.metric("dead_letters_dropped_total") == 1.0).await;
    // The other one may have been refused in the same batch.
    let letters = world.letters(taken + 1).await;
    let letter = &letters[taken];
    assert_eq!((letter.key.as_deref(), &letter.value[..]), (Some(&b"k"[..]), &b"{}"[..]));
    purger.ready().await;
    assert_eq!(purger.stop().await, Stopped::Clean);
    // All of it is committed: nothing comes again.
    let again = world.start().await;
    again.ready().await;
    world.produce("alice", record("1", "alice")).await;
    world.has("alice", 2).await;
    assert_eq!(again.metric("records_taken_total"), 1.0);
    assert_eq!(again.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_33_a_letter_that_is_too_large_even_when_cut_holds_nothing_up() {
    let world = World::new(false).await;
    world.configure(&world.config.kafka.topics.dead, "max.message.bytes", "100").await;
    taken_before(&world, 200).await;
    let purger = world.start().await;
    world.produce("k", "{}").await;
    world.produce_to_alice(0, 1).await;
    world.has("alice", 1).await;
    purger.until("counted", |p| p.metric("dead_letters_dropped_total") == 1.0).await;
    purger.until("finished", |p| p.metric("in_flight_records") == 0.0).await;
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_33_a_right_that_is_missing_holds_the_record_and_is_named() {
    let kafka = Kafka::start_with(KafkaOptions::with_authorizer()).await.unwrap();
    let world = World::on(&kafka).await;
    let (dead, receipts) = (&world.config.kafka.topics.dead, &world.config.kafka.topics.receipts);
    let purger = world.start().await;
    purger.ready().await;
    kafka.allow_writes(dead, false).await.unwrap();
    kafka.allow_writes(receipts, false).await.unwrap();
    world.produce("k", "{}").await;
    world.produce("alice", asking("0", "alice", ReceiptSet::ACCEPTED)).await;
    world.has("alice", 1).await;
    purger.fails("producing", &["2 records wait for", "Topic authorization failed"]).await;
    // The oldest record that is not finished is named, too.
    let push = &world.config.kafka.topics.push;
    purger.fails("records", &[push, "has not been finished for"]).await;
    assert_eq!(purger.metric("dead_letters_dropped_total"), 0.0);
    kafka.allow_writes(dead, true).await.unwrap();
    kafka.allow_writes(receipts, true).await.unwrap();
    assert_eq!(world.letters(1).await[0].value, "{}");
    let told = world.receipts(2).await;
    let kinds: Vec<_> = told.iter().map(|receipt| receipt.kind()).collect();
    assert_eq!(kinds, [ReceiptKind::Refused, ReceiptKind::Accepted]);
    purger.ready().await;
    assert_eq!(purger.stop().await, Stopped::Clean);
}
