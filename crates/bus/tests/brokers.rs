//! The consumer and the producers against librdkafka's in-process broker and against Apache Kafka:
//! both have to behave alike.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

use std::time::Duration;

use barid_bus::consumer::{Commit, Consumer, Consuming, Done, Event, Partition, Record};
use barid_bus::ensure_topics;
use barid_bus::{DeadLetter, DeadLetters, EmbeddedKafka, GroupProtocol, KafkaConfig, Producer};
use barid_testkit::Kafka;
use barid_testkit::kafka::{KafkaOptions, unique};
use bytes::Bytes;
use prometheus::IntCounter;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use tokio::time::{Instant, timeout};

const LIMIT: Duration = Duration::from_secs(30);

fn dropped() -> IntCounter {
    IntCounter::new("dropped", "dropped").unwrap()
}

/// Topics and a group of its own.
fn config() -> KafkaConfig {
    let mut config = KafkaConfig { partitions: 3, group: unique("group"), ..Default::default() };
    let topics = &mut config.topics;
    for name in [
        &mut topics.push_high,
        &mut topics.push,
        &mut topics.push_bulk,
        &mut topics.receipts,
        &mut topics.dead,
    ] {
        *name = unique(name);
    }
    config
}

async fn apache() -> KafkaConfig {
    apache_with(config()).await
}

async fn apache_with(config: KafkaConfig) -> KafkaConfig {
    let config = KafkaConfig { brokers: vec![Kafka::shared().await.brokers()], ..config };
    ensure_topics(&config, LIMIT).await.unwrap();
    ensure_topics(&config, LIMIT).await.expect("topics that exist stay");
    config
}

fn embedded() -> (EmbeddedKafka, KafkaConfig) {
    let mut config = config();
    let kafka = EmbeddedKafka::start(&mut config).unwrap();
    (kafka, config)
}

/// Assigns, and takes records until there are `count`.
async fn take(consumer: &mut Consumer<Consuming>, count: usize) -> Vec<Record> {
    let mut records = Vec::new();
    let taking = async {
        while records.len() < count {
            while let Some(event) = consumer.poll() {
                if let Event::Assigned(partitions) = event {
                    consumer.assign(&partitions).await.unwrap();
                }
            }
            for topic in 0..3 {
                consumer.take(topic, 100, |_| true, &mut records);
            }
            let _ = timeout(Duration::from_millis(20), consumer.ready()).await;
        }
    };
    timeout(LIMIT, taking).await.expect("records come");
    records
}

fn start(config: &KafkaConfig) -> Consumer<Consuming> {
    Consumer::start(config, &config.topics.pushes()).unwrap()
}

async fn produce(config: &KafkaConfig, count: usize) {
    let producer = Producer::new(config).unwrap();
    for i in 0..count {
        let payload = Bytes::from(format!("{i}"));
        producer.send(&config.topics.push, b"one key", payload, &[("n", b"v")]).await.unwrap();
    }
}

async fn takes_commits_and_goes_on_where_it_stopped(config: KafkaConfig, topic_ids: usize) {
    produce(&config, 5).await;
    let mut consumer = start(&config);
    let records = take(&mut consumer, 5).await;
    let offsets: Vec<i64> = records.iter().map(|record| record.offset).collect();
    assert_eq!(offsets, [0, 1, 2, 3, 4]);
    assert_eq!(records[0].header("N"), Some(&b"v"[..]));
    assert!(records[0].timestamp_ms.unwrap() > 0);
    assert_eq!(records[0].leader_epoch, 0, "both brokers tell it");
    assert_eq!(consumer.is_classic(), config.group_protocol == GroupProtocol::Classic);
    let partition = Partition { topic: records[0].topic.clone(), number: records[0].partition };
    let ids = consumer.topic_ids().await.unwrap();
    assert_eq!(ids.len(), topic_ids, "the in-process broker gives none");
    let topic_id = barid_bus::consumer::id_of(&ids, &config.topics.push);
    consumer.seek(&partition, 3).await.unwrap();
    assert_eq!(take(&mut consumer, 2).await[0].offset, 3);
    let commit = Commit { partition, offset: 4, topic_id };
    consumer.commit_and_wait(&[commit], LIMIT).await.unwrap();
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    let mut again = start(&config);
    assert_eq!(take(&mut again, 1).await[0].offset, 4);
    assert_eq!(again.drain().finish(LIMIT).await, Done::Left);
}

#[tokio::test]
async fn embedded_broker() {
    let (_kafka, config) = embedded();
    takes_commits_and_goes_on_where_it_stopped(config, 0).await;
}

#[tokio::test]
async fn embedded_broker_with_classic_groups() {
    let (_kafka, mut config) = embedded();
    config.group_protocol = GroupProtocol::Classic;
    takes_commits_and_goes_on_where_it_stopped(config, 0).await;
}

#[tokio::test]
async fn apache_kafka() {
    takes_commits_and_goes_on_where_it_stopped(apache().await, 3).await;
}

#[tokio::test]
async fn apache_kafka_with_classic_groups() {
    let config = KafkaConfig { group_protocol: GroupProtocol::Classic, ..apache().await };
    takes_commits_and_goes_on_where_it_stopped(config, 3).await;
}

#[tokio::test]
async fn a_broker_without_kip_848_is_used_with_the_classic_protocol() {
    let old = ("group.coordinator.rebalance.protocols".to_owned(), "classic".to_owned());
    let options = KafkaOptions { properties: vec![old], ..Default::default() };
    let kafka = Kafka::start_with(options).await.unwrap();
    let config = KafkaConfig { brokers: vec![kafka.brokers()], ..config() };
    ensure_topics(&config, LIMIT).await.unwrap();
    produce(&config, 2).await;
    let mut consumer = start(&config);
    assert_eq!(take(&mut consumer, 2).await[0].offset, 0);
    assert!(consumer.is_classic());
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
}

