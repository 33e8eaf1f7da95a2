//! Which master holds which shard: one lane a master, with a queue for each script.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use barid_core::{AppId, Shard, ShardCount};
use parking_lot::RwLock;
use redis::{Cmd, ErrorKind, FromRedisValue, RedisError, ServerErrorKind, Value};
use tokio::sync::broadcast;

use crate::batcher::{Batcher, Masters};
use crate::cluster::{self, Master, slot_of};
use crate::link::{Link, replicas_of};
use crate::metrics::Metrics;
use crate::operations::{Ack, Confirm, Connect, Disconnect, Read};
use crate::redis_clock::RedisTime;
use crate::scripts::{Call, Script};
use crate::{Error, Reconnected, RedisConfig, UserKey, keys};

/// The masters are looked up again at most this often.
const REFRESH_SPACING: Duration = Duration::from_millis(300);
/// Redirections that one call follows.
const REDIRECTIONS_MAX: usize = 3;
/// Events that a slow subscriber may be behind.
const EVENTS: usize = 64;

/// All masters, and the queues in front of them.
pub(crate) struct Topology {
    this: Weak<Self>,
    config: RedisConfig,
    shards: ShardCount,
    metrics: Metrics,
    map: RwLock<Arc<Map>>,
    /// When the masters were looked up last; held during a look-up.
    refreshed: tokio::sync::Mutex<Instant>,
    reconnected: broadcast::Sender<Reconnected>,
    /// See [`Link::found`].
    founds: AtomicBool,
}

#[derive(Default)]
struct Map {
    lanes: Vec<Arc<Lane>>,
    /// The lane of each shard.
    of_shard: Vec<usize>,
    /// The slots of each lane.
    slots: Vec<Vec<(u16, u16)>>,
}

/// One master: its link, and a queue a script.
pub(crate) struct Lane {
    name: String,
    pub link: Arc<Link>,
    /// A connection for accept and WAIT alone, where replicas are waited for: it blocks behind WAIT.
    replicated: Option<Arc<Link>>,
    pub connect: Batcher<Connect>,
    pub confirm: Batcher<Confirm>,
    pub read: Batcher<Read>,
    pub ack: Batcher<Ack>,
    pub disconnect: Batcher<Disconnect>,
}

impl Topology {
    /// Connects to the masters, and records nothing there before [`Self::found`]. Of several, some may be away.
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
            reconnected: broadcast::Sender::new(EVENTS),
            founds: AtomicBool::new(false),
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

