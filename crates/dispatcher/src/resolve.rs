//! Resolution of routes: L1 (moka) in front of L2 (the routes in Redis).
//!
//! L1 is coherent: Redis reports every change of a key that was read on the tracking connection. A loaded value is
//! cached only if its load is still in the table of loads. An invalidation removes the load from the table. So a
//! value that was read before a change and arrives after it goes to the callers that asked before the change, and is
//! not cached. Values that were not read on a tracking connection are not cached. All values of a shard are dropped
//! when its tracking connection breaks, or when it moves to another master.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{AudienceKey, Shard, ShardCount};
use barid_mailbox::{DisconnectRequest, Error, RedisTime, Route, UserKey};
use moka::notification::RemovalCause;
use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::metrics::Metrics;

/// Access to routes in Redis. A trait, so that tests can delay a load.
pub trait Routes: Send + Sync + 'static {
    /// Reads on the tracking connection: Redis reports later changes.
    fn tracked(&self, user: &UserKey) -> impl Future<Output = Result<Vec<Route>, Error>> + Send;
    /// Reads on a connection without tracking.
    fn untracked(&self, user: &UserKey) -> impl Future<Output = Result<Vec<Route>, Error>> + Send;
    /// Removes a route if it still belongs to this session.
    fn remove(&self, request: DisconnectRequest) -> impl Future<Output = Result<(), Error>> + Send;
    /// A user's shard.
    fn shard_of(&self, user: &UserKey) -> Shard;
    /// Number of shards.
    fn shards(&self) -> ShardCount;
    /// The clock of a shard's master; `None`: it has not answered yet.
    fn redis_time(&self, shard: Shard) -> Option<RedisTime>;
}

/// Bounds of L1 and of loads.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Approximate bound of L1, bytes.
    pub bytes_max: u64,
    /// Time to live of an entry, in case an invalidation is missed.
    pub ttl: Duration,
    /// Bound of a load's duration.
    pub load_timeout: Duration,
    /// How long loads of a shard fail at once after one has failed: the master is unavailable, or the shard is being
    /// moved.
    pub away: Duration,
}

/// The routes of a user cannot be read now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot read routes")]
pub struct Away;

/// The result of a load, for all its callers.
pub type Loaded = Result<Arc<[Route]>, Away>;

/// L1 in front of L2. Cheap to clone.
pub struct Resolver<R> {
    inner: Arc<Inner<R>>,
}

impl<R> Clone for Resolver<R> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

/// See [`Resolver::downgrade`].
pub struct WeakResolver<R>(Weak<Inner<R>>);

impl<R> WeakResolver<R> {
    /// The resolver, unless it is dropped.
    pub fn upgrade(&self) -> Option<Resolver<R>> {
        self.0.upgrade().map(|inner| Resolver { inner })
    }
}

struct Inner<R> {
    routes: Arc<R>,
    limits: Limits,
    metrics: Metrics,
    l1: Cache<UserKey, Cached>,
    // Held during every insert and invalidation, so that these are serialized.
    loads: Mutex<HashMap<UserKey, Load>>,
    shards: Vec<OfShard>,
    tickets: AtomicU64,
    started: Instant,
}

#[derive(Default)]
struct OfShard {
    // Entries of an older era are misses. That drops them at once; moka removes them lazily.
    era: AtomicU64,
    // Until when loads of a shard fail at once, ms since `started`.
    away_until_ms: AtomicU64,
}

#[derive(Clone)]
struct Cached {
    era: u64,
    routes: Arc<[Route]>,
}

struct Load {
    ticket: u64,
    answer: watch::Receiver<Option<Loaded>>,
}

/// The result of a lookup.
pub enum Lookup {
    /// From L1.
    Hit(Arc<[Route]>),
    /// A load that has begun. Concurrent lookups of a user share it.
    Loading(Loading),
    /// The routes cannot be read now.
    Away,
}

/// A load that has begun.
pub struct Loading(watch::Receiver<Option<Loaded>>);

impl Lookup {
    /// Waits for the routes. The load runs even if this is not called.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub async fn routes(self) -> Loaded {
        match self {
            Self::Hit(routes) => Ok(routes),
            Self::Away => Err(Away),
            Self::Loading(Loading(mut answer)) => {
                let done = answer.wait_for(Option::is_some).await.map_err(|_| Away)?;
                (*done).clone().unwrap_or(Err(Away))
            }
        }
    }
}

