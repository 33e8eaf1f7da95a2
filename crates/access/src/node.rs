//! What all connections of a node share.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use barid_bus::Receipts;
use barid_core::{
    AppId, Backoff, Clock as _, ConnectionId, Incarnation, NodeId, SessionRef, Shard, SystemClock,
};
use barid_mailbox::{DisconnectRequest, LiveSessions, Mailbox, UserKey};
use barid_runtime::{Condition, Shutdown, Tracer};

use crate::admission::{Admission, Origins};
use crate::auth::Verifier;
use crate::config::{HeartbeatConfig, LimitsConfig};
use crate::fanout::Fanout;
use crate::handle::Handle;
use crate::metrics::Metrics;
use crate::proxy::Proxies;
use crate::registry::Registry;
use crate::session::{Seconds, Settings};
use crate::tls::Tls;
use crate::upstream::Upstream;
use crate::wheel::Wheel;

/// How often what is remembered for limits is looked through.
const SWEEP_SECONDS: Seconds = 10;

/// The node: what it is made of, its sessions, and what changes while it lives.
pub struct Node {
    parts: Parts,
    /// Its sessions.
    pub registry: Registry,
    /// What is for many of them.
    pub fanout: Fanout,
    /// Their clocks.
    pub wheel: Wheel,
    first_incarnation: Incarnation,
    incarnation: AtomicU64,
    connections: AtomicU64,
    seconds: AtomicU32,
    began: Instant,
    retry: Backoff,
}

/// What a node is made of.
pub struct Parts {
    /// Its name.
    pub id: NodeId,
    /// Redis.
    pub mailbox: Mailbox,
    /// Who may connect.
    pub verifier: Verifier,
    /// Where it stands; may be empty.
    pub zone: String,
    /// What it counts.
    pub metrics: Metrics,
    /// Logs sampled messages.
    pub tracer: Tracer,
    /// To the business; `None`: switched off.
    pub receipts: Option<Receipts>,
    /// Bounds.
    pub limits: LimitsConfig,
    /// Whom it lets in.
    pub admission: Arc<Admission>,
    /// TLS on the devices' port; `None`: plain.
    pub tls: Option<Tls>,
    /// Whom to believe about clients' addresses.
    pub proxies: Proxies,
    /// Which web pages may connect.
    pub origins: Origins,
    /// What a device may send.
    pub upstream: Upstream,
    /// Pings.
    pub heartbeat: HeartbeatConfig,
    /// Bounds of sessions.
    pub settings: Settings,
    /// Draining.
    pub shutdown: Shutdown,
    /// Other access nodes, to close sessions that were replaced.
    pub peers: crate::peers::Peers,
}

impl std::ops::Deref for Node {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Node {
    /// Puts it together; its first life is `incarnation`.
    pub fn new(parts: Parts, incarnation: Incarnation) -> Self {
        Self {
            fanout: Fanout::new(&parts.limits, &parts.metrics),
            parts,
            registry: Registry::new(),
            wheel: Wheel::new(),
            first_incarnation: incarnation,
            incarnation: AtomicU64::new(incarnation.0),
            connections: AtomicU64::new(0),
            seconds: AtomicU32::new(0),
            began: Instant::now(),
            retry: Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 0.5)
                .expect("constants in range"),
        }
    }

