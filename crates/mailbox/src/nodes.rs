//! The running nodes according to their leases. If most leases vanish at once, this is not believed for a while.

pub(crate) mod memory;

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

use self::memory::{Memory, Own, Reading};
use crate::announcements::Announcements;
use crate::lease::copies::copies;
use crate::lease::node::{NodeRecord, NodeRole};
use crate::lease::record;
use crate::lease::state::Stamp;
use crate::topology::Topology;
use crate::{Error, Mailbox, keys};

/// Wait between an announcement and the reading that follows: a fleet that restarts is then read once.
const ANNOUNCED_PAUSE: Duration = Duration::from_millis(20);
/// A reading ignores masters that take longer to answer.
const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// An incarnation that is missing for this long is not just too new to have been read.
const SURELY_VOID: Duration = Duration::from_secs(2);

/// State of an incarnation that is not among the running nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Unknown: it may be newer than the last reading of the leases.
    Unsure,
    /// It is gone, and its routes are void.
    Void,
    /// It has been gone for as long as routes are kept: they may be removed.
    Over,
}

impl Standing {
    /// The standing of an incarnation that has been gone for `void_since` ([`NodeTable::void_since`]), if routes are
    /// kept for `void_after`.
    pub fn of(void_since: Option<Duration>, void_after: Duration) -> Self {
        match void_since {
            Some(since) if since >= void_after => Self::Over,
            Some(since) if since >= SURELY_VOID => Self::Void,
            _ => Self::Unsure,
        }
    }
}

/// The running nodes of a role, refreshed in the background until the last clone is dropped. Cheap to clone.
#[derive(Clone)]
pub struct NodeTable {
    inner: Arc<Inner>,
    view: watch::Receiver<Arc<Vec<NodeRecord>>>,
}

struct Inner {
    view: watch::Sender<Arc<Vec<NodeRecord>>>,
    memory: Mutex<Memory>,
}

impl NodeTable {
    /// Starts reading the leases of `role`, every `refresh` and after each announcement. The table is empty until the
    /// first reading.
    pub fn watch(mailbox: &Mailbox, role: NodeRole, refresh: Duration) -> Self {
        let (view, receiver) = watch::channel(Arc::default());
        let stale_after = (refresh + READ_TIMEOUT) * 4;
        let inner = Arc::new(Inner { view, memory: Mutex::new(Memory::new(stale_after)) });
        let following = follow(Arc::downgrade(&inner), mailbox.clone(), role, refresh);
        tokio::spawn(following.in_current_span());
        Self { inner, view: receiver }
    }

    /// The running nodes, sorted by id.
    pub fn snapshot(&self) -> Arc<Vec<NodeRecord>> {
        self.view.borrow().clone()
    }

    /// Waits until the nodes have changed since this clone last waited. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.view.changed().await.is_err() {
            std::future::pending::<()>().await; // unreachable: `inner` holds the sender
        }
    }

    /// How long an incarnation of a node has been gone; `None`: it is running, or this is unknown now. An incarnation
    /// is gone for `Duration::MAX` once a later one of its node has confirmed all sessions, and not before. One that
    /// was never seen counts from the first call with it.
    pub fn void_since(&self, node: &NodeId, incarnation: Incarnation) -> Option<Duration> {
        self.inner.memory.lock().void_since(node, incarnation, Instant::now())
    }

    /// The last incarnations of nodes whose leases ended less than `limit` ago, without a later one. Empty unless the
    /// leases were read within the last 1.5 s: if such a node is back and has confirmed its sessions, nothing corrects
    /// what is put off for it afterwards.
    pub fn gone_for_less_than(&self, limit: Duration) -> Vec<(NodeId, Incarnation)> {
        self.inner.memory.lock().gone_for_less_than(limit, Instant::now())
    }
}

async fn follow(inner: Weak<Inner>, mailbox: Mailbox, role: NodeRole, refresh: Duration) {
    let mut announcements = Announcements::subscribe(mailbox.topology().config());
    let mut masters = None;
    for turn in 0.. {
        let known = match inner.upgrade() {
            Some(inner) => inner.memory.lock().known().collect(),
            None => return,
        };
        let reading = read(mailbox.topology(), Some(role), known, turn).await;
        let Some(inner) = inner.upgrade() else { return };
        log_changes(&mut masters, &reading);
        let view = inner.memory.lock().update(reading, Instant::now());
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
            () = announcements.next(role) => tokio::time::sleep(ANNOUNCED_PAUSE).await,
        }
    }
}

/// Logs when masters stop or resume answering.
fn log_changes(before: &mut Option<(bool, bool)>, reading: &Reading) {
    let now = (reading.any, reading.complete);
    if before.replace(now) != Some(now) {
        match now {
            (true, true) => tracing::debug!("all masters return leases"),
            (true, false) => tracing::warn!("some masters return no leases: using copies"),
            (false, _) => tracing::warn!("no master returns leases: keeping the last view"),
        }
    }
}

impl Mailbox {
    /// The nodes of all roles that have a lease, sorted by id, as far as masters answer.
    ///
    /// # Errors
    /// Returns [`Error::Away`] if none does.
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, Error> {
        let reading = read(self.topology(), None, Vec::new(), 0).await;
        if !reading.any {
            return Err(Error::Away("no master returns leases".into()));
        }
        let mut records: Vec<NodeRecord> = reading.running().cloned().collect();
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }
}

/// Reads the leases of a role, or of all roles: the copies beside one shard of each master, another shard each turn,
/// then the own keys of those nodes that copies do not show running.
async fn read(
    topology: &Topology,
    role: Option<NodeRole>,
    known: Vec<(NodeId, Stamp)>,
    turn: usize,
) -> Reading {
    let lanes = topology.shards_by_lane();
    let asked = lanes.iter().map(|shards| {
        let shard = shards[turn % shards.len()];
        async move { timeout(READ_TIMEOUT, copies(topology, shard)).await }
    });
    let mut reading = Reading::of(known, Instant::now());
    for answer in join_all(asked).await {
        reading.add_copies(role, answer.ok().and_then(Result::ok));
    }
    let asked = reading.open().into_iter().map(|id| async move {
        let own = timeout(READ_TIMEOUT, own(topology, &id)).await;
        (id, own.unwrap_or(Own::Unreadable))
    });
    for (id, own) in join_all(asked).await {
        reading.add_own(role, &id, own);
    }
    reading
}

/// Reads a node's own key.
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
            tracing::debug!(node = %id, %error, "reading a lease failed");
            Own::Unreadable
        }
    }
}
