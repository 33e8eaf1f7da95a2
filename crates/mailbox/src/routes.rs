//! Routes, read on connections on which Redis reports every change of what was read.
//!
//! Each master has such a connection: one that breaks, a slot that moves, or a master that is added or removed affects
//! only its own shards.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use barid_core::{Shard, ShardCount};
use barid_runtime::Condition;
use parking_lot::RwLock;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, ProtocolVersion, PushInfo, PushKind, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument as _;

use crate::cluster::{self, Master, slot_of};
use crate::dial::{dial, warn_sparingly};
use crate::layout::parse_route;
use crate::{Error, RedisConfig, Route, UserKey, keys};

/// How often each connection is checked, and how long an answer may take; how often a Redis Cluster or Sentinel is
/// asked for the masters.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Wait between attempts to connect, and after a connection that broke within `PING_EVERY`.
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// Cached routes to discard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invalidation {
    /// This user's routes changed.
    User(UserKey),
    /// All routes of these shards may have changed: their master was emptied or replaced, or its connection was lost.
    Shards(Arc<[Shard]>),
}

/// Reads routes with server-assisted client-side caching (CLIENT TRACKING). A change of a value that
/// [`TrackedRoutes::get`] returned is reported on the connection on which it was read, before any later reply. A slot
/// that moves to another master, and a master that Sentinel replaces, are noticed within about a second.
///
/// Cheap to clone; stops with the last clone.
#[derive(Clone)]
pub struct TrackedRoutes {
    inner: Arc<Inner>,
}

struct Inner {
    config: RedisConfig,
    shards: ShardCount,
    map: RwLock<Arc<Map>>,
    listeners: RwLock<Vec<Listener>>,
    tracking: watch::Sender<bool>,
    /// Renewed at each sign that changes are reported.
    alive: OnceLock<Condition>,
    /// A read was redirected: look up the masters.
    redirected: Arc<Notify>,
}

type Listener = Box<dyn Fn(Invalidation) + Send + Sync>;

#[derive(Default)]
struct Map {
    masters: Vec<Arc<Tracked>>,
    /// The master of each shard; `None`: its slot is not served.
    of_shard: Vec<Option<usize>>,
}

impl Map {
    fn of(&self, shard: Shard) -> Option<&Arc<Tracked>> {
        let index = (*self.of_shard.get(usize::from(shard.get()))?)?;
        self.masters.get(index)
    }

    fn has(&self, master: &Arc<Tracked>) -> bool {
        self.masters.iter().any(|other| Arc::ptr_eq(other, master))
    }
}

/// One master, and its connection while changes are reported.
struct Tracked {
    name: String,
    client: Client,
    live: RwLock<Option<Live>>,
}

/// A connection on which changes are reported.
#[derive(Clone)]
struct Live {
    connection: MultiplexedConnection,
    /// Notified when this connection fails; each connection has its own.
    broken: Arc<Notify>,
}

impl TrackedRoutes {
    /// Connects in the background, and stays connected.
    ///
    /// # Errors
    /// Returns [`Error::Unusable`] if the configuration is invalid.
    pub async fn open(config: &RedisConfig) -> Result<Self, Error> {
        config.check().map_err(Error::Unusable)?;
        let inner = Arc::new(Inner {
            config: config.clone(),
            shards: config.shard_count().map_err(|e| Error::Unusable(e.to_string()))?,
            map: RwLock::default(),
            listeners: RwLock::default(),
            tracking: watch::Sender::new(false),
            alive: OnceLock::new(),
            redirected: Arc::default(),
        });
        if let Err(error) = inner.look_up_masters().await {
            warn_sparingly!(error, "looking up the masters of routes failed");
        }
        tokio::spawn(follow(Arc::downgrade(&inner)).in_current_span());
        Ok(Self { inner })
    }

    /// Keeps `condition` ready as long as changes of every shard are reported.
    pub fn report_to(&self, condition: Condition) {
        // A second call would change nothing.
        let _first = self.inner.alive.set(condition);
    }

    /// Calls `listener` for each invalidation. It must not block: it runs on the task that reads the connection.
    pub fn on_invalidate(&self, listener: impl Fn(Invalidation) + Send + Sync + 'static) {
        self.inner.listeners.write().push(Box::new(listener));
    }

    /// Whether changes of every shard are reported now. [`Self::get`] fails for shards of which they are not.
    pub fn tracking(&self) -> watch::Receiver<bool> {
        self.inner.tracking.subscribe()
    }

