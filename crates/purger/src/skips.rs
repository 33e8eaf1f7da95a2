//! Messages that are left in the log while a master is away. Partitions hold messages for every master, so
//! those of a master that is away would fill the window and stop all others. Instead its messages are left out:
//! their records stay unfinished in the ledger, which holds the commit before the first of them, and
//! take no memory beyond that. Once the master is back and everything else is finished, the log is
//! read again from there, and of what was read before only those messages count. Pure.
//!
//! A shard of which one message was left out gets none from behind it before that: accept refuses
//! positions that lie behind one it has.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use barid_bus::consumer::Partition;
use barid_core::Shard;

use crate::flight::Flight;

/// The left-out messages of every partition, within a bound of records.
#[derive(Debug)]
pub struct LeftOut {
    by_partition: HashMap<Partition, Skips>,
    records: usize,
    records_max: usize,
    /// The bound was reached when it was looked at last.
    at_bound: bool,
}

impl LeftOut {
    /// Nothing left out; up to `records_max` records may be.
    pub fn new(records_max: usize) -> Self {
        Self { by_partition: HashMap::new(), records: 0, records_max, at_bound: false }
    }

    /// Those of a partition in this reading; none if they are about another reading.
    pub fn of(&mut self, partition: &Partition, reading: (u64, u64)) -> &mut Skips {
        self.by_partition.entry(partition.clone()).or_default().of(reading)
    }

    /// As [`Self::of`], if something was left out of the partition so far.
    pub fn known(&mut self, partition: &Partition, reading: (u64, u64)) -> Option<&mut Skips> {
        Some(self.by_partition.get_mut(partition)?.of(reading))
    }

    /// Whether nothing more is taken of a partition until all but what was left out is finished.
    pub fn is_returning(&self, partition: &Partition) -> bool {
        self.by_partition.get(partition).is_some_and(|skips| skips.returning)
    }

    /// Whether the bound is reached; and whether it was not when this was called last.
    pub fn is_full(&mut self) -> (bool, bool) {
        let full = self.records >= self.records_max;
        let was_full = std::mem::replace(&mut self.at_bound, full);
        (full, full && !was_full)
    }

    /// Leaves out some or all messages of a record: those of `shards`.
    pub fn leave(
        &mut self,
        partition: &Partition,
        reading: (u64, u64),
        offset: i64,
        shards: impl IntoIterator<Item = Shard>,
    ) -> &mut Skips {
        self.records += 1;
        let skips = self.of(partition, reading);
        skips.leave(offset, shards);
        skips
    }

    /// Forgets partitions that are not held.
    pub fn retain(&mut self, is_held: impl Fn(&Partition) -> bool) {
        self.by_partition.retain(|partition, _| is_held(partition));
    }

    /// Counts the records again, after some partitions began to read theirs.
    pub fn recount(&mut self) -> usize {
        self.records = self.by_partition.values().map(Skips::records).sum();
        self.records
    }

    /// Records left out, over all partitions.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Records left out of these partitions.
    pub fn records_of(&self, partitions: &[Partition]) -> usize {
        let skips = partitions.iter().filter_map(|partition| self.by_partition.get(partition));
        skips.map(Skips::records).sum()
    }
}

/// The left-out messages of one partition in one reading. Another reading takes everything again.
#[derive(Debug, Default)]
pub struct Skips {
    reading: (u64, u64),
    shards: HashSet<Shard>,
    from: Option<i64>,
    records: usize,
    /// Records of which some messages are under way, and how many were left out.
    partly: Vec<(Arc<Flight>, usize)>,
    /// Being read again: before this offset only these shards' messages count.
    again: VecDeque<(i64, HashSet<Shard>)>,
    /// Nothing more is taken until all but what was left out is finished.
    pub returning: bool,
}

impl Skips {
    /// Forgets everything if it was about another assignment or reading than this one.
    pub fn of(&mut self, reading: (u64, u64)) -> &mut Self {
        if self.reading != reading {
            *self = Self { reading, ..Self::default() };
        }
        self
    }

    /// Whether a message was left out since the log was read, so that all behind it are.
    pub fn blocks(&self, shard: Shard) -> bool {
        self.shards.contains(&shard)
    }

    /// Whether a message has to be accepted: in what is read again, most were.
    pub fn wants(&self, offset: i64, shard: Shard) -> bool {
        let again = self.again.iter().find(|(until, _)| offset < *until);
        again.is_none_or(|(_, shards)| shards.contains(&shard))
    }

    /// Whether a record is read again: what was told about it is not told once more.
    pub fn is_again(&self, offset: i64) -> bool {
        self.again.iter().any(|(until, _)| offset < *until)
    }

    /// A record is left out for these shards.
    pub fn leave(&mut self, offset: i64, shards: impl IntoIterator<Item = Shard>) {
        self.from.get_or_insert(offset);
        self.records += 1;
        self.shards.extend(shards);
    }

    /// Others of its messages are under way.
    pub fn leave_part(&mut self, flight: Arc<Flight>, left_out: usize) {
        self.partly.push((flight, left_out));
    }

    /// Whether all else of the records that are left out is done.
    pub fn is_settled(&mut self) -> bool {
        self.partly.retain(|(flight, left_out)| flight.left() > *left_out);
        self.partly.is_empty()
    }

    /// Records left out.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Shards that were left out.
    pub fn shards(&self) -> impl Iterator<Item = Shard> + '_ {
        self.shards.iter().copied()
    }

    /// The log is read again from here, after it was read up to `next`, all else of which is finished.
    pub fn read_again(&mut self, next: i64) -> Option<i64> {
        let from = self.from.take()?;
        let shards = std::mem::take(&mut self.shards);
        while self.again.front().is_some_and(|(until, _)| *until <= next) {
            self.again.pop_front();
        }
        self.again.push_front((next, shards));
        (self.records, self.returning) = (0, false);
        self.partly.clear();
        Some(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::ShardCount;

    #[test]
    fn hazard_47_what_was_left_out_comes_again_and_nothing_else_does() {
        let shards: Vec<Shard> = ShardCount::new(4).unwrap().all().collect();
        let (away, other) = (shards[1], shards[2]);
        let mut skips = Skips::default();
        skips.of((1, 1));
        assert!(skips.wants(5, away) && !skips.blocks(away));
        skips.leave(5, [away]);
        skips.leave(9, [away]);
        assert!(skips.blocks(away) && !skips.blocks(other));
        assert_eq!((skips.records(), skips.read_again(20)), (2, Some(5)));
        assert!(skips.wants(5, away) && !skips.wants(6, other) && !skips.blocks(away));
        assert!(skips.is_again(19) && !skips.is_again(20));
        // It is away again in the midst: what lies behind keeps its rule.
        skips.leave(9, [away]);
        assert_eq!(skips.read_again(12), Some(9));
        assert!(skips.wants(9, away) && !skips.wants(11, other));
        assert!(skips.wants(15, away) && !skips.wants(19, other));
        assert!(skips.wants(20, other), "it was never read before");
    }

    #[test]
    fn another_reading_takes_everything() {
        let shard = ShardCount::new(4).unwrap().all().next().unwrap();
        let mut skips = Skips::default();
        skips.of((1, 1)).leave(5, [shard]);
        assert!(!skips.of((1, 2)).blocks(shard));
        assert_eq!(skips.read_again(9), None);
    }
}
