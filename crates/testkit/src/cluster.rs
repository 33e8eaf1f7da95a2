//! A whole cluster: Barid's binaries, real Kafka, real Redis, with verbs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message as _};
use serde_json::{Value as Json, json};
use toml::{Table, Value};

use crate::checker::Place;
use crate::kafka::{KafkaOptions, unique};
use crate::ports::free_port;
use crate::process::Process;
use crate::redis::RedisOptions;
use crate::spawner::Scratch;
use crate::{Device, Kafka, Redis, RedisCluster, http, paths, token};

/// How long a role may take to come up or to leave, on a machine that runs other tests as well.
const ROLE_LIMIT: Duration = Duration::from_secs(30);

/// How often roles look at the table of nodes.
const NODES_REFRESH_MS: i64 = 100;

/// Seconds that roles are given to drain.
const DRAIN_SECONDS: i64 = 5;

/// The tenant that tests use unless they say otherwise.
pub const APP: &str = "demo";

/// One of the four roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `barid-purger`
    Purger,
    /// `barid-dispatcher`
    Dispatcher,
    /// `barid-delayer`
    Delayer,
    /// `barid-access`
    Access,
}

impl Role {
    /// All of them, in the order in which a full stop goes.
    pub const ALL: [Self; 4] = [Self::Purger, Self::Dispatcher, Self::Delayer, Self::Access];

    /// As in `barid-<name>`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Purger => "purger",
            Self::Dispatcher => "dispatcher",
            Self::Delayer => "delayer",
            Self::Access => "access",
        }
    }

    /// The binary.
    ///
    /// # Errors
    /// It was not built.
    pub fn binary(self) -> Result<PathBuf> {
        paths::binary(&format!("barid-{}", self.name()))
    }
}

/// Describes a cluster; [`Cluster::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    counts: BTreeMap<Role, usize>,
    settings: Vec<(Option<Role>, String, Value)>,
    partitions: i32,
    own_kafka: Option<KafkaOptions>,
    redis: RedisOptions,
    masters: Option<u16>,
    variables: Vec<(Role, String, String)>,
    quiet: bool,
}

impl Builder {
    /// How many nodes of a role there are (one, unless told).
    #[must_use]
    pub fn nodes(mut self, role: Role, count: usize) -> Self {
        self.counts.insert(role, count);
        self
    }

