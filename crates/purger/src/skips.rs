//! Messages that are left in the log while their master is unavailable. A partition holds messages for every master,
//! so those for an unavailable one would fill the window and stop all others. Instead they are left out: their
//! records stay unfinished in the ledger, so that the commit stays before the first of them, and take no other
//! memory. Once the master is available and everything else is finished, the log is read again from there, and only
//! the messages that were left out are accepted. Pure.
//!
//! Once a message of a shard is left out, all later messages of the shard are left out as well, because accept refuses
//! positions below the shard's last one.

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
    /// Whether the bound was reached at the last check.
    at_bound: bool,
}

impl LeftOut {
    /// Creates an empty set for up to `records_max` records.
    pub fn new(records_max: usize) -> Self {
        Self { by_partition: HashMap::new(), records: 0, records_max, at_bound: false }
    }

    /// The left-out messages of a partition in this reading; those of another reading are forgotten.
    pub fn of(&mut self, partition: &Partition, reading: (u64, u64)) -> &mut Skips {
        self.by_partition.entry(partition.clone()).or_default().of(reading)
    }

    /// As [`Self::of`]; `None` if no message of the partition was left out.
    pub fn known(&mut self, partition: &Partition, reading: (u64, u64)) -> Option<&mut Skips> {
        Some(self.by_partition.get_mut(partition)?.of(reading))
    }

    /// Whether no record of a partition is taken until all records but the left-out ones are finished.
    pub fn is_returning(&self, partition: &Partition) -> bool {
        self.by_partition.get(partition).is_some_and(|skips| skips.returning)
    }

    /// Whether the bound is reached, and whether that is new since the last call.
    pub fn is_full(&mut self) -> (bool, bool) {
        let full = self.records >= self.records_max;
        let was_full = std::mem::replace(&mut self.at_bound, full);
        (full, full && !was_full)
    }

    /// Leaves out the messages of a record for these shards.
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

    /// Keeps only these partitions.
    pub fn retain(&mut self, is_held: impl Fn(&Partition) -> bool) {
        self.by_partition.retain(|partition, _| is_held(partition));
    }

    /// Recounts the records, after partitions began to read theirs.
    pub fn recount(&mut self) -> usize {
        self.records = self.by_partition.values().map(Skips::records).sum();
        self.records
    }

    /// Number of left-out records of all partitions.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Number of left-out records of these partitions.
    pub fn records_of(&self, partitions: &[Partition]) -> usize {
        let skips = partitions.iter().filter_map(|partition| self.by_partition.get(partition));
        skips.map(Skips::records).sum()
    }
}

/// The left-out messages of one partition in one reading. A new reading takes everything again.
#[derive(Debug, Default)]
pub struct Skips {
    reading: (u64, u64),
    shards: HashSet<Shard>,
    from: Option<i64>,
    records: usize,
    /// Records with messages in flight, each with the number of messages that were left out.
    partly: Vec<(Arc<Flight>, usize)>,
    /// While they are read again: below this offset, only messages of these shards are accepted.
    again: VecDeque<(i64, HashSet<Shard>)>,
    /// No record is taken until all records but the left-out ones are finished.
    pub returning: bool,
}

impl Skips {
    /// Forgets everything about another assignment or reading than this one.
    pub fn of(&mut self, reading: (u64, u64)) -> &mut Self {
        if self.reading != reading {
            *self = Self { reading, ..Self::default() };
        }
        self
    }

    /// Whether a message of the shard was left out, so that all later ones are as well.
    pub fn blocks(&self, shard: Shard) -> bool {
        self.shards.contains(&shard)
    }

    /// Whether a message still has to be accepted; most messages that are read again were accepted before.
    pub fn wants(&self, offset: i64, shard: Shard) -> bool {
        let again = self.again.iter().find(|(until, _)| offset < *until);
        again.is_none_or(|(_, shards)| shards.contains(&shard))
    }

    /// Whether a record is read again, so that its receipts are not sent again.
    pub fn is_again(&self, offset: i64) -> bool {
        self.again.iter().any(|(until, _)| offset < *until)
    }

    /// Leaves out a record for these shards.
    pub fn leave(&mut self, offset: i64, shards: impl IntoIterator<Item = Shard>) {
        self.from.get_or_insert(offset);
        self.records += 1;
        self.shards.extend(shards);
    }

    /// Records that other messages of the record are in flight.
    pub fn leave_part(&mut self, flight: Arc<Flight>, left_out: usize) {
        self.partly.push((flight, left_out));
    }

    /// Whether all other messages of the left-out records are done.
    pub fn is_settled(&mut self) -> bool {
        self.partly.retain(|(flight, left_out)| flight.left() > *left_out);
        self.partly.is_empty()
    }

    /// Number of left-out records.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Shards with left-out messages.
    pub fn shards(&self) -> impl Iterator<Item = Shard> + '_ {
        self.shards.iter().copied()
    }

    /// Starts to read the left-out records again. `next` is the offset up to which the log was read. Returns the
    /// offset to start from.
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
