//! The ledger of a partition: computes the offset that may be committed, which is that of the first unfinished
//! record, and the positions that shards must know at that commit. Promise P1 depends on this file: keep it small.

use std::collections::{BTreeMap, BTreeSet};

use barid_core::LogPosition;

/// The highest position that each shard, by number, has confirmed.
pub type Confirmed = BTreeMap<u16, LogPosition>;

/// The offsets of one partition in one assignment. Offsets that the log does not contain (compacted records,
/// transaction markers) are never taken, and do not delay a commit.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// Offsets that are taken and not finished.
    open: BTreeSet<i64>,
    /// One past the highest offset taken; the start of the reading if none is.
    next: Option<i64>,
    /// Covers every finished position below the committable offset. It never decreases, even on a rewind: if the
    /// partition moves to another purger during a repair, that one must know what to repair.
    confirmed: Confirmed,
}

impl Ledger {
    /// Creates the ledger of a partition that is read from `offset`. `confirmed`: the positions that its shards have
    /// confirmed.
    pub fn resume(offset: i64, confirmed: Confirmed) -> Self {
        Self { open: BTreeSet::new(), next: Some(offset), confirmed }
    }

    /// Records that an offset was taken. Offsets must increase; returns false for one that does not, because the
    /// committable offset would go back.
    pub fn take(&mut self, offset: i64) -> bool {
        if offset < 0 || self.next.is_some_and(|next| offset < next) {
            return false;
        }
        self.open.insert(offset);
        self.next = Some(offset + 1);
        true
    }

    /// Finishes an offset, whose shards have confirmed these positions. Returns false if it is not open.
    pub fn finish(
        &mut self,
        offset: i64,
        confirmed: impl IntoIterator<Item = (u16, LogPosition)>,
    ) -> bool {
        if !self.open.remove(&offset) {
            return false;
        }
        for (shard, position) in confirmed {
            let highest = self.confirmed.entry(shard).or_insert(position);
            *highest = position.max(*highest);
        }
        true
    }

    /// Forgets the offsets from `offset` on, which will be taken again.
    pub fn rewind(&mut self, offset: i64) {
        self.open.split_off(&offset);
        self.next = self.next.map(|next| next.min(offset));
    }

    /// The offset to commit, at which another purger would continue. `None`: nothing was taken, and the start of the
    /// reading is unknown.
    pub fn committable(&self) -> Option<i64> {
        self.open.first().copied().or(self.next)
    }

    /// The positions that each shard must know. Read it in the same step as [`Self::committable`].
    pub fn confirmed(&self) -> &Confirmed {
        &self.confirmed
    }

    /// One past the highest offset taken.
    pub fn next(&self) -> Option<i64> {
        self.next
    }

