//! The consumer and the producers against librdkafka's in-process broker and against Apache Kafka:
//! both have to behave alike.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

mod follower;

use std::collections::HashMap;
use std::time::Duration;

use barid_bus::consumer::{
    Assigned, Commit, Consumer, Consuming, Done, Event, Partition, Reach, Record,
};
use barid_bus::{
    DeadLetter, DeadLetters, EmbeddedKafka, GroupProtocol, KafkaConfig, Memory, Metadata, Producer,
    Properties, Receipts, TopicSource, describe_topics, ensure_topics, probe_revocations,
};
use barid_core::LogPosition;
use barid_runtime::Unfit;
use barid_testkit::Kafka;
use barid_testkit::certificates::Authority;
use barid_testkit::kafka::{KafkaOptions, unique};
use barid_wire::v1::Receipt;
use bytes::Bytes;
use prometheus::IntCounter;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
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
        &mut topics.revocations,
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
    assert_eq!(ensure_topics(&config, LIMIT).await.unwrap().len(), 6);
    let again = ensure_topics(&config, LIMIT).await.expect("topics that exist stay");
    assert!(again.is_empty(), "{again:?}");
    config
}

fn embedded() -> (EmbeddedKafka, KafkaConfig) {
    let mut config = config();
    let kafka = EmbeddedKafka::start(&mut config).unwrap();
    (kafka, config)
}

async fn assign(consumer: &mut Consumer<Consuming>, partitions: &[Partition]) -> Vec<Assigned> {
    let planned = consumer.plan(partitions).await.unwrap();
    consumer.take_up(&planned).unwrap();
    planned
}

/// Assigns, and takes records until there are `count`.
async fn take(consumer: &mut Consumer<Consuming>, count: usize) -> Vec<Record> {
    take_noting(consumer, count, &mut Vec::new()).await
}

