//! The master of each shard: a lane per master, with a queue for each operation.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use barid_core::{AppId, Shard, ShardCount};
use parking_lot::RwLock;
use redis::{Cmd, ErrorKind, FromRedisValue, RedisError, ServerErrorKind, Value};
use tokio::sync::broadcast;
use tracing::Instrument as _;

use crate::batcher::{Batcher, Masters};
use crate::cluster::{self, Master, slot_of};
use crate::dial::warn_sparingly;
use crate::link::{Link, ReplicatedError};
use crate::metrics::Metrics;
use crate::operations::{Ack, Confirm, Connect, Disconnect, Join, Read, ReadAudience, ReadJournal};
use crate::redis_clock::RedisTime;
use crate::scripts::{Call, Script};
use crate::{Error, Reconnected, RedisConfig, UserKey, keys};

/// Minimum time between look-ups of the masters.
const REFRESH_SPACING: Duration = Duration::from_millis(300);
/// Maximum redirections of one call.
const REDIRECTIONS_MAX: usize = 3;
/// Maximum events that a slow subscriber may lag behind.
const EVENTS_MAX: usize = 64;

/// All masters, and the queues in front of them.
pub(crate) struct Topology {
    this: Weak<Self>,
    config: RedisConfig,
    shards: ShardCount,
    metrics: Metrics,
    map: RwLock<Arc<Map>>,
    /// When the masters were last looked up; locked during a look-up.
    refreshed: tokio::sync::Mutex<Instant>,
    reconnected: broadcast::Sender<Reconnected>,
    /// As in [`Link`].
    records_meta: AtomicBool,
}

#[derive(Default)]
struct Map {
    lanes: Vec<Arc<Lane>>,
    /// The lane of each shard.
    of_shard: Vec<usize>,
    /// The slots of each lane.
    slots: Vec<Vec<(u16, u16)>>,
}

/// One master: its link, and a queue per operation.
pub(crate) struct Lane {
    name: String,
    pub link: Arc<Link>,
    /// Only with `wait_replicas`: a connection for accept and WAIT, which blocks it.
    replicated: Option<Arc<Link>>,
    pub connect: Batcher<Connect<true>>,
    pub connect_known: Batcher<Connect<false>>,
    pub confirm: Batcher<Confirm>,
    pub read: Batcher<Read>,
    pub ack: Batcher<Ack>,
    pub disconnect: Batcher<Disconnect>,
    pub join: Batcher<Join>,
    pub read_audience: Batcher<ReadAudience>,
    pub read_journal: Batcher<ReadJournal>,
}

