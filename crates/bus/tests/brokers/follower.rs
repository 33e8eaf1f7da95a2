//! Followers of a compacted topic, on Apache Kafka and on librdkafka's in-process broker.

use std::time::Duration;

use barid_bus::{Change, Error, Followed, Follower, KafkaConfig, ensure_topics};
use barid_testkit::Kafka;
use barid_testkit::kafka::unique;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use tokio::time::{Instant, timeout};

use crate::{LIMIT, apache, config, embedded};

fn producer(config: &KafkaConfig) -> FutureProducer {
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", config.brokers.join(",")).set("linger.ms", "0");
    client.create().unwrap()
}

/// Produces to a partition; without a value, a tombstone.
async fn put(
    producer: &FutureProducer,
    topic: &str,
    partition: i32,
    key: &str,
    value: Option<&str>,
) {
    let mut record = FutureRecord::to(topic).key(key).partition(partition);
    record.payload = value;
    producer.send(record, LIMIT).await.unwrap();
}

fn change(key: &str, value: Option<&str>) -> Change {
    let value = value.map(|value| value.as_bytes().to_vec().into());
    Change { key: key.as_bytes().to_vec().into(), value }
}

async fn next(follower: &mut Follower) -> Followed {
    timeout(LIMIT, follower.next()).await.expect("an event")
}

/// The changes until it has caught up.
async fn caught_up(follower: &mut Follower) -> Vec<Change> {
    let (mut all, mut is_degraded, mut is_caught_up) = (Vec::new(), false, false);
    while is_degraded || !is_caught_up {
        match next(follower).await {
            Followed::Changes(changes) => all.extend(changes),
            Followed::CaughtUp => is_caught_up = true,
            // A topic that was just created may have no leader yet.
            Followed::Degraded(Error::Away(_)) => is_degraded = true,
            Followed::Recovered => is_degraded = false,
            other => panic!("{other:?}"),
        }
    }
    all
}

