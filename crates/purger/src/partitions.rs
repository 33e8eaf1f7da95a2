//! The partitions that this purger holds: which records of each are taken, finished, and ready to be committed, and
//! which are read again because Redis has forgotten them. Pure: no Kafka, no Redis; time is an argument.
//!
//! **Repair.** It begins when a shard has forgotten messages that it had confirmed ([`Partitions::gap`]). The reading
//! ends, and every shard is asked for its position, so that one further reading repairs all of them ([`Round`]). Then
//! the log is read again from the lowest of these positions ([`Open::rewind`]), as far as the log and the mailboxes'
//! time to live reach. Once that is finished, the stored position of each repaired shard is raised to the one that it
//! must know ([`Repair`]). Otherwise messages that the log no longer holds would be reported as a gap for ever.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use barid_bus::consumer::{Assigned, Commit, Partition, Reach};
use barid_bus::{EPOCHS_MAX, Ledger, Memory, Metadata, TopicSource};
use barid_core::{Shard, ShardCount};
use barid_mailbox::LogPosition;
use tokio::time::Instant;

use crate::flight::{Assignment, Flight, Parcel, Reading};
use crate::lanes::Answer;

/// All partitions held by this purger.
#[derive(Debug)]
pub struct Partitions {
    open: HashMap<Partition, Open>,
    assignments: u64,
    shards: ShardCount,
}

/// A partition held.
#[derive(Debug)]
pub struct Open {
    /// The assignment.
    pub assignment: Arc<Assignment>,
    /// The current reading.
    pub reading: Arc<Reading>,
    /// The records in flight, and the offset up to which all are finished.
    pub ledger: Ledger,
    /// Records that were taken and wait for room in their lanes, in order.
    pub stalled: VecDeque<Vec<Parcel>>,
    /// The offset to seek to before the next record is taken.
    pub seek_to: Option<i64>,
    /// The offset that the log unexpectedly went back to. No record is taken until the reason is known.
    pub suspect: Option<i64>,
    /// The partition is being revoked: no further record is taken.
    pub revoking: bool,
    /// The round in which its shards are asked for their positions. No record is taken until they have answered.
    round: Option<Round>,
    repair: Option<Repair>,
    rounds: u64,
    committed: Option<i64>,
    source: TopicSource,
    /// The topic's id, if known.
    id: Option<Arc<str>>,
    /// The lowest offset that was taken in each of the latest leader epochs, by this or earlier owners.
    epochs: BTreeMap<i32, i64>,
}

/// A question to all shards of a partition that have confirmed a position.
#[derive(Debug)]
pub struct Round {
    /// Counts the questions of an assignment, from 1.
    pub number: u64,
    stage: Stage,
    gaps: BTreeMap<Shard, Option<LogPosition>>,
    /// The reading has ended, so the log is read again whatever the answers are.
    goes_back: bool,
}

#[derive(Debug)]
enum Stage {
    Due,
    /// Waits for `missing` answers until a deadline, so that a lane with an unavailable master does not delay the
    /// others. Whether its shards have forgotten messages shows in their next batch.
    Asked {
        missing: usize,
        until: Instant,
    },
}

/// A repair: the shards for which the log is read again.
#[derive(Debug)]
struct Repair {
    /// The position that each shard must know in the end.
    shards: BTreeMap<Shard, LogPosition>,
    /// The repair is complete once everything before this offset is finished.
    until: i64,
    /// The question that raises them, and how many answers are missing.
    closing: Option<(u64, usize)>,
}

impl Open {
    fn new(
        id: u64,
        priority: usize,
        shards: ShardCount,
        Assigned { partition, source, id: topic_id, start, memory }: Assigned,
    ) -> Self {
        let Memory { confirmed, epochs } = memory;
        let seeds = confirmed.iter().filter_map(|(shard, at)| Some((shards.shard(*shard)?, *at)));
        let seeds: HashMap<Shard, LogPosition> = seeds.collect();
        let round = (!seeds.is_empty()).then(|| Round::new(1, false));
        let name = Arc::clone(source.name());
        let assignment = Arc::new(Assignment::new(id, partition, name, priority, seeds));
        Self {
            reading: Reading::first(Arc::clone(&assignment), start),
            assignment,
            ledger: start.map_or_else(Ledger::default, |start| Ledger::resume(start, confirmed)),
            stalled: VecDeque::new(),
            seek_to: None,
            suspect: None,
            revoking: false,
            rounds: u64::from(round.is_some()),
            round,
            repair: None,
            committed: start,
            source,
            id: topic_id,
            epochs,
        }
    }

