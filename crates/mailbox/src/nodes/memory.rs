//! A lease reader's memory of nodes, which decides which of them are gone. It does no I/O and takes the time as an
//! argument.

use std::collections::HashMap;
use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use tokio::time::Instant;

use crate::lease::node::{NodeRecord, NodeRole};
use crate::lease::record::Copy;
use crate::lease::state::Stamp;

/// If more than half of the nodes vanish at once, they count as gone only after this time: a failover of the leases'
/// master or a clock step makes all leases vanish, while most nodes run.
pub(super) const DISBELIEF: Duration = Duration::from_secs(30);
/// How long a node that is gone is remembered. Its routes are void long before, and a route that remains is then void
/// as that of an unknown node.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// A reading that is older says nothing of nodes that may have come back.
const FRESH: Duration = Duration::from_millis(1_500);
/// Maximum unknown incarnations that are remembered.
const STRANGERS_MAX: usize = 4096;

/// State of a node's own key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Own {
    /// It was not read, because a copy shows that the node is running.
    #[default]
    Unasked,
    /// Its master did not answer.
    Unreadable,
    /// It does not exist.
    Absent,
    /// It exists.
    Held(Stamp, NodeRecord),
}

/// A node in one reading of the leases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// The newest copy whose lease has not ended.
    copy: Option<(Stamp, NodeRecord)>,
    /// The newest copy that says that the lease was released.
    released: Option<Stamp>,
    pub own: Own,
    /// The newest write that the reader knew before.
    known: Option<Stamp>,
}

impl Evidence {
    /// Takes a copy into account. `now` is the time of the master that has it, ms.
    pub fn add(&mut self, copy: Copy, now: u64) {
        if copy.released {
            self.released = self.released.max(Some(copy.stamp));
        } else if let Some(record) = copy.record
            && copy.ends > now
            && self.copy.as_ref().is_none_or(|(stamp, _)| *stamp < copy.stamp)
        {
            self.copy = Some((copy.stamp, record));
        }
    }

    /// Whether the copies do not show that the node is running: then its own key decides.
    fn is_open(&self) -> bool {
        !matches!(self.verdict(self.known), Verdict::Running(..))
    }

    /// `known`: the newest write that was ever read. A release before it is outdated.
    fn verdict(&self, known: Option<Stamp>) -> Verdict<'_> {
        let own = match &self.own {
            Own::Held(stamp, record) => Some((*stamp, record)),
            _ => None,
        };
        let copy = self.copy.as_ref().map(|(stamp, record)| (*stamp, record));
        let newest = own.into_iter().chain(copy).max_by_key(|(stamp, _)| *stamp);
        match (newest, self.released) {
            (Some((stamp, record)), released)
                if released.is_none_or(|released| released < stamp) =>
            {
                // A copy of an earlier incarnation, written late or brought back by a failover, says nothing of a later
                // one whose own key was not read.
                let earlier = known.is_some_and(|known| stamp.incarnation < known.incarnation);
                match self.own {
                    Own::Unasked | Own::Unreadable if earlier => Verdict::Unknown,
                    _ => Verdict::Running(stamp, record),
                }
            }
            (_, Some(stamp)) if known.is_none_or(|known| known <= stamp) => {
                Verdict::Released(stamp)
            }
            (..) if self.own == Own::Absent => Verdict::Gone,
            _ => Verdict::Unknown,
        }
    }
}

enum Verdict<'a> {
    Running(Stamp, &'a NodeRecord),
    /// It released its lease after all other writes that were read.
    Released(Stamp),
    /// Its own key was read and is absent, and no copy is valid.
    Gone,
    Unknown,
}

/// The result of reading the leases once.
#[derive(Debug)]
pub(crate) struct Reading {
    began: Instant,
    /// Known nodes, and those that have a copy.
    pub nodes: HashMap<NodeId, Evidence>,
    /// Whether every master answered.
    pub complete: bool,
    /// Whether any did.
    pub any: bool,
}

impl Reading {
    /// A reading without any answer yet. `known`: the nodes to look for, whether or not they have a copy, each with the
    /// newest write that was ever read.
    pub fn of(known: impl IntoIterator<Item = (NodeId, Stamp)>, began: Instant) -> Self {
        let of = |(id, stamp)| (id, Evidence { known: Some(stamp), ..Evidence::default() });
        let nodes = known.into_iter().map(of).collect();
        Self { began, nodes, complete: true, any: false }
    }