    /// Reads a user's routes, whose next change is then reported.
    ///
    /// # Errors
    /// Returns [`Error::Away`] if the master does not answer, or changes of the user's shard are not reported now.
    pub async fn get(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        let away = || Error::Away("route changes are not tracked now".into());
        let shard = self.inner.shards.shard_of(user.app.as_str(), user.user.as_str());
        let master = self.inner.map.read().of(shard).cloned().ok_or_else(away)?;
        let Live { mut connection, broken } = master.live.read().clone().ok_or_else(away)?;
        let mut get = redis::cmd("HGETALL");
        get.arg(keys::routes(shard, &user.app, &user.user));
        let fields: Result<Vec<(String, String)>, _> = get.query_async(&mut connection).await;
        let fields = fields.inspect_err(|error| match error.kind() {
            // The master answers: the slot is being moved, or was.
            ErrorKind::Server(_) => {
                tracing::debug!(%error, %shard, "routes have moved to another master");
                self.inner.redirected.notify_one();
            }
            _ => {
                warn_sparingly!(error, "reading routes failed");
                broken.notify_one();
            }
        })?;
        Ok(fields.iter().filter_map(|(device, route)| parse_route(device, route)).collect())
    }
}

impl Inner {
    /// Looks up the masters, and tracks changes on each of them.
    async fn look_up_masters(self: &Arc<Self>) -> Result<(), Error> {
        let known = self.map.read().masters.iter().map(|master| master.client.clone()).collect();
        let masters = cluster::masters(&self.config, known).await?;
        self.install(masters);
        Ok(())
    }

    /// Replaces the masters; connections to known masters are kept. Everything read of a shard that has another master
    /// now is invalidated: its changes are no longer reported, including those of routes that did not exist.
    fn install(self: &Arc<Self>, masters: Vec<Master>) {
        let old = self.map.read().clone();
        let mut map = Map::default();
        for shard in self.shards.all() {
            let slot = slot_of(&keys::timers(shard));
            map.of_shard.push(masters.iter().position(|master| master.serves(slot)));
        }
        let mut new = Vec::new();
        for Master { name, client, .. } in masters {
            let same = old.masters.iter().find(|master| master.name == name).cloned();
            map.masters.push(same.unwrap_or_else(|| {
                new.push(Arc::new(Tracked { name, client, live: RwLock::default() }));
                Arc::clone(&new[new.len() - 1])
            }));
        }
        let same = |shard: &Shard| match (old.of(*shard), map.of(*shard)) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (old, new) => old.is_none() && new.is_none(),
        };
        let moved: Arc<[Shard]> = self.shards.all().filter(|shard| !same(shard)).collect();
        // The map before the invalidation: from now on reads go where changes are reported.
        *self.map.write() = Arc::new(map);
        if !moved.is_empty() {
            self.report(&Invalidation::Shards(moved));
        }
        for master in new {
            tokio::spawn(keep(Arc::downgrade(self), master).in_current_span());
        }
        self.update_tracking();
    }

    fn shards_of(&self, master: &Arc<Tracked>) -> Arc<[Shard]> {
        let map = self.map.read().clone();
        let own = |shard: &Shard| map.of(*shard).is_some_and(|other| Arc::ptr_eq(other, master));
        self.shards.all().filter(own).collect()
    }

    fn is_tracking(&self) -> bool {
        let map = self.map.read().clone();
        !map.masters.is_empty() && map.masters.iter().all(|master| master.live.read().is_some())
    }

    fn update_tracking(&self) {
        let now = self.is_tracking();
        self.tracking.send_if_modified(|before| std::mem::replace(before, now) != now);
    }

    /// Connects to a master, and turns tracking on.
    async fn track(self: &Arc<Self>, master: &Arc<Tracked>) -> Result<Live, Error> {
        let (inner, of) = (Arc::downgrade(self), Arc::downgrade(master));
        let broken = Arc::<Notify>::default();
        let on_disconnect = Arc::clone(&broken);
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.config.connect_timeout()))
            .set_response_timeout(Some(self.config.response_timeout()))
            .set_push_sender(move |push: PushInfo| {
                if push.kind == PushKind::Disconnection {
                    on_disconnect.notify_one();
                }
                if let (Some(inner), Some(master)) = (inner.upgrade(), of.upgrade()) {
                    inner.receive(&master, &push);
                }
                Ok::<(), redis::aio::SendError>(())
            });
        let info = master.client.get_connection_info().clone();
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let client = Client::open(info.set_redis_settings(settings))?;
        let mut connection = dial(&client, &config).await?;
        check_role(&mut connection).await?;
        let mut on = redis::cmd("CLIENT");
        on.arg("TRACKING").arg("ON");
        let () = on.query_async(&mut connection).await?;
        Ok(Live { connection, broken })
    }

    /// Handles a push: `invalidate` with a list of keys, or with nil for all keys.
    fn receive(&self, master: &Arc<Tracked>, push: &PushInfo) {
        match (&push.kind, push.data.first()) {
            (PushKind::Disconnection, _) | (PushKind::Invalidate, Some(Value::Nil) | None) => {
                self.report(&Invalidation::Shards(self.shards_of(master)));
            }
            (PushKind::Invalidate, Some(Value::Array(names))) => {
                for name in names {
                    if let Value::BulkString(name) = name
                        && let Some(user) = keys::parse_routes(name)
                    {
                        self.report(&Invalidation::User(user));
                    }
                }
            }
            _ => {}
        }
    }

    fn report(&self, invalidation: &Invalidation) {
        for listener in self.listeners.read().iter() {
            listener(invalidation.clone());
        }
    }
}

