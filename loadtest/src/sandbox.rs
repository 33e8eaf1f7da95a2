//! A whole cluster for the time of a measurement: Apache Kafka, redis-server and Barid's binaries as
//! processes on free ports, with the CPU time that each of them takes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use barid_testkit::kafka::KafkaOptions;
use barid_testkit::{Cluster, Role, certificates, http, token};

use crate::controller::Agents;
use crate::cpu;
use crate::producer::Plan;
use crate::rpc::ConnectRequest;

/// How long a device may hold an acknowledgement back, ms.
pub const ACK_DELAY_MS: u32 = 100;

/// Partitions of a topic.
pub const PARTITIONS: i32 = 4;

/// A running cluster.
#[derive(Debug)]
pub struct Sandbox {
    cluster: Cluster,
    pids: BTreeMap<String, u32>,
    /// Holds the certificate of who serves TLS.
    _certificate: tempfile::TempDir,
}

/// What [`Sandbox`] has beside one node of each other role.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Access nodes.
    pub access_nodes: usize,
    /// They are spoken to over TLS, with [`certificates::ONE`].
    pub tls: bool,
}

/// CPU seconds since its start, by role; `agents` are those of this machine, `business` is this process.
pub type CpuTimes = BTreeMap<String, f64>;

impl Sandbox {
    /// One node of each role, with the configuration that they come with.
    ///
    /// # Errors
    /// Something does not come up.
    pub async fn start() -> anyhow::Result<Self> {
        Self::of(Shape { access_nodes: 1, tls: false }).await
    }

    /// The same, of this shape.
    ///
    /// # Errors
    /// Something does not come up.
    pub async fn of(shape: Shape) -> anyhow::Result<Self> {
        // C1 alone: in so short a time the other compiler takes more of two cores than it gives back. A large
        // young generation: each collection stops the broker for some 15 ms, and at a thousand messages a
        // second 140 MiB were full every two seconds, which is nearly one message in a hundred.
        let jvm = [
            "-Xms1g",
            "-Xmx1g",
            "-Xmn800m",
            "-XX:+AlwaysPreTouch",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
        ];
        let kafka = KafkaOptions { jvm: jvm.map(str::to_owned).to_vec(), ..Default::default() };
        let certificate = tempfile::tempdir()?;
        let mut cluster = Cluster::builder();
        if shape.tls {
            for (key, name, text) in [
                ("tls.certificate_file", "tls.pem", certificates::ONE.pem),
                ("tls.key_file", "tls.key", certificates::ONE.key),
            ] {
                let file = certificate.path().join(name);
                std::fs::write(&file, text)?;
                cluster = cluster.set_of(Role::Access, key, file.display().to_string());
            }
        }
        let mut cluster = cluster
            .quiet()
            .partitions(PARTITIONS)
            .nodes(Role::Access, shape.access_nodes)
            .own_kafka_with(kafka)
            .set("redis.retry_base_ms", 2_000)
            .set("redis.retry_max_ms", 60_000)
            .start()
            .await?;
        let mut pids = BTreeMap::new();
        pids.insert("kafka".into(), cluster.kafka()?.pid().context("Kafka is gone")?);
        pids.insert("redis".into(), cluster.redis.pid().context("Redis is gone")?);
        for role in Role::ALL {
            for number in 0..cluster.count(role) {
                let name = match number {
                    0 => role.name().to_owned(),
                    _ => format!("{}-{number}", role.name()),
                };
                pids.insert(name, cluster.node(role, number).process()?.pid());
            }
        }
        Ok(Self { cluster, pids, _certificate: certificate })
    }

    /// What to produce to it.
    pub fn plan(&self, payload_bytes: u32, linger_ms: u32) -> Plan {
        Plan {
            brokers: self.cluster.brokers(),
            topic: self.cluster.topics().push.clone(),
            app: barid_testkit::cluster::APP.into(),
            payload_bytes,
            linger_ms,
        }
    }

