//! Describes a cluster, and starts it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use toml::Value;

use super::Cluster;
use super::config::{NODES_REFRESH_MS, Setting};
use super::node::Role;
use super::topics::Topics;
use crate::kafka::KafkaOptions;
use crate::redis::RedisOptions;
use crate::spawner::Scratch;
use crate::{Kafka, Redis, RedisCluster};

/// A cluster to be started; see [`Cluster::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    counts: BTreeMap<Role, usize>,
    pub(super) settings: Vec<Setting>,
    partitions: i32,
    own_kafka: Option<KafkaOptions>,
    redis: RedisOptions,
    masters: Option<u16>,
    variables: Vec<(Role, String, String)>,
    pub(super) quiet: bool,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
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

    /// Sets the number of nodes of a role (default: 1).
    #[must_use]
    pub fn nodes(mut self, role: Role, count: usize) -> Self {
        self.counts.insert(role, count);
        self
    }

    /// Two nodes of each role.
    #[must_use]
    pub fn pairs(self) -> Self {
        Role::ALL.into_iter().fold(self, |builder, role| builder.nodes(role, 2))
    }

    /// Sets `key` (dotted) in every role's configuration.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.settings.push(Setting { role: None, key: key.into(), value: value.into() });
        self
    }

    /// Sets `key` (dotted) in one role's configuration.
    #[must_use]
    pub fn set_of(mut self, role: Role, key: &str, value: impl Into<Value>) -> Self {
        self.settings.push(Setting { role: Some(role), key: key.into(), value: value.into() });
        self
    }

    /// Sets an environment variable of one role's processes.
    #[must_use]
    pub fn variable_of(mut self, role: Role, name: &str, value: &str) -> Self {
        self.variables.push((role, name.into(), value.into()));
        self
    }

    pub(super) fn variables_of(&self, role: Role) -> Vec<(String, String)> {
        let of = self.variables.iter().filter(|(of, ..)| *of == role);
        of.map(|(_, name, value)| (name.clone(), value.clone())).collect()
    }

    /// Sets the number of partitions of the push topics (default: 4).
    #[must_use]
    pub fn partitions(mut self, partitions: i32) -> Self {
        self.partitions = partitions;
        self
    }

    /// Starts a Kafka that no other test uses, so that the test may kill it.
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

    /// Does not print the end of the roles' output when the cluster is dropped.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Makes Redis write to disk before it answers (appendfsync always), so that the test may kill it.
    #[must_use]
    pub fn durable_redis(mut self) -> Self {
        let settings = vec![("appendfsync".into(), "always".into())];
        self.redis = RedisOptions { append_only: true, settings };
        self
    }

    /// Starts a Redis Cluster of this many masters, without replicas, instead of one Redis; see
    /// [`Cluster::masters`].
    #[must_use]
    pub fn redis_cluster(mut self, masters: u16) -> Self {
        self.masters = Some(masters);
        self
    }

    /// Starts everything and waits until every role is ready.
    ///
    /// # Errors
    /// Returns an error with the end of its output if a process does not start.
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
        kafka.create_topics(&topics.logs(), self.partitions).await?;
        kafka.create_compacted(&topics.revocations).await?;
        let client = kafka.client();
        let dir = Scratch::new("barid-cluster-")?;
        let counts = Role::ALL.map(|role| (role, self.counts.get(&role).copied().unwrap_or(1)));
        let nodes = Vec::new();
        let mut cluster =
            Cluster { nodes, redis, masters, own_kafka, client, topics, builder: self, dir };
        for (role, count) in counts {
            (0..count).try_for_each(|number| cluster.add(role, number))?;
        }
        cluster.wait_ready().await?;
        // A ready role may not know the nodes that became ready after it: it sees them at its next
        // look at the table of nodes. Until then pushes take the slow path.
        tokio::time::sleep(2 * Duration::from_millis(NODES_REFRESH_MS.into())).await;
        Ok(cluster)
    }
}