    /// Sets `key` (dotted) in every role's configuration.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.settings.push((None, key.into(), value.into()));
        self
    }

    /// Sets `key` (dotted) in one role's configuration.
    #[must_use]
    pub fn set_of(mut self, role: Role, key: &str, value: impl Into<Value>) -> Self {
        self.settings.push((Some(role), key.into(), value.into()));
        self
    }

    /// Sets a variable in the environment of one role's processes.
    #[must_use]
    pub fn variable_of(mut self, role: Role, name: &str, value: &str) -> Self {
        self.variables.push((role, name.into(), value.into()));
        self
    }

    fn variables_of(&self, role: Role) -> Vec<(String, String)> {
        let of = self.variables.iter().filter(|(of, ..)| *of == role);
        of.map(|(_, name, value)| (name.clone(), value.clone())).collect()
    }

    /// Partitions of the push topics (4, unless told).
    #[must_use]
    pub fn partitions(mut self, partitions: i32) -> Self {
        self.partitions = partitions;
        self
    }

    /// A Kafka that no other test uses, so that it may be killed.
    #[must_use]
    pub fn own_kafka(self) -> Self {
        self.own_kafka_with(KafkaOptions::default())
    }

    /// As [`Builder::own_kafka`], with options.
    #[must_use]
    pub fn own_kafka_with(mut self, options: KafkaOptions) -> Self {
        self.own_kafka = Some(options);
        self
    }

    /// Does not print the end of the roles' output when it is dropped.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// A Redis that has written to disk what it answers, so that it may be killed
    /// (appendfsync always).
    #[must_use]
    pub fn durable_redis(mut self) -> Self {
        let settings = vec![("appendfsync".into(), "always".into())];
        self.redis = RedisOptions { append_only: true, settings };
        self
    }

    /// A Redis Cluster of so many masters, without replicas, in place of the one Redis:
    /// [`Cluster::masters`].
    #[must_use]
    pub fn redis_cluster(mut self, masters: u16) -> Self {
        self.masters = Some(masters);
        self
    }

    /// Starts everything and waits until every role says that it is ready.
    ///
    /// # Errors
    /// Something does not come up; shows the end of its output.
    pub async fn start(self) -> Result<Cluster> {
        let mut redis = Redis::down(self.redis.clone())?;
        let masters = match self.masters {
            Some(masters) => Some(RedisCluster::start_patient(masters).await?),
            None => {
                redis.restart().await?;
                None
            }
        };
        let own_kafka = match self.own_kafka.clone() {
            Some(options) => Some(Kafka::start_with(options).await?),
            None => None,
        };
        let kafka = match &own_kafka {
            Some(kafka) => kafka,
            None => Kafka::shared().await,
        };
        let topics = Topics::new();
        let names = topics.all();
        kafka.create_topics(&names.each_ref().map(String::as_str), self.partitions).await?;
        let client = kafka.client();
        let mut cluster = Cluster {
            dir: Scratch::new("barid-cluster-")?,
            builder: self,
            nodes: Vec::new(),
            redis,
            masters,
            own_kafka,
            client,
            topics,
        };
        for role in Role::ALL {
            let count = cluster.builder.counts.get(&role).copied().unwrap_or(1);
            for number in 0..count {
                cluster.add(role, number)?;
            }
        }
        cluster.wait_ready().await?;
        // A role is ready when it can work with what it knows of; who came up after it is seen at
        // the next look at the table of nodes. Until then pushes take the slow path.
        tokio::time::sleep(Duration::from_millis(2 * NODES_REFRESH_MS.unsigned_abs())).await;
        Ok(cluster)
    }
}

/// The topics of one cluster. The tests of a process share a broker, so each has its own names.
#[derive(Debug, Clone)]
pub struct Topics {
    /// What must not wait.
    pub high: String,
    /// The ordinary.
    pub push: String,
    /// What may wait.
    pub bulk: String,
    /// Receipts.
    pub receipts: String,
    /// What was refused.
    pub dead: String,
}

impl Topics {
    fn new() -> Self {
        let prefix = unique("t");
        let name = |rest: &str| format!("{prefix}.{rest}");
        Self {
            high: name("push.high"),
            push: name("push"),
            bulk: name("push.bulk"),
            receipts: name("receipts"),
            dead: name("dead"),
        }
    }

    fn all(&self) -> [String; 5] {
        [&self.high, &self.push, &self.bulk, &self.receipts, &self.dead].map(Clone::clone)
    }
}

/// One role's process, running or not.
#[derive(Debug)]
pub struct Node {
    /// Its role.
    pub role: Role,
    /// Which of its role, from 0.
    pub number: usize,
    process: Option<Process>,
    variables: Vec<(String, String)>,
    config: PathBuf,
    ready_file: PathBuf,
    log: PathBuf,
}

impl Node {
    fn name(&self) -> String {
        format!("{}-{}", self.role.name(), self.number)
    }

