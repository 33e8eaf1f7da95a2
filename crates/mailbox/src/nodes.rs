//! Which nodes live, as their leases say; sceptical of sudden mass death.

pub(crate) mod memory;

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use self::memory::{Memory, Own, Reading};
use crate::announcements::Announcements;
use crate::lease::copies::copies;
use crate::lease::life::Stamp;
use crate::lease::node::{NodeRecord, NodeRole};
use crate::lease::record;
use crate::topology::Topology;
use crate::{Error, Mailbox, keys};

/// Between an announcement and the reading that follows it: a fleet that restarts is read once.
const ANNOUNCED_PAUSE: Duration = Duration::from_millis(20);
/// A master that takes longer to answer tells nothing to this reading.
const PATIENCE: Duration = Duration::from_secs(1);

/// A life that has been over for so long is not one that just came.
const SURELY_VOID: Duration = Duration::from_secs(2);

/// Who is gone by a reading that is older is not acted on.
const FRESH: Duration = Duration::from_millis(1_500);

/// What a route is worth whose life is not among the living.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nobody can tell: it may be younger than what was read of the leases.
    Unsure,
    /// Its node is gone.
    Void,
    /// Its node has been gone for as long as routes are kept: it may be removed.
    Over,
}

impl Standing {
    /// Of a life that has been over since `void_since` ([`NodeTable::void_since`]), where routes are kept
    /// for `void_after`.
    pub fn of(void_since: Option<Duration>, void_after: Duration) -> Self {
        match void_since {
            Some(since) if since >= void_after => Self::Over,
            Some(since) if since >= SURELY_VOID => Self::Void,
            _ => Self::Unsure,
        }
    }
}

/// The living nodes of a role, refreshed in the background. Cheap to clone; the refreshing ends with
/// the last clone.
#[derive(Clone)]
pub struct NodeTable {
    inner: Arc<Inner>,
    view: watch::Receiver<Arc<Vec<NodeRecord>>>,
}

struct Inner {
    view: watch::Sender<Arc<Vec<NodeRecord>>>,
    memory: Mutex<Memory>,
    /// When the reading began that `memory` took in last.
    read_at: Mutex<Option<Instant>>,
}

impl NodeTable {
    /// Starts to follow the leases of `role`, reading them every `refresh` and whenever one of them
    /// announces a change. Empty until the first reading.
    pub fn watch(mailbox: &Mailbox, role: NodeRole, refresh: Duration) -> Self {
        let (view, receiver) = watch::channel(Arc::default());
        let stale_after = (refresh + PATIENCE) * 4;
        let inner = Arc::new(Inner {
            view,
            memory: Mutex::new(Memory::new(stale_after)),
            read_at: Mutex::default(),
        });
        tokio::spawn(follow(Arc::downgrade(&inner), mailbox.clone(), role, refresh));
        Self { inner, view: receiver }
    }

    /// The living nodes, by id.
    pub fn snapshot(&self) -> Arc<Vec<NodeRecord>> {
        self.view.borrow().clone()
    }

    /// Waits until the nodes are others than when this clone last asked. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.view.changed().await.is_err() {
            std::future::pending::<()>().await; // cannot be: `inner` holds the sender
        }
    }

    /// How long an incarnation of a node has been gone; `None`: it lives, or nobody can tell now. One
    /// that a later life follows is gone for `Duration::MAX` once that is confirmed, and not before. One
    /// that was never seen counts from the first question about it.
    pub fn void_since(&self, node: &NodeId, incarnation: Incarnation) -> Option<Duration> {
        self.inner.memory.lock().void_since(node, incarnation, Instant::now())
    }

    /// The last incarnations of nodes whose leases ended less than `limit` ago, with no later one. Empty unless the
    /// leases were read within the last 1.5 s: a node may be back by then, and nobody corrects what was put off for
    /// it after its sessions were confirmed.
    pub fn gone_for_less_than(&self, limit: Duration) -> Vec<(NodeId, Incarnation)> {
        let now = Instant::now();
        match *self.inner.read_at.lock() {
            Some(at) if now - at <= FRESH => {
                self.inner.memory.lock().gone_for_less_than(limit, now)
            }
            _ => Vec::new(),
        }
    }
}

async fn follow(inner: Weak<Inner>, mailbox: Mailbox, role: NodeRole, refresh: Duration) {
    let mut announcements = Announcements::hear(mailbox.topology().config());
    let mut masters = None;
    for turn in 0.. {
        let known = match inner.upgrade() {
            Some(inner) => inner.memory.lock().known().collect(),
            None => return,
        };
        let began = Instant::now();
        let reading = read(mailbox.topology(), Some(role), known, turn).await;
        let Some(inner) = inner.upgrade() else { return };
        told(&mut masters, &reading);
        let view = inner.memory.lock().update(reading, Instant::now());
        *inner.read_at.lock() = Some(began);
        inner.view.send_if_modified(|old| {
            let changed = **old != view;
            if changed {
                *old = Arc::new(view);
            }
            changed
        });
        drop(inner);
        tokio::select! {
            () = tokio::time::sleep(refresh) => {}
            () = announcements.of(role) => tokio::time::sleep(ANNOUNCED_PAUSE).await,
        }
    }
}

/// Logs when masters do not answer, and when they do again.
fn told(before: &mut Option<(bool, bool)>, reading: &Reading) {
    let now = (reading.any, reading.complete);
    if before.replace(now) != Some(now) {
        match now {
            (true, true) => tracing::debug!("leases can be read everywhere"),
            (true, false) => tracing::warn!("leases cannot be read everywhere: copies are used"),
            (false, _) => tracing::warn!("leases cannot be read: keeping the last view"),
        }
    }
}

impl Mailbox {
    /// The nodes of all roles that have a lease now, by id, as far as masters answer.
    ///
    /// # Errors
    /// [`Error::Away`]: none does.
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, Error> {
        let reading = read(self.topology(), None, Vec::new(), 0).await;
        if !reading.any {
            return Err(Error::Away("no master tells of leases".into()));
        }
        let mut records: Vec<NodeRecord> = reading.living().cloned().collect();
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }
}

/// The leases of a role, or of all: the copies beside one shard of each master, another one each turn;
/// and the own keys of those whose copies leave open whether they live.
async fn read(
    topology: &Topology,
    role: Option<NodeRole>,
    known: Vec<(NodeId, Stamp)>,
    turn: usize,
) -> Reading {
    let lanes = topology.shards_by_lane();
    let asked = lanes.iter().map(|shards| {
        let shard = shards[turn % shards.len()];
        async move { timeout(PATIENCE, copies(topology, shard)).await }
    });
    let mut reading = Reading::of(known);
    for answer in join_all(asked).await {
        reading.heard(role, answer.ok().and_then(Result::ok));
    }
    let asked = reading.open().into_iter().map(|id| async move {
        let own = timeout(PATIENCE, own(topology, &id)).await;
        (id, own.unwrap_or(Own::Unreadable))
    });
    for (id, own) in join_all(asked).await {
        reading.asked(role, &id, own);
    }
    reading
}

/// A node's own key.
async fn own(topology: &Topology, id: &NodeId) -> Own {
    let key = keys::node(id.as_str());
    let mut get = redis::cmd("HGETALL");
    get.arg(&key);
    match topology.query_on::<HashMap<String, String>>(&key, &get).await {
        Ok(fields) => match record::own(id, &fields) {
            Some((stamp, record)) => Own::Held(stamp, record),
            None => Own::Absent,
        },
        Err(error) => {
            tracing::debug!(node = %id, %error, "a lease cannot be read");
            Own::Unreadable
        }
    }
}
