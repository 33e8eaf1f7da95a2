//! What a reader of leases remembers, and whom it takes for gone. It names no Redis and takes its time as
//! an argument.

use std::collections::HashMap;
use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use tokio::time::Instant;

use crate::lease::life::Stamp;
use crate::lease::node::{NodeRecord, NodeRole};
use crate::lease::record::Copy;

/// When more than half of the nodes vanish at once, it is believed only after so long: a failover of
/// the leases' master or a stepped clock takes them all, and most live.
pub(super) const DISBELIEF: Duration = Duration::from_secs(30);
/// How long a node that is gone is looked for. Its routes are void long before, and one that a device left behind is
/// then void as a stranger's is.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Unknown lives whose first evidence is remembered.
const STRANGERS_MAX: usize = 4096;

/// What a node's own key says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Own {
    /// It was not asked: a copy told enough.
    #[default]
    Unasked,
    /// Its master does not answer.
    Unreadable,
    /// There is none.
    Absent,
    /// It stands.
    Held(Stamp, NodeRecord),
}

/// What a reading saw of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// The newest copy whose lease had not ended.
    copy: Option<(Stamp, NodeRecord)>,
    /// The newest copy that says that the lease was given up.
    given_up: Option<Stamp>,
    pub own: Own,
    /// The newest writing that the reader knew before.
    known: Option<Stamp>,
}

impl Evidence {
    /// Takes a copy into account; `now` is the time of the master that holds it, ms.
    pub fn add(&mut self, copy: Copy, now: u64) {
        if copy.given_up {
            self.given_up = self.given_up.max(Some(copy.stamp));
        } else if let Some(record) = copy.record
            && copy.ends > now
            && self.copy.as_ref().is_none_or(|(stamp, _)| *stamp < copy.stamp)
        {
            self.copy = Some((copy.stamp, record));
        }
    }

    /// Whether the copies leave open if it lives: then its own key decides.
    fn is_open(&self) -> bool {
        !matches!(self.verdict(self.known), Verdict::Lives(..))
    }

    /// `known`: the newest writing that was ever read. That an earlier one gave the lease up says nothing
    /// of it.
    fn verdict(&self, known: Option<Stamp>) -> Verdict<'_> {
        let own = match &self.own {
            Own::Held(stamp, record) => Some((*stamp, record)),
            _ => None,
        };
        let copy = self.copy.as_ref().map(|(stamp, record)| (*stamp, record));
        let newest = own.into_iter().chain(copy).max_by_key(|(stamp, _)| *stamp);
        match (newest, self.given_up) {
            (Some((stamp, record)), given_up)
                if given_up.is_none_or(|given_up| given_up < stamp) =>
            {
                // A copy of an earlier life, written late or brought back by a failover, tells nothing of a later
                // life whose own key was not read.
                let earlier = known.is_some_and(|known| stamp.incarnation < known.incarnation);
                match self.own {
                    Own::Unasked | Own::Unreadable if earlier => Verdict::Unknown,
                    _ => Verdict::Lives(stamp, record),
                }
            }
            (_, Some(stamp)) if known.is_none_or(|known| known <= stamp) => Verdict::GaveUp(stamp),
            (..) if self.own == Own::Absent => Verdict::Gone,
            _ => Verdict::Unknown,
        }
    }
}

enum Verdict<'a> {
    Lives(Stamp, &'a NodeRecord),
    /// It gave its lease up after all else that was read.
    GaveUp(Stamp),
    /// Its own key was read and is absent, and no copy stands.
    Gone,
    /// Nobody can tell.
    Unknown,
}

/// What Redis says at a moment.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    /// Those that are known, or of which there is a copy.
    pub nodes: HashMap<NodeId, Evidence>,
    /// Whether every master answered.
    pub complete: bool,
    /// Whether any did.
    pub any: bool,
}

impl Reading {
    /// Nobody has answered yet. `known`: the nodes to look for, whether a copy shows them or not, each with the newest
    /// writing that was ever read.
    pub fn of(known: impl IntoIterator<Item = (NodeId, Stamp)>) -> Self {
        let of = |(id, stamp)| (id, Evidence { known: Some(stamp), ..Evidence::default() });
        let nodes = known.into_iter().map(of).collect();
        Self { nodes, complete: true, any: false }
    }

    /// A master's answer: its time, ms, and the copies beside one of its shards, of which those of `role`
    /// count, or all; `None`: it did not answer.
    pub fn heard(
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

    /// Those whose own keys have to be asked: the copies leave open whether they live.
    pub fn open(&self) -> Vec<NodeId> {
        let open = self.nodes.iter().filter(|(_, evidence)| evidence.is_open());
        open.map(|(id, _)| id.clone()).collect()
    }

    /// What one of their own keys says.
    pub fn asked(&mut self, role: Option<NodeRole>, id: &NodeId, own: Own) {
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

    /// The records of those that live.
    pub fn living(&self) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values().filter_map(|evidence| match evidence.verdict(None) {
            Verdict::Lives(_, record) => Some(record),
            _ => None,
        })
    }
}

/// What is known of nodes beyond the view.
pub(crate) struct Memory {
    /// What was read longer ago says nothing of who is gone.
    stale_after: Duration,
    known: HashMap<NodeId, Known>,
    /// When lives that no lease was ever seen for were first asked about.
    strangers: HashMap<(NodeId, Incarnation), Instant>,
    /// When a master answered last, and when all did.
    heard_at: Option<Instant>,
    complete_at: Option<Instant>,
    /// Since when more than half were missing.
    vanished_at: Option<Instant>,
}

struct Known {
    stamp: Stamp,
    record: NodeRecord,
    gone_since: Option<Instant>,
    gave_up: bool,
}

impl Memory {
    pub fn new(stale_after: Duration) -> Self {
        Self {
            stale_after,
            known: HashMap::new(),
            strangers: HashMap::new(),
            heard_at: None,
            complete_at: None,
            vanished_at: None,
        }
    }