    /// The life that routes name now.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation(self.incarnation.load(Ordering::Acquire))
    }

    /// Whether a route of this life may be of a session that is here. Connections are numbered over all
    /// lives of the process, and a session that lives on into another life is found by its number
    /// before its route names that.
    pub fn lived_as(&self, incarnation: Incarnation) -> bool {
        (self.first_incarnation..=self.incarnation()).contains(&incarnation)
    }

    /// A number for a new connection.
    pub fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// What a route of this connection names now.
    pub fn session(&self, connection: ConnectionId) -> SessionRef {
        SessionRef { node: self.id.clone(), incarnation: self.incarnation(), connection }
    }

    /// Milliseconds since the Unix epoch, by this machine's clock.
    pub fn now_ms(&self) -> u64 {
        SystemClock.now_ms()
    }

    /// Milliseconds since the Unix epoch by the clock that stamps a user's messages, or a little less.
    pub fn mailbox_now_ms(&self, user: &UserKey) -> u64 {
        let shard = self.mailbox.shard_of(user);
        self.mailbox.redis_now_ms(shard).unwrap_or_else(|| self.now_ms())
    }

    /// The same in microseconds, neither early nor late by intent.
    pub fn mailbox_now_us(&self, user: &UserKey) -> u64 {
        self.shard_now_us(self.mailbox.shard_of(user))
    }

    /// The same by the clock that stamps the messages of an app's group, or of everyone.
    pub fn audience_now_us(&self, app: &AppId, mailbox: &str) -> u64 {
        self.shard_now_us(self.mailbox.shard_of_group(app, mailbox))
    }

    fn shard_now_us(&self, shard: Shard) -> u64 {
        let time = self.mailbox.redis_time(shard);
        time.map_or_else(|| self.now_ms() * 1000, |time| time.us(Instant::now()))
    }

    /// The coarse clock: seconds since the node started.
    pub fn seconds(&self) -> Seconds {
        self.seconds.load(Ordering::Relaxed)
    }

    /// Milliseconds since the node began, modulo 2^32.
    pub fn uptime_ms(&self) -> u32 {
        self.began.elapsed().as_millis() as u32
    }

    /// Microseconds since the node began.
    pub fn uptime_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// The coarse clock's value when `expires_s` (Unix epoch) has come.
    pub fn seconds_at(&self, expires_s: u64) -> Seconds {
        let left_ms = expires_s.saturating_mul(1000).saturating_sub(self.now_ms());
        let left = Seconds::try_from(left_ms.div_ceil(1000)).unwrap_or(Seconds::MAX);
        self.seconds().saturating_add(left)
    }

    /// Turns the wheel, once a second for as long as the node lives; keeps `turning` true.
    pub async fn tick(&self, turning: &Condition) {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let started = second.tick().await;
        turning.ready();
        loop {
            let now = second.tick().await;
            let now = Seconds::try_from((now - started).as_secs()).unwrap_or(Seconds::MAX);
            // A machine that stood still leaves seconds out: each has its slot.
            for now in self.seconds() + 1..=now {
                self.seconds.store(now, Ordering::Relaxed);
                self.wheel.turn(now);
                self.fanout.sweep(now);
                if now.is_multiple_of(SWEEP_SECONDS) {
                    self.admission.sweep();
                }
            }
            self.metrics.addresses.set(self.admission.addresses() as i64);
            self.metrics.users.set(self.registry.users() as i64);
            self.metrics.wheel_entries.set(self.wheel.entries() as i64);
            turning.ready();
        }
    }

    /// Sets when a session wants to look at the clock.
    pub fn set_due(&self, handle: &Arc<Handle>, due: Seconds) {
        self.wheel.set_due(handle, due, self.seconds());
    }

    /// Whether the node is being drained.
    pub fn is_draining(&self) -> bool {
        self.shutdown.is_draining()
    }

    /// Waits until the node is being drained.
    pub async fn draining(&self) {
        self.shutdown.draining().await;
    }

    /// Makes a call to Redis until it is answered.
    pub async fn until_answered<T, F>(&self, name: &'static str, mut call: impl FnMut() -> F) -> T
    where
        F: Future<Output = Result<T, barid_mailbox::Error>>,
    {
        let mut failures = 0;
        loop {
            match call().await {
                Ok(answer) => return answer,
                Err(error) => {
                    tracing::debug!(call = name, %error, failures, "redis did not answer");
                    self.metrics.redis_retry(name);
                    tokio::time::sleep(self.retry.delay(failures)).await;
                    failures = failures.saturating_add(1);
                }
            }
        }
    }

    /// Removes the route of a session that is not here; gives up after a few seconds: the next push
    /// to it finds out again.
    pub async fn forget(&self, request: DisconnectRequest) {
        let call = self.until_answered("disconnect", || self.mailbox.disconnect(request.clone()));
        let limit = Duration::from_millis(self.limits.hello_timeout_ms);
        if tokio::time::timeout(limit, call).await.is_err() {
            tracing::debug!("route not removed: redis is away");
        }
    }
}

impl LiveSessions for Node {
    type Session = Handle;

    fn all(&self) -> Vec<Arc<Handle>> {
        self.registry.all()
    }

    fn shard_of(&self, session: &Handle) -> Shard {
        self.mailbox.shard_of(session.user())
    }

    fn begin_life(&self, incarnation: Incarnation) {
        self.incarnation.store(incarnation.0, Ordering::Release);
    }
}
