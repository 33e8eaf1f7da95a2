//! Judges the order in which a device was shown records.

use std::ops::Range;

/// The positions that a device was shown. A position is any number that grows from each of a user's records
/// to the next: an offset of Kafka, or a count.
#[derive(Debug, Clone, Default)]
pub struct Order {
    /// One more than the highest position shown.
    next: u64,
    /// Positions below `next` that were not shown: not empty, in order. One for each time that some were
    /// passed over, so that memory does not grow with the number of records.
    gaps: Vec<Range<u64>>,
}

/// Place of a shown record relative to those shown before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// It is the latest record shown so far.
    InOrder {
        /// Positions between the record and the latest one before it.
        passed_over: u64,
    },
    /// A later record was shown before it.
    OutOfOrder,
    /// It was shown before.
    Repeated,
}

impl Order {
    /// A record was shown.
    pub fn shown(&mut self, position: u64) -> Shown {
        if position >= self.next {
            let gap = self.next..position;
            let passed_over = position - self.next;
            self.gaps.extend(Some(gap).filter(|gap| !gap.is_empty()));
            self.next = position + 1;
            return Shown::InOrder { passed_over };
        }
        let Some(index) = self.gaps.iter().position(|gap| gap.contains(&position)) else {
            return Shown::Repeated;
        };
        let gap = self.gaps[index].clone();
        let rest = [gap.start..position, position + 1..gap.end];
        self.gaps.splice(index..=index, rest.into_iter().filter(|rest| !rest.is_empty()));
        Shown::OutOfOrder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_position_is_judged_by_those_before_it() {
        let mut order = Order::default();
        let judged = [0, 0, 1, 5, 3, 3, 2, 4, 4, 9, 1].map(|position| order.shown(position));
        let in_order = |passed_over| Shown::InOrder { passed_over };
        let (late, again) = (Shown::OutOfOrder, Shown::Repeated);
        assert_eq!(
            judged,
            [
                in_order(0),
                again,
                in_order(0),
                in_order(3),
                late,
                again,
                late,
                late,
                again,
                in_order(3),
                again
            ]
        );
        assert_eq!(order.gaps.into_iter().flatten().collect::<Vec<_>>(), [6, 7, 8]);
    }
}
