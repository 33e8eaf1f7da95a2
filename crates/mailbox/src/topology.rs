//! Which master holds which shard: one lane a master.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use barid_core::{Shard, ShardCount};
use parking_lot::RwLock;
use redis::{Client, Cmd, FromRedisValue, Value};

use crate::batcher::Batcher;
use crate::link::Link;
use crate::metrics::Metrics;
use crate::operations::{Ack, Confirm, Connect, Disconnect, Read};
use crate::scripts::{Call, Script};
use crate::{Error, RedisConfig, UserKey};

/// All masters, and the queues in front of them.
pub(crate) struct Topology {
    config: RedisConfig,
    shards: ShardCount,
    metrics: Metrics,
    map: RwLock<Arc<Map>>,
}

struct Map {
    lanes: Vec<Arc<Lane>>,
    /// The lane of each shard.
    of_shard: Vec<usize>,
}

/// One master: its link, and a queue a script.
pub(crate) struct Lane {
    pub link: Arc<Link>,
    pub connect: Batcher<Connect>,
    pub confirm: Batcher<Confirm>,
    pub read: Batcher<Read>,
    pub ack: Batcher<Ack>,
    pub disconnect: Batcher<Disconnect>,
}

impl Topology {
    pub async fn open(
        config: RedisConfig,
        shards: ShardCount,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Error> {
        let client = Client::open(config.url.expose())?;
        let connections = metrics.connections.clone();
        let link = Link::new(client, &config, move || connections.inc());
        link.ready().await?;
        Ok(Arc::new_cyclic(|topology| {
            let lane = Arc::new(Lane::start(link, topology.clone(), &config));
            let map = Map { lanes: vec![lane], of_shard: vec![0; usize::from(shards.get())] };
            Self { config, shards, metrics, map: RwLock::new(Arc::new(map)) }
        }))
    }

    pub fn config(&self) -> &RedisConfig {
        &self.config
    }

    pub fn shards(&self) -> ShardCount {
        self.shards
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Whether each shard needs a call of its own.
    pub fn is_cluster(&self) -> bool {
        self.config.cluster
    }

    /// Where a user lives.
    pub fn shard_of(&self, user: &UserKey) -> Shard {
        self.shards.shard_of(user.app.as_str(), user.user.as_str())
    }

    /// Splits items into what one call may carry, keeping their order: all of them, or in a Redis
    /// Cluster those of one shard.
    pub fn calls<'a, T>(&self, items: &'a [T], shard: impl Fn(&T) -> Shard) -> Vec<Vec<&'a T>> {
        if !self.is_cluster() {
            return if items.is_empty() { Vec::new() } else { vec![items.iter().collect()] };
        }
        let mut calls: BTreeMap<Shard, Vec<&T>> = BTreeMap::new();
        for item in items {
            calls.entry(shard(item)).or_default().push(item);
        }
        calls.into_values().collect()
    }

    pub fn lanes(&self) -> usize {
        self.map.read().lanes.len()
    }

    pub fn lane_of(&self, shard: Shard) -> usize {
        self.map.read().of_shard[usize::from(shard.get())]
    }

    pub fn lane(&self, shard: Shard) -> Arc<Lane> {
        let map = self.map.read();
        map.lanes[map.of_shard[usize::from(shard.get())]].clone()
    }

    pub fn link(&self, shard: Shard) -> Arc<Link> {
        self.lane(shard).link.clone()
    }

    /// Runs a script where `shard` is.
    pub async fn run(&self, shard: Shard, script: &Script, call: &Call) -> Result<Value, Error> {
        Ok(self.link(shard).run(script, call).await?)
    }

    /// Sends a command on keys of `shard`.
    pub async fn query<T: FromRedisValue>(&self, shard: Shard, cmd: &Cmd) -> Result<T, Error> {
        let value = self.link(shard).send(cmd).await?;
        redis::from_redis_value(value).map_err(|e| Error::Unexpected(e.to_string()))
    }

    pub async fn ping(&self) -> Result<(), Error> {
        let lanes = self.map.read().lanes.clone();
        let ping = redis::cmd("PING");
        for lane in lanes {
            lane.link.send(&ping).await?;
        }
        Ok(())
    }
}

impl Lane {
    fn start(link: Arc<Link>, topology: Weak<Topology>, config: &RedisConfig) -> Self {
        Self {
            link,
            connect: Batcher::start(topology.clone(), config),
            confirm: Batcher::start(topology.clone(), config),
            read: Batcher::start(topology.clone(), config),
            ack: Batcher::start(topology.clone(), config),
            disconnect: Batcher::start(topology, config),
        }
    }
}
