//! A whole cluster: Barid's binaries on real Kafka and Redis. A test starts, stops and kills its nodes.

mod builder;
mod business;
mod config;
mod node;
mod reader;
mod topics;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rdkafka::ClientConfig;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_tungstenite::tungstenite;

pub use self::builder::Builder;
pub use self::business::Business;
use self::config::{DRAIN_SECONDS, Shared};
pub use self::node::{Node, Role};
pub use self::reader::{Reader, Record};
pub use self::topics::Topics;
use crate::device::next_attempt;
use crate::spawner::Scratch;
use crate::{Device, Kafka, Redis, RedisCluster, token};

/// For a node that has just started to read the revocations.
const REVOCATIONS_READ: Duration = Duration::from_secs(10);

/// A running cluster. Dropping it ends its processes and removes its files, after printing the end of
/// each role's output, which the test harness shows if the test failed.
#[derive(Debug)]
pub struct Cluster {
    // First: the roles end before Redis and Kafka.
    nodes: Vec<Node>,
    /// The Redis; it does not run if the cluster has a Redis Cluster.
    pub redis: Redis,
    masters: Option<RedisCluster>,
    own_kafka: Option<Kafka>,
    client: ClientConfig,
    topics: Topics,
    builder: Builder,
    dir: Scratch,
}

impl Cluster {
    /// One node of each role, short retry times, four partitions, the shared Kafka, a Redis of its own.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// [`Cluster::builder`] without changes.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// The cluster's topics.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// The cluster's own Kafka.
    ///
    /// # Errors
    /// Returns an error unless the cluster was built with [`Builder::own_kafka`].
    pub fn kafka(&mut self) -> Result<&mut Kafka> {
        self.own_kafka.as_mut().context("this cluster shares its Kafka")
    }

    /// The cluster's Redis Cluster.
    ///
    /// # Errors
    /// Returns an error unless the cluster was built with [`Builder::redis_cluster`].
    pub fn masters(&mut self) -> Result<&mut RedisCluster> {
        self.masters.as_mut().context("this cluster has no Redis Cluster")
    }

    /// `host:port` of Kafka.
    pub fn brokers(&self) -> String {
        self.client.get("bootstrap.servers").unwrap_or_default().to_owned()
    }

    /// The node `number` of `role`.
    ///
    /// # Panics
    /// Panics if the cluster has no such node.
    pub fn node(&mut self, role: Role, number: usize) -> &mut Node {
        let node = self.nodes.iter_mut().find(|n| n.role == role && n.number == number);
        node.expect("the test names a node that the cluster has")
    }

    /// The number of nodes of `role`, running or not.
    pub fn count(&self, role: Role) -> usize {
        self.nodes.iter().filter(|node| node.role == role).count()
    }

    /// Waits until every running role is ready.
    ///
    /// # Errors
    /// Returns an error if a role does not become ready.
    pub async fn wait_ready(&mut self) -> Result<()> {
        for node in self.nodes.iter_mut().filter(|node| node.is_launched()) {
            node.ready().await?;
        }
        Ok(())
    }

    /// Adds a node and starts it, without waiting until it is ready.
    ///
    /// # Errors
    /// Returns an error if the process cannot be started.
    pub fn add(&mut self, role: Role, number: usize) -> Result<()> {
        let variables = self.builder.variables_of(role);
        let mut node = Node::new(role, number, self.dir.path(), variables);
        let shared = Shared {
            redis: &self.redis,
            masters: self.masters.as_ref(),
            brokers: self.brokers(),
            topics: &self.topics,
            settings: &self.builder.settings,
        };
        std::fs::write(&node.config, toml::to_string(&shared.config_of(&node)?)?)?;
        node.launch()?;
        self.nodes.push(node);
        Ok(())
    }

    /// SIGTERM, and wait until the node has drained; gives the exit code.
    ///
    /// # Errors
    /// Returns an error if the node does not end within its drain time and 10 s more, or was ended by a
    /// signal.
    pub async fn drain(&mut self, role: Role, number: usize) -> Result<i32> {
        let limit = Duration::from_secs(u64::from(DRAIN_SECONDS) + 10);
        self.node(role, number).drain(limit).await
    }

    /// Drains a node, expects exit code 0, starts it again and waits until it is ready.
    ///
    /// # Errors
    /// Returns an error if any of these fails.
    pub async fn restart(&mut self, role: Role, number: usize) -> Result<()> {
        let code = self.drain(role, number).await?;
        let node = self.node(role, number);
        let log = node.output().unwrap_or_default();
        ensure!(code == 0, "{} drained with exit code {code}:\n{log}", node.name());
        self.launch(role, number).await
    }

    /// Starts a node that was drained or killed, and waits until it is ready.
    ///
    /// # Errors
    /// Returns an error if the node does not become ready.
    pub async fn launch(&mut self, role: Role, number: usize) -> Result<()> {
        self.spawn(role, number)?;
        self.node(role, number).ready().await
    }

    /// Starts a node that was drained or killed, without waiting until it is ready.
    ///
    /// # Errors
    /// Returns an error if the process cannot be started.
    pub fn spawn(&mut self, role: Role, number: usize) -> Result<()> {
        self.node(role, number).launch()
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// Returns an error if the node is not running.
    pub fn kill(&mut self, role: Role, number: usize) -> Result<()> {
        self.node(role, number).kill()
    }

    /// The URL at which devices connect to access node `number`.
    ///
    /// # Errors
    /// Returns an error if the node does not start.
    pub async fn url(&mut self, number: usize) -> Result<String> {
        let address = self.node(Role::Access, number).address("ws").await?;
        Ok(format!("ws://{address}/v1/connect"))
    }

    /// A token of a user of [`token::APP`], valid for an hour.
    pub fn token(&self, user: &str) -> String {
        token::token(token::APP, user, Duration::from_secs(3_600))
    }

    /// A device of `user` connected to the first access node.
    ///
    /// # Errors
    /// Returns an error if the node refuses the handshake or the Hello.
    pub async fn device(&mut self, user: &str, device: &str) -> Result<Device> {
        self.device_at(0, user, device).await
    }

    /// A device of `user` connected to access node `number`, once it has read the revocations of tokens.
    ///
    /// # Errors
    /// Returns an error if the node refuses the handshake or the Hello.
    pub async fn device_at(&mut self, number: usize, user: &str, device: &str) -> Result<Device> {
        let url = self.url(number).await?;
        let deadline = Instant::now() + REVOCATIONS_READ;
        loop {
            let hello = json!({ "device": device, "attempt": next_attempt() });
            match Device::connect_with(&url, &self.token(user), hello).await {
                Err(error) if is_unavailable(&error) && Instant::now() < deadline => {
                    sleep(Duration::from_millis(10)).await;
                }
                connected => return connected.map(|(device, _)| device),
            }
        }
    }

    /// A producer to this cluster, which can be moved into another task.
    ///
    /// # Errors
    /// Returns an error if librdkafka cannot start.
    pub fn business(&self) -> Result<Business> {
        Business::new(self.client.clone(), self.topics.clone())
    }

    /// A reader of `topic` from its beginning.
    ///
    /// # Errors
    /// Returns an error if librdkafka cannot start.
    pub fn reader(&self, topic: &str) -> Result<Reader> {
        Reader::new(self.client.clone(), topic)
    }
}

/// Whether a node answered 503, as it does until it has read the revocations.
fn is_unavailable(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(tungstenite::Error::Http(answer)) if answer.status() == 503
    )
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.builder.quiet {
            self.nodes.iter().for_each(Node::print_tail);
        }
    }
}
