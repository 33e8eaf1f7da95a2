//! A real Apache Kafka: one KRaft node in one small JVM, on private ports and in a temporary directory.

mod acls;

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::types::RDKafkaErrorCode;
use tokio::sync::OnceCell;

use crate::certificates::Issued;
use crate::paths;
use crate::ports::free_port;
use crate::process::Process;
use crate::spawner::{self, Scratch};

/// For a start, which takes 3 s on an idle machine, and took more than 90 s on one core at a load of 76.
const START_LIMIT: Duration = Duration::from_secs(240);

/// Options of a broker.
#[derive(Debug, Clone)]
pub struct KafkaOptions {
    /// Create a topic when a client names it. Off, so that a misspelt topic is an error.
    pub auto_create_topics: bool,
    /// After this time without a heartbeat, a consumer leaves its group, milliseconds. Kafka's default (45 s)
    /// is too long for tests that kill consumers.
    pub session_timeout_ms: u32,
    /// A second listener with TLS and SASL, [`Kafka::secured`]: the certificate of the broker, its key, and the
    /// password of the user `barid`, for PLAIN and SCRAM-SHA-512.
    pub secured: Option<(Issued, String)>,
    /// Further lines of server.properties, which override the others.
    pub properties: Vec<(String, String)>,
    /// Options of the Java virtual machine. The default starts fast and takes little memory; benchmarks need
    /// the optimizing compiler.
    pub jvm: Vec<String>,
}

impl Default for KafkaOptions {
    fn default() -> Self {
        let jvm = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"];
        Self {
            auto_create_topics: false,
            session_timeout_ms: 3_000,
            secured: None,
            properties: Vec::new(),
            jvm: jvm.map(str::to_owned).to_vec(),
        }
    }
}

impl KafkaOptions {
    /// A broker with an authorizer; resources without an access control list are open to everybody.
    pub fn with_authorizer() -> Self {
        let properties = [
            ("authorizer.class.name", "org.apache.kafka.metadata.authorizer.StandardAuthorizer"),
            ("allow.everyone.if.no.acl.found", "true"),
            ("early.start.listeners", "CONTROLLER"),
        ];
        let properties = properties.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Self { properties: properties.to_vec(), ..Self::default() }
    }
}

/// A running Apache Kafka. Killed, and its data removed, on drop and with the test process.
#[derive(Debug)]
pub struct Kafka {
    // First: the process ends before its directory is removed.
    process: Option<Process>,
    port: u16,
    secured: u16,
    password: Option<String>,
    jvm: Vec<String>,
    dir: Scratch,
}

static SHARED: OnceCell<Kafka> = OnceCell::const_new();