    /// The same, to a topic that nobody consumes, with as many partitions.
    ///
    /// # Errors
    /// Kafka does not create it.
    pub async fn unconsumed(&mut self, plan: &Plan) -> anyhow::Result<Plan> {
        let topic = "unconsumed";
        self.cluster.kafka()?.create_topics(&[topic], PARTITIONS).await?;
        Ok(Plan { topic: topic.into(), ..plan.clone() })
    }

    /// Where the access node answers operators.
    ///
    /// # Errors
    /// It is gone.
    pub async fn admin(&mut self) -> anyhow::Result<SocketAddr> {
        self.cluster.node(Role::Access, 0).address("admin").await
    }

    /// How agents connect, to all access nodes; nothing is said about users.
    ///
    /// # Errors
    /// An access node is gone.
    pub async fn way(&mut self) -> anyhow::Result<ConnectRequest> {
        let mut nodes = Vec::new();
        for number in 0..self.cluster.count(Role::Access) {
            let address = self.cluster.node(Role::Access, number).address("ws").await?;
            nodes.push(address.to_string());
        }
        Ok(ConnectRequest {
            nodes,
            app: barid_testkit::cluster::APP.into(),
            secret: token::SECRET.into(),
            key_id: token::KEY_ID.into(),
            ack_delay_ms: ACK_DELAY_MS,
            ..ConnectRequest::default()
        })
    }

    /// Where dispatchers reach the access node.
    ///
    /// # Errors
    /// The access node is gone.
    pub async fn dispatchers_address(&mut self) -> anyhow::Result<SocketAddr> {
        self.cluster.node(Role::Access, 0).address("grpc").await
    }

    /// Waits until every device has acknowledged everything, which ends the retry timers.
    ///
    /// # Errors
    /// Some are left after `limit`.
    pub async fn all_acknowledged(&self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let timers: Vec<String> = self.cluster.redis.query(&["KEYS", "*}:t"]).await?;
            if timers.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "not everything is acknowledged after {limit:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What all roles' metrics say, as text.
    ///
    /// # Errors
    /// A role does not answer.
    pub async fn metrics(&mut self) -> anyhow::Result<String> {
        let mut all = String::new();
        for role in Role::ALL {
            for number in 0..self.cluster.count(role) {
                let admin = self.cluster.node(role, number).address("admin").await?;
                all.push_str(&http::get(admin, "/metrics").await?.1);
            }
        }
        Ok(all)
    }

    /// The processes by name (the second and later nodes of a role are numbered), for who wants to profile
    /// one.
    pub fn pids(&self) -> &BTreeMap<String, u32> {
        &self.pids
    }

    /// CPU time of each role, and of the load tool, until now.
    ///
    /// # Errors
    /// A process is gone.
    pub fn cpu_times(&self, agents: &Agents) -> anyhow::Result<CpuTimes> {
        self.by_role(agents, cpu::of_process)
    }

    /// What is measured of each process, summed by role: `agents` are those of this machine, `business` is
    /// this process.
    ///
    /// # Errors
    /// A process is gone.
    pub fn by_role(
        &self,
        agents: &Agents,
        measured: impl Fn(u32) -> anyhow::Result<f64>,
    ) -> anyhow::Result<BTreeMap<String, f64>> {
        let roles = self.pids.iter().map(|(name, pid)| (name.as_str(), *pid));
        let agents = agents.pids().into_iter().map(|pid| ("agents", pid));
        let business = [("business", std::process::id())];
        let mut sums = BTreeMap::<String, f64>::new();
        for (name, pid) in roles.chain(agents).chain(business) {
            *sums.entry(role(name).to_owned()).or_default() +=
                measured(pid).with_context(|| format!("{name} is gone"))?;
        }
        Ok(sums)
    }
}

/// The role of a process by its name.
pub fn role(name: &str) -> &str {
    name.split_once('-').map_or(name, |(role, _)| role)
}
