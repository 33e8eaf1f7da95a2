//! The window: bounds the records in flight and their bytes, by priority. Records that do not fit stay in Kafka. Pure.

use crate::config::WindowConfig;

/// Priorities of topics, 0 the most urgent.
pub const PRIORITIES: usize = 3;
/// Records taken in one turn for each unit of weight.
const TURN: usize = 16;

/// Records in flight and their bytes. Each priority has its own bounds. Bytes may exceed their bound by the records
/// of one turn, because a record's size is known only after it was taken.
#[derive(Debug)]
pub struct Window {
    records_max: usize,
    bytes_max: usize,
    /// Weights of the priorities in a turn.
    weights: [usize; PRIORITIES],
    used: [Used; PRIORITIES],
}

#[derive(Debug, Default, Clone, Copy)]
struct Used {
    records: usize,
    bytes: usize,
    /// Whether the bound was reached at the last grant.
    at_records: bool,
    at_bytes: bool,
}

/// A bound of a priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Records in flight.
    Records,
    /// Their bytes.
    Bytes,
}

/// Records that a priority may take in one turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Records.
    pub records: usize,
    /// A bound that was reached in this turn, and not in the last one, so that it is counted once.
    pub reached: Option<Bound>,
}

impl Window {
    /// Creates an empty window.
    pub fn new(config: &WindowConfig) -> Self {
        Self {
            records_max: config.records_max,
            bytes_max: config.bytes_max,
            weights: config.weights,
            used: [Used::default(); PRIORITIES],
        }
    }

    /// Computes the records that a priority may take in this turn.
    pub fn grant(&mut self, priority: usize) -> Grant {
        let used = &mut self.used[priority];
        let full = used.bytes >= self.bytes_max;
        let was_full = std::mem::replace(&mut used.at_bytes, full);
        if full {
            return Grant { records: 0, reached: (!was_full).then_some(Bound::Bytes) };
        }
        let room = self.records_max.saturating_sub(used.records);
        let was_out = std::mem::replace(&mut used.at_records, room == 0);
        let records = room.min(self.weights[priority] * TURN);
        let reached = (room == 0 && !was_out).then_some(Bound::Records);
        Grant { records, reached }
    }

    /// Adds a record that was taken.
    pub fn enter(&mut self, priority: usize, bytes: usize) {
        let used = &mut self.used[priority];
        used.records += 1;
        used.bytes += bytes;
    }

    /// Removes a record that is finished or will be read again.
    pub fn leave(&mut self, priority: usize, bytes: usize) {
        let used = &mut self.used[priority];
        used.records = used.records.saturating_sub(1);
        used.bytes = used.bytes.saturating_sub(bytes);
    }

    /// Records of a priority in flight.
    pub fn records(&self, priority: usize) -> usize {
        self.used[priority].records
    }

    /// Bytes of the records in flight.
    pub fn bytes(&self, priority: usize) -> usize {
        self.used[priority].bytes
    }

    /// Whether a bound is reached.
    pub fn is_full(&self, priority: usize) -> bool {
        let used = &self.used[priority];
        used.records >= self.records_max || used.bytes >= self.bytes_max
    }

    /// Whether half of the bytes are in use.
    pub fn is_half_full(&self, priority: usize) -> bool {
        self.used[priority].bytes >= self.bytes_max / 2
    }
}

impl Bound {
    /// The label of `stalls_total`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Records => "records",
            Self::Bytes => "bytes",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(records_max: usize, bytes_max: usize, weights: [usize; PRIORITIES]) -> Window {
        Window::new(&WindowConfig { records_max, bytes_max, weights, ..WindowConfig::default() })
    }

    #[test]
    fn a_bound_is_reported_once_each_time_that_it_is_reached() {
        let mut window = window(2, 100, [8, 4, 1]);
        assert_eq!(window.grant(0), Grant { records: 2, reached: None });
        window.enter(0, 10);
        window.enter(0, 10);
        assert_eq!(window.grant(0), Grant { records: 0, reached: Some(Bound::Records) });
        assert_eq!(window.grant(0), Grant { records: 0, reached: None });
        window.leave(0, 10);
        assert_eq!(window.grant(0), Grant { records: 1, reached: None });
        window.enter(0, 90);
        assert_eq!(window.grant(0), Grant { records: 0, reached: Some(Bound::Bytes) });
        assert_eq!(window.grant(1), Grant { records: 2, reached: None }, "bounds are per priority");
    }

    /// An event of a priority.
    #[derive(Debug, Clone)]
    enum Step {
        /// A turn: as much as is granted is taken, records of so many bytes.
        Turn(usize, usize),
        /// The oldest records are finished.
        Finish(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..PRIORITIES, 0_usize..40).prop_map(|(priority, bytes)| Step::Turn(priority, bytes)),
            (0..PRIORITIES, 0_usize..30)
                .prop_map(|(priority, count)| Step::Finish(priority, count)),
        ]
    }

    proptest! {
        #[test]
        fn grants_keep_to_the_bounds_and_what_leaves_makes_room(
            records_max in 1_usize..60,
            bytes_max in 1_usize..600,
            weights in [1_usize..5, 1..5, 1..5],
            steps in prop::collection::vec(step(), 0..80),
        ) {
            let mut window = window(records_max, bytes_max, weights);
            let mut under_way: [Vec<usize>; PRIORITIES] = Default::default();
            let mut at: [Option<Bound>; PRIORITIES] = [None; PRIORITIES];
            for step in steps {
                match step {
                    Step::Turn(priority, bytes) => {
                        let before: usize = under_way[priority].iter().sum();
                        let Grant { records, reached } = window.grant(priority);
                        prop_assert!(records <= weights[priority] * TURN);
                        prop_assert!(before < bytes_max || records == 0);
                        let full = before >= bytes_max || under_way[priority].len() >= records_max;
                        prop_assert_eq!(records == 0, full, "room is granted whenever there is some");
                        prop_assert!(reached.is_none() || full);
                        prop_assert!(reached.is_none() || reached != at[priority], "counted twice");
                        if full {
                            at[priority] = reached.or(at[priority]);
                        } else {
                            at[priority] = None;
                        }
                        for _ in 0..records {
                            window.enter(priority, bytes);
                            under_way[priority].push(bytes);
                        }
                    }
                    Step::Finish(priority, count) => {
                        let count = count.min(under_way[priority].len());
                        for bytes in under_way[priority].drain(..count) {
                            window.leave(priority, bytes);
                        }
                    }
                }
                for (priority, under_way) in under_way.iter().enumerate() {
                    prop_assert!(under_way.len() <= records_max);
                    prop_assert_eq!(window.records(priority), under_way.len());
                    prop_assert_eq!(window.bytes(priority), under_way.iter().sum::<usize>());
                    let bytes: usize = under_way.iter().sum();
                    let full = under_way.len() == records_max || bytes >= bytes_max;
                    prop_assert_eq!(window.is_full(priority), full);
                }
            }
        }
    }
}
