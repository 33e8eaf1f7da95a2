//! Which nodes live, as their leases say; sceptical of sudden mass death.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::announcements::Announcements;
use crate::{Error, Mailbox, NodeRecord, NodeRole, keys};

/// When more than half of the nodes vanish at once, it is believed only after so long: a failover of
/// the leases' master or a stepped clock takes them all, and most live.
const DISBELIEF: Duration = Duration::from_secs(30);
/// Between an announcement and the reading that follows it: a fleet that restarts is read once.
const ANNOUNCED_PAUSE: Duration = Duration::from_millis(20);
/// Former lives remembered of each node.
const LIVES_MAX: usize = 16;
/// Unknown lives whose first sight is remembered.
const STRANGERS_MAX: usize = 4096;

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
    /// A view older than this says nothing of who is gone.
    stale_after: Duration,
}

/// What is known of nodes beyond the view.
#[derive(Default)]
struct Memory {
    known: HashMap<NodeId, Known>,
    /// When lives that no lease was ever seen for were first asked about.
    strangers: HashMap<(NodeId, Incarnation), Instant>,
    read_at: Option<Instant>,
    /// Since when more than half were missing.
    vanished_at: Option<Instant>,
}

struct Known {
    record: NodeRecord,
    gone_since: Option<Instant>,
    former: Vec<Incarnation>,
}

impl NodeTable {
    /// Starts to follow the leases of `role`, reading them every `refresh` and whenever one of them
    /// announces a change. Empty until the first reading.
    pub fn watch(mailbox: &Mailbox, role: NodeRole, refresh: Duration) -> Self {
        let (view, receiver) = watch::channel(Arc::default());
        let stale_after = refresh * 4;
        let inner = Arc::new(Inner { view, memory: Mutex::default(), stale_after });
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

    /// How long an incarnation of a node has been gone; `None`: it lives, or nobody can tell now. A
    /// life after which another one was seen is gone for `Duration::MAX`. One that was never seen
    /// counts from the first question about it.
    pub fn void_since(&self, node: &NodeId, incarnation: Incarnation) -> Option<Duration> {
        let mut memory = self.inner.memory.lock();
        memory.void_since(node, incarnation, self.inner.stale_after, Instant::now())
    }
}

impl Memory {
    fn void_since(
        &mut self,
        node: &NodeId,
        incarnation: Incarnation,
        stale_after: Duration,
        now: Instant,
    ) -> Option<Duration> {
        if let Some(known) = self.known.get(node) {
            if known.former.contains(&incarnation) {
                return Some(Duration::MAX);
            }
            if known.record.incarnation == incarnation {
                return known.gone_since.map(|at| now - at);
            }
        }
        if self.read_at.is_none_or(|at| now - at > stale_after) {
            return None;
        }
        if self.strangers.len() >= STRANGERS_MAX {
            self.strangers.clear();
        }
        let first = self.strangers.entry((node.clone(), incarnation)).or_insert(now);
        Some(now - *first)
    }

    /// Takes over a reading; returns the view that follows from it.
    fn update(&mut self, reading: Reading, now: Instant) -> Vec<NodeRecord> {
        self.read_at = Some(now);
        let living = self.known.values().filter(|known| known.gone_since.is_none());
        let (all, missing) = living.fold((0, 0), |(all, missing), known| {
            (all + 1, missing + usize::from(reading.misses(&known.record.id)))
        });
        let suspicious = missing * 2 > all;
        let believe = match (suspicious, self.vanished_at) {
            (false, _) => true,
            (true, Some(at)) => now.duration_since(at) >= DISBELIEF,
            (true, None) => {
                tracing::warn!(missing, all, "most leases vanished at once: keeping the last view");
                self.vanished_at = Some(now);
                false
            }
        };
        if believe {
            self.vanished_at = None;
        }
        for known in self.known.values_mut() {
            let id = &known.record.id;
            if !reading.holds(id) && (believe || !reading.misses(id)) {
                known.gone_since.get_or_insert(now);
            }
        }
        for record in reading.records {
            self.see(record);
        }
        let living = self.known.values().filter(|known| known.gone_since.is_none());
        let mut view: Vec<NodeRecord> = living.map(|known| known.record.clone()).collect();
        view.sort_by(|a, b| a.id.cmp(&b.id));
        view
    }

