//! The partitions that this purger holds: what of each is taken, finished, and to be committed. Pure:
//! no Kafka, no Redis, no time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use barid_bus::Ledger;
use barid_bus::consumer::{Assigned, Commit, Partition};
use barid_core::Shard;
use barid_mailbox::{LogPosition, Source};

use crate::flight::{Assignment, Flight, Parcel, Reading};

/// Every partition held.
#[derive(Debug, Default)]
pub struct Partitions {
    open: HashMap<Partition, Open>,
    assignments: u64,
}

/// A partition held.
#[derive(Debug)]
pub struct Open {
    /// As it was assigned.
    pub assignment: Arc<Assignment>,
    /// What is being read now.
    pub reading: Arc<Reading>,
    /// What may be committed.
    pub ledger: Ledger,
    /// Records that were taken and wait for room, in order.
    pub stalled: VecDeque<Vec<Parcel>>,
    /// Where to go before anything more is taken.
    pub seek_to: Option<i64>,
    /// The log went back to here by itself: nothing is taken until it is known why.
    pub suspect: Option<i64>,
    /// To be given back: nothing more is taken.
    pub revoking: bool,
    committed: Option<i64>,
    /// The lowest offset of each leader's epoch that was taken.
    epochs: BTreeMap<i32, i64>,
}

impl Open {
    fn new(assignment: Assignment) -> Self {
        let assignment = Arc::new(assignment);
        Self {
            reading: Reading::first(Arc::clone(&assignment)),
            assignment,
            ledger: Ledger::default(),
            stalled: VecDeque::new(),
            seek_to: None,
            suspect: None,
            revoking: false,
            committed: None,
            epochs: BTreeMap::new(),
        }
    }

    /// Whether its next records are wanted.
    pub fn wants(&self) -> bool {
        self.stalled.is_empty()
            && self.seek_to.is_none()
            && self.suspect.is_none()
            && !self.revoking
    }

    /// A record was taken. False: its offset lies before what was taken already, so the log is
    /// another one than it was; nothing more is taken until [`Partitions::compare`] knows why.
    pub fn take(&mut self, offset: i64, leader_epoch: i32) -> bool {
        if !self.ledger.take(offset) {
            self.suspect = Some(offset);
            return false;
        }
        let lowest = self.epochs.entry(leader_epoch).or_insert(offset);
        *lowest = (*lowest).min(offset);
        true
    }

    /// Forgets what waits for room: it will be taken again. The flights, so that they are uncounted.
    pub fn drop_stalled(&mut self) -> Vec<Arc<Flight>> {
        let stalled = std::mem::take(&mut self.stalled);
        let flights: Vec<Arc<Flight>> = stalled
            .into_iter()
            .filter_map(|parcels| parcels.first().map(|parcel| Arc::clone(&parcel.flight)))
            .collect();
        if let Some(first) = flights.first() {
            self.ledger.rewind(first.record.offset);
        }
        flights
    }

    /// Goes back because a shard knows nothing after `known`: to there, or to what is not finished,
    /// whichever is earlier. Where to seek is in `seek_to`.
    fn go_back(&mut self, shard: Shard, known: Option<LogPosition>) {
        let Some(unfinished) = self.ledger.committable() else { return };
        // Offsets of a later leader's epoch may lie below that of an earlier one.
        let after = known.map_or(i32::MIN, |known| known.leader_epoch);
        let later = self.epochs.range(after..).filter(|(epoch, _)| **epoch > after);
        let first_later = later.map(|(_, offset)| *offset).min();
        let targets = [known.map(|known| known.offset), first_later, self.seek_to];
        let target = targets.into_iter().flatten().fold(unfinished, i64::min);
        self.reading.end();
        let first = self.epochs.values().copied().min().unwrap_or(target);
        self.reading = self.reading.repairing(shard, known, target, first);
        self.ledger.rewind(target);
        self.seek_to = Some(target);
    }

    /// The log went back by itself, within the same topic: an unclean election. What is under way
    /// goes on; what comes has a later leader's epoch, hence later positions.
    fn start_over_at(&mut self, offset: i64) {
        self.reading = self.reading.next();
        self.ledger = Ledger::default();
        self.committed = None;
        self.seek_to = Some(offset);
    }
}

