//! A node's lease: what makes its routes valid.

mod confirming;
pub(crate) mod life;
#[cfg(test)]
mod model;
pub(crate) mod places;
pub(crate) mod record;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use barid_core::{Clock as _, Incarnation, InvalidName, NodeId, Shard, SystemClock};
use barid_runtime::bounds::{Bound, DAY_SECONDS, whole};
use barid_runtime::{Condition, Health};
use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub use self::confirming::{Confirming, LiveSession, LiveSessions};
use self::life::{Life, News, Place};
use self::places::{State, Writing};
use crate::{Error, Mailbox};

/// How long the routes of a node that is gone are kept, unless told otherwise.
const VOID_AFTER: Duration = Duration::from_secs(600);

/// Bytes of a text in a lease's record: a copy of it stands beside every shard.
const TEXT_BYTES_MAX: usize = 256;

/// What kind of node it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// Holds sockets.
    Access,
    /// Resolves audiences.
    Dispatcher,
}

impl NodeRole {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Dispatcher => "dispatcher",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Access, Self::Dispatcher].into_iter().find(|role| role.as_str() == word)
    }
}

/// A node's record in its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its name; one living node has it.
    pub id: NodeId,
    /// Its role.
    pub role: NodeRole,
    /// Its gRPC `host:port`.
    pub address: String,
    /// Its life: a restart makes a new one, and a lapse for longer than half of the time for which
    /// others keep the routes of a node that is gone. A later one is greater.
    pub incarnation: Incarnation,
    /// Sessions it holds.
    pub load: u64,
    /// It is leaving: nothing new is given to it if there is another.
    pub draining: bool,
    /// Where it stands, free text; empty: not told.
    pub zone: String,
    /// The `host:port` of its admin endpoint; empty: not told.
    pub admin: String,
    /// The URL at which devices connect; empty: not told, or they do not.
    pub devices: String,
    /// All routes of earlier lives of this node are void: each session that lived on into this life has
    /// written its route anew. True from the start in a process that has just started.
    pub confirmed: bool,
}

/// Configuration of a node's lease, under the keys of these names.
#[derive(Debug, Clone)]
pub struct LeaseConfig {
    /// `node`: its name; empty: made from its role and address.
    pub node: String,
    /// `advertise`: the `host:port` at which others reach it; empty: where it listens.
    pub advertise: String,
    /// `zone`: where it stands; may be empty.
    pub zone: String,
    /// `lease_ttl_ms`: how long the lease lives without renewal.
    pub ttl: Duration,
    /// `void_after_seconds`: how long dispatchers keep the routes of a node whose lease ended.
    pub void_after: Duration,
}

impl LeaseConfig {
    /// The bounds of these numbers.
    pub fn bounds() -> Vec<Bound> {
        vec![
            whole("lease_ttl_ms", 100..=600_000, "ms"),
            // A day: routes of a node that will not come back cost a re-send each until then.
            whole("void_after_seconds", 1..=DAY_SECONDS, "s"),
        ]
    }

    /// Checks it before a port binds; `key` is the key of the address `listen`.
    ///
    /// # Errors
    /// The first key that is wrong, and why.
    pub fn check(&self, key: &str, listen: SocketAddr) -> Result<(), String> {
        if self.ttl > self.void_after / 2 {
            return Err(format!(
                "lease_ttl_ms must be at most half of void_after_seconds, {}",
                self.void_after.as_millis() / 2
            ));
        }
        if !self.node.is_empty() {
            NodeId::new(&self.node).map_err(|error| format!("node: {error}"))?;
        }
        check_text("advertise", &self.advertise)?;
        check_text("zone", &self.zone)?;
        if listen.ip().is_unspecified() && self.advertise.is_empty() {
            return Err(format!("advertise must be set where {key} names no address"));
        }
        Ok(())
    }