    /// The nodes to look for, whether a copy shows them or not, each with the newest writing that was ever read.
    pub fn known(&self) -> impl Iterator<Item = (NodeId, Stamp)> {
        self.known.iter().map(|(id, known)| (id.clone(), known.stamp))
    }

    fn is_stale(&self, at: Option<Instant>, now: Instant) -> bool {
        at.is_none_or(|at| now - at > self.stale_after)
    }

    /// How long a life of a node has been over; `None`: it is not, or nobody can tell now.
    /// `Duration::MAX`: nothing of it is left.
    pub fn void_since(
        &mut self,
        node: &NodeId,
        incarnation: Incarnation,
        now: Instant,
    ) -> Option<Duration> {
        if self.is_stale(self.heard_at, now) {
            return None;
        }
        if let Some(known) = self.known.get(node)
            && incarnation <= known.stamp.incarnation
        {
            let former = incarnation < known.stamp.incarnation;
            return match known.gone_since {
                // Its sessions live on in the later life, until that says that all of them are confirmed.
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
        if self.is_stale(self.heard_at, now) {
            return Vec::new();
        }
        let gone = |known: &Known| known.gone_since.is_some_and(|at| now - at < limit);
        let lives = self.known.iter().filter(|(_, known)| gone(known));
        lives.map(|(id, known)| (id.clone(), known.stamp.incarnation)).collect()
    }

    /// Takes over a reading; returns the view that follows from it, by id.
    pub fn update(&mut self, reading: Reading, now: Instant) -> Vec<NodeRecord> {
        if reading.any {
            self.heard_at = Some(now);
        }
        // What nobody showed may have been on a master that was not read. Then the time anew begins from
        // which it counts as gone; a moment may pass without, in which no lease comes and ends.
        let anew = self.is_stale(self.complete_at, now);
        if anew {
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
                Verdict::Lives(stamp, record) => self.see(id, stamp, record, believe, now),
                Verdict::GaveUp(stamp) => {
                    if let Some(known) = self.known.get_mut(&id) {
                        known.stamp = stamp;
                        known.gave_up = true;
                        known.gone_since.get_or_insert(now);
                    }
                }
                Verdict::Gone => {
                    if let Some(known) = self.known.get_mut(&id).filter(|_| believe) {
                        let since = known.gone_since.get_or_insert(now);
                        if anew && !known.gave_up {
                            *since = now;
                        }
                    }
                }
                Verdict::Unknown => {
                    // Nobody can tell since when, either: it counts anew.
                    if let Some(known) = self.known.get_mut(&id).filter(|known| !known.gave_up)
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
        let living = self.known.values().filter(|known| known.gone_since.is_none());
        let mut view: Vec<NodeRecord> = living.map(|known| known.record.clone()).collect();
        view.sort_by(|a, b| a.id.cmp(&b.id));
        view
    }

    /// Whether those who are missing are taken for gone. Who cannot be read is not missing.
    fn believes(&mut self, reading: &Reading, now: Instant) -> bool {
        let (mut all, mut missing) = (0, 0);
        for (id, known) in self.known.iter().filter(|(_, known)| known.gone_since.is_none()) {
            match reading.nodes.get(id).map(|evidence| evidence.verdict(Some(known.stamp))) {
                None | Some(Verdict::Unknown) => continue,
                Some(Verdict::Gone) => missing += 1,
                // An older life than the one that is known: that one is missing.
                Some(Verdict::Lives(stamp, _)) if stamp.incarnation < known.stamp.incarnation => {
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

    fn see(&mut self, id: NodeId, stamp: Stamp, record: &NodeRecord, believe: bool, now: Instant) {
        self.strangers.remove(&(id.clone(), stamp.incarnation));
        let Some(known) = self.known.get_mut(&id) else {
            let record = record.clone();
            self.known.insert(id, Known { stamp, record, gone_since: None, gave_up: false });
            return;
        };
        let former = stamp.incarnation < known.stamp.incarnation;
        if former && known.gone_since.is_none() {
            // A Redis that went back shows it, or that forgot the later one: that one is missing.
            if believe {
                known.gone_since = Some(now);
            }
        } else if stamp >= known.stamp || former {
            // A former life after the later one was found gone: a process whose clock is behind, and
            // nothing told it of the later one.
            *known = Known { stamp, record: record.clone(), gone_since: None, gave_up: false };
        } else if !known.gave_up {
            known.gone_since = None;
        }
    }
}

#[cfg(test)]
mod tests;
