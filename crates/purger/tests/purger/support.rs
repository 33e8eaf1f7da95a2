//! A purger in this process on a real Redis and a broker, what goes in, and what comes out.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_bus::{EmbeddedKafka, KafkaConfig, Producer, ensure_topics};
use barid_core::{
    AppId, Attempt, ConnectionId, DeviceId, Incarnation, NodeId, ReceiptSet, SessionRef, Shard,
    UserId,
};
use barid_mailbox::{ConnectOutcome, ConnectRequest, Inspection, Mailbox, RedisConfig, UserKey};
use barid_purger::{Config, Handoff, Service};
use barid_runtime::{Context, SecretUrl, Stopped};
use barid_testkit::kafka::unique;
use barid_testkit::{Kafka, Redis, records};
use barid_wire::envelope;
use barid_wire::internal;
use barid_wire::record::{Push, decode_receipt};
use barid_wire::v1::Receipt;
use bytes::Bytes;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

pub const LIMIT: Duration = Duration::from_secs(40);

/// Keeps what it is handed.
#[derive(Clone, Default)]
pub struct Kept(pub Arc<Mutex<Vec<internal::Push>>>);

impl Handoff for Kept {
    async fn push(&self, _shard: Shard, push: internal::Push) {
        self.0.lock().await.push(push);
    }
    fn any_available(&self) -> bool {
        true
    }
    async fn flush(&self, _deadline: tokio::time::Instant) -> usize {
        0
    }
}

pub struct World {
    pub redis: Redis,
    pub config: Config,
    pub mailbox: Mailbox,
    pub producer: Producer,
    pub handed: Kept,
    pub embedded: Option<EmbeddedKafka>,
}

/// A purger of this world, in this process.
pub struct Running {
    pub context: Context,
    pub task: JoinHandle<Result<Stopped, barid_purger::Error>>,
}

/// A record as a reader gets it.
#[derive(Debug)]
pub struct Letter {
    pub key: Option<Bytes>,
    pub value: Bytes,
    pub headers: Vec<(String, Bytes)>,
}

impl World {
    pub async fn new(embedded: bool) -> Self {
        if embedded { Self::made(None, true).await } else { Self::on(Kafka::shared().await).await }
    }

    /// On a broker of one's own, with its topics.
    pub async fn on(kafka: &Kafka) -> Self {
        Self::made(Some(kafka), true).await
    }

    /// Without any topic.
    pub async fn bare(kafka: &Kafka) -> Self {
        Self::made(Some(kafka), false).await
    }

    async fn made(kafka: Option<&Kafka>, topics: bool) -> Self {
        let redis = Redis::start().await.unwrap();
        let mut config =
            Config { commit_interval_ms: 100, topic_refresh_ms: 300, ..Default::default() };
        config.redis = RedisConfig {
            url: SecretUrl::new(redis.url()),
            response_timeout_ms: 500,
            ..Default::default()
        };
        config.kafka = KafkaConfig { partitions: 4, group: unique("group"), ..Default::default() };
        let names = &mut config.kafka.topics;
        for name in [
            &mut names.push_high,
            &mut names.push,
            &mut names.push_bulk,
            &mut names.receipts,
            &mut names.revocations,
            &mut names.dead,
        ] {
            *name = unique(name);
        }
        let embedded = match kafka {
            None => Some(EmbeddedKafka::start(&mut config.kafka).unwrap()),
            Some(kafka) => {
                config.kafka.brokers = vec![kafka.brokers()];
                None
            }
        };
        if kafka.is_some() && topics {
            ensure_topics(&config.kafka, LIMIT).await.unwrap();
        }
        let mailbox = Mailbox::open(&config.redis, &Context::new().metrics).await.unwrap();
        let producer = Producer::new(&config.kafka).unwrap();
        Self { redis, config, mailbox, producer, handed: Kept::default(), embedded }
    }

    pub async fn start(&self) -> Running {
        self.start_with(Context::new()).await
    }

    pub async fn start_with(&self, context: Context) -> Running {
        let mailbox = Mailbox::open(&self.config.redis, &context.metrics).await.unwrap();
        let (config, handed) = (self.config.clone(), self.handed.clone());
        let service = Service::start(config, mailbox, handed, context.clone()).unwrap();
        Running { context, task: tokio::spawn(service.work()) }
    }

    pub async fn produce(&self, key: &str, value: impl Into<Bytes>) {
        let topic = &self.config.kafka.topics.push;
        self.producer.send(topic, key.as_bytes(), value.into(), &[]).await.unwrap();
    }