impl Kafka {
    /// The broker that all tests of this process share: starting one takes 3 s and 300 MB. Each test uses
    /// topics and groups of its own ([`unique`]).
    ///
    /// # Panics
    /// Panics if the broker does not start.
    pub async fn shared() -> &'static Self {
        let start = || async { Self::start().await.expect("Apache Kafka starts") };
        SHARED.get_or_init(start).await
    }

    /// Starts a broker with the default options.
    ///
    /// # Errors
    /// As [`Kafka::start_with`].
    pub async fn start() -> Result<Self> {
        Self::start_with(KafkaOptions::default()).await
    }

    /// Starts a broker and waits until it answers.
    ///
    /// # Errors
    /// Returns an error if Java or the jars are missing (and how to get them), or with the end of its log if
    /// the broker does not start.
    pub async fn start_with(options: KafkaOptions) -> Result<Self> {
        paths::kafka_class_path()?;
        let dir = Scratch::new("barid-kafka-").context("directory for Kafka's data")?;
        let (port, controller, secured) = (free_port(), free_port(), free_port());
        let mut properties = server_properties(&options, port, controller, &dir);
        if let Some((certificate, password)) = &options.secured {
            let file = dir.path().join("broker.pem");
            std::fs::write(&file, certificate.key.clone() + &certificate.pem)?;
            properties = secure(&properties, secured, &file, password);
        }
        std::fs::write(dir.path().join("server.properties"), properties)?;
        let password = options.secured.map(|(_, password)| password);
        let mut kafka = Self { process: None, port, secured, password, jvm: options.jvm, dir };
        kafka.format().await?;
        kafka.restart().await?;
        Ok(kafka)
    }

    /// `host:port` for clients.
    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `host:port` of the listener with TLS and SASL; only with [`KafkaOptions::secured`].
    pub fn secured(&self) -> String {
        format!("127.0.0.1:{}", self.secured)
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The configuration of a client of this broker that logs nothing.
    pub fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.brokers()).set_log_level(RDKafkaLogLevel::Emerg);
        config
    }

    /// Creates topics with `partitions` each. Existing topics are not changed.
    ///
    /// # Errors
    /// Returns an error if the broker refuses one, or does not answer.
    pub async fn create_topics(&self, names: &[&str], partitions: i32) -> Result<()> {
        let topic = |name| NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        self.create(names.iter().map(|name| topic(*name)).collect()).await
    }

    /// Creates a compacted topic of one partition, which is compacted within a second or two: its segments are short.
    ///
    /// # Errors
    /// Returns an error if the broker refuses it, or does not answer.
    pub async fn create_compacted(&self, name: &str) -> Result<()> {
        let topic = NewTopic::new(name, 1, TopicReplication::Fixed(1))
            .set("cleanup.policy", "compact")
            .set("segment.ms", "1000")
            .set("min.cleanable.dirty.ratio", "0.01");
        self.create(vec![topic]).await
    }

    async fn create(&self, topics: Vec<NewTopic<'_>>) -> Result<()> {
        for outcome in self.admin()?.create_topics(&topics, &admin_options()).await? {
            match outcome {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, error)) => bail!("creating topic {name}: {error}"),
            }
        }
        Ok(())
    }

    /// Allows or denies all writes to a topic. The broker needs [`KafkaOptions::with_authorizer`].
    ///
    /// # Errors
    /// Returns an error if the broker refuses, or does not answer.
    pub async fn allow_writes(&self, topic: &str, allowed: bool) -> Result<()> {
        let port = self.port;
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || acls::allow_writes(port, &topic, allowed)).await?
    }

    /// Deletes topics.
    ///
    /// # Errors
    /// Returns an error if the broker refuses one, or does not answer.
    pub async fn delete_topics(&self, names: &[&str]) -> Result<()> {
        for outcome in self.admin()?.delete_topics(names, &admin_options()).await? {
            outcome.map_err(|(name, error)| anyhow::anyhow!("deleting topic {name}: {error}"))?;
        }
        Ok(())
    }

    /// The directory of its logs, which has a directory for each partition.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// `kill -9`. The port and the data stay for [`Kafka::restart`].
    ///
    /// # Errors
    /// Returns an error if it is not running.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("Kafka is not running")?.kill()
    }

    /// SIGTERM, and wait until the broker has shut down.
    ///
    /// # Errors
    /// Returns an error if it is not running, or does not end within 30 s.
    pub async fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("Kafka is not running")?;
        process.term()?;
        process.wait(Duration::from_secs(30)).await?;
        Ok(())
    }

    /// SIGSTOP: connections stay open, nothing answers.
    ///
    /// # Errors
    /// Returns an error if it is not running.
    pub fn pause(&mut self) -> Result<()> {
        self.process.as_mut().context("Kafka is not running")?.stop()
    }

    /// SIGCONT after [`Kafka::pause`].
    ///
    /// # Errors
    /// Returns an error if it is not running.
    pub fn resume(&mut self) -> Result<()> {
        self.process.as_mut().context("Kafka is not running")?.cont()
    }

    /// Kills it if it is running, starts it with the same port and data and waits until it answers.
    ///
    /// # Errors
    /// Returns an error with the end of its log if it does not start.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = None;
        let class_path = paths::kafka_class_path()?;
        let properties = self.dir.path().join("server.properties");
        let log = self.dir.path().join("kafka.log");
        let process = Process::spawn("kafka", "java", &log, |java| {
            java.args(&self.jvm).args(["-cp", &class_path, "kafka.Kafka"]).arg(properties);
        })?;
        self.process = Some(process);
        self.answering().await
    }

    async fn format(&self) -> Result<()> {
        let class_path = paths::kafka_class_path()?;
        let log = self.dir.path().join("format.log");
        let properties = self.dir.path().join("server.properties");
        let mut format = Process::spawn("kafka storage format", "java", &log, |java| {
            java.args(["-Xmx64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
                .args(["-cp", &class_path, "kafka.tools.StorageTool", "format", "--standalone"])
                .args(["-t", "YmFyaWQtdGVzdGtpdC0wMQ", "-c"])
                .arg(properties);
            if let Some(password) = &self.password {
                let user = format!("SCRAM-SHA-512=[name=barid,password={password}]");
                java.args(["--add-scram", &user]);
            }
        })
        .context("is Java installed? scripts/setup.sh test installs what tests need")?;
        let status = format.wait(START_LIMIT).await?;
        if !status.success() {
            bail!("formatting Kafka's storage failed with {status}:\n{}", format.tail(30));
        }
        Ok(())
    }

    async fn answering(&mut self) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < START_LIMIT {
            self.process.as_mut().context("Kafka is not running")?.must_run()?;
            // librdkafka backs off if it is asked before the port is open.
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok()
                && self.has_broker().await?
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let log = self.process.as_ref().map(|p| p.tail(40)).unwrap_or_default();
        bail!("Kafka does not answer after {START_LIMIT:?}:\n{log}")
    }

    async fn has_broker(&self) -> Result<bool> {
        let admin = self.admin()?;
        let ask = move || admin.inner().fetch_metadata(None, Duration::from_secs(2));
        let metadata = tokio::task::spawn_blocking(ask).await?;
        Ok(metadata.is_ok_and(|m| !m.brokers().is_empty()))
    }

    fn admin(&self) -> Result<AdminClient<DefaultClientContext>> {
        Ok(self.client().create()?)
    }
}

/// `prefix` with a suffix that no other call gives: names for topics, groups, users.
pub fn unique(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn admin_options() -> AdminOptions {
    let limit = Some(Duration::from_secs(20));
    AdminOptions::new().request_timeout(limit).operation_timeout(limit)
}

fn server_properties(
    options: &KafkaOptions,
    port: u16,
    controller: u16,
    dir: &spawner::Scratch,
) -> String {
    let session = options.session_timeout_ms;
    let heartbeat = (session / 6).max(100);
    let data = dir.path().join("data");
    let mut text = format!(
        "process.roles=broker,controller\n\
         node.id=1\n\
         controller.quorum.bootstrap.servers=127.0.0.1:{controller}\n\
         listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
         controller.listener.names=CONTROLLER\n\
         log.dirs={}\n\
         auto.create.topics.enable={}\n\
         num.partitions=4\n\
         offsets.topic.replication.factor=1\n\
         offsets.topic.num.partitions=4\n\
         transaction.state.log.replication.factor=1\n\
         transaction.state.log.min.isr=1\n\
         transaction.state.log.num.partitions=2\n\
         share.coordinator.state.topic.replication.factor=1\n\
         share.coordinator.state.topic.min.isr=1\n\
         group.initial.rebalance.delay.ms=0\n\
         group.min.session.timeout.ms=500\n\
         group.consumer.min.session.timeout.ms=500\n\
         group.consumer.session.timeout.ms={session}\n\
         group.consumer.min.heartbeat.interval.ms=50\n\
         group.consumer.heartbeat.interval.ms={heartbeat}\n\
         num.io.threads=2\n\
         num.network.threads=2\n\
         num.recovery.threads.per.data.dir=1\n\
         log.cleaner.dedupe.buffer.size=2097152\n",
        data.display(),
        options.auto_create_topics,
    );
    for (key, value) in &options.properties {
        let _ = writeln!(text, "{key}={value}");
    }
    text
}

/// Adds a listener with TLS and SASL.
fn secure(properties: &str, port: u16, certificate: &Path, password: &str) -> String {
    let listener = format!("SASL_SSL://127.0.0.1:{port}");
    let with = |line: &str| {
        let of = line.starts_with("listeners=") || line.starts_with("advertised.listeners=");
        if of { format!("{line},{listener}\n") } else { format!("{line}\n") }
    };
    let mut text: String = properties.lines().map(with).collect();
    let module = "org.apache.kafka.common.security";
    let prefix = "listener.name.sasl_ssl";
    let _ = write!(
        text,
        "listener.security.protocol.map=\
           PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL\n\
         ssl.keystore.type=PEM\n\
         ssl.keystore.location={}\n\
         sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512\n\
         {prefix}.plain.sasl.jaas.config={module}.plain.PlainLoginModule required user_barid=\"{password}\";\n\
         {prefix}.scram-sha-512.sasl.jaas.config={module}.scram.ScramLoginModule required;\n",
        certificate.display()
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::producer::{FutureProducer, FutureRecord};

    async fn produce(kafka: &Kafka, topic: &str, payload: &str) {
        let producer: FutureProducer = kafka.client().create().unwrap();
        let record = FutureRecord::<str, str>::to(topic).payload(payload);
        producer.send(record, Duration::from_secs(20)).await.unwrap();
    }

    fn count(kafka: &Kafka, topic: &str) -> i64 {
        let consumer: BaseConsumer = kafka.client().set("group.id", "count").create().unwrap();
        consumer.fetch_watermarks(topic, 0, Duration::from_secs(20)).unwrap().1
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn kafka_keeps_its_records_over_a_kill() {
        let mut kafka = Kafka::start().await.unwrap();
        kafka.create_topics(&["t"], 1).await.unwrap();
        kafka.create_topics(&["t"], 1).await.unwrap();
        produce(&kafka, "t", "one").await;
        kafka.kill().unwrap();
        assert!(kafka.kill().is_err());
        kafka.restart().await.unwrap();
        produce(&kafka, "t", "two").await;
        assert_eq!(count(&kafka, "t"), 2);
    }
}