impl Topology {
    /// Connects to the masters; some may be away. Nothing is recorded there before [`Self::record_meta`].
    pub async fn open(
        config: RedisConfig,
        shards: ShardCount,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Error> {
        let masters = cluster::masters(&config, Vec::new()).await?;
        let topology = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            config,
            shards,
            metrics,
            map: RwLock::default(),
            refreshed: tokio::sync::Mutex::new(Instant::now()),
            reconnected: broadcast::Sender::new(EVENTS_MAX),
            records_meta: AtomicBool::new(false),
        });
        topology.install(masters);
        let lanes = topology.map.read().lanes.clone();
        let ready = futures::future::join_all(lanes.iter().map(|lane| lane.link.ready())).await;
        let failures: Vec<Error> = ready.into_iter().filter_map(Result::err).collect();
        let refused = failures.iter().find(|e| matches!(e, Error::Unusable(_)));
        match refused.or(failures.first()) {
            Some(error) if refused.is_some() || failures.len() == lanes.len() => {
                return Err(error.clone());
            }
            _ => {}
        }
        Ok(topology)
    }

    /// From now on, connections record shard count and layout in an empty Redis; current ones do so at once.
    ///
    /// # Errors
    /// Returns [`Error::Unusable`] if another shard count or layout is recorded.
    pub async fn record_meta(&self) -> Result<(), Error> {
        let lanes = self.map.read().lanes.clone();
        for lane in lanes {
            if let Some(link) = &lane.replicated {
                let _not_connected = link.record_meta().await;
            }
            match lane.link.record_meta().await {
                Err(error @ Error::Unusable(_)) => return Err(error),
                Err(error) => warn_sparingly!(error, "shard count and layout not recorded"),
                Ok(()) => {}
            }
        }
        self.records_meta.store(true, Ordering::Relaxed);
        self.check_replica_settings().await;
        Ok(())
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

    /// Reports every new connection from now on.
    pub fn reconnections(&self) -> broadcast::Receiver<Reconnected> {
        self.reconnected.subscribe()
    }

    /// Whether each shard needs calls of its own.
    pub fn is_cluster(&self) -> bool {
        self.config.cluster
    }

    /// The shard of a user.
    pub fn shard_of(&self, user: &UserKey) -> Shard {
        self.shards.shard_of(user.app.as_str(), user.user.as_str())
    }

    /// The shard of an audience.
    pub fn shard_of_audience(&self, app: &AppId, audience: &str) -> Shard {
        self.shards.shard_of(app.as_str(), audience)
    }

    /// Groups items by the call that may carry them, in order: all in one, or in a Redis Cluster one call per shard.
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

    /// The shards of each master that has any.
    pub fn shards_by_lane(&self) -> Vec<Vec<Shard>> {
        let map = self.map.read().clone();
        let mut lanes = vec![Vec::new(); map.lanes.len()];
        for (shard, lane) in self.shards.all().zip(&map.of_shard) {
            lanes[*lane].push(shard);
        }
        lanes.retain(|shards| !shards.is_empty());
        lanes
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

    /// The time of a shard's master; cheap enough for every message.
    pub fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        let map = self.map.read();
        map.lanes[map.of_shard[usize::from(shard.get())]].link.clock().time()
    }

    /// Runs a script on the master of `shard`.
    pub async fn run(&self, shard: Shard, script: &Script, call: &Call) -> Result<Value, Error> {
        let command = Command::Script(script, call);
        self.follow(|| self.link(shard), &command).await
    }

    /// Sends a command to the master of `shard`.
    pub async fn query<T: FromRedisValue>(&self, shard: Shard, cmd: &Cmd) -> Result<T, Error> {
        let value = self.follow(|| self.link(shard), &Command::Plain(cmd)).await?;
        redis::from_redis_value(value).map_err(|e| Error::Unexpected(e.to_string()))
    }

    /// Runs a script on the master of a key that belongs to no shard.
    pub async fn run_on(&self, key: &str, script: &Script, call: &Call) -> Result<Value, Error> {
        self.follow(|| self.link_of_key(key), &Command::Script(script, call)).await
    }

    /// Sends a command to the master of a key that belongs to no shard.
    pub async fn query_on<T: FromRedisValue>(&self, key: &str, cmd: &Cmd) -> Result<T, Error> {
        let value = self.follow(|| self.link_of_key(key), &Command::Plain(cmd)).await?;
        redis::from_redis_value(value).map_err(|e| Error::Unexpected(e.to_string()))
    }

    /// Checks shard count and layout, and records them again if they were lost.
    pub async fn check_meta(&self) -> Result<(), Error> {
        self.link_of_key(keys::META).check_meta().await
    }

    /// Waits for an answer of every master.
    pub async fn ping(&self) -> Result<(), Error> {
        let lanes = self.map.read().lanes.clone();
        let want = self.config.wait_replicas;
        let answers = lanes.iter().map(|lane| async move {
            lane.link.ping().await?;
            // While there are no messages, no WAIT shows that a replica is missing.
            match want > 0 {
                true => match lane.link.replicas().await? {
                    have if have < want => Err(Error::Unreplicated { have, want }),
                    _ => Ok(()),
                },
                false => Ok(()),
            }
        });
        futures::future::try_join_all(answers).await?;
        Ok(())
    }

    /// Runs calls of a script, each on its shard's master, and waits until that master's replicas confirm them;
    /// returns one result per call. A call that is redirected fails, because WAIT does not cover it.
    pub async fn run_replicated(
        &self,
        script: &Script,
        calls: &[(Shard, Call)],
    ) -> Vec<Result<Value, Error>> {
        let (want, timeout_ms) = (self.config.wait_replicas, self.config.wait_timeout_ms);
        let map = self.map.read().clone();
        let mut by_lane: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (index, (shard, _)) in calls.iter().enumerate() {
            by_lane.entry(map.of_shard[usize::from(shard.get())]).or_default().push(index);
        }
        let rounds = by_lane.into_iter().map(|(lane, indices)| {
            let lane = map.lanes[lane].clone();
            async move {
                let link = lane.replicated.as_ref().unwrap_or(&lane.link);
                let calls: Vec<&Call> = indices.iter().map(|index| &calls[*index].1).collect();
                let results = link.run_replicated(script, &calls, want, timeout_ms).await;
                indices.into_iter().zip(results).collect::<Vec<_>>()
            }
        });
        let rounds = futures::future::join_all(rounds).await;
        let missing = || Err(Error::Unexpected("a call was not answered".into()));
        let mut results: Vec<_> = calls.iter().map(|_| missing()).collect();
        let mut moved = false;
        for (index, result) in rounds.into_iter().flatten() {
            results[index] = result.map_err(|error| match error {
                ReplicatedError::TooFew { have } => Error::Unreplicated { have, want },
                ReplicatedError::Call(error) => {
                    moved |= error.kind() == ErrorKind::Server(ServerErrorKind::Moved);
                    self.refresh_after(&error);
                    Error::from(error)
                }
            });
        }
        if moved {
            self.refresh().await;
        }
        results
    }

    /// Warns of server settings that conflict with `wait_replicas`.
    async fn check_replica_settings(&self) {
        if self.config.wait_replicas > 0 {
            let lanes = self.map.read().lanes.clone();
            let looks = lanes.iter().map(|lane| lane.link.warn_of_min_replicas());
            futures::future::join_all(looks).await;
        }
    }

    /// Sends to `link()`, and follows redirections. A slot that is being moved to another master (ASK, TRYAGAIN: a
    /// script's keys may be on both) counts as away until the move is complete.
    async fn follow(
        &self,
        link: impl Fn() -> Arc<Link>,
        command: &Command<'_>,
    ) -> Result<Value, Error> {
        let mut last = None;
        for _ in 0..REDIRECTIONS_MAX {
            let error = match command.send(&link()).await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::Server(ServerErrorKind::Moved) => self.refresh().await,
                _ => {
                    self.refresh_after(&error);
                    return Err(error.into());
                }
            }
            last = Some(error);
        }
        Err(last.map_or_else(|| Error::Away("too many redirections".into()), Error::from))
    }

    /// Looks up the masters in the background if a failover may explain the error.
    fn refresh_after(&self, error: &RedisError) {
        let moved = error.is_io_error()
            || matches!(
                error.kind(),
                ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::ClusterDown)
            );
        if self.config.may_move()
            && moved
            && let Some(topology) = self.this.upgrade()
        {
            tokio::spawn(async move { topology.refresh().await }.in_current_span());
        }
    }

    /// Looks up the masters. Callers during a look-up wait for it and do not start another.
    async fn refresh(&self) {
        if !self.config.may_move() {
            return;
        }
        let called_at = Instant::now();
        let mut refreshed = self.refreshed.lock().await;
        if *refreshed > called_at {
            return;
        }
        tokio::time::sleep(REFRESH_SPACING.saturating_sub(refreshed.elapsed())).await;
        let known = self.map.read().lanes.iter().map(|lane| lane.link.client().clone()).collect();
        match cluster::masters(&self.config, known).await {
            Ok(masters) => self.install(masters),
            Err(error) => warn_sparingly!(error, "looking up the masters failed"),
        }
        *refreshed = Instant::now();
    }

    /// Replaces the masters; lanes of known masters are kept.
    fn install(&self, masters: Vec<Master>) {
        let old = self.map.read().clone();
        let mut map = Map::default();
        for shard in self.shards.all() {
            let slot = slot_of(&keys::timers(shard));
            // Any master reports that a slot is not served.
            let lane = masters.iter().position(|master| master.serves(slot)).unwrap_or(0);
            map.of_shard.push(lane);
        }
        for master in masters {
            let same = old.lanes.iter().find(|lane| lane.name == master.name).cloned();
            map.lanes.push(same.unwrap_or_else(|| self.start_lane(&master)));
            map.slots.push(master.slots);
        }
        *self.map.write() = Arc::new(map);
    }

    fn start_lane(&self, master: &Master) -> Arc<Lane> {
        let (this, name) = (self.this.clone(), master.name.clone());
        let records_meta = self.records_meta.load(Ordering::Relaxed);
        let link = Link::new(master.client.clone(), &self.config, records_meta, move || {
            if let Some(topology) = this.upgrade() {
                topology.connected(&name);
            }
        });
        let replicated = (self.config.wait_replicas > 0)
            .then(|| Link::new(master.client.clone(), &self.config, records_meta, || {}));
        Arc::new(Lane::start(master.name.clone(), link, replicated, &self.this, &self.config))
    }

    fn connected(&self, name: &str) {
        self.metrics.connections.inc();
        let map = self.map.read().clone();
        let lane = map.lanes.iter().position(|lane| lane.name == name);
        let shards = self.shards.all().zip(&map.of_shard).filter(|(_, of)| Some(**of) == lane);
        let shards = shards.map(|(shard, _)| shard).collect();
        tracing::info!(master = name, "connected to redis");
        let _no_subscriber = self.reconnected.send(Reconnected { shards });
    }

    fn link_of_key(&self, key: &str) -> Arc<Link> {
        let slot = slot_of(key);
        let map = self.map.read();
        let serves = |ranges: &Vec<(u16, u16)>| {
            ranges.iter().any(|(from, to)| (*from..=*to).contains(&slot))
        };
        let lane = map.slots.iter().position(serves).unwrap_or(0);
        map.lanes[lane].link.clone()
    }
}