    /// `count` messages for alice, ids `from..`, in order.
    pub async fn produce_to_alice(&self, from: usize, count: usize) {
        for i in from..from + count {
            self.produce("alice", record(&i.to_string(), "alice")).await;
        }
    }

    /// A device of the user is online.
    pub async fn connect(&self, user: &str) {
        let connect = ConnectRequest {
            user: key(user),
            device: DeviceId::new("phone").unwrap(),
            session: SessionRef {
                node: NodeId::new("a").unwrap(),
                incarnation: Incarnation(1),
                connection: ConnectionId(1),
            },
            attempt: Attempt(1),
            platform: "test".into(),
            position: None,
        };
        let connected = self.mailbox.connect(connect).await.unwrap();
        assert!(matches!(connected, ConnectOutcome::Connected { .. }));
    }

    /// Asks until Redis answers: some tests stop it.
    pub async fn inspect(&self, user: &str) -> Inspection {
        let end = Instant::now() + LIMIT;
        loop {
            match self.mailbox.inspect(&key(user)).await {
                Ok(inspection) => return inspection,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
        }
    }

    pub async fn ids(&self, user: &str) -> Vec<String> {
        let entries = self.inspect(user).await.mailbox.entries;
        entries.into_iter().map(|entry| envelope::decode(entry).unwrap().1.id).collect()
    }

    /// Waits until a user's mailbox has so many entries.
    pub async fn has(&self, user: &str, count: usize) {
        let end = Instant::now() + LIMIT;
        loop {
            let ids = self.ids(user).await;
            if ids.len() >= count {
                assert_eq!(ids.len(), count);
                return;
            }
            assert!(Instant::now() < end, "{user} has {ids:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sets an option of a topic.
    pub async fn configure(&self, topic: &str, option: &str, value: &str) {
        let admin: AdminClient<DefaultClientContext> = self.client().create().unwrap();
        let set = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(option, value);
        for outcome in admin.alter_configs([&set], &AdminOptions::new()).await.unwrap() {
            outcome.unwrap();
        }
    }

    /// Lets the topics of records and dead letters take records of so many bytes.
    pub async fn raise_limit(&self, bytes: u32) {
        let admin: AdminClient<DefaultClientContext> = self.client().create().unwrap();
        let topics = &self.config.kafka.topics;
        let value = bytes.to_string();
        let limit = |topic| {
            AlterConfig::new(ResourceSpecifier::Topic(topic)).set("max.message.bytes", &value)
        };
        let limits = [limit(&topics.push), limit(&topics.dead)];
        for outcome in admin.alter_configs(&limits, &AdminOptions::new()).await.unwrap() {
            outcome.unwrap();
        }
    }

    /// For records as no client of Barid's makes them.
    pub fn raw_producer(&self) -> FutureProducer {
        self.client().set("message.max.bytes", "20000000").create().unwrap()
    }

    /// Produces to the first partition, whatever the key; gives the offset.
    pub async fn produce_raw(
        &self,
        producer: &FutureProducer,
        key: Option<&str>,
        value: Option<&[u8]>,
        headers: &[(String, Vec<u8>)],
    ) -> i64 {
        let headers = headers.iter().fold(OwnedHeaders::new(), |owned, (name, value)| {
            owned.insert(Header { key: name, value: Some(value) })
        });
        let mut record = FutureRecord::to(&self.config.kafka.topics.push).partition(0);
        record.key = key.map(str::as_bytes);
        record.payload = value;
        producer.send(record.headers(headers), LIMIT).await.unwrap().offset
    }

    fn client(&self) -> rdkafka::ClientConfig {
        let mut config = rdkafka::ClientConfig::new();
        config.set("bootstrap.servers", self.config.kafka.brokers.join(","));
        config
    }

    /// Reads the first `count` records of a topic; fewer if no more come.
    async fn read(&self, topic: &str, count: usize) -> Vec<Letter> {
        let mut config = self.client();
        config.set("group.id", unique("reader")).set("auto.offset.reset", "earliest");
        let topic = topic.to_owned();
        let read = move || {
            let reader: BaseConsumer = config.create().unwrap();
            reader.subscribe(&[&topic]).unwrap();
            let (mut records, mut heard) = (Vec::new(), Instant::now());
            while records.len() < count && heard.elapsed() < LIMIT {
                let Some(message) = reader.poll(Duration::from_millis(200)) else { continue };
                let Ok(message) = message else { continue };
                heard = Instant::now();
                let bytes =
                    |bytes: Option<&[u8]>| Bytes::copy_from_slice(bytes.unwrap_or_default());
                let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
                records.push(Letter {
                    key: message.key().map(Bytes::copy_from_slice),
                    value: bytes(message.payload()),
                    headers: headers.map(|h| (h.key.to_owned(), bytes(h.value))).collect(),
                });
            }
            records
        };
        tokio::task::spawn_blocking(read).await.unwrap()
    }

    pub async fn letters(&self, count: usize) -> Vec<Letter> {
        self.read(&self.config.kafka.topics.dead, count).await
    }

    pub async fn receipts(&self, count: usize) -> Vec<Receipt> {
        let mut receipts: Vec<Receipt> = self
            .read(&self.config.kafka.topics.receipts, count)
            .await
            .into_iter()
            .map(|letter| {
                let receipt = decode_receipt(&letter.value).unwrap();
                assert_eq!(letter.key.as_deref(), Some(receipt.id.as_bytes()));
                receipt
            })
            .collect();
        assert_eq!(receipts.len(), count, "{receipts:?}");
        receipts.sort_by(|a, b| (&a.id, a.kind).cmp(&(&b.id, b.kind)));
        receipts
    }
}

impl Running {
    pub async fn stop(self) -> Stopped {
        self.context.shutdown.begin(Duration::from_secs(10));
        tokio::time::timeout(LIMIT, self.task).await.unwrap().unwrap().unwrap()
    }

    /// As `kill -9`, as far as one process can: nothing is finished, nothing committed.
    pub fn kill(self) {
        self.task.abort();
    }

    /// The value of a counter for one label.
    pub fn metric_of(&self, name: &str, label: &str) -> f64 {
        let families = self.context.metrics.gather();
        let family = families.iter().find(|f| f.name() == format!("barid_purger_{name}"));
        let metrics = family.map(|f| f.get_metric()).unwrap_or_default();
        let of_label = |m: &&prometheus::proto::Metric| m.get_label()[0].value() == label;
        metrics.iter().filter(of_label).map(|m| m.get_counter().get_value()).sum()
    }

    /// The value of a gauge for one label.
    pub fn gauge_of(&self, name: &str, label: &str) -> f64 {
        let families = self.context.metrics.gather();
        let family = families.iter().find(|f| f.name() == format!("barid_purger_{name}"));
        let metrics = family.map(|f| f.get_metric()).unwrap_or_default();
        let of_label = |m: &&prometheus::proto::Metric| m.get_label()[0].value() == label;
        metrics.iter().filter(of_label).map(|m| m.get_gauge().get_value()).sum()
    }

    pub fn metric(&self, name: &str) -> f64 {
        let families = self.context.metrics.gather();
        let family = families.iter().find(|f| f.name() == format!("barid_purger_{name}"));
        let metrics = family.map(|f| f.get_metric()).unwrap_or_default();
        metrics.iter().map(|m| m.get_counter().get_value() + m.get_gauge().get_value()).sum()
    }

    pub async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(self) {
            assert!(Instant::now() < end, "{what}: {:?}", self.context.health.not_ready());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a condition fails with a reason in which all of these words are; the reason.
    pub async fn fails(&self, condition: &str, words: &[&str]) -> String {
        let reason = |this: &Self| {
            let failing = this.context.health.not_ready();
            let found = failing.into_iter().find(|(name, _)| *name == condition);
            found.map(|(_, reason)| reason).filter(|r| words.iter().all(|word| r.contains(word)))
        };
        self.until(condition, |this| reason(this).is_some()).await;
        reason(self).unwrap_or_default()
    }

    pub async fn ready(&self) {
        self.until("ready", |this| this.context.health.not_ready().is_empty()).await;
    }
}

pub fn key(user: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(user).unwrap() }
}

/// A record as most tests produce it.
pub fn message(id: &str, user: &str) -> Push {
    records::text(user, id, "hello")
}

/// Its JSON.
pub fn record(id: &str, user: &str) -> Bytes {
    records::json(&message(id, user))
}

/// Likewise, asking for receipts.
pub fn asking(id: &str, user: &str, receipts: ReceiptSet) -> Bytes {
    records::json(&Push { receipts, ..message(id, user) })
}

pub fn expected(count: usize) -> Vec<String> {
    (0..count).map(|i| i.to_string()).collect()
}
