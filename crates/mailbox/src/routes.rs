//! Routes, read on connections on which Redis reports every change of what was read.
//!
//! Each master has a connection of its own that is kept for itself: one that breaks, a slot that moves,
//! a master that comes or goes is a matter of its own shards.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use barid_core::{Shard, ShardCount};
use barid_runtime::Condition;
use parking_lot::RwLock;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, ProtocolVersion, PushInfo, PushKind, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::{self, Master, slot_of};
use crate::layout::parse_route;
use crate::{Error, RedisConfig, Route, UserKey, keys};

/// How often each connection is asked whether it lives, and how long it may take to answer; how often a
/// Redis Cluster or Sentinel is asked for the masters.
const PING_EVERY: Duration = Duration::from_secs(1);
/// The pause between attempts to connect, after a connection that broke sooner than `PING_EVERY`, and
/// between a redirection and the look at the slots that it asks for.
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// Cached routes that are no longer valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invalidation {
    /// This user's routes changed.
    User(UserKey),
    /// All routes of these shards: their master was emptied or replaced, or its connection was lost, and
    /// with it an unknown number of reports.
    Shards(Arc<[Shard]>),
}

/// Reads routes with server-assisted client-side caching (CLIENT TRACKING). A report of a change
/// arrives on the connection on which the value was read, in order with the replies: a value that
/// [`TrackedRoutes::get`] returned is reported when it changes, and before any later reply. A slot that
/// moves to another master, and a master that Sentinel replaces, are noticed within about a second.
///
/// Cheap to clone; ends with the last clone.
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
    /// Told at each sign that changes are reported.
    alive: OnceLock<Condition>,
    /// Somebody was redirected.
    redirected: Arc<Notify>,
}

type Listener = Box<dyn Fn(Invalidation) + Send + Sync>;

#[derive(Default)]
struct Map {
    masters: Vec<Arc<Tracked>>,
    /// The master of each shard; `None`: nobody serves its slot.
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

/// One master, and its connection while it is tracking.
struct Tracked {
    name: String,
    client: Client,
    live: RwLock<Option<Live>>,
}

/// A connection on which changes are reported.
#[derive(Clone)]
struct Live {
    connection: MultiplexedConnection,
    /// Notified when this connection fails; the next one has another.
    broken: Arc<Notify>,
}

impl TrackedRoutes {
    /// Starts to connect in the background and to stay connected.
    ///
    /// # Errors
    /// [`Error::Unusable`]: the configuration is wrong.
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
        if let Err(error) = inner.look().await {
            tracing::warn!(%error, "route changes cannot be followed yet");
        }
        tokio::spawn(follow(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    /// Keeps `condition` true as long as the tracked connections answer.
    pub fn report_to(&self, condition: Condition) {
        // A second call would change nothing.
        let _first = self.inner.alive.set(condition);
    }

    /// Calls `listener` for each change, on the task that reads the connection: it must be short.
    pub fn on_invalidate(&self, listener: impl Fn(Invalidation) + Send + Sync + 'static) {
        self.inner.listeners.write().push(Box::new(listener));
    }

    /// Whether changes are reported now of every shard. Where they are not, [`Self::get`] fails.
    pub fn tracking(&self) -> watch::Receiver<bool> {
        self.inner.tracking.subscribe()
    }

    /// A user's routes. From now on their next change is reported.
    ///
    /// # Errors
    /// [`Error::Away`]: also while changes of this user's shard are not tracked.
    pub async fn get(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        let away = || Error::Away("route changes are not followed now".into());
        let shard = self.inner.shards.shard_of(user.app.as_str(), user.user.as_str());
        let master = self.inner.map.read().of(shard).cloned().ok_or_else(away)?;
        let Live { mut connection, broken } = master.live.read().clone().ok_or_else(away)?;
        let mut get = redis::cmd("HGETALL");
        get.arg(keys::routes(shard, &user.app, &user.user));
        let fields: Result<Vec<(String, String)>, _> = get.query_async(&mut connection).await;
        let fields = fields.inspect_err(|error| match error.kind() {
            // It answers: the slot is on its way, or has arrived elsewhere.
            ErrorKind::Server(_) => {
                tracing::debug!(%error, %shard, "routes cannot be read where they were");
                self.inner.redirected.notify_one();
            }
            _ => {
                tracing::warn!(%error, "routes cannot be read on the tracked connection");
                broken.notify_one();
            }
        })?;
        Ok(fields.iter().filter_map(|(device, route)| parse_route(device, route)).collect())
    }
}

impl Inner {
    /// Asks who serves what, and follows those.
    async fn look(self: &Arc<Self>) -> Result<(), Error> {
        let known = self.map.read().masters.iter().map(|master| master.client.clone()).collect();
        let masters = cluster::masters(&self.config, known).await?;
        self.install(masters);
        Ok(())
    }

    /// Takes over a set of masters; the connections of those that stay go on. What was read of a shard
    /// that has another master now is forgotten: nobody reports its changes any longer, not even of
    /// routes that were not there.
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
        // First the map: what is read from now on is read where its changes are reported.
        *self.map.write() = Arc::new(map);
        if !moved.is_empty() {
            self.report(&Invalidation::Shards(moved));
        }
        for master in new {
            tokio::spawn(keep(Arc::downgrade(self), master));
        }
        self.tell();
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

    fn tell(&self) {
        let now = self.is_tracking();
        self.tracking.send_if_modified(|before| std::mem::replace(before, now) != now);
    }

    /// Connects to a master and has Redis report changes.
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
                    inner.heard(&master, &push);
                }
                Ok::<(), redis::aio::SendError>(())
            });
        let info = master.client.get_connection_info().clone();
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let client = Client::open(info.set_redis_settings(settings))?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        check_role(&mut connection).await?;
        let mut on = redis::cmd("CLIENT");
        on.arg("TRACKING").arg("ON");
        let () = on.query_async(&mut connection).await?;
        Ok(Live { connection, broken })
    }

    /// One push of Redis: `invalidate` with a list of keys, or nil for all of them.
    fn heard(&self, master: &Arc<Tracked>, push: &PushInfo) {
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
            return; // it is the only one for ever
        }
        let (redirected, wait) =
            (Arc::clone(&strong.redirected), if known { PING_EVERY } else { RETRY_AFTER });
        drop(strong);
        if timeout(wait, redirected.notified()).await.is_ok() {
            sleep(RETRY_AFTER / 3).await;
        }
        let Some(strong) = inner.upgrade() else { return };
        if let Err(error) = strong.look().await {
            tracing::warn!(%error, "the masters of routes cannot be looked up");
        }
    }
}