    /// Adds a master's answer: its time, ms, and the copies beside one of its shards, of which those of `role` count,
    /// or all; `None`: it did not answer.
    pub fn add_copies(
        &mut self,
        role: Option<NodeRole>,
        answer: Option<(u64, impl IntoIterator<Item = (NodeId, Copy)>)>,
    ) {
        let Some((now, copies)) = answer else {
            self.complete = false;
            return;
        };
        self.any = true;
        for (id, copy) in copies {
            let other = copy.record.as_ref().is_none_or(|it| role.is_some_and(|r| r != it.role));
            if !other {
                self.nodes.entry(id).or_default().add(copy, now);
            }
        }
    }

    /// The nodes whose own keys must be read, because copies do not show that they are running.
    pub fn open(&self) -> Vec<NodeId> {
        let open = self.nodes.iter().filter(|(_, evidence)| evidence.is_open());
        open.map(|(id, _)| id.clone()).collect()
    }

    /// Adds a node's own key.
    pub fn add_own(&mut self, role: Option<NodeRole>, id: &NodeId, own: Own) {
        let own = match own {
            Own::Held(_, record) if role.is_some_and(|role| role != record.role) => Own::Absent,
            own => own,
        };
        self.any |= own != Own::Unreadable;
        self.complete &= own != Own::Unreadable;
        if let Some(evidence) = self.nodes.get_mut(id) {
            evidence.own = own;
        }
    }

    /// The records of running nodes.
    pub fn running(&self) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values().filter_map(|evidence| match evidence.verdict(None) {
            Verdict::Running(_, record) => Some(record),
            _ => None,
        })
    }
}

/// All nodes seen so far, over all readings.
pub(crate) struct Memory {
    /// Readings that are older say nothing about nodes that are gone.
    stale_after: Duration,
    known: HashMap<NodeId, Known>,
    /// Incarnations without a known lease, and when each was first asked about.
    strangers: HashMap<(NodeId, Incarnation), Instant>,
    /// When the last reading began.
    read_at: Option<Instant>,
    /// When a master answered last, and when all did.
    answered_at: Option<Instant>,
    complete_at: Option<Instant>,
    /// Since when more than half were missing.
    vanished_at: Option<Instant>,
}

struct Known {
    stamp: Stamp,
    record: NodeRecord,
    gone_since: Option<Instant>,
    released: bool,
}

impl Memory {
    pub fn new(stale_after: Duration) -> Self {
        Self {
            stale_after,
            known: HashMap::new(),
            strangers: HashMap::new(),
            read_at: None,
            answered_at: None,
            complete_at: None,
            vanished_at: None,
        }
    }

    /// The nodes to look for, whether or not they have a copy, each with the newest write that was ever read.
    pub fn known(&self) -> impl Iterator<Item = (NodeId, Stamp)> {
        self.known.iter().map(|(id, known)| (id.clone(), known.stamp))
    }

    fn is_stale(&self, at: Option<Instant>, now: Instant) -> bool {
        at.is_none_or(|at| now - at > self.stale_after)
    }

    /// See [`super::NodeTable::void_since`].
    pub fn void_since(
        &mut self,
        node: &NodeId,
        incarnation: Incarnation,
        now: Instant,
    ) -> Option<Duration> {
        if self.is_stale(self.answered_at, now) {
            return None;
        }
        if let Some(known) = self.known.get(node)
            && incarnation <= known.stamp.incarnation
        {
            let former = incarnation < known.stamp.incarnation;
            return match known.gone_since {
                // Its sessions continue in the later incarnation, until that has confirmed all of them.
                _ if former && known.record.confirmed => Some(Duration::MAX),
                since => since.map(|at| now - at),
            };
        }
        if self.is_stale(self.complete_at, now) {
            return None;
        }
        if self.strangers.len() >= STRANGERS_MAX {
            self.strangers.clear();
        }
        let first = self.strangers.entry((node.clone(), incarnation)).or_insert(now);
        Some(now - *first)
    }

    /// See [`super::NodeTable::gone_for_less_than`].
    pub fn gone_for_less_than(&self, limit: Duration, now: Instant) -> Vec<(NodeId, Incarnation)> {
        let is_fresh = self.read_at.is_some_and(|at| now - at <= FRESH);
        if !is_fresh || self.is_stale(self.answered_at, now) {
            return Vec::new();
        }
        let gone = |known: &Known| known.gone_since.is_some_and(|at| now - at < limit);
        let gone = self.known.iter().filter(|(_, known)| gone(known));
        gone.map(|(id, known)| (id.clone(), known.stamp.incarnation)).collect()
    }

