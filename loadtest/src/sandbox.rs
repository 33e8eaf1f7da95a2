//! A cluster for one measurement: Apache Kafka, redis-server and Barid's binaries as processes on free
//! ports, with the CPU time and memory of each.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use barid_testkit::cluster::Builder;
use barid_testkit::kafka::KafkaOptions;
use barid_testkit::{Cluster, Role, certificates, http, token};

use crate::controller::Agents;
use crate::producer::Plan;
use crate::rpc::ConnectRequest;

/// Minimum time between two acknowledgements of a device, ms.
pub const ACK_DELAY_MS: u32 = 100;

/// Partitions of each topic.
pub const PARTITIONS: i32 = 4;

/// A running cluster.
#[derive(Debug)]
pub struct Sandbox {
    cluster: Cluster,
    pids: BTreeMap<String, u32>,
    /// The directory of the certificates.
    _certificate: tempfile::TempDir,
}

/// The access nodes of a [`Sandbox`], which has one node of each other role.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    pub nodes: usize,
    /// Whether they serve TLS, with [`certificates::ONE`].
    pub tls: bool,
    /// Whether the roles speak mutual TLS (`internal_tls`), with an authority that is made for the cluster.
    pub internal_tls: bool,
    /// `limits.handshakes_max`; `None`: its default.
    pub handshakes_max: Option<u32>,
}

/// A figure by role; `agents` are those of this machine, `business` is this process.
pub type ByRole = BTreeMap<String, f64>;

impl Sandbox {
    /// Starts a cluster with default configuration, except for the delay of re-sends and the limit on an app's new
    /// users.
    pub async fn start(access: Access) -> anyhow::Result<Self> {
        // C1 alone: in such a short time the other compiler costs more CPU time than it saves. A large young
        // generation: each collection stops the broker for some 15 ms, and at 1,000 messages per second
        // 140 MiB were full every two seconds, which affected nearly 1 % of all messages.
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
        if access.tls {
            for (key, name, text) in [
                ("tls.certificate_file", "tls.pem", certificates::ONE.pem),
                ("tls.key_file", "tls.key", certificates::ONE.key),
            ] {
                let file = certificate.path().join(name);
                std::fs::write(&file, text)?;
                cluster = cluster.set_of(Role::Access, key, file.display().to_string());
            }
        }
        if access.internal_tls {
            cluster = with_internal_tls(cluster, certificate.path())?;
        }
        if let Some(places) = access.handshakes_max {
            cluster = cluster.set_of(Role::Access, "limits.handshakes_max", i64::from(places));
        }
        let mut cluster = cluster
            .quiet()
            .partitions(PARTITIONS)
            .nodes(Role::Access, access.nodes)
            .own_kafka_with(kafka)
            .set("redis.retry_base_ms", 2_000)
            .set("redis.retry_max_ms", 60_000)
            // All devices are new, and connect at once.
            .set_of(Role::Access, "limits.app_new_users_per_second", 0)
            .start()
            .await?;
        let mut pids = BTreeMap::new();
        pids.insert("kafka".into(), cluster.kafka()?.pid().context("Kafka is not running")?);
        pids.insert("redis".into(), cluster.redis.pid().context("Redis is not running")?);
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

    /// How to produce to it.
    pub fn plan(&self, payload_bytes: u32, linger_ms: u32) -> Plan {
        Plan {
            brokers: self.cluster.brokers(),
            topic: self.cluster.topics().push.clone(),
            app: barid_testkit::token::APP.into(),
            payload_bytes,
            linger_ms,
        }
    }

    /// The same for a new topic that Barid does not consume.
    pub async fn unconsumed(&mut self, plan: &Plan) -> anyhow::Result<Plan> {
        let topic = "unconsumed";
        self.cluster.kafka()?.create_topics(&[topic], PARTITIONS).await?;
        Ok(Plan { topic: topic.into(), ..plan.clone() })
    }

    /// The first access node's admin address.
    pub async fn admin(&mut self) -> anyhow::Result<SocketAddr> {
        self.cluster.node(Role::Access, 0).address("admin").await
    }

    /// A request that connects to all access nodes, without users.
    pub async fn connect_request(&mut self) -> anyhow::Result<ConnectRequest> {
        let mut nodes = Vec::new();
        for number in 0..self.cluster.count(Role::Access) {
            let address = self.cluster.node(Role::Access, number).address("ws").await?;
            nodes.push(address.to_string());
        }
        Ok(ConnectRequest {
            nodes,
            app: barid_testkit::token::APP.into(),
            secret: token::SECRET.into(),
            key_id: token::KEY_ID.into(),
            ack_delay_ms: ACK_DELAY_MS,
            ..ConnectRequest::default()
        })
    }

    /// The first access node's address for dispatchers.
    pub async fn dispatchers_address(&mut self) -> anyhow::Result<SocketAddr> {
        self.cluster.node(Role::Access, 0).address("grpc").await
    }

    /// Waits until every device has acknowledged everything, which ends the retry timers. Fails after
    /// `limit`.
    pub async fn all_acknowledged(&self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let timers: Vec<String> = self.cluster.redis.query(&["KEYS", "*}:t"]).await?;
            if timers.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "acknowledgements are missing after {limit:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The metrics of all processes, as text.
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

    /// Process ids by name; the second and later nodes of a role are numbered.
    pub fn pids(&self) -> &BTreeMap<String, u32> {
        &self.pids
    }

    /// Process ids of the access nodes.
    pub fn access_pids(&self) -> Vec<u32> {
        let access = self.pids.iter().filter(|(name, _)| role(name) == Role::Access.name());
        access.map(|(_, pid)| *pid).collect()
    }

    /// The sum over each role's processes of a figure that is read by process id.
    pub fn by_role(
        &self,
        agents: &Agents,
        figure: impl Fn(u32) -> anyhow::Result<f64>,
    ) -> anyhow::Result<ByRole> {
        let roles = self.pids.iter().map(|(name, pid)| (name.as_str(), *pid));
        let agents = agents.pids().into_iter().map(|pid| ("agents", pid));
        let business = [("business", std::process::id())];
        let mut sums = ByRole::new();
        for (name, pid) in roles.chain(agents).chain(business) {
            *sums.entry(role(name).to_owned()).or_default() +=
                figure(pid).with_context(|| format!("{name} is not running"))?;
        }
        Ok(sums)
    }
}

/// Each role gets a certificate that names it, as `barid cluster ca` makes them.
fn with_internal_tls(mut cluster: Builder, dir: &Path) -> anyhow::Result<Builder> {
    let authority = certificates::Authority::new()?;
    let ca = dir.join("ca.pem");
    std::fs::write(&ca, authority.pem())?;
    for role in Role::ALL {
        let issued = authority.issue_for(&[&format!("{}.barid.internal", role.name())])?;
        let [certificate, key] =
            ["pem", "key"].map(|end| dir.join(format!("{}.{end}", role.name())));
        std::fs::write(&certificate, issued.pem)?;
        std::fs::write(&key, issued.key)?;
        for (key, file) in
            [("ca_file", &ca), ("certificate_file", &certificate), ("key_file", &key)]
        {
            cluster =
                cluster.set_of(role, &format!("internal_tls.{key}"), file.display().to_string());
        }
    }
    Ok(cluster)
}

/// The role of a process by its name.
fn role(name: &str) -> &str {
    name.split_once('-').map_or(name, |(role, _)| role)
}