/// Keeps a master's connection, or makes a new one, for as long as it is a master and anybody wants it.
async fn keep(inner: Weak<Inner>, master: Arc<Tracked>) {
    loop {
        let Some(strong) = inner.upgrade().filter(|inner| inner.map.read().has(&master)) else {
            return;
        };
        match strong.track(&master).await {
            Ok(live) => {
                let began = Instant::now();
                // What was read of it before was read on connections that are gone.
                *master.live.write() = Some(live.clone());
                strong.tell();
                drop(strong);
                while answers(&inner, &master, live.clone()).await {}
                *master.live.write() = None;
                let Some(strong) = inner.upgrade() else { return };
                strong.report(&Invalidation::Shards(strong.shards_of(&master)));
                strong.tell();
                drop(strong);
                if began.elapsed() < PING_EVERY {
                    sleep(RETRY_AFTER).await;
                }
            }
            Err(error) => {
                tracing::warn!(master = master.name, %error, "route changes cannot be followed");
                drop(strong);
                sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Whether a while later the connection is still one to a master that is wanted.
async fn answers(inner: &Weak<Inner>, master: &Arc<Tracked>, live: Live) -> bool {
    let Live { mut connection, broken } = live;
    tokio::select! {
        () = broken.notified() => return false,
        answer = timeout(PING_EVERY, check_role(&mut connection)) => match answer {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(master = master.name, %error, "route changes are no longer followed");
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

/// A replica reports changes late or not at all. After a failover the old master's address may be one.
async fn check_role(connection: &mut MultiplexedConnection) -> Result<(), Error> {
    let mut info = redis::cmd("INFO");
    info.arg("replication");
    let info: String = info.query_async(connection).await?;
    let role = info.lines().find_map(|line| line.strip_prefix("role:")).unwrap_or_default();
    match role.trim_end() {
        "master" => Ok(()),
        role => Err(Error::Away(format!("it is a {role}, not a master"))),
    }
}
