//! Routes, read on connections on which Redis reports every change of what was read.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use barid_runtime::Condition;
use parking_lot::RwLock;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ProtocolVersion, PushInfo, PushKind, Value};
use tokio::sync::{Notify, watch};

use crate::cluster::{self, Master, slot_of};
use crate::operations::parse_route;
use crate::{Error, RedisConfig, Route, UserKey, keys};

/// How often each connection is asked whether it lives, and how long it may take to answer.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Between attempts to connect.
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// What must be forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invalidation {
    /// This user's routes changed.
    User(UserKey),
    /// Everything: Redis was emptied, or a connection was lost and with it an unknown number of
    /// reports.
    All,
}

/// Reads routes with server-assisted client-side caching (CLIENT TRACKING). A report of a change
/// arrives on the connection on which the value was read, in order with the replies: a value that
/// [`TrackedRoutes::get`] returned is reported when it changes, and before any later reply.
///
/// Cheap to clone; ends with the last clone.
#[derive(Clone)]
pub struct TrackedRoutes {
    inner: Arc<Inner>,
}

struct Inner {
    config: RedisConfig,
    shards: barid_core::ShardCount,
    session: RwLock<Option<Arc<Session>>>,
    listeners: Listeners,
    tracking: watch::Sender<bool>,
    /// Told at each sign that changes are reported.
    alive: OnceLock<Condition>,
}

type Listener = Box<dyn Fn(Invalidation) + Send + Sync>;
type Listeners = Arc<RwLock<Vec<Listener>>>;

/// One connection a master, all of them tracking. One that fails ends the whole session.
struct Session {
    masters: Vec<(Master, MultiplexedConnection)>,
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
            session: RwLock::default(),
            listeners: Listeners::default(),
            tracking: watch::Sender::new(false),
            alive: OnceLock::new(),
        });
        if let Err(error) = inner.connect().await {
            tracing::warn!(%error, "route changes cannot be followed yet");
        }
        tokio::spawn(keep(Arc::downgrade(&inner)));
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

    /// Whether changes are reported now. When it turns false (after a report of everything), cache
    /// nothing until it is true again.
    pub fn tracking(&self) -> watch::Receiver<bool> {
        self.inner.tracking.subscribe()
    }

    /// A user's routes. From now on their next change is reported.
    ///
    /// # Errors
    /// [`Error::Away`]: also while changes are not tracked.
    pub async fn get(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        let away = || Error::Away("route changes are not followed now".into());
        let session = self.inner.session.read().clone().ok_or_else(away)?;
        let shard = self.inner.shards.shard_of(user.app.as_str(), user.user.as_str());
        let key = keys::routes(shard, &user.app, &user.user);
        let slot = slot_of(&key);
        let mut serving = session.masters.iter().filter(|(master, _)| master.serves(slot));
        let mut connection = serving.next().map(|(_, c)| c.clone()).ok_or_else(away)?;
        let mut get = redis::cmd("HGETALL");
        get.arg(&key);
        let fields: Result<Vec<(String, String)>, _> = get.query_async(&mut connection).await;
        let fields = fields.inspect_err(|error| {
            tracing::warn!(%error, "routes cannot be read on the tracked connection");
            session.broken.notify_one();
        })?;
        Ok(fields.iter().filter_map(|(device, route)| parse_route(device, route)).collect())
    }
}

impl Inner {
    /// Connects to every master and turns tracking on.
    async fn connect(&self) -> Result<(), Error> {
        let broken = Arc::new(Notify::new());
        let masters = cluster::masters(&self.config, Vec::new()).await?;
        let connected = masters.into_iter().map(|master| async {
            let connection = self.track(&master.client, &broken).await?;
            Ok::<_, Error>((master, connection))
        });
        let masters = futures::future::try_join_all(connected).await?;
        // What was cached before was read on connections that are gone.
        report(&self.listeners, &Invalidation::All);
        *self.session.write() = Some(Arc::new(Session { masters, broken }));
        self.tracking.send_replace(true);
        Ok(())
    }

    async fn track(
        &self,
        client: &Client,
        broken: &Arc<Notify>,
    ) -> Result<MultiplexedConnection, Error> {
        let (listeners, broken) = (Arc::downgrade(&self.listeners), broken.clone());
        let tracking = self.tracking.clone();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.config.connect_timeout()))
            .set_response_timeout(Some(self.config.response_timeout()))
            .set_push_sender(move |push: PushInfo| {
                if push.kind == PushKind::Disconnection {
                    tracking.send_replace(false);
                    broken.notify_one();
                }
                heard(&listeners, &push);
                Ok::<(), redis::aio::SendError>(())
            });
        let info = client.get_connection_info().clone();
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let client = Client::open(info.set_redis_settings(settings))?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut on = redis::cmd("CLIENT");
        on.arg("TRACKING").arg("ON");
        let () = on.query_async(&mut connection).await?;
        Ok(connection)
    }

    /// Forgets the session and tells everybody to forget what came from it.
    fn lose(&self) {
        self.tracking.send_replace(false);
        *self.session.write() = None;
        report(&self.listeners, &Invalidation::All);
    }
}

/// Keeps a session alive, or makes a new one, for as long as anybody wants it.
async fn keep(inner: Weak<Inner>) {
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let session = strong.session.read().clone();
        let Some(session) = session else {
            if let Err(error) = strong.connect().await {
                tracing::warn!(%error, "route changes cannot be followed");
                drop(strong);
                tokio::time::sleep(RETRY_AFTER).await;
            }
            continue;
        };
        let condition = strong.alive.get().cloned();
        drop(strong);
        tokio::select! {
            () = session.broken.notified() => {}
            alive = tokio::time::timeout(PING_EVERY, ping(&session)) => {
                if matches!(alive, Ok(Ok(()))) {
                    if let Some(condition) = condition {
                        condition.ready();
                    }
                    tokio::select! {
                        () = session.broken.notified() => {}
                        () = tokio::time::sleep(PING_EVERY) => continue,
                    }
                }
            }
        }
        let Some(strong) = inner.upgrade() else { return };
        strong.lose();
    }
}

async fn ping(session: &Session) -> Result<(), redis::RedisError> {
    let ping = redis::cmd("PING");
    for (_, connection) in &session.masters {
        let () = ping.query_async::<Value>(&mut connection.clone()).await.map(drop)?;
    }
    Ok(())
}

/// One push of Redis: `invalidate` with a list of keys, or nil for all of them.
fn heard(listeners: &std::sync::Weak<RwLock<Vec<Listener>>>, push: &PushInfo) {
    let Some(listeners) = listeners.upgrade() else { return };
    match (&push.kind, push.data.first()) {
        (PushKind::Disconnection, _) | (PushKind::Invalidate, Some(Value::Nil) | None) => {
            report(&listeners, &Invalidation::All);
        }
        (PushKind::Invalidate, Some(Value::Array(names))) => {
            for name in names {
                if let Value::BulkString(name) = name
                    && let Some(user) = keys::parse_routes(name)
                {
                    report(&listeners, &Invalidation::User(user));
                }
            }
        }
        _ => {}
    }
}

fn report(listeners: &RwLock<Vec<Listener>>, invalidation: &Invalidation) {
    for listener in listeners.read().iter() {
        listener(invalidation.clone());
    }
}
