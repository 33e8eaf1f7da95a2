//! A node's lease: what makes its routes valid.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use barid_core::{Incarnation, InvalidName, NodeId};
use barid_runtime::{Condition, Health};
use redis::Value;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::scripts::{self, Call};
use crate::topology::Topology;
use crate::{Error, Mailbox, keys};

/// How long an id stays in the index after its lease ended.
const INDEX_KEPT: Duration = Duration::from_secs(3600);

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

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its name; one living node has it.
    pub id: NodeId,
    /// Its role.
    pub role: NodeRole,
    /// Its gRPC `host:port`.
    pub address: String,
    /// Its life: a restart or a lapsed lease makes a new one.
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
}

/// What an operator says of a node's lease, under the keys of these names.
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
}

impl LeaseConfig {
    /// What must hold before a port binds; `key` holds where the node listens for others.
    ///
    /// # Errors
    /// What is wrong, naming the key.
    pub fn check(&self, key: &str, listen: SocketAddr) -> Result<(), String> {
        if self.ttl.is_zero() {
            return Err("lease_ttl_ms must be above zero".into());
        }
        if !self.node.is_empty() {
            NodeId::new(&self.node).map_err(|error| format!("node: {error}"))?;
        }
        if listen.ip().is_unspecified() && self.advertise.is_empty() {
            return Err(format!("advertise must be set where {key} names no address"));
        }
        Ok(())
    }

    /// What a node that listens on `bound`, and with its admin endpoint on `admin`, says of itself.
    ///
    /// # Errors
    /// Its address makes no name: it is too long. `node` has to be set.
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
        })
    }
}

/// What became of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseEvent {
    /// It is gone, or could not be renewed for longer than it lasts: others hold this incarnation
    /// for dead. Answer with [`Lease::renew_as`] and a new one.
    Lapsed,
    /// It stands again, under the incarnation of the last `renew_as`.
    Renewed,
    /// A connection to Redis was made anew: sessions have to be confirmed
    /// ([`Mailbox::reconnections`] tells of which shards).
    Reconnected,
}

/// A lease that renews itself until it is released or dropped (then it ends by itself).
pub struct Lease {
    orders: mpsc::Sender<Order>,
    wanted: watch::Sender<NodeRecord>,
    counts: watch::Receiver<Counts>,
    reported: Reported,
    seen: Counts,
    task: JoinHandle<()>,
}

/// What is told whether the lease stands.
type Reported = Arc<OnceLock<Condition>>;

enum Order {
    Take,
    Publish,
    Release,
}

/// How often each event has happened: a slow owner misses repetitions, never a kind.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    lapsed: u64,
    renewed: u64,
    reconnected: u64,
}

