//! What of a partition may be committed: everything before the first offset that is taken and not
//! finished. The smallest file of this crate, because P1 rests on it.

use std::collections::BTreeSet;

/// The offsets of one partition in one assignment. Offsets that the log does not have (compacted,
/// transaction markers) are never taken and hold nothing back.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// Taken, not finished.
    open: BTreeSet<i64>,
    /// One past the highest offset taken.
    next: Option<i64>,
}

impl Ledger {
    /// An offset was taken from the log. They come in order; one that does not is refused, because
    /// what may be committed would go back. False: refused.
    pub fn take(&mut self, offset: i64) -> bool {
        if offset < 0 || self.next.is_some_and(|next| offset < next) {
            return false;
        }
        self.open.insert(offset);
        self.next = Some(offset + 1);
        true
    }

    /// Everything about an offset is done. False: it is not open.
    pub fn finish(&mut self, offset: i64) -> bool {
        self.open.remove(&offset)
    }

    /// Forgets what was taken from `offset` on: it will be taken again.
    pub fn rewind(&mut self, offset: i64) {
        self.open.split_off(&offset);
        self.next = self.next.map(|next| next.min(offset));
    }

    /// The offset to commit: the next one to read if the process died now. `None`: nothing was taken.
    pub fn committable(&self) -> Option<i64> {
        self.open.first().copied().or(self.next)
    }

    /// Offsets taken and not finished.
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
        assert!(ledger.finish(7) && ledger.finish(5));
        assert_eq!(ledger.committable(), Some(6));
        assert!(ledger.finish(6));
        assert_eq!((ledger.committable(), ledger.open()), (Some(8), 0));
    }

    #[test]
    fn holes_in_the_log_hold_nothing_back() {
        let mut ledger = ledger(&[5, 9, 40]);
        ledger.finish(5);
        assert_eq!(ledger.committable(), Some(9));
        ledger.finish(9);
        assert_eq!(ledger.committable(), Some(40));
        ledger.finish(40);
        assert_eq!(ledger.committable(), Some(41));
    }

    #[test]
    fn nothing_taken_is_nothing_to_commit() {
        assert_eq!(Ledger::default().committable(), None);
        assert!(!Ledger::default().finish(3));
    }

    #[test]
    fn offsets_that_go_back_are_refused_until_rewound() {
        let mut ledger = ledger(&[5, 6]);
        assert!(!ledger.take(6) && !ledger.take(2) && !ledger.take(-1));
        ledger.finish(6);
        ledger.rewind(6);
        assert!(ledger.take(6));
        assert_eq!((ledger.committable(), ledger.open()), (Some(5), 2));
        ledger.rewind(3);
        assert_eq!((ledger.committable(), ledger.open()), (Some(3), 0));
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
        fn never_commits_past_an_unfinished_offset(steps in prop::collection::vec(step(), 0..200)) {
            let mut ledger = Ledger::default();
            // What the ledger must agree with: every offset taken, and whether it is finished.
            let mut taken: Vec<(i64, bool)> = Vec::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Take { hole } => {
                        let offset = next + hole;
                        prop_assert!(ledger.take(offset));
                        taken.push((offset, false));
                        next = offset + 1;
                    }
                    Step::Finish { which } if which < taken.len() => {
                        let (offset, finished) = taken[which];
                        prop_assert_eq!(ledger.finish(offset), !finished);
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