    /// Takes a reading into account; returns the running nodes, sorted by id.
    pub fn update(&mut self, reading: Reading, now: Instant) -> Vec<NodeRecord> {
        self.read_at = Some(reading.began);
        if reading.any {
            self.answered_at = Some(now);
        }
        // After too long without a complete reading, a missing node may have been on a master that was not read: it
        // counts as gone only from now on.
        let starts_over = self.is_stale(self.complete_at, now);
        if starts_over {
            self.strangers.clear();
        }
        if reading.complete {
            self.complete_at = Some(now);
        }
        let believe = self.believes(&reading, now);
        self.known.retain(|_, known| known.gone_since.is_none_or(|at| now - at < REMEMBERED));
        for (id, evidence) in reading.nodes {
            let known = self.known.get(&id).map(|known| known.stamp);
            match evidence.verdict(known) {
                Verdict::Running(stamp, record) => {
                    self.note_running(id, stamp, record, believe, now)
                }
                Verdict::Released(stamp) => {
                    if let Some(known) = self.known.get_mut(&id) {
                        known.stamp = stamp;
                        known.released = true;
                        known.gone_since.get_or_insert(now);
                    }
                }
                Verdict::Gone => {
                    if let Some(known) = self.known.get_mut(&id).filter(|_| believe) {
                        let since = known.gone_since.get_or_insert(now);
                        if starts_over && !known.released {
                            *since = now;
                        }
                    }
                }
                Verdict::Unknown => {
                    // Since when is unknown as well: it counts from now on.
                    if let Some(known) = self.known.get_mut(&id).filter(|known| !known.released)
                        && let Some(since) = &mut known.gone_since
                    {
                        *since = now;
                    }
                }
            }
        }
        self.view()
    }

    fn view(&self) -> Vec<NodeRecord> {
        let running = self.known.values().filter(|known| known.gone_since.is_none());
        let mut view: Vec<NodeRecord> = running.map(|known| known.record.clone()).collect();
        view.sort_by(|a, b| a.id.cmp(&b.id));
        view
    }

    /// Whether missing nodes count as gone. A node that could not be read is not missing.
    fn believes(&mut self, reading: &Reading, now: Instant) -> bool {
        let (mut all, mut missing) = (0, 0);
        for (id, known) in self.known.iter().filter(|(_, known)| known.gone_since.is_none()) {
            match reading.nodes.get(id).map(|evidence| evidence.verdict(Some(known.stamp))) {
                None | Some(Verdict::Unknown) => continue,
                Some(Verdict::Gone) => missing += 1,
                // An earlier incarnation than the known one, which is therefore missing.
                Some(Verdict::Running(stamp, _)) if stamp.incarnation < known.stamp.incarnation => {
                    missing += 1;
                }
                Some(_) => {}
            }
            all += 1;
        }
        if missing * 2 <= all {
            self.vanished_at = None;
            return true;
        }
        let since = *self.vanished_at.get_or_insert_with(|| {
            tracing::warn!(missing, all, "most leases vanished at once: keeping the last view");
            now
        });
        let believe = now - since >= DISBELIEF;
        if believe {
            self.vanished_at = None;
        }
        believe
    }

    fn note_running(
        &mut self,
        id: NodeId,
        stamp: Stamp,
        record: &NodeRecord,
        believe: bool,
        now: Instant,
    ) {
        self.strangers.remove(&(id.clone(), stamp.incarnation));
        let Some(known) = self.known.get_mut(&id) else {
            let record = record.clone();
            self.known.insert(id, Known { stamp, record, gone_since: None, released: false });
            return;
        };
        let former = stamp.incarnation < known.stamp.incarnation;
        if former && known.gone_since.is_none() {
            // Redis has lost the later one, which is therefore missing.
            if believe {
                known.gone_since = Some(now);
            }
        } else if stamp >= known.stamp || former {
            // An earlier incarnation after the later one was found gone: its process has a clock that is behind, and
            // found no trace of the later one.
            *known = Known { stamp, record: record.clone(), gone_since: None, released: false };
        } else if !known.released {
            known.gone_since = None;
        }
    }
}

#[cfg(test)]
mod tests;