    fn see(&mut self, record: NodeRecord) {
        self.strangers.remove(&(record.id.clone(), record.incarnation));
        match self.known.get_mut(&record.id) {
            Some(known) => {
                known.gone_since = None;
                if known.record.incarnation != record.incarnation {
                    if known.former.len() == LIVES_MAX {
                        known.former.remove(0);
                    }
                    known.former.retain(|life| *life != record.incarnation);
                    known.former.push(known.record.incarnation);
                }
                known.record = record;
            }
            None => {
                let known = Known { record, gone_since: None, former: Vec::new() };
                self.known.insert(known.record.id.clone(), known);
            }
        }
    }
}

/// What Redis says at a moment.
struct Reading {
    /// Those that have a lease.
    records: Vec<NodeRecord>,
    /// Those that should have one: it was taken and not given up.
    expected: HashSet<NodeId>,
    /// The index itself is gone: nothing can be said of anybody.
    blank: bool,
}

impl Reading {
    fn holds(&self, id: &NodeId) -> bool {
        self.records.iter().any(|record| record.id == *id)
    }

    /// Whether its lease is absent without having been given up.
    fn misses(&self, id: &NodeId) -> bool {
        !self.holds(id) && (self.blank || self.expected.contains(id))
    }
}

async fn follow(inner: Weak<Inner>, mailbox: Mailbox, role: NodeRole, refresh: Duration) {
    let mut announcements = Announcements::hear(mailbox.topology().config());
    loop {
        let read = read(&mailbox, Some(role)).await;
        let Some(inner) = inner.upgrade() else { return };
        match read {
            Ok(reading) => {
                let view = inner.memory.lock().update(reading, Instant::now());
                inner.view.send_if_modified(|old| {
                    let changed = **old != view;
                    if changed {
                        *old = Arc::new(view);
                    }
                    changed
                });
            }
            Err(error) => tracing::warn!(%error, "leases cannot be read: keeping the last view"),
        }
        drop(inner);
        tokio::select! {
            () = tokio::time::sleep(refresh) => {}
            () = announcements.of(role) => tokio::time::sleep(ANNOUNCED_PAUSE).await,
        }
    }
}

impl Mailbox {
    /// The nodes of all roles that have a lease now, by id.
    ///
    /// # Errors
    /// [`Error::Away`].
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, Error> {
        let mut records = read(self, None).await?.records;
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }
}

/// The leases of a role, or of all.
async fn read(mailbox: &Mailbox, role: Option<NodeRole>) -> Result<Reading, Error> {
    let topology = mailbox.topology();
    let mut list = redis::cmd("ZRANGE");
    list.arg(keys::NODES).arg(0).arg(-1).arg("WITHSCORES");
    let index: Vec<(String, f64)> = topology.query_on(keys::NODES, &list).await?;
    let records = index.iter().map(|(id, _)| async move {
        let key = keys::node(id);
        let mut get = redis::cmd("HGETALL");
        get.arg(&key);
        let fields: HashMap<String, String> = topology.query_on(&key, &get).await?;
        Ok::<_, Error>(parse(id, &fields))
    });
    let records = futures::future::try_join_all(records).await?.into_iter().flatten();
    let expected = index.iter().filter(|(_, ends)| *ends > 0.0);
    Ok(Reading {
        records: records.filter(|record| role.is_none_or(|role| record.role == role)).collect(),
        expected: expected.filter_map(|(id, _)| NodeId::new(id).ok()).collect(),
        blank: index.is_empty(),
    })
}

fn parse(id: &str, fields: &HashMap<String, String>) -> Option<NodeRecord> {
    let field = |name: &str| fields.get(name).map(String::as_str);
    Some(NodeRecord {
        id: NodeId::new(id).ok()?,
        role: NodeRole::parse(field("role")?)?,
        address: field("address")?.to_owned(),
        incarnation: Incarnation(field("incarnation")?.parse().ok()?),
        load: field("load")?.parse().ok()?,
        draining: field("state")? == "draining",
        zone: field("zone").unwrap_or_default().to_owned(),
        // Absent in leases of earlier versions.
        admin: field("admin").unwrap_or_default().to_owned(),
        devices: field("devices").unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, incarnation: u64) -> NodeRecord {
        NodeRecord {
            id: NodeId::new(id).unwrap(),
            role: NodeRole::Access,
            address: "127.0.0.1:1".into(),
            incarnation: Incarnation(incarnation),
            load: 0,
            draining: false,
            zone: String::new(),
            admin: String::new(),
            devices: String::new(),
        }
    }

    fn ids(view: &[NodeRecord]) -> Vec<&str> {
        view.iter().map(|record| record.id.as_str()).collect()
    }

    /// `lapsed`: ids that should have a lease and have none.
    fn read(living: &[(&str, u64)], lapsed: &str) -> Reading {
        let records: Vec<_> = living.iter().map(|(id, life)| record(id, *life)).collect();
        let lapsed = lapsed.split_whitespace().map(|id| NodeId::new(id).unwrap());
        let expected: HashSet<_> = records.iter().map(|r| r.id.clone()).chain(lapsed).collect();
        Reading { records, blank: expected.is_empty(), expected }
    }

    const STALE: Duration = Duration::from_secs(4);

    #[test]
    fn hazard_13_mass_death_is_believed_only_after_a_while() {
        let (mut memory, t) = (Memory::default(), Instant::now());
        let b = NodeId::new("b").unwrap();
        memory.update(read(&[("a", 1), ("b", 1), ("c", 1)], ""), t);
        assert_eq!(ids(&memory.update(read(&[("a", 1)], "b c"), t)), ["a", "b", "c"]);
        assert_eq!(memory.void_since(&b, Incarnation(1), STALE, t), None);
        let t = t + DISBELIEF;
        assert_eq!(ids(&memory.update(read(&[("a", 1)], "b c"), t)), ["a"]);
        assert_eq!(memory.void_since(&b, Incarnation(1), STALE, t), Some(Duration::ZERO));
    }

    #[test]
    fn leases_that_were_given_up_are_gone_at_once() {
        let (mut memory, t) = (Memory::default(), Instant::now());
        memory.update(read(&[("a", 1), ("b", 1)], ""), t);
        assert!(memory.update(read(&[], "x"), t).is_empty());
        // But not when the index was lost with them.
        memory.update(read(&[("a", 1), ("b", 1)], ""), t);
        assert_eq!(ids(&memory.update(read(&[], ""), t)), ["a", "b"]);
    }

    #[test]
    fn one_death_is_believed_at_once_and_its_time_counts() {
        let (mut memory, t) = (Memory::default(), Instant::now());
        memory.update(read(&[("a", 1), ("b", 1)], ""), t);
        assert_eq!(ids(&memory.update(read(&[("a", 1)], "b c"), t)), ["a"]);
        let later = Duration::from_secs(9);
        let gone = memory.void_since(&NodeId::new("b").unwrap(), Incarnation(1), STALE, t + later);
        assert_eq!(gone, Some(later));
    }

    #[test]
    fn a_former_life_is_void_at_once_and_an_unseen_one_from_the_first_question() {
        let (mut memory, t) = (Memory::default(), Instant::now());
        let a = NodeId::new("a").unwrap();
        memory.update(read(&[("a", 9)], ""), t);
        memory.update(read(&[("a", 4)], ""), t);
        assert_eq!(memory.void_since(&a, Incarnation(9), STALE, t), Some(Duration::MAX));
        assert_eq!(memory.void_since(&a, Incarnation(4), STALE, t), None);
        // Newer than the view, perhaps: nothing is removed for it soon.
        assert_eq!(memory.void_since(&a, Incarnation(7), STALE, t), Some(Duration::ZERO));
        memory.update(read(&[("a", 7)], ""), t);
        assert_eq!(memory.void_since(&a, Incarnation(7), STALE, t), None);
        // Redis away: nobody can tell.
        assert_eq!(memory.void_since(&a, Incarnation(8), STALE, t + STALE * 2), None);
    }
}