    /// Whether the partition's next records may be taken.
    pub fn wants(&self) -> bool {
        self.stalled.is_empty()
            && self.seek_to.is_none()
            && self.suspect.is_none()
            && self.round.is_none()
            && !self.revoking
    }

    /// Records that a record was taken. Returns false if its offset is below one that was taken before: the log has
    /// changed, and no record is taken until [`Partitions::compare`] has found the reason.
    pub fn track(&mut self, offset: i64, leader_epoch: i32) -> bool {
        if !self.ledger.take(offset) {
            self.suspect = Some(offset);
            return false;
        }
        let lowest = self.epochs.entry(leader_epoch).or_insert(offset);
        *lowest = (*lowest).min(offset);
        if self.epochs.len() > EPOCHS_MAX {
            self.epochs.pop_first();
        }
        true
    }

    /// Whether the log may be read again for messages that were left in it: no repair or revocation is under way.
    pub fn may_return(&self) -> bool {
        !self.revoking
            && self.seek_to.is_none()
            && self.suspect.is_none()
            && self.round.is_none()
            && !self.reading.ended()
    }

    /// Reads again from `offset`. The ledger goes back together with the consumer, because it treats offsets that it
    /// does not see as absent from the log.
    pub fn read_from(&mut self, offset: i64) {
        self.ledger.rewind(offset);
        self.seek_to = Some(self.seek_to.map_or(offset, |to| to.min(offset)));
    }

    /// Drops the stalled records, to take them again later. Returns their flights, to be subtracted from the window.
    pub fn drop_stalled(&mut self) -> Vec<Arc<Flight>> {
        let stalled = std::mem::take(&mut self.stalled);
        let flights: Vec<Arc<Flight>> = stalled
            .into_iter()
            .filter_map(|parcels| parcels.first().map(|parcel| Arc::clone(&parcel.flight)))
            .collect();
        if let Some(first) = flights.first() {
            self.read_from(first.record.offset);
        }
        flights
    }

    /// Starts a repair of shards that have forgotten the messages after these positions. No record is taken until the
    /// other shards have reported theirs. Returns the stalled flights, to be subtracted from the window.
    fn forgot(
        &mut self,
        gaps: impl IntoIterator<Item = (Shard, Option<LogPosition>)>,
    ) -> Vec<Arc<Flight>> {
        self.reading.end();
        let dropped = self.drop_stalled();
        let rounds = &mut self.rounds;
        let round = self.round.get_or_insert_with(|| {
            *rounds += 1;
            Round::new(*rounds, true)
        });
        round.goes_back = true;
        round.gaps.extend(gaps);
        dropped
    }

    /// The shards to ask now, and the number of the round, if a question is due.
    pub fn questions(&self, shards: ShardCount) -> Option<(u64, Vec<Shard>)> {
        let round = self.round.as_ref().filter(|round| matches!(round.stage, Stage::Due))?;
        let confirmed = self.ledger.confirmed().keys();
        Some((round.number, confirmed.filter_map(|shard| shards.shard(*shard)).collect()))
    }

    /// Whether its shards are being asked for their positions, or soon will be.
    #[cfg(test)]
    pub fn is_asking(&self) -> bool {
        self.round.is_some()
    }

    /// Records that they were asked: waits for this many answers until the deadline.
    pub fn asked(&mut self, answers: usize, until: Instant) {
        if let Some(round) = &mut self.round {
            round.stage = Stage::Asked { missing: answers, until };
        }
    }

    /// Whether to call [`Self::rewind`]: all answers have arrived or the deadline has passed, and a shard has forgotten
    /// messages. If none has, this ends the round.
    pub fn must_rewind(&mut self, now: Instant) -> bool {
        let Some(round) = &self.round else { return false };
        match round.stage {
            Stage::Asked { missing, until } if missing == 0 || until <= now => {}
            _ => return false,
        }
        if round.goes_back || !round.gaps.is_empty() {
            return true;
        }
        self.round = None;
        false
    }

