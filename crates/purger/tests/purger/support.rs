//! A purger in this process on a real Redis and a broker, what goes in, and what comes out.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_bus::{EmbeddedKafka, KafkaConfig, Producer, ensure_topics};
use barid_core::{AppId, Shard, UserId};
use barid_mailbox::{Inspection, Mailbox, RedisConfig, UserKey};
use barid_purger::{Config, Handoff, Service};
use barid_runtime::{Context, SecretUrl, Stopped};
use barid_testkit::kafka::unique;
use barid_testkit::{Kafka, Redis};
use barid_wire::envelope;
use barid_wire::internal::Push;
use barid_wire::record::decode_receipt;
use barid_wire::v1::Receipt;
use bytes::Bytes;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

pub const LIMIT: Duration = Duration::from_secs(40);

/// Keeps what it is handed.
#[derive(Clone, Default)]
pub struct Kept(pub Arc<Mutex<Vec<Push>>>);

impl Handoff for Kept {
    async fn push(&self, _shard: Shard, push: Push) {
        self.0.lock().await.push(push);
    }
    async fn any_available(&self) -> bool {
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

impl World {
    pub async fn new(embedded: bool) -> Self {
        let redis = Redis::start().await.unwrap();
        let mut config =
            Config { commit_interval_ms: 100, topic_refresh_ms: 300, ..Default::default() };
        config.redis = RedisConfig {
            url: SecretUrl::new(redis.url()),
            response_timeout_ms: 500,
            ..Default::default()
        };
        config.kafka = KafkaConfig { partitions: 4, group: unique("group"), ..Default::default() };
        let topics = &mut config.kafka.topics;
        for name in [
            &mut topics.push_high,
            &mut topics.push,
            &mut topics.push_bulk,
            &mut topics.receipts,
            &mut topics.dead,
        ] {
            *name = unique(name);
        }
        let embedded = if embedded {
            Some(EmbeddedKafka::start(&mut config.kafka).unwrap())
        } else {
            config.kafka.brokers = vec![Kafka::shared().await.brokers()];
            ensure_topics(&config.kafka, LIMIT).await.unwrap();
            None
        };
        let mailbox = Mailbox::open(&config.redis, &Context::new().metrics).await.unwrap();
        let producer = Producer::new(&config.kafka).unwrap();
        Self { redis, config, mailbox, producer, handed: Kept::default(), embedded }
    }

    pub async fn start(&self) -> Running {
        let context = Context::new();
        let mailbox = Mailbox::open(&self.config.redis, &context.metrics).await.unwrap();
        let service =
            Service::new(self.config.clone(), mailbox, self.handed.clone(), &context).unwrap();
        let task = tokio::spawn({
            let context = context.clone();
            async move { service.run(&context).await }
        });
        Running { context, task }
    }

    pub async fn produce(&self, key: &str, value: impl Into<Bytes>) {
        let topic = &self.config.kafka.topics.push;
        self.producer.send(topic, key.as_bytes(), value.into(), &[]).await.unwrap();
    }

    /// `count` messages for alice, ids `from..`, in order.
    pub async fn produce_to_alice(&self, from: usize, count: usize) {
        for i in from..from + count {
            self.produce("alice", record(&i.to_string(), "alice", "")).await;
        }
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
        let entries = self.inspect(user).await.entries;
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

    /// Reads a topic from its start: keys, values, and headers as text.
    pub async fn read(
        &self,
        topic: &str,
        count: usize,
    ) -> Vec<(String, Bytes, Vec<(String, String)>)> {
        let mut config = rdkafka::ClientConfig::new();
        config
            .set("bootstrap.servers", self.config.kafka.brokers.join(","))
            .set("group.id", unique("reader"))
            .set("auto.offset.reset", "earliest");
        let topic = topic.to_owned();
        let read = move || {
            let reader: BaseConsumer = config.create().unwrap();
            reader.subscribe(&[&topic]).unwrap();
            let (mut records, end) = (Vec::new(), Instant::now() + LIMIT);
            while records.len() < count && Instant::now() < end {
                let Some(message) = reader.poll(Duration::from_millis(200)) else { continue };
                let Ok(message) = message else { continue };
                let text = |bytes: Option<&[u8]>| {
                    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
                };
                let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
                records.push((
                    text(message.key()),
                    Bytes::copy_from_slice(message.payload().unwrap_or_default()),
                    headers.map(|h| (h.key.to_owned(), text(h.value))).collect(),
                ));
            }
            records
        };
        let records = tokio::task::spawn_blocking(read).await.unwrap();
        assert_eq!(records.len(), count, "{records:?}");
        records
    }

    pub async fn receipts(&self, count: usize) -> Vec<Receipt> {
        let mut receipts: Vec<Receipt> = self
            .read(&self.config.kafka.topics.receipts, count)
            .await
            .into_iter()
            .map(|(key, value, _)| {
                let receipt = decode_receipt(&value).unwrap();
                assert_eq!(key, receipt.id);
                receipt
            })
            .collect();
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

    pub async fn ready(&self) {
        self.until("ready", |this| this.context.health.not_ready().is_empty()).await;
    }
}

pub fn key(user: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(user).unwrap() }
}

pub fn record(id: &str, user: &str, more: &str) -> String {
    format!(r#"{{"id":"{id}","app":"demo","to":{{"user":"{user}"}},"text":"hello"{more}}}"#)
}

pub fn expected(count: usize) -> Vec<String> {
    (0..count).map(|i| i.to_string()).collect()
}