    /// Number of offsets that are taken and not finished.
    pub fn open(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ledger(taken: &[i64]) -> Ledger {
        let mut ledger = Ledger::default();
        assert!(taken.iter().all(|offset| ledger.take(*offset)));
        ledger
    }

    #[test]
    fn commits_up_to_the_first_unfinished_offset() {
        let mut ledger = ledger(&[5, 6, 7]);
        assert_eq!(ledger.committable(), Some(5));
        assert!(ledger.finish(7, []) && ledger.finish(5, []));
        assert_eq!(ledger.committable(), Some(6));
        assert!(ledger.finish(6, []));
        assert_eq!((ledger.committable(), ledger.open()), (Some(8), 0));
    }

    #[test]
    fn holes_in_the_log_hold_nothing_back() {
        let mut ledger = ledger(&[5, 9, 40]);
        ledger.finish(5, []);
        assert_eq!(ledger.committable(), Some(9));
        ledger.finish(9, []);
        assert_eq!(ledger.committable(), Some(40));
        ledger.finish(40, []);
        assert_eq!(ledger.committable(), Some(41));
    }

    #[test]
    fn nothing_taken_is_nothing_to_commit() {
        assert_eq!(Ledger::default().committable(), None);
        assert!(!Ledger::default().finish(3, []));
    }

    #[test]
    fn offsets_that_go_back_are_refused_until_rewound() {
        let mut ledger = ledger(&[5, 6]);
        assert!(!ledger.take(6) && !ledger.take(2) && !ledger.take(-1));
        ledger.finish(6, []);
        ledger.rewind(6);
        assert!(ledger.take(6));
        assert_eq!((ledger.committable(), ledger.open()), (Some(5), 2));
        ledger.rewind(3);
        assert_eq!((ledger.committable(), ledger.open()), (Some(3), 0));
    }

    #[test]
    fn a_ledger_that_resumes_stands_where_it_begins() {
        let at = LogPosition { leader_epoch: 3, offset: 20, index: 0 };
        let mut ledger = Ledger::resume(21, [(7, at)].into());
        assert_eq!((ledger.committable(), ledger.confirmed()[&7]), (Some(21), at));
        assert!(!ledger.take(20) && ledger.take(25));
        ledger.rewind(11);
        assert_eq!(ledger.committable(), Some(11));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take { hole: i64 },
        Finish { which: usize },
        Rewind { back: i64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0i64..3).prop_map(|hole| Step::Take { hole }),
            4 => (0usize..50).prop_map(|which| Step::Finish { which }),
            1 => (0i64..8).prop_map(|back| Step::Rewind { back }),
        ]
    }

    proptest! {
        #[test]
        fn hazard_26_never_commits_past_an_unfinished_offset_nor_without_what_its_shards_must_know(steps in prop::collection::vec(step(), 0..200)) {
            let mut ledger = Ledger::default();
            // Model of the ledger: every offset taken, and whether it is finished.
            let mut taken: Vec<(i64, bool)> = Vec::new();
            let mut next = 0;
            // All finished offsets by shard, and the offset that each shard is known to have confirmed.
            let mut finished: Vec<(u16, LogPosition)> = Vec::new();
            let mut known = Confirmed::new();
            for step in steps {
                match step {
                    Step::Take { hole } => {
                        let offset = next + hole;
                        prop_assert!(ledger.take(offset));
                        taken.push((offset, false));
                        next = offset + 1;
                    }
                    Step::Finish { which } if which < taken.len() => {
                        let (offset, before) = taken[which];
                        // Records are for two shards, the first of them twice.
                        let part = |shard: i64, index| {
                            let at = LogPosition { leader_epoch: 0, offset, index };
                            ((shard % 5) as u16, at)
                        };
                        let parts = [part(offset, 0), part(offset + 1, 1), part(offset, 2)];
                        prop_assert_eq!(ledger.finish(offset, parts), !before);
                        if !before {
                            finished.extend(parts);
                        }
                        taken[which].1 = true;
                    }
                    Step::Finish { .. } => {}
                    Step::Rewind { back } => {
                        let to = (next - back).max(0);
                        ledger.rewind(to);
                        taken.retain(|(offset, _)| *offset < to);
                        next = to.min(next);
                    }
                }
                for (shard, before) in &known {
                    prop_assert!(ledger.confirmed()[shard] >= *before, "it went down");
                }
                known.clone_from(ledger.confirmed());
                let commit = ledger.committable().unwrap_or(0);
                for (shard, position) in finished.iter().filter(|(_, at)| at.offset < commit) {
                    prop_assert!(known[shard] >= *position, "shard {shard}: {position:?}");
                }
                let unfinished = taken.iter().filter(|(_, finished)| !finished);
                let first = unfinished.map(|(offset, _)| *offset).min();
                match ledger.committable() {
                    Some(commit) => {
                        prop_assert!(first.is_none_or(|first| commit <= first));
                        prop_assert_eq!(commit, first.unwrap_or(next), "nor does it lag");
                    }
                    None => prop_assert!(taken.is_empty()),
                }
            }
        }
    }
}