    fn launch(&mut self) -> Result<()> {
        let _ = std::fs::remove_file(&self.ready_file);
        let (name, binary) = (self.name(), self.role.binary()?);
        let process = Process::spawn(&name, binary, &self.log, |command| {
            command.arg("--config").arg(&self.config).env("RUST_BACKTRACE", "1");
            command.envs(self.variables.iter().cloned());
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// The running process.
    ///
    /// # Errors
    /// It is not running.
    pub fn process(&mut self) -> Result<&mut Process> {
        let name = self.name();
        self.process.as_mut().with_context(|| format!("{name} is not running"))
    }

    async fn addresses(&mut self) -> Result<BTreeMap<String, SocketAddr>> {
        let start = Instant::now();
        loop {
            if let Ok(text) = std::fs::read(&self.ready_file) {
                return serde_json::from_slice(&text).context("ready file");
            }
            self.process()?.must_run()?;
            if start.elapsed() > ROLE_LIMIT {
                bail!("{} is not up:\n{}", self.name(), self.process()?.tail(40));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Where a listener is bound: `admin`, `ws`, `grpc`. Waits until the role is up.
    ///
    /// # Errors
    /// It does not come up, or has no such listener.
    pub async fn address(&mut self, listener: &str) -> Result<SocketAddr> {
        let addresses = self.addresses().await?;
        addresses.get(listener).copied().with_context(|| format!("no {listener} in {addresses:?}"))
    }

    /// Waits until `/readyz` says yes.
    ///
    /// # Errors
    /// It does not; tells the reasons that it gave last.
    pub async fn ready(&mut self) -> Result<()> {
        let start = Instant::now();
        let admin = self.address("admin").await?;
        loop {
            self.process()?.must_run()?;
            let reasons = match http::get(admin, "/readyz").await {
                Ok((200, _)) => return Ok(()),
                Ok((_, body)) => body,
                Err(error) => error.to_string(),
            };
            if start.elapsed() > ROLE_LIMIT {
                let tail = self.process()?.tail(40);
                bail!("{} is not ready: {reasons}\n{tail}", self.name());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What it wrote so far.
    ///
    /// # Errors
    /// It has not been started.
    pub fn output(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("output of {}", self.name()))
    }

    /// All of its metrics, as Prometheus reads them.
    ///
    /// # Errors
    /// The admin endpoint does not answer.
    pub async fn metrics(&mut self) -> Result<String> {
        let admin = self.address("admin").await?;
        Ok(http::get(admin, "/metrics").await?.1)
    }

    /// The value of a metric (summed over its labels); 0 if it is not there.
    ///
    /// # Errors
    /// The admin endpoint does not answer.
    pub async fn metric(&mut self, name: &str) -> Result<f64> {
        let text = self.metrics().await?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let labelled = rest.starts_with('{') || rest.starts_with(' ');
            labelled.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok()).flatten()
        });
        Ok(values.sum())
    }
}

/// A running cluster. Everything ends and is removed on drop; the end of each role's output is
/// printed first, which the test harness shows if the test failed.
#[derive(Debug)]
pub struct Cluster {
    // Processes end before what they rest on.
    nodes: Vec<Node>,
    /// Its Redis; it does not run where there is a Redis Cluster.
    pub redis: Redis,
    masters: Option<RedisCluster>,
    own_kafka: Option<Kafka>,
    client: ClientConfig,
    topics: Topics,
    builder: Builder,
    dir: Scratch,
}

impl Cluster {
    /// One node of each role, fast re-sends, four partitions, the shared Kafka, a Redis of its own.
    pub fn builder() -> Builder {
        Builder {
            counts: BTreeMap::new(),
            settings: Vec::new(),
            partitions: 4,
            own_kafka: None,
            redis: RedisOptions::default(),
            masters: None,
            variables: Vec::new(),
            quiet: false,
        }
    }

    /// [`Cluster::builder`] as it comes.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// Its topics.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Its own Kafka.
    ///
    /// # Errors
    /// It was not built with [`Builder::own_kafka`].
    pub fn kafka(&mut self) -> Result<&mut Kafka> {
        self.own_kafka.as_mut().context("this cluster shares its Kafka")
    }

    /// Its Redis Cluster.
    ///
    /// # Errors
    /// It was not built with [`Builder::redis_cluster`].
    pub fn masters(&mut self) -> Result<&mut RedisCluster> {
        self.masters.as_mut().context("the Redis of this cluster is one alone")
    }

    /// `host:port` of its Kafka.
    pub fn brokers(&self) -> String {
        self.client.get("bootstrap.servers").unwrap_or_default().to_owned()
    }

    /// The node `number` of `role`.
    ///
    /// # Panics
    /// There is no such node.
    pub fn node(&mut self, role: Role, number: usize) -> &mut Node {
        let node = self.nodes.iter_mut().find(|n| n.role == role && n.number == number);
        node.expect("the test names a node that the cluster has")
    }

    /// How many nodes of `role` there are, running or not.
    pub fn count(&self, role: Role) -> usize {
        self.nodes.iter().filter(|node| node.role == role).count()
    }

    /// Waits until every running role says that it is ready.
    ///
    /// # Errors
    /// One does not come up.
    pub async fn wait_ready(&mut self) -> Result<()> {
        for node in self.nodes.iter_mut().filter(|node| node.process.is_some()) {
            node.ready().await?;
        }
        Ok(())
    }

    /// Adds a node; it may not be up yet.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn add(&mut self, role: Role, number: usize) -> Result<()> {
        let file = |what: &str| self.dir.path().join(format!("{}-{number}.{what}", role.name()));
        let mut node = Node {
            role,
            number,
            process: None,
            variables: self.builder.variables_of(role),
            config: file("toml"),
            ready_file: file("ready"),
            log: file("log"),
        };
        let config = self.config(role, number, &node)?;
        std::fs::write(&node.config, toml::to_string(&config)?)?;
        node.launch()?;
        self.nodes.push(node);
        Ok(())
    }

    /// SIGTERM, and waits until it has drained; gives the exit code.
    ///
    /// # Errors
    /// It does not leave within its drain time and some seconds more, or was killed by a signal.
    pub async fn drain(&mut self, role: Role, number: usize) -> Result<i32> {
        let node = self.node(role, number);
        let process = node.process()?;
        process.term()?;
        let limit = Duration::from_secs(DRAIN_SECONDS.unsigned_abs() + 10);
        let status = process.wait(limit).await?;
        node.process = None;
        status.code().with_context(|| format!("{} ended with {status}", node.name()))
    }

    /// Drains a node, demands exit code 0, starts it again and waits until it is ready.
    ///
    /// # Errors
    /// Any of that fails.
    pub async fn restart(&mut self, role: Role, number: usize) -> Result<()> {
        let code = self.drain(role, number).await?;
        let node = self.node(role, number);
        let log = std::fs::read_to_string(&node.log).unwrap_or_default();
        ensure!(code == 0, "{} drained with exit code {code}:\n{log}", node.name());
        self.launch(role, number).await
    }

    /// Starts a node that was drained or killed, and waits until it is ready.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn launch(&mut self, role: Role, number: usize) -> Result<()> {
        self.spawn(role, number)?;
        self.node(role, number).ready().await
    }

    /// Starts a node that was drained or killed; it may not be up yet.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&mut self, role: Role, number: usize) -> Result<()> {
        self.node(role, number).launch()
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill(&mut self, role: Role, number: usize) -> Result<()> {
        let node = self.node(role, number);
        node.process()?.kill()?;
        node.process = None;
        Ok(())
    }

    /// Where devices connect to access node `number`.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn url(&mut self, number: usize) -> Result<String> {
        let address = self.node(Role::Access, number).address("ws").await?;
        Ok(format!("ws://{address}/v1/connect"))
    }

    /// An hour's token of a user of [`APP`].
    pub fn token(&self, user: &str) -> String {
        token::token(APP, user, Duration::from_secs(3_600))
    }

    /// A device of `user` connected to the first access node.
    ///
    /// # Errors
    /// The handshake or Hello is refused.
    pub async fn device(&mut self, user: &str, device: &str) -> Result<Device> {
        self.device_at(0, user, device).await
    }

    /// A device of `user` connected to access node `number`.
    ///
    /// # Errors
    /// The handshake or Hello is refused.
    pub async fn device_at(&mut self, number: usize, user: &str, device: &str) -> Result<Device> {
        let url = self.url(number).await?;
        let hello = json!({ "device": device, "attempt": next_attempt() });
        Device::connect_with(&url, &self.token(user), hello).await.map(|(device, _)| device)
    }

    /// A business, which can be moved into another task.
    ///
    /// # Errors
    /// librdkafka cannot start.
    pub fn business(&self) -> Result<Business> {
        let mut client = self.client.clone();
        client.set("enable.idempotence", "true").set("linger.ms", "0");
        Ok(Business { producer: client.create()?, topics: self.topics.clone() })
    }

    /// Reads `topic` from its beginning.
    ///
    /// # Errors
    /// librdkafka cannot start.
    pub fn reader(&self, topic: &str) -> Result<Reader> {
        let mut client = self.client.clone();
        client.set("group.id", unique("reader")).set("auto.offset.reset", "earliest");
        let consumer: StreamConsumer = client.create()?;
        consumer.subscribe(&[topic])?;
        Ok(Reader { consumer })
    }

    fn config(&self, role: Role, number: usize, node: &Node) -> Result<Table> {
        let mut config = Table::new();
        let mut set = |key: &str, value: Value| set(&mut config, key, value);
        set("admin.listen", "127.0.0.1:0".into())?;
        set("log.level", std::env::var("BARID_TEST_LOG").unwrap_or("info".into()).into())?;
        set("drain_seconds", DRAIN_SECONDS.into())?;
        set("ready_file", node.ready_file.display().to_string().into())?;
        match &self.masters {
            None => set("redis.url", self.redis.url().into())?,
            Some(masters) => {
                let urls = masters.urls();
                set("redis.cluster", true.into())?;
                set("redis.url", urls[0].clone().into())?;
                set("redis.urls", urls[1..].to_vec().into())?;
            }
        }
        set("redis.retry_base_ms", 300.into())?;
        set("redis.retry_max_ms", 2_000.into())?;
        if matches!(role, Role::Purger | Role::Access) {
            let topics = &self.topics;
            set("kafka.brokers", vec![self.brokers()].into())?;
            set("kafka.topics.push_high", topics.high.clone().into())?;
            set("kafka.topics.push", topics.push.clone().into())?;
            set("kafka.topics.push_bulk", topics.bulk.clone().into())?;
            set("kafka.topics.receipts", topics.receipts.clone().into())?;
            set("kafka.topics.dead", topics.dead.clone().into())?;
            set("kafka.group", format!("{}.purger", topics.push).into())?;
        }
        if matches!(role, Role::Dispatcher | Role::Access) {
            set("node", format!("{}-{number}", role.name()).into())?;
        }
        if role == Role::Dispatcher {
            set("listen", "127.0.0.1:0".into())?;
        }
        if role != Role::Access {
            set("nodes_refresh_ms", NODES_REFRESH_MS.into())?;
        }
        if role == Role::Access {
            // Devices have one address for the cluster; here it is the node's, which comes back on
            // the same port after a kill.
            set("listen", format!("127.0.0.1:{}", free_port()).into())?;
            set("grpc_listen", "127.0.0.1:0".into())?;
            set("auth.keys", Value::Array(vec![token::key().into()]))?;
        }
        for (of, key, value) in &self.builder.settings {
            if of.is_none_or(|of| of == role) {
                set(key, value.clone())?;
            }
        }
        Ok(config)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The test harness shows what a test wrote only if it failed.
        if !self.builder.quiet {
            self.nodes.iter().for_each(show_tail);
        }
    }
}

#[expect(clippy::print_stderr, reason = "the harness captures what tests print")]
fn show_tail(node: &Node) {
    let output = std::fs::read_to_string(&node.log).unwrap_or_default();
    let skip = output.lines().count().saturating_sub(25);
    eprintln!("--- the end of {}'s output", node.name());
    for line in output.lines().skip(skip) {
        eprintln!("{line}");
    }
}

/// Grows with every call, as the attempts of a device must: tests reconnect within a millisecond.
fn next_attempt() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let now = u64::try_from(now).unwrap_or(u64::MAX);
    let last =
        LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(now.max(last + 1)));
    now.max(last.unwrap_or_default() + 1)
}