/// What the group decided, seen from one member, for `span`.
async fn follow(consumer: &mut Consumer<Consuming>, held: &mut Vec<Partition>, span: Duration) {
    let end = Instant::now() + span;
    while Instant::now() < end {
        while let Some(event) = consumer.poll() {
            match event {
                Event::Assigned(partitions) => {
                    consumer.assign(&partitions).await.unwrap();
                    held.extend(partitions);
                }
                Event::Revoked { partitions, lost } => {
                    assert!(!lost);
                    consumer.release(&partitions).unwrap();
                    held.retain(|partition| !partitions.contains(partition));
                }
                _ => {}
            }
        }
        let _ = timeout(Duration::from_millis(20), consumer.ready()).await;
    }
}

async fn shares_its_partitions_with_a_second_member(config: KafkaConfig) {
    let (mut a, mut b) = (start(&config), start(&config));
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    let end = Instant::now() + LIMIT;
    while of_a.is_empty() || of_b.is_empty() || of_a.len() + of_b.len() != 9 {
        assert!(Instant::now() < end, "{of_a:?} {of_b:?}");
        follow(&mut a, &mut of_a, Duration::from_millis(100)).await;
        follow(&mut b, &mut of_b, Duration::from_millis(100)).await;
    }
    assert!(of_a.iter().all(|partition| !of_b.contains(partition)));
    assert_eq!(a.drain().finish(LIMIT).await, Done::Left);
    while of_b.len() != 9 {
        assert!(Instant::now() < end, "{of_b:?}");
        follow(&mut b, &mut of_b, Duration::from_millis(100)).await;
    }
    assert_eq!(b.drain().finish(LIMIT).await, Done::Left);
}

#[tokio::test]
async fn apache_kafka_rebalances() {
    shares_its_partitions_with_a_second_member(apache().await).await;
}

#[tokio::test]
async fn apache_kafka_rebalances_classic_groups() {
    let config = KafkaConfig { group_protocol: GroupProtocol::Classic, ..apache().await };
    shares_its_partitions_with_a_second_member(config).await;
}

#[tokio::test]
async fn a_topic_created_again_is_read_from_its_start() {
    let config = apache().await;
    produce(&config, 5).await;
    let mut consumer = start(&config);
    let records = take(&mut consumer, 5).await;
    let old_ids = consumer.topic_ids().await.unwrap();
    let topic_id = barid_bus::consumer::id_of(&old_ids, &config.topics.push);
    let partition = Partition { topic: records[0].topic.clone(), number: records[0].partition };
    let commit = Commit { partition, offset: 2, topic_id };
    Kafka::shared().await.delete_topics(&[&config.topics.push]).await.unwrap();
    ensure_topics(&config, LIMIT).await.unwrap();
    produce(&config, 4).await;
    // The offset of the old life stands in the group, as after a crash between the two.
    let _ = consumer.commit_and_wait(&[commit], LIMIT).await;
    assert_ne!(consumer.topic_ids().await.unwrap(), old_ids);
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    let mut again = start(&config);
    let records = take(&mut again, 4).await;
    assert_eq!(records[0].offset, 0);
    assert_eq!(again.drain().finish(LIMIT).await, Done::Left);
}

#[tokio::test]
async fn hazard_23_a_dead_letter_that_its_topic_does_not_take_is_cut_and_says_so() {
    let config = apache_with(KafkaConfig { dead_bytes_max: 1 << 20, ..config() }).await;
    let dead = DeadLetters::new(Producer::new(&config).unwrap(), &config, dropped());
    let record = |bytes: usize| Record {
        topic: "source".into(),
        partition: 1,
        offset: 7,
        leader_epoch: 0,
        timestamp_ms: Some(9),
        key: Some(Bytes::from_static(b"key")),
        value: vec![b'x'; bytes].into(),
        headers: vec![("mine".into(), Bytes::from_static(b"header"))],
    };
    for bytes in [3, 2_000_000] {
        let letter = DeadLetter { record: &record(bytes), code: "bad_id", reason: "why" };
        timeout(LIMIT, dead.write(&letter)).await.unwrap();
    }
    let reader: BaseConsumer = Kafka::shared()
        .await
        .client()
        .set("group.id", unique("reader"))
        .set("auto.offset.reset", "earliest")
        .create()
        .unwrap();
    reader.subscribe(&[&config.topics.dead]).unwrap();
    let next = || {
        // Rebalances end a poll, too.
        let message = (0..20).find_map(|_| reader.poll(LIMIT)).expect("a letter").unwrap();
        let headers: Vec<(String, String)> = message
            .headers()
            .unwrap()
            .iter()
            .map(|h| (h.key.into(), String::from_utf8_lossy(h.value.unwrap()).into()))
            .collect();
        assert_eq!(message.key(), Some(&b"key"[..]));
        (message.payload_len(), headers)
    };
    let (bytes, headers) = next();
    let has = |headers: &[(String, String)], name: &str, value: &str| {
        headers.contains(&(name.to_owned(), value.to_owned()))
    };
    assert!(bytes == 3 && has(&headers, "mine", "header") && has(&headers, "barid-code", "bad_id"));
    assert!(has(&headers, "barid-offset", "7") && has(&headers, "barid-topic", "source"));
    let (bytes, headers) = next();
    assert!(bytes == 900_000 && has(&headers, "barid-truncated", "2000000"), "{bytes} {headers:?}");
}