    /// A shard that has forgotten messages.
    pub fn forgetful(&self) -> Option<Shard> {
        self.round.as_ref()?.gaps.keys().next().copied()
    }

    /// Goes back to the lowest position that a repaired shard knows, or to the first unfinished record if that is
    /// lower. Sets `seek_to`.
    ///
    /// For a shard that knows a position, the log is read from there, or from the beginning of a later leader epoch,
    /// whose offsets may be lower. For a shard that knows none, or one of an unknown leader epoch, the log is read
    /// from the time that mailboxes still keep messages of.
    pub fn rewind(&mut self, reach: Reach) {
        let Some(Round { gaps, .. }) = self.round.take() else { return };
        let bound = reach.low.max(reach.since);
        let unfinished = self.ledger.committable().unwrap_or(reach.high);
        let starts = gaps.values().map(|known| {
            known.and_then(|known| self.after(known)).map_or(bound, |start| start.max(bound))
        });
        let target = starts.fold(unfinished, i64::min);
        self.reading.end();
        self.mend(gaps.keys().copied(), reach);
        self.reading = self.reading.repairing(gaps.into_iter().collect(), unfinished);
        self.read_from(target);
    }

    /// The offset from which everything after this position is found; `None`: the known leader epochs do not tell.
    fn after(&self, known: LogPosition) -> Option<i64> {
        let oldest = self.epochs.keys().next()?;
        let later =
            self.epochs.range(known.leader_epoch.checked_add(1)?..).map(|(_, first)| *first);
        (*oldest <= known.leader_epoch).then(|| later.fold(known.offset, i64::min))
    }

    /// Adds shards to the repair.
    fn mend(&mut self, shards: impl Iterator<Item = Shard>, reach: Reach) {
        let confirmed = self.ledger.confirmed();
        let must = shards.filter_map(|shard| Some((shard, *confirmed.get(&shard.get())?)));
        let mut mended: BTreeMap<Shard, LogPosition> = must.collect();
        if let Some(before) = self.repair.take() {
            for (shard, at) in before.shards {
                mended.entry(shard).or_insert(at);
            }
        }
        let last = mended.values().map(|at| at.offset.saturating_add(1)).max();
        self.repair =
            last.map(|last| Repair { shards: mended, until: last.min(reach.high), closing: None });
    }

    /// The shards whose positions are to be raised: everything that the log still holds for them is finished.
    pub fn closing(&self) -> Option<Vec<(Shard, LogPosition)>> {
        let repair = self.repair.as_ref().filter(|repair| repair.closing.is_none())?;
        let settled = self.round.is_none() && self.seek_to.is_none() && self.suspect.is_none();
        let over = self.ledger.committable().is_some_and(|finished| finished >= repair.until);
        (settled && over).then(|| repair.shards.iter().map(|(shard, at)| (*shard, *at)).collect())
    }

    /// The number of a new round.
    pub fn next_round(&mut self) -> u64 {
        self.rounds += 1;
        self.rounds
    }

    /// Records that the shards of a repair were asked to raise their positions: waits for this many answers.
    pub fn close(&mut self, round: u64, answers: usize) {
        if let Some(repair) = &mut self.repair {
            repair.closing = Some((round, answers));
        }
    }

    /// Shards under repair.
    pub fn repairing(&self) -> usize {
        self.repair.as_ref().map_or(0, |repair| repair.shards.len())
    }

    fn closed(&mut self, answer: &Answer) {
        let Some(repair) = &mut self.repair else { return };
        let Some((_, missing)) = repair.closing.take_if(|(round, _)| *round == answer.round) else {
            return;
        };
        for shard in &answer.knowing {
            repair.shards.remove(shard);
        }
        if missing > 1 {
            repair.closing = Some((answer.round, missing - 1));
        } else if repair.shards.is_empty() {
            self.repair = None;
        }
    }

    /// Continues after an unclean election, which has truncated the log of the same topic. Records in flight go on.
    /// New records have a later leader epoch, and hence later positions. Unfinished records before the truncation are
    /// still in the log, and are kept.
    fn start_over_at(&mut self, offset: i64) {
        let unfinished = self.ledger.committable().unwrap_or(offset);
        self.reading = self.reading.over_at(offset);
        self.committed = None;
        self.read_from(unfinished.min(offset));
    }
}