/// Sets a dotted key.
fn set(table: &mut Table, key: &str, value: Value) -> Result<()> {
    let (tables, last) = key.rsplit_once('.').unwrap_or(("", key));
    let mut table = table;
    for name in tables.split('.').filter(|name| !name.is_empty()) {
        let inner = table.entry(name).or_insert_with(|| Table::new().into());
        table = inner.as_table_mut().with_context(|| format!("{name} in {key} is no table"))?;
    }
    table.insert(last.into(), value);
    Ok(())
}

/// What a business service has: a producer to the cluster's push topics.
#[derive(Clone)]
pub struct Business {
    producer: FutureProducer,
    topics: Topics,
}

impl Business {
    /// Produces the least record: a text to a user of [`APP`].
    ///
    /// # Errors
    /// Kafka does not take it within 30 s.
    pub async fn say(&self, user: &str, id: &str, text: &str) -> Result<Place> {
        self.push(&json!({ "id": id, "app": APP, "to": { "user": user }, "text": text })).await
    }

    /// Produces a JSON record to the ordinary push topic.
    ///
    /// # Errors
    /// Kafka does not take it within 30 s.
    pub async fn push(&self, record: &Json) -> Result<Place> {
        let key = record["to"]["user"].as_str().unwrap_or_default();
        self.produce(&self.topics.push, key, record.to_string().as_bytes()).await
    }