async fn follows(config: &KafkaConfig) {
    let topic = &config.topics.revocations;
    let mut early = Follower::start(config, topic).unwrap();
    assert_eq!(caught_up(&mut early).await, [], "an empty topic is read at once");
    let producer = producer(config);
    put(&producer, topic, 0, "a", Some("1")).await;
    put(&producer, topic, 0, "b", Some("2")).await;
    put(&producer, topic, 0, "a", None).await;
    // More than one event can hold.
    for n in 0..2_500 {
        let (key, value) = (format!("k{n}"), "v".to_owned());
        let record = FutureRecord::to(topic).key(&key).payload(&value).partition(0);
        drop(producer.send_result(record).unwrap());
    }
    put(&producer, topic, 0, "last", Some("3")).await;

    let mut late = Follower::start(config, topic).unwrap();
    let all = caught_up(&mut late).await;
    assert_eq!(all.len(), 2_504);
    assert_eq!(all[..3], [change("a", Some("1")), change("b", Some("2")), change("a", None)]);
    assert_eq!(all[2_503], change("last", Some("3")));
    let mut seen = Vec::new();
    while seen.len() < all.len() {
        match next(&mut early).await {
            Followed::Changes(changes) => {
                assert!(changes.len() <= 1_000);
                seen.extend(changes);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, all, "who follows from before has seen the same");

    // A record without a key, or with any bytes, is passed on.
    let bytes: &[u8] = b"\xff\x00";
    let bare: FutureRecord<'_, (), [u8]> = FutureRecord::to(topic).payload(bytes).partition(0);
    let began = Instant::now();
    let is_accepted = producer.send(bare, LIMIT).await.is_ok();
    put(&producer, topic, 0, "now", Some("4")).await;
    let mut seen = Vec::new();
    while seen.last() != Some(&change("now", Some("4"))) {
        let Followed::Changes(changes) = next(&mut late).await else { panic!("no changes") };
        seen.extend(changes);
    }
    assert_eq!(seen.len(), 1 + usize::from(is_accepted), "{seen:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_holds_the_topic_and_what_changes() {
    follows(&apache().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_works_on_the_in_process_broker() {
    let (_broker, config) = embedded();
    follows(&config).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_topic_is_told_and_its_creation_is_noticed_and_more_partitions() {
    let kafka = Kafka::shared().await;
    let config = KafkaConfig { brokers: vec![kafka.brokers()], ..config() };
    let topic = &config.topics.revocations;
    let mut follower = Follower::start(&config, topic).unwrap();
    let Followed::Degraded(Error::Refused(why)) = next(&mut follower).await else { panic!() };
    assert!(why.contains(topic.as_str()) && why.contains("does not exist"), "{why}");
    ensure_topics(&config, LIMIT).await.unwrap();
    assert_eq!(next(&mut follower).await, Followed::CaughtUp);
    assert_eq!(next(&mut follower).await, Followed::Recovered);

    let admin: AdminClient<DefaultClientContext> = kafka.client().create().unwrap();
    let more = NewPartitions::new(topic, 2);
    admin.create_partitions(&[more], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    // Until the broker tells clients of the new partition.
    while producer(&config)
        .send(FutureRecord::to(topic).key("there").payload("1").partition(1), LIMIT)
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(next(&mut follower).await, Followed::Partitions(2));
    let told = next(&mut follower).await;
    assert_eq!(told, Followed::Changes(vec![change("there", Some("1"))]));
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_136_offsets_without_records_at_the_end_of_a_log_are_no_error() {
    let config = apache().await;
    let topic = &config.topics.revocations;
    let mut follower = Follower::start(&config, topic).unwrap();
    assert_eq!(caught_up(&mut follower).await, []);
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", config.brokers.join(","));
    client.set("transactional.id", unique("writer"));
    let producer: FutureProducer = client.create().unwrap();
    // The transaction's marker is behind its record.
    let committed = tokio::task::spawn_blocking(move || {
        producer.init_transactions(LIMIT).unwrap();
        producer.begin_transaction().unwrap();
        producer
    });
    let producer = committed.await.unwrap();
    put(&producer, topic, 0, "a", Some("1")).await;
    tokio::task::spawn_blocking(move || producer.commit_transaction(LIMIT).unwrap()).await.unwrap();
    assert_eq!(next(&mut follower).await, Followed::Changes(vec![change("a", Some("1"))]));
    // Two polls would see a log that does not arrive.
    let later = timeout(Duration::from_secs(22), follower.next()).await;
    assert!(later.is_err(), "{later:?}");
    put(&self::producer(&config), topic, 0, "b", Some("2")).await;
    assert_eq!(next(&mut follower).await, Followed::Changes(vec![change("b", Some("2"))]));
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_97_kafka_away_is_told_and_afterwards_nothing_is_missing() {
    let mut kafka = Kafka::start().await.unwrap();
    let mut config = KafkaConfig { brokers: vec![kafka.brokers()], ..config() };
    config.topics.revocations = unique("compacted");
    ensure_topics(&config, LIMIT).await.unwrap();
    let topic = config.topics.revocations.clone();
    let mut follower = Follower::start(&config, &topic).unwrap();
    assert_eq!(caught_up(&mut follower).await, []);
    put(&producer(&config), &topic, 0, "a", Some("1")).await;
    assert_eq!(next(&mut follower).await, Followed::Changes(vec![change("a", Some("1"))]));

    kafka.kill().unwrap();
    let mut without = Follower::start(&config, &topic).unwrap();
    for follower in [&mut follower, &mut without] {
        let Followed::Degraded(Error::Away(why)) = next(follower).await else { panic!() };
        assert!(why.starts_with(&config.brokers[0]), "{why}");
    }
    kafka.restart().await.unwrap();
    put(&producer(&config), &topic, 0, "b", Some("2")).await;
    let (mut changes, mut is_healed) = (Vec::new(), false);
    while changes.is_empty() || !is_healed {
        match next(&mut follower).await {
            Followed::Changes(more) => changes.extend(more),
            Followed::Recovered => is_healed = true,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(changes, [change("b", Some("2"))], "no record twice, none missing");
    let mut all = Vec::new();
    loop {
        match next(&mut without).await {
            Followed::Changes(more) => all.extend(more),
            Followed::CaughtUp => break,
            Followed::Recovered => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(all, [change("a", Some("1")), change("b", Some("2"))]);
}

/// The changes after the follower has begun again, until it has caught up.
async fn restarted(follower: &mut Follower) -> Vec<Change> {
    while next(follower).await != Followed::Restarted {}
    let mut all = Vec::new();
    loop {
        match next(follower).await {
            Followed::Changes(changes) => all.extend(changes),
            Followed::CaughtUp => return all,
            Followed::Degraded(_) | Followed::Recovered => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_134_a_topic_that_was_created_again_is_read_from_its_beginning() {
    let kafka = Kafka::shared().await;
    let config = apache().await;
    let topic = &config.topics.revocations;
    let producer = producer(&config);
    put(&producer, topic, 0, "old", Some("1")).await;
    put(&producer, topic, 0, "kept", Some("1")).await;
    let mut follower = Follower::start(&config, topic).unwrap();
    assert_eq!(caught_up(&mut follower).await.len(), 2);
    kafka.delete_topics(&[topic]).await.unwrap();
    // Until the broker has forgotten it.
    while ensure_topics(&config, LIMIT).await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // More than there were: the old position is within the new log.
    let names = ["kept", "b", "c", "d"];
    for name in names {
        put(&producer, topic, 0, name, Some("2")).await;
    }
    assert_eq!(restarted(&mut follower).await, names.map(|name| change(name, Some("2"))));
    put(&producer, topic, 0, "later", Some("3")).await;
    loop {
        match next(&mut follower).await {
            Followed::Changes(changes) => {
                break assert_eq!(changes, [change("later", Some("3"))]);
            }
            Followed::Degraded(_) | Followed::Recovered => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_compaction_removes_a_new_follower_does_not_see() {
    let kafka = Kafka::shared().await;
    let mut config = KafkaConfig { brokers: vec![kafka.brokers()], ..config() };
    config.topics.revocations = unique("compacted");
    let topic = &config.topics.revocations;
    kafka.create_compacted(topic).await.unwrap();
    let producer = producer(&config);
    for round in 1..=3 {
        put(&producer, topic, 0, "a", Some(&round.to_string())).await;
        put(&producer, topic, 0, "b", Some(&round.to_string())).await;
        // Only closed segments are compacted; the next record closes them.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }
    put(&producer, topic, 0, "last", Some("1")).await;
    let whole = [change("a", Some("3")), change("b", Some("3")), change("last", Some("1"))];
    let begun = Instant::now();
    loop {
        let mut follower = Follower::start(&config, topic).unwrap();
        let all = caught_up(&mut follower).await;
        if all == whole {
            break;
        }
        assert!(begun.elapsed() < LIMIT, "{all:?}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// The last batch is damaged on disk, where Kafka hands it out unseen.
fn damage(kafka: &Kafka, topic: &str) {
    let log = kafka.data().join(format!("{topic}-0")).join("00000000000000000000.log");
    let mut bytes = std::fs::read(&log).unwrap();
    let (mut at, mut last) = (0, 0);
    while at + 61 <= bytes.len() {
        last = at;
        at += 12 + u32::from_be_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
    }
    assert_eq!(bytes[last + 22] & 7, 1, "it is compressed with gzip");
    // Behind the batch's header of 61 bytes and gzip's of 10.
    for byte in &mut bytes[last + 71..last + 91] {
        *byte ^= 0x55;
    }
    std::fs::write(&log, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_136_a_batch_that_cannot_be_read_is_an_error_until_it_is_gone() {
    let mut kafka = Kafka::start().await.unwrap();
    let mut config = KafkaConfig { brokers: vec![kafka.brokers()], ..config() };
    config.topics.revocations = unique("compacted");
    ensure_topics(&config, LIMIT).await.unwrap();
    let topic = config.topics.revocations.clone();
    put(&producer(&config), &topic, 0, "a", Some("1")).await;
    let mut packing = ClientConfig::new();
    packing.set("bootstrap.servers", kafka.brokers()).set("compression.type", "gzip");
    let packing: FutureProducer = packing.create().unwrap();
    let long: String = (0..1_000).map(|n| n.to_string()).collect();
    put(&packing, &topic, 0, "b", Some(&long)).await;
    kafka.stop().await.unwrap();
    damage(&kafka, &topic);
    kafka.restart().await.unwrap();

    let mut follower = Follower::start(&config, &topic).unwrap();
    let mut changes = Vec::new();
    let error = loop {
        match next(&mut follower).await {
            Followed::Changes(more) => changes.extend(more),
            Followed::Degraded(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    eprintln!("a damaged batch: {error}");
    assert_eq!(changes, [change("a", Some("1"))]);
    assert!(timeout(Duration::from_secs(3), follower.next()).await.is_err(), "the error stays");
    kafka.delete_topics(&[&topic]).await.unwrap();
    while ensure_topics(&config, LIMIT).await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    put(&producer(&config), &topic, 0, "c", Some("3")).await;
    assert_eq!(restarted(&mut follower).await, [change("c", Some("3"))]);
}