    /// From now on connections record shard count and layout where nobody has; those that stand do at once.
    ///
    /// # Errors
    /// [`Error::Unusable`]: another shard count or layout is recorded.
    pub async fn found(&self) -> Result<(), Error> {
        let lanes = self.map.read().lanes.clone();
        for lane in lanes {
            if let Some(link) = &lane.replicated {
                let _nothing_connected = link.found().await;
            }
            match lane.link.found().await {
                Err(error @ Error::Unusable(_)) => return Err(error),
                Err(error) => tracing::warn!(%error, "a master went away at once"),
                Ok(()) => {}
            }
        }
        self.founds.store(true, Ordering::Relaxed);
        self.look_at_replicas().await;
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

    /// Tells of every connection that is made from now on.
    pub fn reconnections(&self) -> broadcast::Receiver<Reconnected> {
        self.reconnected.subscribe()
    }

    /// Whether each shard needs a call of its own.
    pub fn is_cluster(&self) -> bool {
        self.config.cluster
    }

    /// Where a user lives.
    pub fn shard_of(&self, user: &UserKey) -> Shard {
        self.shards.shard_of(user.app.as_str(), user.user.as_str())
    }

    /// Where a group lives.
    pub fn shard_of_group(&self, app: &AppId, group: &str) -> Shard {
        self.shards.shard_of(app.as_str(), group)
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

    /// The shards of each master that has some.
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

    /// The clock of a shard's master; cheap enough for every message.
    pub fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        let map = self.map.read();
        map.lanes[map.of_shard[usize::from(shard.get())]].link.clock().time()
    }

    /// Runs a script where `shard` is.
    pub async fn run(&self, shard: Shard, script: &Script, call: &Call) -> Result<Value, Error> {
        let command = Command::Script(script, call);
        self.follow(|| self.link(shard), &command).await
    }

    /// Sends a command on keys of `shard`.
    pub async fn query<T: FromRedisValue>(&self, shard: Shard, cmd: &Cmd) -> Result<T, Error> {
        let value = self.follow(|| self.link(shard), &Command::Plain(cmd)).await?;
        redis::from_redis_value(value).map_err(|e| Error::Unexpected(e.to_string()))
    }

    /// Runs a script on a key that belongs to no shard.
    pub async fn run_on(&self, key: &str, script: &Script, call: &Call) -> Result<Value, Error> {
        self.follow(|| self.link_of_key(key), &Command::Script(script, call)).await
    }

    /// Sends a command on a key that belongs to no shard.
    pub async fn query_on<T: FromRedisValue>(&self, key: &str, cmd: &Cmd) -> Result<T, Error> {
        let value = self.follow(|| self.link_of_key(key), &Command::Plain(cmd)).await?;
        redis::from_redis_value(value).map_err(|e| Error::Unexpected(e.to_string()))
    }

    /// Looks again whether this Redis is the one that the configuration describes, and records it where
    /// it was forgotten.
    pub async fn check_meta(&self) -> Result<(), Error> {
        self.link_of_key(keys::META).check_meta().await
    }

    /// Answers when every master does.
    pub async fn ping(&self) -> Result<(), Error> {
        let lanes = self.map.read().lanes.clone();
        let want = self.config.wait_replicas;
        let answers = lanes.iter().map(|lane| async move {
            lane.link.ping().await?;
            // Without messages nobody waits, and nobody would miss a replica.
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

    /// Runs calls of a script, each where its shard is, and has each master's replicas confirm them;
    /// one result a call. A call that is redirected fails: what WAIT says is not about it.
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
            results[index] = result.map_err(|error| {
                moved |= error.kind() == ErrorKind::Server(ServerErrorKind::Moved);
                self.look_again(&error);
                match replicas_of(&error) {
                    Some(have) => Error::Unreplicated { have, want },
                    None => Error::from(error),
                }
            });
        }
        if moved {
            self.refresh().await;
        }
        results
    }

    /// Warns, once, of settings that do not go with waiting for replicas.
    async fn look_at_replicas(&self) {
        if self.config.wait_replicas > 0 {
            let lanes = self.map.read().lanes.clone();
            let looks = lanes.iter().map(|lane| lane.link.warn_of_min_replicas());
            futures::future::join_all(looks).await;
        }
    }

    /// Sends to `link()`, and goes where it is redirected. A slot on its way to another master (ASK,
    /// TRYAGAIN: some of a script's keys are here, some there) is away until it has arrived.
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
                    self.look_again(&error);
                    return Err(error.into());
                }
            }
            last = Some(error);
        }
        Err(last.map_or_else(|| Error::Away("redirected".into()), Error::from))
    }

    /// After a failure that a failover may explain, looks for the masters without making anyone wait.
    fn look_again(&self, error: &RedisError) {
        let moved = error.is_io_error()
            || matches!(
                error.kind(),
                ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::ClusterDown)
            );
        if self.config.may_move()
            && moved
            && let Some(topology) = self.this.upgrade()
        {
            tokio::spawn(async move { topology.refresh().await });
        }
    }

    /// Looks up the masters. Those who come while somebody does wait for that one.
    async fn refresh(&self) {
        if !self.config.may_move() {
            return;
        }
        let came = Instant::now();
        let mut refreshed = self.refreshed.lock().await;
        if *refreshed > came {
            return;
        }
        tokio::time::sleep(REFRESH_SPACING.saturating_sub(refreshed.elapsed())).await;
        let known = self.map.read().lanes.iter().map(|lane| lane.link.client().clone()).collect();
        match cluster::masters(&self.config, known).await {
            Ok(masters) => self.install(masters),
            Err(error) => tracing::warn!(%error, "the masters could not be looked up"),
        }
        *refreshed = Instant::now();
    }

    /// Takes over a set of masters; lanes of those that stay go on.
    fn install(&self, masters: Vec<Master>) {
        let old = self.map.read().clone();
        let mut map = Map::default();
        for shard in self.shards.all() {
            let slot = slot_of(&keys::timers(shard));
            // A slot that nobody serves: whoever is asked says so.
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
        let founds = self.founds.load(Ordering::Relaxed);
        let link = Link::new(master.client.clone(), &self.config, founds, move || {
            if let Some(topology) = this.upgrade() {
                topology.connected(&name);
            }
        });
        let replicated = (self.config.wait_replicas > 0)
            .then(|| Link::new(master.client.clone(), &self.config, founds, || {}));
        Arc::new(Lane::start(master.name.clone(), link, replicated, &self.this, &self.config))
    }

    fn connected(&self, name: &str) {
        self.metrics.connections.inc();
        let map = self.map.read().clone();
        let lane = map.lanes.iter().position(|lane| lane.name == name);
        let shards = self.shards.all().zip(&map.of_shard).filter(|(_, of)| Some(**of) == lane);
        let shards = shards.map(|(shard, _)| shard).collect();
        tracing::info!(master = name, "connected to redis");
        let _nobody_listens = self.reconnected.send(Reconnected { shards });
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

/// What can be sent again somewhere else.
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
            confirm: Batcher::start(topology.clone(), config),
            read: Batcher::start(topology.clone(), config),
            ack: Batcher::start(topology.clone(), config),
            disconnect: Batcher::start(topology.clone(), config),
        }
    }
}