    /// Produces any bytes to any topic.
    ///
    /// # Errors
    /// Kafka does not take it within 30 s.
    pub async fn produce(&self, topic: &str, key: &str, payload: &[u8]) -> Result<Place> {
        self.produce_with(topic, key, payload, &[]).await
    }

    /// Likewise, with headers.
    ///
    /// # Errors
    /// Kafka does not take it within 30 s.
    pub async fn produce_with(
        &self,
        topic: &str,
        key: &str,
        payload: &[u8],
        headers: &[(&str, &str)],
    ) -> Result<Place> {
        let header = |all: OwnedHeaders, (key, value): &(&str, &str)| {
            all.insert(Header { key, value: Some(*value) })
        };
        let headers = headers.iter().fold(OwnedHeaders::new(), header);
        let record = FutureRecord::to(topic).key(key).payload(payload).headers(headers);
        match self.producer.send(record, Duration::from_secs(30)).await {
            Ok(taken) => Ok(Place { partition: taken.partition, offset: taken.offset }),
            Err((error, _)) => Err(error.into()),
        }
    }
}

/// One record of a topic that Barid writes to.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// Its headers, as text.
    pub headers: BTreeMap<String, String>,
}

impl Record {
    /// Its value as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Json> {
        Ok(serde_json::from_slice(&self.value)?)
    }
}

/// Reads a topic from its beginning.
pub struct Reader {
    consumer: StreamConsumer,
}

impl Reader {
    /// The next record.
    ///
    /// # Errors
    /// None comes within `limit`.
    pub async fn next(&self, limit: Duration) -> Result<Record> {
        let received = tokio::time::timeout(limit, self.consumer.recv()).await;
        let message = received.with_context(|| format!("no record within {limit:?}"))??;
        Ok(record(&message))
    }
}

fn record(message: &rdkafka::message::BorrowedMessage<'_>) -> Record {
    use rdkafka::message::Headers as _;
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into();
    let headers = message.headers().map(|headers| {
        headers.iter().map(|header| (header.key.to_owned(), text(header.value))).collect()
    });
    Record {
        key: text(message.key()),
        value: message.payload().unwrap_or_default().to_vec(),
        headers: headers.unwrap_or_default(),
    }
}