impl Round {
    fn new(number: u64, goes_back: bool) -> Self {
        Self { number, stage: Stage::Due, gaps: BTreeMap::new(), goes_back }
    }

    fn answered(&mut self, answer: &Answer) {
        for shard in &answer.knowing {
            self.gaps.remove(shard);
        }
        self.gaps.extend(answer.gaps.iter().copied());
        if let Stage::Asked { missing, .. } = &mut self.stage {
            *missing = missing.saturating_sub(1);
        }
    }
}

impl Partitions {
    /// Creates an empty set, for a cluster of this many shards.
    pub fn new(shards: ShardCount) -> Self {
        Self { open: HashMap::new(), assignments: 0, shards }
    }

    /// Adds an assigned partition.
    pub fn assign(&mut self, assigned: Assigned, priority: usize) {
        self.assignments += 1;
        let partition = assigned.partition.clone();
        let open = Open::new(self.assignments, priority, self.shards, assigned);
        if let Some(old) = self.open.insert(partition, open) {
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

    /// Removes a partition. Its records in flight no longer count.
    pub fn remove(&mut self, partition: &Partition) -> Option<Open> {
        let open = self.open.remove(partition)?;
        open.reading.end();
        Some(open)
    }

    /// Finishes a record. If its reading has ended, it is ignored: the record may have been dropped, and is taken
    /// again.
    pub fn finish(&mut self, flight: &Flight) {
        if flight.reading.ended() {
            return;
        }
        if let Some(open) = self.open.get_mut(&flight.reading.assignment.partition)
            && Arc::ptr_eq(&open.reading, &flight.reading)
        {
            open.ledger.finish(flight.record.offset, flight.positions());
        }
    }

    /// Starts a repair, because a shard has forgotten the messages after `known`. Accepted for every reading of the
    /// current assignment, because a second shard may report a reading that the first one has ended. Returns the
    /// stalled flights, to be subtracted from the window.
    pub fn gap(
        &mut self,
        reading: &Reading,
        shard: Shard,
        known: Option<LogPosition>,
    ) -> Vec<Arc<Flight>> {
        match self.of(&reading.assignment) {
            Some(open) => open.forgot([(shard, known)]),
            None => Vec::new(),
        }
    }

    /// Handles an answer to a question. Returns the stalled flights, to be subtracted from the window.
    pub fn answered(&mut self, answer: &Answer) -> Vec<Arc<Flight>> {
        let Some(open) = self.of(&answer.assignment) else { return Vec::new() };
        if let Some(round) = open.round.as_mut().filter(|round| round.number == answer.round) {
            round.answered(answer);
            if !answer.gaps.is_empty() {
                open.reading.end();
            }
            return Vec::new();
        }
        open.closed(answer);
        if answer.gaps.is_empty() {
            return Vec::new();
        }
        open.forgot(answer.gaps.iter().copied())
    }

    fn of(&mut self, assignment: &Assignment) -> Option<&mut Open> {
        let open = self.open.get_mut(&assignment.partition)?;
        (open.assignment.id == assignment.id).then_some(open)
    }

    /// Compares the topics' ids with those at assignment. A topic with another id was recreated: its log starts at
    /// 0, and has its own positions. An absent id proves nothing. Returns the number of such partitions, and the
    /// stalled flights.
    pub fn compare(&mut self, ids: &HashMap<String, String>) -> (usize, Vec<Arc<Flight>>) {
        let (mut recreated, mut dropped) = (0, Vec::new());
        for open in self.open.values_mut() {
            let id = ids.get(&*open.assignment.partition.topic);
            if let (Some(id), Some(known)) = (id, &open.id)
                && **id != **known
            {
                recreated += 1;
                dropped.extend(open.drop_stalled());
                open.reading.end();
                self.assignments += 1;
                let id: Arc<str> = id.as_str().into();
                let assigned = Assigned {
                    partition: open.assignment.partition.clone(),
                    source: TopicSource::Id(Arc::clone(&id)),
                    id: Some(id),
                    start: None,
                    memory: Memory::default(),
                };
                let priority = open.assignment.priority;
                let mut fresh = Open::new(self.assignments, priority, self.shards, assigned);
                fresh.seek_to = Some(0);
                fresh.revoking = open.revoking;
                *open = fresh;
                continue;
            }
            if let Some(id) = id {
                open.id = Some(id.as_str().into());
            }
            // A broker that reports no ids never will.
            let known = id.is_some() || open.id.is_none() && ids.is_empty();
            if let Some(offset) = open.suspect.take_if(|_| known) {
                dropped.extend(open.drop_stalled());
                open.start_over_at(offset);
            }
        }
        (recreated, dropped)
    }

    /// Takes the commits that are due, and counts them as committed.
    pub fn begin_commits(&mut self) -> Vec<Commit> {
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

    /// After a failed commit: makes everything due again.
    pub fn uncommit(&mut self) {
        self.open.values_mut().for_each(|open| open.committed = None);
    }

    /// The commits of these partitions, whether due or not.
    pub fn commits_of(&self, partitions: &[Partition]) -> Vec<Commit> {
        let open = partitions.iter().filter_map(|partition| self.open.get(partition));
        open.filter_map(|open| Some(open.commit(open.ledger.committable()?))).collect()
    }

    /// Whether the log of a partition went back for an unknown reason.
    pub fn is_any_suspect(&self) -> bool {
        self.open.values().any(|open| open.suspect.is_some())
    }

    /// Records taken and not finished.
    pub fn unfinished(&self) -> usize {
        self.open.values().map(|open| open.ledger.open()).sum()
    }
}

impl Open {
    /// The commit, with the positions of shards taken at the same moment, so that they cover the committed offset.
    fn commit(&self, offset: i64) -> Commit {
        let memory =
            Memory { confirmed: self.ledger.confirmed().clone(), epochs: self.epochs.clone() };
        let metadata = Metadata { source: Some(self.source.clone()), id: self.id.clone(), memory };
        Commit { partition: self.assignment.partition.clone(), offset, metadata }
    }

    /// The last offset that was to be committed.
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

    fn assigned(start: Option<i64>, memory: Memory) -> Assigned {
        let (source, id) = (TopicSource::Id("id1".into()), Some("id1".into()));
        Assigned { partition: partition(), source, id, start, memory }
    }

    fn shards() -> ShardCount {
        ShardCount::new(4).unwrap()
    }

    fn held() -> Partitions {
        let mut partitions = Partitions::new(shards());
        partitions.assign(assigned(None, Memory::default()), 1);
        partitions
    }

    /// As by a purger that committed 100 and knew of a shard and an epoch.
    fn succeeded(memory: Memory) -> Partitions {
        let mut partitions = Partitions::new(shards());
        partitions.assign(assigned(Some(100), memory), 1);
        partitions
    }

    /// Every shard has answered, or will not.
    fn go_back(partitions: &mut Partitions, reach: Reach) {
        let open = partitions.get_mut(&partition()).unwrap();
        if open.questions(shards()).is_some() {
            open.asked(0, Instant::now());
        }
        if open.must_rewind(Instant::now()) {
            open.rewind(reach);
        }
    }

    const ALL: Reach = Reach { low: 0, high: 1_000, since: 0 };

    fn answer(partitions: &Partitions, round: u64, knowing: &[Shard]) -> Answer {
        let assignment = Arc::clone(&partitions.get(&partition()).unwrap().assignment);
        Answer { assignment, round, knowing: knowing.to_vec(), gaps: Vec::new() }
    }

    fn take(partitions: &mut Partitions, offsets: std::ops::Range<i64>, epoch: i32) {
        let open = partitions.get_mut(&partition()).unwrap();
        for offset in offsets {
            assert!(open.track(offset, epoch));
        }
    }

    fn shard() -> Shard {
        shards().all().next().unwrap()
    }

    fn at(leader_epoch: i32, offset: i64) -> Option<LogPosition> {
        Some(LogPosition { leader_epoch, offset, index: 0 })
    }

    fn finish(partitions: &mut Partitions, offsets: std::ops::Range<i64>) {
        let open = partitions.get_mut(&partition()).unwrap();
        let at = |offset| LogPosition { leader_epoch: 0, offset, index: 0 };
        offsets.for_each(|offset| assert!(open.ledger.finish(offset, [(0, at(offset))])));
    }

    #[test]
    fn a_gap_goes_back_below_the_commit_and_never_past_what_is_unfinished() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 0);
        finish(&mut partitions, 0..8);
        assert_eq!(partitions.begin_commits()[0].offset, 8);
        let reading = partitions.get(&partition()).unwrap().reading.clone();
        partitions.gap(&reading, shard(), at(0, 9));
        assert!(reading.ended() && !partitions.get(&partition()).unwrap().wants());
        go_back(&mut partitions, ALL);
        let open = partitions.get(&partition()).unwrap();
        assert_eq!(open.seek_to, Some(8), "8 and 9 are not finished");
        assert!(!open.wants() && !Arc::ptr_eq(&open.reading, &reading));
        // Another shard of the same reading knows less.
        partitions.gap(&reading, shard(), at(0, 3));
        go_back(&mut partitions, ALL);
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, Some(3));
        assert_eq!(partitions.begin_commits()[0].offset, 3, "a crash now must read from there");
    }