impl<R: Routes> Resolver<R> {
    /// Creates a resolver with an empty L1.
    pub fn new(routes: Arc<R>, limits: Limits, metrics: Metrics) -> Self {
        let evicted = metrics.l1_evicted.clone();
        let l1 = Cache::builder()
            .max_capacity(limits.bytes_max)
            .weigher(weight)
            .eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Size {
                    evicted.inc();
                }
            })
            .time_to_live(limits.ttl)
            .build();
        let shards = routes.shards().all().map(|_| OfShard::default()).collect();
        let inner = Inner {
            routes,
            limits,
            metrics,
            l1,
            loads: Mutex::default(),
            shards,
            tickets: AtomicU64::new(0),
            started: Instant::now(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// L2, for calls other than lookups.
    pub fn routes(&self) -> Arc<R> {
        Arc::clone(&self.inner.routes)
    }

    /// The clock of a user's master.
    pub fn redis_time(&self, user: &UserKey) -> Option<RedisTime> {
        self.inner.routes.redis_time(self.inner.routes.shard_of(user))
    }

    /// The clock of an audience's master.
    pub fn redis_time_of(&self, audience: &AudienceKey) -> Option<RedisTime> {
        let AudienceKey { app, audience } = audience;
        let routes = &self.inner.routes;
        routes.redis_time(routes.shards().shard_of(app.as_str(), audience.as_str()))
    }

    /// Looks up a user's routes in L1, or starts a load. Call within a runtime.
    pub fn look(&self, user: &UserKey) -> Lookup {
        let era = self.inner.of_shard(user).era.load(Ordering::SeqCst);
        if let Some(cached) = self.inner.l1.get(user).filter(|cached| cached.era == era) {
            self.inner.metrics.l1_hits.inc();
            return Lookup::Hit(cached.routes);
        }
        self.inner.metrics.l1_misses.inc();
        self.load(user)
    }

    /// Reads a user's routes from L2, and caches them in L1.
    pub fn look_again(&self, user: &UserKey) -> Lookup {
        self.load(user)
    }

    /// Invalidates a user whose routes have changed.
    pub fn invalidate(&self, user: &UserKey) {
        let mut loads = self.inner.loads.lock();
        loads.remove(user);
        self.inner.l1.invalidate(user);
        drop(loads);
        self.inner.metrics.l1_invalidations.inc();
    }

    /// A weak reference, for the reporter of changes, which the resolver itself owns.
    pub fn downgrade(&self) -> WeakResolver<R> {
        WeakResolver(Arc::downgrade(&self.inner))
    }

    /// Invalidates all users of these shards.
    pub fn invalidate_shards(&self, shards: &[Shard]) {
        let mut loads = self.inner.loads.lock();
        loads.retain(|user, _| !shards.contains(&self.inner.routes.shard_of(user)));
        for shard in shards {
            if let Some(of) = self.inner.shards.get(usize::from(shard.get())) {
                of.era.fetch_add(1, Ordering::SeqCst);
            }
        }
        if shards.len() == self.inner.shards.len() {
            self.inner.l1.invalidate_all();
        }
        drop(loads);
        self.inner.metrics.l1_invalidations.inc();
    }

    /// Number of entries in L1. Also runs moka's maintenance.
    pub fn entries(&self) -> u64 {
        self.inner.l1.run_pending_tasks();
        self.inner.l1.entry_count()
    }

    fn load(&self, user: &UserKey) -> Lookup {
        if self.inner.is_away(user) {
            return Lookup::Away;
        }
        let mut loads = self.inner.loads.lock();
        if let Some(load) = loads.get(user) {
            return Lookup::Loading(Loading(load.answer.clone()));
        }
        let ticket = self.inner.tickets.fetch_add(1, Ordering::SeqCst);
        let (done, answer) = watch::channel(None);
        loads.insert(user.clone(), Load { ticket, answer: answer.clone() });
        drop(loads);
        let (inner, user) = (Arc::clone(&self.inner), user.clone());
        tokio::spawn(async move {
            let loaded = inner.read(&user).await;
            inner.finish(user, ticket, &loaded);
            done.send_replace(Some(loaded.map(|(routes, _)| routes)));
        });
        Lookup::Loading(Loading(answer))
    }
}

impl<R: Routes> Inner<R> {
    /// Reads L2. Also returns whether Redis will report changes of what was read.
    async fn read(&self, user: &UserKey) -> Result<(Arc<[Route]>, bool), Away> {
        let read = async {
            if let Ok(routes) = self.routes.tracked(user).await {
                return Ok((routes, true));
            }
            self.routes.untracked(user).await.map(|routes| (routes, false))
        };
        let why = match timeout(self.limits.load_timeout, read).await {
            Ok(Ok((routes, tracked))) => return Ok((routes.into(), tracked)),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".into(),
        };
        let until = (self.started.elapsed() + self.limits.away).as_millis() as u64;
        self.of_shard(user).away_until_ms.store(until, Ordering::Relaxed);
        tracing::debug!(why, "cannot read routes");
        self.metrics.load_failures.inc();
        Err(Away)
    }

    fn is_away(&self, user: &UserKey) -> bool {
        let until = self.of_shard(user).away_until_ms.load(Ordering::Relaxed);
        until != 0 && (self.started.elapsed().as_millis() as u64) < until
    }

    fn finish(&self, user: UserKey, ticket: u64, loaded: &Result<(Arc<[Route]>, bool), Away>) {
        let mut loads = self.loads.lock();
        if loads.get(&user).is_none_or(|load| load.ticket != ticket) {
            self.metrics.l1_discarded.inc();
            return;
        }
        loads.remove(&user);
        if let Ok((routes, true)) = loaded {
            let era = self.of_shard(&user).era.load(Ordering::SeqCst);
            self.l1.insert(user, Cached { era, routes: Arc::clone(routes) });
        }
    }

    fn of_shard(&self, user: &UserKey) -> &OfShard {
        // There is one for each shard of `shard_of`.
        &self.shards[usize::from(self.routes.shard_of(user).get())]
    }
}

/// Approximate size of an entry: its strings, and their overhead.
fn weight(user: &UserKey, cached: &Cached) -> u32 {
    const ENTRY_BYTES: usize = 200;
    const ROUTE_BYTES: usize = 160;
    let names = user.app.as_str().len() + user.user.as_str().len();
    let routes: usize = cached
        .routes
        .iter()
        .map(|route| {
            let strings = [route.device.as_str(), route.session.node.as_str(), &route.platform];
            ROUTE_BYTES + strings.iter().map(|s| s.len()).sum::<usize>()
        })
        .sum();
    u32::try_from(ENTRY_BYTES + names + routes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
