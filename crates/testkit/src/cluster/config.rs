//! The configuration files of a cluster's nodes.

use anyhow::{Context as _, Result};
use toml::{Table, Value};

use super::node::{Node, Role};
use super::topics::Topics;
use crate::ports::free_port;
use crate::{Redis, RedisCluster, token};

/// Seconds that a role gets to drain.
pub(super) const DRAIN_SECONDS: u32 = 5;

/// How often roles read the table of nodes, milliseconds.
pub(super) const NODES_REFRESH_MS: u32 = 100;

/// A setting of a test: a dotted key, for one role or for all.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub role: Option<Role>,
    pub key: String,
    pub value: Value,
}

/// Settings shared by the nodes of a cluster.
pub(super) struct Shared<'a> {
    pub redis: &'a Redis,
    pub masters: Option<&'a RedisCluster>,
    pub brokers: String,
    pub topics: &'a Topics,
    pub settings: &'a [Setting],
}

impl Shared<'_> {
    /// The configuration of `node`: what it needs to run here, then the settings of the test.
    pub(super) fn config_of(&self, node: &Node) -> Result<Table> {
        let mut config = Table::new();
        let mut put = |key: &str, value: Value| set(&mut config, key, value);
        put("admin.listen", "127.0.0.1:0".into())?;
        put("log.level", std::env::var("BARID_TEST_LOG").unwrap_or("info".into()).into())?;
        put("drain_seconds", i64::from(DRAIN_SECONDS).into())?;
        put("ready_file", node.ready_file.display().to_string().into())?;
        self.put_redis(&mut put)?;
        if matches!(node.role, Role::Purger | Role::Access) {
            self.put_kafka(&mut put)?;
        }
        if matches!(node.role, Role::Dispatcher | Role::Access) {
            put("node", node.name().into())?;
        }
        match node.role {
            Role::Access => {
                // Devices have one address for the cluster; here it is the node's, which must be the
                // same after a restart.
                put("listen", format!("127.0.0.1:{}", free_port()).into())?;
                put("grpc_listen", "127.0.0.1:0".into())?;
                put("auth.keys", Value::Array(vec![token::key().into()]))?;
            }
            Role::Dispatcher => put("listen", "127.0.0.1:0".into())?,
            Role::Purger | Role::Delayer => (),
        }
        if node.role != Role::Access {
            put("nodes_refresh_ms", i64::from(NODES_REFRESH_MS).into())?;
        }
        for Setting { role, key, value } in self.settings {
            if role.is_none_or(|role| role == node.role) {
                put(key, value.clone())?;
            }
        }
        Ok(config)
    }

    fn put_redis(&self, put: &mut impl FnMut(&str, Value) -> Result<()>) -> Result<()> {
        match self.masters {
            None => put("redis.url", self.redis.url().into())?,
            Some(masters) => {
                let urls = masters.urls();
                put("redis.cluster", true.into())?;
                put("redis.url", urls[0].clone().into())?;
                put("redis.urls", urls[1..].to_vec().into())?;
            }
        }
        put("redis.retry_base_ms", 300.into())?;
        put("redis.retry_max_ms", 2_000.into())
    }

    fn put_kafka(&self, put: &mut impl FnMut(&str, Value) -> Result<()>) -> Result<()> {
        let topics = self.topics;
        put("kafka.brokers", vec![self.brokers.clone()].into())?;
        put("kafka.topics.push_high", topics.high.clone().into())?;
        put("kafka.topics.push", topics.push.clone().into())?;
        put("kafka.topics.push_bulk", topics.bulk.clone().into())?;
        put("kafka.topics.receipts", topics.receipts.clone().into())?;
        put("kafka.topics.dead", topics.dead.clone().into())?;
        put("kafka.topics.revocations", topics.revocations.clone().into())?;
        put("kafka.group", format!("{}.purger", topics.push).into())
    }
}

/// Sets a dotted key.
fn set(table: &mut Table, key: &str, value: Value) -> Result<()> {
    let (tables, last) = key.rsplit_once('.').unwrap_or(("", key));
    let mut table = table;
    for name in tables.split('.').filter(|name| !name.is_empty()) {
        let inner = table.entry(name).or_insert_with(|| Table::new().into());
        table = inner.as_table_mut().with_context(|| format!("{name} in {key} is not a table"))?;
    }
    table.insert(last.into(), value);
    Ok(())
}