    #[test]
    fn hazard_45_a_shard_that_knows_nothing_is_read_no_further_back_than_mailboxes_keep() {
        for (since, low, target) in [(30, 10, 30), (10, 30, 30), (60, 0, 45)] {
            let mut partitions = held();
            take(&mut partitions, 40..50, 2);
            finish(&mut partitions, 40..45);
            let reading = partitions.get(&partition()).unwrap().reading.clone();
            partitions.gap(&reading, shard(), None);
            go_back(&mut partitions, Reach { low, high: 50, since });
            let open = partitions.get(&partition()).unwrap();
            assert_eq!(
                (open.seek_to, open.reading.view(shard()).repaired),
                (Some(target), Some(None))
            );
            assert!(open.reading.was_finished(44) && !open.reading.was_finished(45));
        }
    }

    #[test]
    fn hazard_26_a_successor_asks_and_goes_back_before_it_has_taken_anything() {
        let must = LogPosition { leader_epoch: 2, offset: 90, index: 0 };
        let memory = Memory { confirmed: [(0, must)].into(), epochs: [(1, 0), (2, 60)].into() };
        let mut partitions = succeeded(memory);
        let open = partitions.get_mut(&partition()).unwrap();
        assert_eq!(open.assignment.confirmed, [(shard(), must)].into());
        assert_eq!((open.wants(), open.questions(shards())), (false, Some((1, vec![shard()]))));
        open.asked(1, Instant::now() + std::time::Duration::from_secs(9));
        assert!(open.questions(shards()).is_none() && !open.must_rewind(Instant::now()));
        let mut forgot = answer(&partitions, 1, &[]);
        forgot.gaps.push((shard(), at(1, 80)));
        partitions.answered(&forgot);
        go_back(&mut partitions, ALL);
        let open = partitions.get_mut(&partition()).unwrap();
        assert_eq!(
            open.seek_to.take(),
            Some(60),
            "epoch 2 began below what epoch 1 is known to 80"
        );
        assert_eq!((open.repairing(), open.closing()), (1, None));
        // The position that it must know never decreases, and is committed together with the offset.
        take(&mut partitions, 60..65, 2);
        finish(&mut partitions, 60..65);
        let commit = partitions.begin_commits().remove(0);
        assert_eq!((commit.offset, commit.metadata.memory.confirmed[&0]), (65, must));
        // It has passed what it must know: the shard is raised, and that must be acknowledged.
        take(&mut partitions, 65..91, 2);
        finish(&mut partitions, 65..91);
        let open = partitions.get_mut(&partition()).unwrap();
        assert_eq!(open.closing(), Some(vec![(shard(), must)]));
        let round = open.next_round();
        open.close(round, 1);
        assert_eq!(open.closing(), None, "it is under way");
        partitions.answered(&answer(&partitions, round, &[]));
        let open = partitions.get_mut(&partition()).unwrap();
        assert_eq!(open.closing(), Some(vec![(shard(), must)]), "its master was away");
        let round = open.next_round();
        open.close(round, 1);
        partitions.answered(&answer(&partitions, round, &[shard()]));
        assert_eq!(partitions.get(&partition()).unwrap().repairing(), 0);
    }