impl Partitions {
    /// Takes up a partition that was assigned.
    pub fn assign(&mut self, assigned: Assigned, priority: usize) {
        self.assignments += 1;
        let Assigned { partition, topic_id } = assigned;
        let source = Source { topic_id, partition: partition.number };
        let id = self.assignments;
        let assignment = Assignment { id, partition: partition.clone(), source, priority };
        if let Some(old) = self.open.insert(partition, Open::new(assignment)) {
            old.reading.end();
        }
    }

    /// A partition held.
    pub fn get(&self, partition: &Partition) -> Option<&Open> {
        self.open.get(partition)
    }

    /// A partition held.
    pub fn get_mut(&mut self, partition: &Partition) -> Option<&mut Open> {
        self.open.get_mut(partition)
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Open> {
        self.open.values_mut()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Open> {
        self.open.values()
    }

    /// Gives a partition up; what is under way counts no more.
    pub fn remove(&mut self, partition: &Partition) -> Option<Open> {
        let open = self.open.remove(partition)?;
        open.reading.end();
        Some(open)
    }

    /// Everything about a record is done.
    pub fn finish(&mut self, flight: &Flight) {
        if let Some(open) = self.open.get_mut(&flight.reading.assignment.partition)
            && Arc::ptr_eq(&open.reading, &flight.reading)
        {
            open.ledger.finish(flight.record.offset);
        }
    }

    /// A shard has forgotten what came after `known`. A second shard may say so of a reading that is
    /// already over for the first: the assignment counts. The stalled flights, to be uncounted.
    pub fn gap(
        &mut self,
        reading: &Reading,
        shard: Shard,
        known: Option<LogPosition>,
    ) -> Vec<Arc<Flight>> {
        let Some(open) = self.open.get_mut(&reading.assignment.partition) else {
            return Vec::new();
        };
        if open.assignment.id != reading.assignment.id {
            return Vec::new();
        }
        let dropped = open.drop_stalled();
        open.go_back(shard, known);
        dropped
    }

    /// Compares the topics' ids with those at assignment. A topic created anew is another log: its
    /// partitions start at 0, with positions of their own. How many; and the stalled flights.
    pub fn compare(&mut self, ids: &HashMap<String, String>) -> (usize, Vec<Arc<Flight>>) {
        let (mut recreated, mut dropped) = (0, Vec::new());
        for open in self.open.values_mut() {
            let Some(id) = ids.get(&*open.assignment.partition.topic) else { continue };
            if **id != *open.assignment.source.topic_id {
                recreated += 1;
                dropped.extend(open.drop_stalled());
                open.reading.end();
                self.assignments += 1;
                let Assignment { partition, priority, .. } = &*open.assignment;
                let source = Source { topic_id: id.as_str().into(), partition: partition.number };
                let mut fresh = Open::new(Assignment {
                    id: self.assignments,
                    partition: partition.clone(),
                    source,
                    priority: *priority,
                });
                fresh.seek_to = Some(0);
                fresh.revoking = open.revoking;
                *open = fresh;
            } else if let Some(offset) = open.suspect.take() {
                dropped.extend(open.drop_stalled());
                open.start_over_at(offset);
            }
        }
        (recreated, dropped)
    }

    /// What has not been committed yet; counted as committed from now on.
    pub fn take_commits(&mut self) -> Vec<Commit> {
        let mut commits = Vec::new();
        for open in self.open.values_mut() {
            let Some(offset) = open.ledger.committable() else { continue };
            if open.committed != Some(offset) {
                open.committed = Some(offset);
                commits.push(open.commit(offset));
            }
        }
        commits
    }

    /// A commit failed: everything is to be committed again.
    pub fn uncommit(&mut self) {
        self.open.values_mut().for_each(|open| open.committed = None);
    }

    /// What may be committed of these, whatever was before.
    pub fn commits_of(&self, partitions: &[Partition]) -> Vec<Commit> {
        let open = partitions.iter().filter_map(|partition| self.open.get(partition));
        open.filter_map(|open| Some(open.commit(open.ledger.committable()?))).collect()
    }

    /// Records taken and not finished.
    pub fn unfinished(&self) -> usize {
        self.open.values().map(|open| open.ledger.open()).sum()
    }
}

impl Open {
    fn commit(&self, offset: i64) -> Commit {
        Commit {
            partition: self.assignment.partition.clone(),
            offset,
            topic_id: Arc::clone(&self.assignment.source.topic_id),
        }
    }

    /// Where its commits stand, as far as was asked.
    pub fn committed(&self) -> Option<i64> {
        self.committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition() -> Partition {
        Partition { topic: "push".into(), number: 0 }
    }

    fn held() -> Partitions {
        let mut partitions = Partitions::default();
        partitions.assign(Assigned { partition: partition(), topic_id: "id1".into() }, 1);
        partitions
    }

    fn take(partitions: &mut Partitions, offsets: std::ops::Range<i64>, epoch: i32) {
        let open = partitions.get_mut(&partition()).unwrap();
        for offset in offsets {
            assert!(open.take(offset, epoch));
        }
    }

    fn shard() -> Shard {
        barid_core::ShardCount::new(4).unwrap().all().next().unwrap()
    }

    fn at(leader_epoch: i32, offset: i64) -> Option<LogPosition> {
        Some(LogPosition { leader_epoch, offset, index: 0 })
    }

    fn finish(partitions: &mut Partitions, offsets: std::ops::Range<i64>) {
        let open = partitions.get_mut(&partition()).unwrap();
        offsets.for_each(|offset| assert!(open.ledger.finish(offset)));
    }

    #[test]
    fn a_gap_goes_back_below_the_commit_and_never_past_what_is_unfinished() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 0);
        finish(&mut partitions, 0..8);
        assert_eq!(partitions.take_commits()[0].offset, 8);
        let reading = partitions.get(&partition()).unwrap().reading.clone();
        partitions.gap(&reading, shard(), at(0, 9));
        let open = partitions.get(&partition()).unwrap();
        assert_eq!(open.seek_to, Some(8), "8 and 9 are not finished");
        assert!(reading.ended() && !open.wants());
        // Another shard of the same reading knows less.
        partitions.gap(&reading, shard(), at(0, 3));
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, Some(3));
        assert_eq!(partitions.take_commits()[0].offset, 3, "a crash now must read from there");
    }