/// Follows changes of the masters until the last clone is dropped.
async fn follow(inner: Weak<Inner>) {
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let known = !strong.map.read().masters.is_empty();
        if known && !strong.config.may_move() {
            return; // the only master never changes
        }
        let (redirected, wait) =
            (Arc::clone(&strong.redirected), if known { PING_EVERY } else { RETRY_AFTER });
        drop(strong);
        if timeout(wait, redirected.notified()).await.is_ok() {
            sleep(RETRY_AFTER / 3).await;
        }
        let Some(strong) = inner.upgrade() else { return };
        if let Err(error) = strong.look_up_masters().await {
            warn_sparingly!(error, "looking up the masters of routes failed");
        }
    }
}

/// Keeps a connection to a master until it is no longer one, or the last [`TrackedRoutes`] is dropped.
async fn keep(inner: Weak<Inner>, master: Arc<Tracked>) {
    loop {
        let Some(strong) = inner.upgrade().filter(|inner| inner.map.read().has(&master)) else {
            return;
        };
        match strong.track(&master).await {
            Ok(live) => {
                let began = Instant::now();
                // Earlier reads were invalidated when their connection was lost.
                *master.live.write() = Some(live.clone());
                strong.update_tracking();
                drop(strong);
                while answers(&inner, &master, live.clone()).await {}
                *master.live.write() = None;
                let Some(strong) = inner.upgrade() else { return };
                strong.report(&Invalidation::Shards(strong.shards_of(&master)));
                strong.update_tracking();
                drop(strong);
                if began.elapsed() < PING_EVERY {
                    sleep(RETRY_AFTER).await;
                }
            }
            Err(error) => {
                warn_sparingly!(error, "tracking route changes failed");
                drop(strong);
                sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Checks a connection once, and waits. Returns whether it still leads to a master in use.
async fn answers(inner: &Weak<Inner>, master: &Arc<Tracked>, live: Live) -> bool {
    let Live { mut connection, broken } = live;
    tokio::select! {
        () = broken.notified() => return false,
        answer = timeout(PING_EVERY, check_role(&mut connection)) => match answer {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn_sparingly!(error, "tracking route changes stopped");
                return false;
            }
            Err(_) => return false,
        }
    }
    let Some(strong) = inner.upgrade() else { return false };
    if !strong.map.read().has(master) {
        return false;
    }
    if let Some(condition) = strong.alive.get()
        && strong.is_tracking()
    {
        condition.ready();
    }
    drop(strong);
    tokio::select! {
        () = broken.notified() => false,
        () = sleep(PING_EVERY) => true,
    }
}

/// Checks that the node is a master: a replica reports changes late or not at all, and after a failover the former
/// master's address may be one.
async fn check_role(connection: &mut MultiplexedConnection) -> Result<(), Error> {
    let mut info = redis::cmd("INFO");
    info.arg("replication");
    let info: String = info.query_async(connection).await?;
    let role = info.lines().find_map(|line| line.strip_prefix("role:")).unwrap_or_default();
    match role.trim_end() {
        "master" => Ok(()),
        role => Err(Error::Away(format!("the node is a {role}, not a master"))),
    }
}