    /// Takes the lease and renews it every third of `ttl`. The incarnation that it stands under may be
    /// higher than `record` says: another life of this name was ahead ([`Lease::record`]).
    ///
    /// # Errors
    /// [`Error::Away`]: nothing is taken.
    pub async fn acquire(&self, mailbox: &Mailbox, record: NodeRecord) -> Result<Lease, Error> {
        Lease::take(mailbox, record, self.ttl, self.void_after).await
    }

    /// The record of a node that listens on `bound`, with its admin endpoint on `admin`.
    ///
    /// # Errors
    /// The name made from its address is too long: `node` has to be set.
    pub fn record(
        &self,
        role: NodeRole,
        bound: SocketAddr,
        admin: Option<SocketAddr>,
        incarnation: Incarnation,
    ) -> Result<NodeRecord, InvalidName> {
        let address = match self.advertise.as_str() {
            "" => bound.to_string(),
            advertised => advertised.to_owned(),
        };
        let id = match self.node.as_str() {
            // Names hold no ':' and no brackets.
            "" => format!("{}-{}", role.as_str(), address.replace([':', '[', ']'], "-")),
            name => name.to_owned(),
        };
        let id = NodeId::new(&id)?;
        let admin = admin.map_or_else(String::new, |admin| match address.rsplit_once(':') {
            // Bound everywhere: reached where the node is.
            Some((host, _)) if admin.ip().is_unspecified() => format!("{host}:{}", admin.port()),
            _ => admin.to_string(),
        });
        Ok(NodeRecord {
            id,
            role,
            address,
            incarnation,
            load: 0,
            draining: false,
            zone: self.zone.clone(),
            admin,
            devices: String::new(),
            confirmed: true,
        })
    }
}

/// Checks a text of a lease's record. NUL separates the fields of a copy; other control characters
/// would reach logs and terminals.
///
/// # Errors
/// It is too long, or has a control character; names the key.
pub fn check_text(key: &str, text: &str) -> Result<(), String> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("{key} has {} bytes, the limit is {TEXT_BYTES_MAX}", text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(bad) => Err(format!("{key} contains {bad:?}; write it without control characters")),
        None => Ok(()),
    }
}

/// What became of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEvent {
    /// This life is over; another one is being taken.
    Lapsed,
    /// Another life stands, under this incarnation. Its record says that it is not confirmed, until
    /// [`Lease::set_confirmed`].
    NewLife(Incarnation),
    /// The lease had gone, and stands again in the same life: sessions have to be confirmed.
    WasGone,
    /// These shards lost what was written there, or may have: a connection was made anew. Their
    /// sessions have to be confirmed.
    Forgot(Vec<Shard>),
}

/// A lease that renews itself until it is released or dropped (then it ends by itself).
pub struct Lease {
    orders: mpsc::Sender<Order>,
    wanted: watch::Sender<NodeRecord>,
    happened: Arc<Happened>,
    reported: Reported,
    task: JoinHandle<()>,
}

/// The readiness condition of the lease.
type Reported = Arc<OnceLock<Condition>>;

enum Order {
    Publish,
    Release,
}

/// Events that the owner has not taken yet. Merged: a slow owner misses repetitions, never a kind or a shard.
#[derive(Default)]
struct Happened {
    pending: Mutex<Pending>,
    more: Notify,
}

#[derive(Default)]
struct Pending {
    lapsed: bool,
    life: Option<Incarnation>,
    was_gone: bool,
    forgot: BTreeSet<Shard>,
}

impl Happened {
    fn add(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.pending.lock());
        self.more.notify_one();
    }
}

impl Pending {
    fn add(&mut self, news: News) {
        match news {
            News::Lapsed(_) => (self.lapsed, self.life) = (true, None),
            News::Taken(incarnation) => self.life = Some(incarnation),
            News::Forgot(Place::Own) => self.was_gone = true,
            News::Forgot(Place::Copy(shard)) => self.forget([shard]),
        }
    }

    /// Marks these shards as having possibly lost what was written.
    fn forget(&mut self, shards: impl IntoIterator<Item = Shard>) {
        self.forgot.extend(shards);
    }