impl Lease {
    /// Takes the lease and renews it every third of `ttl`.
    ///
    /// # Errors
    /// [`Error::Away`]: nothing is taken.
    pub async fn acquire(
        mailbox: &Mailbox,
        record: NodeRecord,
        ttl: Duration,
    ) -> Result<Self, Error> {
        let reconnections = mailbox.reconnections();
        call(mailbox, "take", &record, ttl).await?;
        let (orders, inbox) = mpsc::channel(16);
        let (wanted, _) = watch::channel(record);
        let (counts_out, counts) = watch::channel(Counts::default());
        let reported = Reported::default();
        let keeper = Keeper {
            mailbox: mailbox.clone(),
            ttl,
            wanted: wanted.subscribe(),
            counts: counts_out,
            reported: Arc::clone(&reported),
            held_at: Instant::now(),
            state: State::Held,
        };
        let task = tokio::spawn(keeper.run(inbox, reconnections));
        Ok(Self { orders, wanted, counts, reported, seen: Counts::default(), task })
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

    /// Takes the lease again under another incarnation, until it succeeds ([`LeaseEvent::Renewed`]).
    pub fn renew_as(&self, incarnation: Incarnation) {
        self.wanted.send_modify(|record| record.incarnation = incarnation);
        self.order(Order::Take);
    }

    /// The next thing that happened. Cancel-safe.
    pub async fn next_event(&mut self) -> LeaseEvent {
        loop {
            let now = *self.counts.borrow_and_update();
            if now.lapsed > self.seen.lapsed {
                self.seen.lapsed = now.lapsed;
                return LeaseEvent::Lapsed;
            }
            if now.renewed > self.seen.renewed {
                self.seen.renewed = now.renewed;
                return LeaseEvent::Renewed;
            }
            if now.reconnected > self.seen.reconnected {
                self.seen.reconnected = now.reconnected;
                return LeaseEvent::Reconnected;
            }
            if self.counts.changed().await.is_err() {
                std::future::pending::<()>().await; // the task ended with its runtime
            }
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

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The task behind a lease.
struct Keeper {
    mailbox: Mailbox,
    ttl: Duration,
    wanted: watch::Receiver<NodeRecord>,
    counts: watch::Sender<Counts>,
    reported: Reported,
    held_at: Instant,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Held,
    /// The owner was told and has not named a new incarnation.
    Lapsed,
    /// It has.
    Taking,
}

impl Keeper {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Order>,
        mut reconnections: broadcast::Receiver<crate::Reconnected>,
    ) {
        let mut due = Instant::now() + self.ttl / 3;
        loop {
            tokio::select! {
                order = inbox.recv() => match order {
                    Some(Order::Take) => self.state = State::Taking,
                    Some(Order::Publish) => {}
                    Some(Order::Release) | None => return self.give_up().await,
                },
                reconnected = reconnections.recv() => {
                    if matches!(reconnected, Err(broadcast::error::RecvError::Closed)) {
                        return;
                    }
                    self.counts.send_modify(|counts| counts.reconnected += 1);
                }
                () = tokio::time::sleep_until(due) => {}
            }
            let done = self.renew().await;
            due = Instant::now() + if done { self.ttl / 3 } else { self.ttl / 10 };
        }
    }

    /// One attempt; whether there is nothing more to do for now.
    async fn renew(&mut self) -> bool {
        let record = self.wanted.borrow().clone();
        let verb = match self.state {
            State::Held => "renew",
            State::Taking => "take",
            State::Lapsed => return true,
        };
        match call(&self.mailbox, verb, &record, self.ttl).await {
            Ok(true) => {
                self.held_at = Instant::now();
                if let Some(condition) = self.reported.get() {
                    condition.ready();
                }
                if self.state == State::Taking {
                    self.counts.send_modify(|counts| counts.renewed += 1);
                }
                self.state = State::Held;
                true
            }
            Ok(false) => {
                self.lapse("it is gone");
                true
            }
            Err(error) => {
                if self.state == State::Held && self.held_at.elapsed() > self.ttl {
                    self.lapse(&error.to_string());
                }
                false
            }
        }
    }

    fn lapse(&mut self, why: &str) {
        tracing::warn!(why, "the lease lapsed");
        if let Some(condition) = self.reported.get() {
            condition.failing(format!("lapsed: {why}"));
        }
        self.state = State::Lapsed;
        self.counts.send_modify(|counts| counts.lapsed += 1);
    }

    async fn give_up(self) {
        let record = self.wanted.borrow().clone();
        if let Err(error) = call(&self.mailbox, "release", &record, self.ttl).await {
            tracing::warn!(%error, "the lease could not be given up: it ends by itself");
        }
    }
}

/// Runs the lease script, then puts the node into the index. False: the lease is not ours.
async fn call(
    mailbox: &Mailbox,
    verb: &str,
    record: &NodeRecord,
    ttl: Duration,
) -> Result<bool, Error> {
    let key = keys::node(record.id.as_str());
    let mut lease = Call::default();
    let state = if record.draining { "draining" } else { "serving" };
    lease.key(key.clone()).arg(verb).arg(ttl.as_millis()).arg(record.incarnation);
    lease.arg(record.role.as_str()).arg(&record.address).arg(record.load).arg(state);
    lease.arg(&record.zone).arg(&record.admin).arg(&record.devices);
    let topology = mailbox.topology();
    let done = topology.run_on(&key, &scripts::LEASE, &lease).await?;
    if done != Value::Int(1) {
        return Ok(false);
    }
    let left = if verb == "release" { Duration::ZERO } else { ttl };
    let mut index = Call::default();
    index.key(keys::NODES.into()).arg(&record.id).arg(left.as_millis()).arg(INDEX_KEPT.as_millis());
    topology.run_on(keys::NODES, &scripts::INDEX, &index).await?;
    if verb != "renew" || record.draining {
        announce(topology, record.role).await;
    }
    Ok(true)
}

/// Spares the others the wait for their next reading; they read all the same if nobody hears it.
async fn announce(topology: &Topology, role: NodeRole) {
    let mut publish = redis::cmd("PUBLISH");
    publish.arg(keys::NODES_CHANGED).arg(role.as_str());
    if let Err(error) = topology.query_on::<i64>(keys::NODES, &publish).await {
        tracing::debug!(%error, "a change of the nodes was not announced");
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
}