async fn take_noting(
    consumer: &mut Consumer<Consuming>,
    count: usize,
    assigned: &mut Vec<Assigned>,
) -> Vec<Record> {
    let mut records = Vec::new();
    let taking = async {
        while records.len() < count {
            while let Some(event) = consumer.poll() {
                if let Event::Assigned(partitions) = event {
                    assigned.extend(assign(consumer, &partitions).await);
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

/// A commit of a partition whose `shards` shards have confirmed something.
fn commit(ids: &HashMap<String, String>, partition: Partition, shards: u16) -> Commit {
    let source = match ids.get(&*partition.topic) {
        Some(id) => TopicSource::Id(id.as_str().into()),
        None => TopicSource::Name(partition.topic.clone()),
    };
    let at = |shard| LogPosition { leader_epoch: 7, offset: 1_000 - i64::from(shard), index: 2 };
    let memory = Memory {
        confirmed: (0..shards).map(|shard| (shard, at(shard))).collect(),
        epochs: [(6, 3), (7, 900)].into(),
    };
    let metadata = Metadata { source: Some(source), id: None, memory };
    Commit { partition, offset: 1_000, metadata }
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
    consumer.seek(&partition, 3).await.unwrap();
    assert_eq!(take(&mut consumer, 2).await[0].offset, 3);
    let commit = Commit { offset: 4, ..commit(&ids, partition, 64) };
    let left_out = consumer.commit_and_wait(vec![commit.clone()], LIMIT).await.unwrap();
    assert_eq!(left_out, 0);
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    let mut again = start(&config);
    let mut assigned = Vec::new();
    assert_eq!(take_noting(&mut again, 1, &mut assigned).await[0].offset, 4);
    let found = assigned.iter().find(|a| a.partition == commit.partition).unwrap();
    assert_eq!((found.start, &found.memory), (Some(4), &commit.metadata.memory));
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

/// Follows the group's assignments from one member for `span`.
async fn follow(consumer: &mut Consumer<Consuming>, held: &mut Vec<Partition>, span: Duration) {
    let end = Instant::now() + span;
    while Instant::now() < end {
        while let Some(event) = consumer.poll() {
            match event {
                Event::Assigned(partitions) => {
                    assign(consumer, &partitions).await;
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
    let partition = Partition { topic: records[0].topic.clone(), number: records[0].partition };
    let commit = Commit { offset: 2, ..commit(&old_ids, partition, 3) };
    Kafka::shared().await.delete_topics(&[&config.topics.push]).await.unwrap();
    ensure_topics(&config, LIMIT).await.unwrap();
    produce(&config, 4).await;
    // The offset of the old life stands in the group, as after a crash between the two.
    let _ = consumer.commit_and_wait(vec![commit], LIMIT).await;
    assert_ne!(consumer.topic_ids().await.unwrap(), old_ids);
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    let mut again = start(&config);
    let mut assigned = Vec::new();
    let records = take_noting(&mut again, 4, &mut assigned).await;
    assert_eq!(records[0].offset, 0);
    assert!(assigned.iter().all(|a| a.memory == Memory::default()), "of the old life");
    assert_eq!(again.drain().finish(LIMIT).await, Done::Left);
}

/// Commits for every partition of the push topic; what the next member is told of them.
async fn remembered(config: &KafkaConfig, shards: u16) -> (usize, Vec<Assigned>) {
    produce(config, 1).await;
    let mut consumer = start(config);
    let records = take(&mut consumer, 1).await;
    let ids = consumer.topic_ids().await.unwrap();
    let topic = records[0].topic.clone();
    let commits = (0..i32::from(config.partitions)).map(|number| {
        let partition = Partition { topic: topic.clone(), number };
        // The record is to be taken by the next, too.
        Commit { offset: 0, ..commit(&ids, partition, shards) }
    });
    let commits: Vec<Commit> = commits.collect();
    let left_out = consumer.commit_and_wait(commits, LIMIT).await.unwrap();
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    let (mut again, mut assigned) = (start(config), Vec::new());
    take_noting(&mut again, 1, &mut assigned).await;
    assert_eq!(again.drain().finish(LIMIT).await, Done::Left);
    assigned.retain(|a| a.partition.topic == topic);
    assert_eq!(assigned.len(), usize::from(config.partitions));
    assert!(assigned.iter().all(|a| a.start == Some(0)), "a partition was not committed");
    (left_out, assigned)
}

#[tokio::test]
async fn hazard_26_a_commit_never_fails_for_what_it_says_of_the_shards() {
    let property = ("offset.metadata.max.bytes".to_owned(), "64".to_owned());
    let options = KafkaOptions { properties: vec![property], ..Default::default() };
    let kafka = Kafka::start_with(options).await.unwrap();
    let config = KafkaConfig { brokers: vec![kafka.brokers()], ..config() };
    ensure_topics(&config, LIMIT).await.unwrap();
    let (left_out, assigned) = remembered(&config, 64).await;
    assert!(left_out > 3 * 32, "{left_out}");
    // The topic's id, and those with the highest positions, as far as they fit.
    for Assigned { source, memory, .. } in assigned {
        assert!(matches!(source, TopicSource::Id(_)));
        assert!(memory.confirmed.keys().all(|shard| *shard < 32));
    }
}

#[tokio::test]
async fn hazard_26_a_commit_of_many_partitions_fits_into_one_batch() {
    let many = KafkaConfig { partitions: 600, metadata_bytes_max: 3_000, ..config() };
    let config = KafkaConfig { brokers: vec![Kafka::shared().await.brokers()], ..many };
    Kafka::shared().await.create_topics(&[&config.topics.push], 600).await.unwrap();
    let few = KafkaConfig { partitions: 1, ..config.clone() };
    ensure_topics(&few, LIMIT).await.unwrap();
    let (left_out, assigned) = remembered(&config, 256).await;
    assert!(left_out > 0 && assigned.iter().all(|a| !a.memory.confirmed.is_empty()));
}

#[tokio::test]
async fn a_log_tells_how_far_it_reaches_and_what_is_not_older_than_a_time() {
    let config = apache().await;
    produce(&config, 3).await;
    let mut consumer = start(&config);
    let records = take(&mut consumer, 3).await;
    let partition = Partition { topic: records[0].topic.clone(), number: records[0].partition };
    let second = records[1].timestamp_ms.unwrap();
    let reach = async |since_ms| consumer.reach(&partition, since_ms).await.unwrap();
    assert_eq!(reach(0).await, Reach { low: 0, high: 3, since: 0 });
    let since = reach(second).await.since;
    assert!(records[since as usize].timestamp_ms.unwrap() >= second && since <= 1);
    assert_eq!(reach(second + 3_600_000).await.since, 3, "all of it is older");
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    // librdkafka's own broker knows no times: all of its log counts as new enough.
    let (_kafka, config) = embedded();
    produce(&config, 3).await;
    let mut consumer = start(&config);
    let records = take(&mut consumer, 3).await;
    let partition = Partition { topic: records[0].topic.clone(), number: records[0].partition };
    let reach = consumer.reach(&partition, second + 3_600_000).await.unwrap();
    assert_eq!(reach, Reach { low: 0, high: 3, since: 0 });
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
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

#[tokio::test(flavor = "multi_thread")]
async fn hazard_68_a_request_under_way_keeps_no_member_in_its_group() {
    let (kafka, config) = embedded();
    produce(&config, 1).await;
    let mut consumer = start(&config);
    let records = take(&mut consumer, 1).await;
    let partition = Partition { topic: records[0].topic.clone(), number: records[0].partition };
    // ListOffsets; the request gives up after five seconds.
    kafka.delay_answers(2, 10, LIMIT);
    let request = tokio::spawn(consumer.reach(&partition, 0));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(consumer.drain().finish(LIMIT).await, Done::Left);
    let (mut next, mut held) = (start(&config), Vec::new());
    while held.len() != 9 {
        assert!(!request.is_finished(), "it was still a member: the next has {held:?}");
        follow(&mut next, &mut held, Duration::from_millis(20)).await;
    }
    assert!(!request.is_finished(), "it was still a member");
    assert!(request.await.unwrap().is_err());
    assert_eq!(next.drain().finish(LIMIT).await, Done::Left);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_69_a_record_that_its_topic_rejects_delays_no_other() {
    let config = KafkaConfig { brokers: vec![Kafka::shared().await.brokers()], ..config() };
    // A compacted topic takes no record without a key. The topic of receipts does not exist, so that a
    // receipt is under way until librdkafka is sure of that, half a minute.
    let admin: AdminClient<DefaultClientContext> = Kafka::shared().await.client().create().unwrap();
    let compacted = NewTopic::new(&config.topics.dead, 1, TopicReplication::Fixed(1))
        .set("cleanup.policy", "compact");
    admin.create_topics([&compacted], &AdminOptions::new()).await.unwrap()[0].clone().unwrap();
    let producer = Producer::new(&config).unwrap();
    let receipts = Receipts::new(producer.clone(), &config, dropped());
    let receipt = Receipt { id: "1".into(), ..Default::default() };
    let told = tokio::spawn(async move { receipts.deliver(&receipt).await });
    let count = dropped();
    let dead = DeadLetters::new(producer.clone(), &config, count.clone());
    let record = |key: Option<&'static str>| Record {
        topic: "source".into(),
        partition: 1,
        offset: 7,
        leader_epoch: 0,
        timestamp_ms: Some(9),
        key: key.map(Bytes::from),
        value: Bytes::from_static(b"value"),
        headers: Vec::new(),
    };
    let (keyed, keyless) = (record(Some("key")), record(None));
    let letter = |record| DeadLetter { record, code: "bad_id", reason: "why" };
    let (keyed, keyless) = (letter(&keyed), letter(&keyless));
    let writes = async {
        tokio::join!(dead.write(&keyless), dead.write(&keyed));
        dead.write(&keyed).await;
    };
    timeout(Duration::from_secs(15), writes).await.expect("they do not wait for the receipt");
    assert_eq!(count.get(), 1, "the one without a key");
    assert!(!told.is_finished());
    told.abort();
}

#[tokio::test]
async fn kafka_over_tls_with_sasl() {
    let authority = Authority::new().unwrap();
    let password = "a password: with 'quotes'".replace(['\'', ':', ' '], "-");
    let secured = Some((authority.issue().unwrap(), password.clone()));
    let kafka = Kafka::start_with(KafkaOptions { secured, ..Default::default() }).await.unwrap();
    let mut ca = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut ca, authority.pem().as_bytes()).unwrap();
    let ca = ca.path().display().to_string();
    let with = |mechanism: &str, password: &str| {
        let properties = [
            ("security.protocol", "SASL_SSL"),
            ("ssl.ca.location", &ca),
            ("sasl.mechanism", mechanism),
            ("sasl.username", "barid"),
            ("sasl.password", password),
        ];
        let pair = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let properties = Properties(properties.into_iter().map(pair).collect());
        KafkaConfig { brokers: vec![kafka.secured()], properties, ..config() }
    };
    for mechanism in ["SCRAM-SHA-512", "PLAIN"] {
        let config = with(mechanism, &password);
        assert_eq!(config.check(), Ok(()));
        ensure_topics(&config, LIMIT).await.unwrap();
        produce(&config, 3).await;
        assert_eq!(take(&mut start(&config), 3).await.len(), 3);
    }
    let wrong = ensure_topics(&with("PLAIN", "another"), Duration::from_secs(3)).await;
    assert!(wrong.is_err(), "a wrong password");
}

#[tokio::test]
async fn topics_that_do_not_fit_are_told_with_what_to_set() {
    let config = apache().await;
    let fits = describe_topics(&config, LIMIT).await.unwrap();
    assert!(fits.iter().all(|topic| topic.problems.is_empty()), "{fits:?}");
    assert_eq!(fits[1].partitions, 3);
    assert!(fits.iter().all(|topic| topic.settings.contains_key("retention.ms")));

    let mut odd = config.clone();
    for (name, settings) in [
        (&mut odd.topics.push, [("cleanup.policy", "compact"), ("max.message.bytes", "2000000")]),
        (&mut odd.topics.dead, [("min.insync.replicas", "2"), ("max.message.bytes", "1000000")]),
        (&mut odd.topics.revocations, [("cleanup.policy", "delete"), ("retention.ms", "1000")]),
    ] {
        *name = unique("odd");
        let topic = NewTopic::new(name, 1, TopicReplication::Fixed(1));
        let topic = settings.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
        let admin: AdminClient<DefaultClientContext> =
            Kafka::shared().await.client().create().unwrap();
        admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }
    odd.topics.receipts = "nowhere".into();
    let topics = describe_topics(&odd, LIMIT).await.unwrap();
    let told = |name: &str| {
        let topic = topics.iter().find(|topic| topic.name == name).unwrap();
        topic.problems.join("; ")
    };
    assert!(told(&odd.topics.push).contains("cleanup.policy=delete"));
    let dead = told(&odd.topics.dead);
    assert!(dead.contains("max.message.bytes=2004096") && dead.contains("min.insync"), "{dead}");
    assert!(told("nowhere").contains("does not exist"));
    assert!(told(&odd.topics.revocations).contains("set cleanup.policy=compact"));
    let probe = probe_revocations(&odd, LIMIT).await.unwrap();
    assert_eq!(probe.name, format!("topic {}", odd.topics.revocations));
    let Err(Unfit::Unusable(why)) = probe.found else { panic!("it fits") };
    assert!(why.contains("set cleanup.policy=compact"), "{why}");
    assert!(probe_revocations(&config, LIMIT).await.is_none());

    let (_broker, config) = embedded();
    let topics = describe_topics(&config, LIMIT).await.unwrap();
    assert!(topics.iter().all(|topic| topic.problems.is_empty()), "{topics:?}");
}