    fn next(&mut self) -> Option<LeaseEvent> {
        if std::mem::take(&mut self.lapsed) {
            return Some(LeaseEvent::Lapsed);
        }
        if let Some(incarnation) = self.life.take() {
            return Some(LeaseEvent::NewLife(incarnation));
        }
        if std::mem::take(&mut self.was_gone) {
            return Some(LeaseEvent::WasGone);
        }
        let forgot = std::mem::take(&mut self.forgot);
        (!forgot.is_empty()).then(|| LeaseEvent::Forgot(forgot.into_iter().collect()))
    }
}

impl Lease {
    /// As [`LeaseConfig::acquire`], with this `ttl` and routes that are kept for ten minutes.
    ///
    /// # Errors
    /// [`Error::Away`]: nothing is taken.
    pub async fn acquire(
        mailbox: &Mailbox,
        record: NodeRecord,
        ttl: Duration,
    ) -> Result<Self, Error> {
        Self::take(mailbox, record, ttl, VOID_AFTER).await
    }

    async fn take(
        mailbox: &Mailbox,
        record: NodeRecord,
        ttl: Duration,
        void_after: Duration,
    ) -> Result<Self, Error> {
        let reconnections = mailbox.reconnections();
        let life = Life::new(record.incarnation, void_after, Instant::now());
        let (orders, inbox) = mpsc::channel(16);
        let (wanted, _) = watch::channel(record);
        let (happened, reported) = (Arc::<Happened>::default(), Reported::default());
        let mut keeper = Keeper {
            mailbox: mailbox.clone(),
            ttl,
            life,
            wanted: wanted.clone(),
            happened: Arc::clone(&happened),
            reported: Arc::clone(&reported),
        };
        keeper.take().await?;
        keeper.life.begin_work();
        // What happened so far is what was asked for.
        *happened.pending.lock() = Pending::default();
        let task = tokio::spawn(keeper.run(inbox, reconnections));
        Ok(Self { orders, wanted, happened, reported, task })
    }

    /// Adds the condition `lease` to `health`: it holds while this lease is renewed in time.
    pub fn report_to(&self, health: &Health, ttl: Duration) {
        let condition = health.lapsing("lease", "renewal", ttl);
        condition.ready();
        // A second call would change nothing.
        let _first = self.reported.set(condition);
    }

    /// The record as it is (to be) published.
    pub fn record(&self) -> NodeRecord {
        self.wanted.borrow().clone()
    }

    /// Publishes how many sessions there are, with the next renewal.
    pub fn set_load(&self, load: u64) {
        self.wanted.send_modify(|record| record.load = load);
    }

    /// Publishes at once that the node is leaving.
    pub fn set_draining(&self) {
        self.wanted.send_modify(|record| record.draining = true);
        self.order(Order::Publish);
    }

    /// Publishes at once that no route of a life before this one is good any longer.
    pub fn set_confirmed(&self, incarnation: Incarnation) {
        if self.wanted.send_if_modified(|record| set_confirmed(record, incarnation)) {
            self.order(Order::Publish);
        }
    }

    /// The next thing that happened. Cancel-safe.
    pub async fn next_event(&mut self) -> LeaseEvent {
        loop {
            if let Some(event) = self.happened.pending.lock().next() {
                return event;
            }
            self.happened.more.notified().await;
        }
    }

    /// Gives it up. Where Redis is away it ends by itself.
    pub async fn release(mut self) {
        if self.orders.send(Order::Release).await.is_ok() {
            let _cancelled = (&mut self.task).await;
        }
    }

    fn order(&self, order: Order) {
        // A full queue means that the keeper has the same to do already.
        let _full = self.orders.try_send(order);
    }
}