impl Masters for Topology {
    fn config(&self) -> &RedisConfig {
        &self.config
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn link(&self, shard: Shard) -> Arc<Link> {
        self.lane(shard).link.clone()
    }

    async fn run(&self, shard: Shard, script: &Script, call: &Call) -> Result<Value, Error> {
        self.run(shard, script, call).await
    }
}

/// A command or script call, which can be sent again after a redirection.
enum Command<'a> {
    Plain(&'a Cmd),
    Script(&'a Script, &'a Call),
}

impl Command<'_> {
    async fn send(&self, link: &Link) -> Result<Value, RedisError> {
        match self {
            Self::Plain(cmd) => link.send(cmd).await,
            Self::Script(script, call) => link.run(script, call).await,
        }
    }
}

impl Lane {
    fn start(
        name: String,
        link: Arc<Link>,
        replicated: Option<Arc<Link>>,
        topology: &Weak<Topology>,
        config: &RedisConfig,
    ) -> Self {
        Self {
            name,
            link,
            replicated,
            connect: Batcher::start(topology.clone(), config),
            connect_known: Batcher::start(topology.clone(), config),
            confirm: Batcher::start(topology.clone(), config),
            read: Batcher::start(topology.clone(), config),
            ack: Batcher::start(topology.clone(), config),
            disconnect: Batcher::start(topology.clone(), config),
            join: Batcher::start(topology.clone(), config),
            read_audience: Batcher::start(topology.clone(), config),
            read_journal: Batcher::start(topology.clone(), config),
        }
    }
}