    #[test]
    fn a_successor_whose_shards_know_everything_goes_on() {
        let must = LogPosition { leader_epoch: 2, offset: 90, index: 0 };
        let memory = Memory { confirmed: [(0, must)].into(), ..Default::default() };
        let mut partitions = succeeded(memory);
        partitions.get_mut(&partition()).unwrap().asked(1, Instant::now());
        partitions.answered(&answer(&partitions, 1, &[shard()]));
        go_back(&mut partitions, ALL);
        let open = partitions.get_mut(&partition()).unwrap();
        assert_eq!((open.wants(), open.seek_to, open.repairing()), (true, None, 0));
        assert!(partitions.begin_commits().is_empty(), "there is nothing new to commit");
    }

    #[test]
    fn hazard_26_a_leader_of_which_nothing_is_kept_is_read_from_the_bound() {
        let must = LogPosition { leader_epoch: 4, offset: 99, index: 0 };
        let memory = Memory { confirmed: [(0, must)].into(), ..Default::default() };
        let mut partitions = succeeded(memory);
        take(&mut partitions, 150..151, 4);
        let reading = partitions.get(&partition()).unwrap().reading.clone();
        // Epoch 4 began at 80, which nobody knows.
        partitions.gap(&reading, shard(), at(3, 100));
        go_back(&mut partitions, Reach { low: 7, high: 151, since: 20 });
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, Some(20));
    }

    #[test]
    fn hazard_31_what_is_not_finished_below_an_unclean_election_is_taken_again() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 3);
        finish(&mut partitions, 0..4);
        let open = partitions.get_mut(&partition()).unwrap();
        assert!(!open.track(7, 4), "the log went back");
        let ids = HashMap::from([("push".to_owned(), "id1".to_owned())]);
        partitions.compare(&ids);
        let open = partitions.get(&partition()).unwrap();
        assert_eq!(open.seek_to, Some(4), "4 to 6 are still in the log");
        assert_eq!(open.ledger.committable(), Some(4));
    }

    #[test]
    fn hazard_32_an_id_that_is_absent_or_appears_is_no_other_topic() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 0);
        assert_eq!(partitions.compare(&HashMap::new()).0, 0);
        let name = TopicSource::Name("push".into());
        let assigned =
            Assigned { source: name.clone(), id: None, ..assigned(Some(5), Memory::default()) };
        partitions.assign(assigned, 1);
        let ids = |id: &str| HashMap::from([("push".to_owned(), id.to_owned())]);
        assert_eq!(partitions.compare(&ids("id1")).0, 0);
        take(&mut partitions, 5..6, 0);
        finish(&mut partitions, 5..6);
        let commit = partitions.begin_commits().remove(0);
        assert_eq!(commit.metadata.source, Some(name), "Redis knows it by its name");
        assert_eq!(commit.metadata.id.as_deref(), Some("id1"));
        assert_eq!(partitions.compare(&ids("id2")).0, 1, "that is another one");
    }

    #[test]
    fn offsets_given_twice_by_an_unclean_election_are_not_skipped_by_a_gap() {
        let mut partitions = held();
        take(&mut partitions, 0..10, 3);
        finish(&mut partitions, 0..10);
        let open = partitions.get_mut(&partition()).unwrap();
        assert!(!open.track(5, 4), "the log went back");
        let ids = HashMap::from([("push".to_owned(), "id1".to_owned())]);
        assert_eq!(partitions.compare(&ids).0, 0);
        partitions.get_mut(&partition()).unwrap().seek_to = None;
        take(&mut partitions, 5..9, 4);
        finish(&mut partitions, 5..9);
        // Redis stands at offset 9 of the old leader: 5 to 8 of the new one are forgotten.
        let reading = partitions.get(&partition()).unwrap().reading.clone();
        partitions.gap(&reading, shard(), at(3, 9));
        go_back(&mut partitions, ALL);
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, Some(5));
    }

    #[test]
    fn hazard_07_a_topic_created_again_starts_at_its_beginning_as_another_source() {
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
        partitions.assign(assigned(None, Memory::default()), 1);
        take(&mut partitions, 0..1, 0);
        partitions.gap(&old.reading, shard(), None);
        assert_eq!(partitions.get(&partition()).unwrap().seek_to, None);
        assert_eq!(partitions.unfinished(), 1);
    }
}