/// Whether it is news that the sessions of this life are confirmed.
fn set_confirmed(record: &mut NodeRecord, incarnation: Incarnation) -> bool {
    let news = record.incarnation == incarnation && !record.confirmed;
    record.confirmed |= news;
    news
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The task behind a lease.
struct Keeper {
    mailbox: Mailbox,
    ttl: Duration,
    life: Life,
    wanted: watch::Sender<NodeRecord>,
    happened: Arc<Happened>,
    reported: Reported,
}

impl Keeper {
    /// Writes until the lease is held. Retries only where another life is ahead, and outbids it.
    async fn take(&mut self) -> Result<(), Error> {
        loop {
            let before = self.life.incarnation();
            let error = self.write(State::Held { announce: true }).await;
            match error {
                _ if self.life.is_held() => return Ok(()),
                Some(error) if self.life.incarnation() == before => return Err(error),
                _ => {}
            }
        }
    }

    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Order>,
        mut reconnections: broadcast::Receiver<crate::Reconnected>,
    ) {
        let mut due = Instant::now() + self.ttl / 3;
        loop {
            let mut announce = false;
            tokio::select! {
                order = inbox.recv() => match order {
                    Some(Order::Publish) => announce = true,
                    Some(Order::Release) | None => return self.give_up().await,
                },
                reconnected = reconnections.recv() => match reconnected {
                    Ok(reconnected) => {
                        self.happened.add(|pending| pending.forget(reconnected.shards.iter().copied()));
                    }
                    // Which ones is not known any longer.
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        let all = self.mailbox.shards().all();
                        self.happened.add(|pending| pending.forget(all));
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                () = tokio::time::sleep_until(due) => {}
            }
            let began = Instant::now();
            let announce = announce || self.wanted.borrow().draining || !self.life.is_held();
            self.write(State::Held { announce }).await;
            let renewed = self.life.is_held() && self.life.held_at() >= began;
            due = began + if renewed { self.ttl / 3 } else { self.ttl / 10 };
        }
    }

    /// Writes the lease once everywhere. The error is one of those that came, if any did.
    async fn write(&mut self, state: State) -> Option<Error> {
        let began = Instant::now();
        let (stamp, news) = self.life.attempt(began, SystemClock.now_ms());
        self.heed(news);
        let record = self.wanted.borrow().clone();
        let sweep = !self.life.is_held();
        let writing = Writing { record: &record, stamp, ttl: self.ttl, state, sweep };
        // A master that does not answer must not keep the others from the next writing.
        let mut answers = writing.start(self.mailbox.topology(), self.ttl / 3);
        let (mut failed, mut forgot) = (None, false);
        while let Some((place, answer)) = answers.recv().await {
            match answer {
                Ok(wrote) => {
                    let now_ms = SystemClock.now_ms();
                    let news = self.life.answered(place, stamp, wrote, began, now_ms);
                    forgot |= matches!(news, Some(News::Forgot(_)));
                    self.heed(news);
                    self.report(began);
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = &failed {
            tracing::debug!(%error, "the lease was not written everywhere");
        }
        if forgot {
            self.look_at_meta().await;
        }
        failed
    }

    fn report(&self, began: Instant) {
        if self.life.is_held()
            && self.life.held_at() >= began
            && let Some(condition) = self.reported.get()
        {
            condition.ready();
        }
    }

    fn heed(&mut self, news: Option<News>) {
        self.wanted.send_if_modified(|record| self.life.enter(record, news));
        let Some(news) = news else { return };
        self.happened.add(|pending| pending.add(news));
        let incarnation = self.life.incarnation();
        let events = &self.mailbox.topology().metrics().lease_events;
        match news {
            News::Lapsed(why) => {
                tracing::warn!(
                    why,
                    incarnation = incarnation.0,
                    "the lease lapsed: a new life begins"
                );
                events.with_label_values(&["lapsed"]).inc();
                if let Some(condition) = self.reported.get() {
                    condition.failing(format!("lapsed: {why}"));
                }
            }
            News::Taken(_) => events.with_label_values(&["taken"]).inc(),
            News::Forgot(Place::Own) => {
                tracing::warn!("the lease was gone: it stands again");
                events.with_label_values(&["was_gone"]).inc();
            }
            News::Forgot(Place::Copy(shard)) => {
                tracing::warn!(%shard, "a shard forgot what was written there");
                events.with_label_values(&["forgot"]).inc();
            }
        }
    }

    /// Checks `barid:meta` after a shard forgot: a Redis that was emptied gets it written again, and one that
    /// was set up otherwise is reported.
    async fn look_at_meta(&self) {
        let looked = self.mailbox.topology().check_meta();
        match tokio::time::timeout(self.ttl / 3, looked).await {
            Ok(Err(error @ Error::Unusable(_))) => {
                tracing::error!(%error, "redis was emptied and set up otherwise");
            }
            Ok(Err(error)) => tracing::debug!(%error, "barid:meta cannot be looked at"),
            Ok(Ok(())) | Err(_) => {}
        }
    }

    async fn give_up(mut self) {
        if let Some(error) = self.write(State::GivenUp).await {
            tracing::warn!(%error, "the lease could not be given up everywhere: it ends by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(node: &str, advertise: &str) -> LeaseConfig {
        LeaseConfig {
            node: node.into(),
            advertise: advertise.into(),
            zone: "z".into(),
            ttl: Duration::from_secs(1),
            void_after: Duration::from_secs(600),
        }
    }

    #[test]
    fn a_node_without_a_name_is_called_after_the_address_that_others_use() {
        let bound = SocketAddr::from(([0, 0, 0, 0], 7081));
        let told = |config: LeaseConfig| {
            let admin = Some(SocketAddr::from(([0, 0, 0, 0], 7082)));
            let record = config.record(NodeRole::Access, bound, admin, Incarnation(1)).unwrap();
            (record.id.to_string(), record.address, record.admin)
        };
        let expect = |id: &str, address: &str, admin: &str| {
            (id.to_owned(), address.to_owned(), admin.to_owned())
        };
        // Two nodes that listen on the same port everywhere are two nodes.
        assert_eq!(told(config("", "h1:7081")), expect("access-h1-7081", "h1:7081", "h1:7082"));
        assert_eq!(
            told(config("", "[::1]:7081")),
            expect("access----1--7081", "[::1]:7081", "[::1]:7082")
        );
        assert_eq!(told(config("n", "")), expect("n", "0.0.0.0:7081", "0.0.0.0:7082"));
    }

    #[test]
    fn an_address_that_nobody_can_reach_is_refused() {
        let everywhere = SocketAddr::from(([0, 0, 0, 0], 7081));
        let error = config("", "").check("grpc_listen", everywhere).unwrap_err();
        assert_eq!(error, "advertise must be set where grpc_listen names no address");
        assert_eq!(config("", "h1:1").check("grpc_listen", everywhere), Ok(()));
        let error = config("a:b", "").check("listen", ([127, 0, 0, 1], 1).into()).unwrap_err();
        assert!(error.starts_with("node: node contains ':'"), "{error}");
    }

    #[test]
    fn hazard_75_texts_that_would_break_a_copy_are_refused_by_key() {
        let local = SocketAddr::from(([127, 0, 0, 1], 1));
        let zone = |zone: &str| {
            let config = LeaseConfig { zone: zone.into(), ..config("n", "") };
            config.check("listen", local)
        };
        assert_eq!(zone("a zone, with = and ümlauts"), Ok(()));
        assert_eq!(zone(&"z".repeat(256)), Ok(()));
        let told = zone("a\0confirmed\x001").unwrap_err();
        assert_eq!(told, "zone contains '\\0'; write it without control characters");
        for bad in ["a\nb", "\u{1b}[2J", "\u{9b}"] {
            assert!(zone(bad).unwrap_err().starts_with("zone contains "));
            let error = config("n", &format!("h{bad}:1")).check("listen", local).unwrap_err();
            assert!(error.starts_with("advertise contains "), "{error}");
        }
        let told = zone(&"z".repeat(257)).unwrap_err();
        assert_eq!(told, "zone has 257 bytes, the limit is 256");
    }
}