    #[test]
    fn a_shard_that_knows_nothing_goes_back_to_where_this_assignment_began() {
        let mut partitions = held();
        take(&mut partitions, 40..45, 2);
        finish(&mut partitions, 40..45);
        let reading = partitions.get(&partition()).unwrap().reading.clone();
        partitions.gap(&reading, shard(), None);
        let open = partitions.get(&partition()).unwrap();
        assert_eq!((open.seek_to, open.reading.repairs(shard())), (Some(40), Some(None)));
    }

    #[test]
    fn offsets_given_twice_by_an_unclean_election_are_not_skipped_by_a_gap() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 3);
        finish(&mut partitions, 0..10);
        let open = partitions.get_mut(&partition()).unwrap();
        assert!(!open.take(5, 4), "the log went back");
        let ids = HashMap::from([("push".to_owned(), "id1".to_owned())]);
        assert_eq!(partitions.compare(&ids).0, 0);
        partitions.get_mut(&partition()).unwrap().seek_to = None;
        take(&mut partitions, 5..9, 4);
        finish(&mut partitions, 5..9);
        // Redis stands at offset 9 of the old leader: 5 to 8 of the new one are forgotten.
        let reading = partitions.get(&partition()).unwrap().reading.clone();
        partitions.gap(&reading, shard(), at(3, 9));
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, Some(5));
    }

    #[test]
    fn a_topic_created_again_starts_at_its_beginning_as_another_source() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 0);
        let old = partitions.get(&partition()).unwrap().reading.clone();
        let ids = HashMap::from([("push".to_owned(), "id2".to_owned())]);
        assert_eq!(partitions.compare(&ids).0, 1);
        let open = partitions.get(&partition()).unwrap();
        assert_eq!((open.seek_to, &*open.assignment.source.topic_id), (Some(0), "id2"));
        assert!(old.ended() && !Arc::ptr_eq(&old, &open.reading));
        // A gap of the old life says nothing about the new one.
        partitions.gap(&old, shard(), at(0, 3));
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, Some(0));
    }

    #[test]
    fn a_partition_assigned_again_knows_nothing_of_its_earlier_flights() {
        let mut partitions = held();
        take(&mut partitions, 0..3, 0);
        let old = partitions.remove(&partition()).unwrap();
        assert!(old.reading.ended());
        partitions.assign(Assigned { partition: partition(), topic_id: "id1".into() }, 1);
        take(&mut partitions, 0..1, 0);
        partitions.gap(&old.reading, shard(), None);
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, None);
        assert_eq!(partitions.unfinished(), 1);
    }
}
