//! A record in flight: from the moment it is taken until it is finished.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use barid_bus::consumer::{Partition, Record};
use barid_core::limits::TIME_MS_MAX;
use barid_core::{Owner, ReceiptSet, Shard, TraceParent};
use barid_mailbox::{AcceptMessage, LogPosition, Source};
use barid_runtime::TraceEvent;
use barid_wire::record::{Push, ReceiptKind};
use barid_wire::v1::Receipt;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::history::View;

/// One assignment of a partition to this purger.
#[derive(Debug)]
pub struct Assignment {
    /// Identifies the assignment within the process.
    pub id: u64,
    /// The partition.
    pub partition: Partition,
    /// The partition's name in Redis.
    pub source: Source,
    /// The priority of its topic, 0 the most urgent.
    pub priority: usize,
    /// The positions that shards had confirmed when the partition was assigned, as committed by its last owner.
    pub confirmed: HashMap<Shard, LogPosition>,
    /// The current reading.
    live: Mutex<Weak<Reading>>,
}

impl Assignment {
    /// Creates an assignment that is not being read yet.
    pub fn new(
        id: u64,
        partition: Partition,
        topic_id: Arc<str>,
        priority: usize,
        confirmed: HashMap<Shard, LogPosition>,
    ) -> Self {
        let source = Source { topic_id, partition: partition.number };
        Self { id, partition, source, priority, confirmed, live: Mutex::default() }
    }

    /// The current reading, or the last one while the next is prepared; `None`: the assignment is over.
    pub fn live(&self) -> Option<Arc<Reading>> {
        self.live.lock().upgrade()
    }
}

/// One pass over an assignment's log, from its first offset or from where a seek went. Once it has ended, records that
/// were taken in it and are not finished are dropped: they will be taken again, by this or another purger.
#[derive(Debug)]
pub struct Reading {
    /// The assignment.
    pub assignment: Arc<Assignment>,
    number: u64,
    /// Shards that this reading repairs, each with the last position that it reported.
    repairs: HashMap<Shard, Option<LogPosition>>,
    /// Every record before this offset was finished in an earlier reading, and is read again only for the shards that
    /// are repaired.
    finished_below: i64,
    ended: AtomicBool,
}

impl Reading {
    /// The first reading of an assignment, from `start`; `None`: from the beginning of the log.
    pub fn first(assignment: Arc<Assignment>, start: Option<i64>) -> Arc<Self> {
        Self::live(assignment, 1, HashMap::new(), start.unwrap_or(0))
    }

    /// The next reading, which goes back to repair these shards. The other shards must still know the positions that
    /// they have confirmed.
    pub fn repairing(
        &self,
        repairs: HashMap<Shard, Option<LogPosition>>,
        finished_below: i64,
    ) -> Arc<Self> {
        self.after(repairs, self.finished_below.max(finished_below))
    }

    /// The next reading, of a log that was truncated to `offset` by an unclean election.
    pub fn over_at(&self, offset: i64) -> Arc<Self> {
        self.after(HashMap::new(), self.finished_below.min(offset))
    }

    fn after(
        &self,
        repairs: HashMap<Shard, Option<LogPosition>>,
        finished_below: i64,
    ) -> Arc<Self> {
        Self::live(Arc::clone(&self.assignment), self.number + 1, repairs, finished_below)
    }

    fn live(
        assignment: Arc<Assignment>,
        number: u64,
        repairs: HashMap<Shard, Option<LogPosition>>,
        finished_below: i64,
    ) -> Arc<Self> {
        let ended = AtomicBool::new(false);
        let reading = Arc::new(Self { assignment, number, repairs, finished_below, ended });
        *reading.assignment.live.lock() = Arc::downgrade(&reading);
        reading
    }

    /// Whether the record at this offset was finished in an earlier reading.
    pub fn was_finished(&self, offset: i64) -> bool {
        offset < self.finished_below
    }

    /// Counts the readings of an assignment, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Identifies the reading within the process: its assignment and its number.
    pub fn id(&self) -> (u64, u64) {
        (self.assignment.id, self.number)
    }

    /// The reading as a shard's history sees it.
    pub fn view(&self, shard: Shard) -> View {
        View {
            assignment: self.assignment.id,
            reading: self.number,
            committed: self.assignment.confirmed.get(&shard).copied(),
            repaired: self.repairs.get(&shard).copied(),
        }
    }

    /// Ends the reading. Calls under way continue.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

/// A record in flight.
#[derive(Debug)]
pub struct Flight {
    /// The reading that it was taken in.
    pub reading: Arc<Reading>,
    /// The original record, for a dead letter if Redis refuses a message of it.
    pub record: Record,
    /// The decoded record; `None` if it was refused.
    pub push: Option<Push>,
    /// When it was taken.
    pub taken: Instant,
    /// The business's `traceparent`; empty if it sent none, or an invalid one.
    pub traceparent: String,
    /// Approximate size in memory, bytes.
    pub bytes: usize,
    /// Its shards, each with the index of the last message for it.
    places: Vec<(Shard, u32)>,
    /// Messages (one per mailbox) that are not done.
    left: AtomicUsize,
}

/// A record's timestamp, ms since the Unix epoch; 0: absent or implausible.
pub fn produced_at_ms(record: &Record) -> u64 {
    let timestamp = record.timestamp_ms.and_then(|ms| u64::try_from(ms).ok());
    timestamp.filter(|ms| *ms <= TIME_MS_MAX).unwrap_or(0)
}

impl Flight {
    /// Creates a flight with a message for each of these shards, in order.
    pub fn new(
        reading: Arc<Reading>,
        record: Record,
        push: Option<Push>,
        taken: Instant,
        traceparent: String,
        shards: &[Shard],
    ) -> Self {
        let mut places: Vec<(Shard, u32)> = shards.iter().copied().zip(0..).collect();
        // The last index of each shard is sorted first, and is the one that is kept.
        places.sort_unstable_by(|a, b| b.cmp(a));
        places.dedup_by_key(|(shard, _)| *shard);
        places.shrink_to_fit();
        // A refused record counts as one part without a shard.
        let parts = if push.is_some() { shards.len() } else { 1 };
        let payload = push.as_ref().map_or(0, |push| push.payload.len());
        let bytes = 512 + record.bytes() + payload + 256 * parts;
        let left = AtomicUsize::new(parts);
        Self { reading, record, push, taken, traceparent, bytes, places, left }
    }

    /// Its last position in each of its shards.
    pub fn positions(&self) -> impl Iterator<Item = (u16, LogPosition)> {
        let (leader_epoch, offset) = (self.record.leader_epoch, self.record.offset);
        self.places.iter().map(move |(shard, index)| {
            (shard.get(), LogPosition { leader_epoch, offset, index: *index })
        })
    }

    /// Whether its time to live, counted from its production, has passed at `now_ms`.
    pub fn is_expired(&self, now_ms: u64) -> bool {
        let ttl_ms = self.push.as_ref().map_or(0, |push| push.ttl_ms);
        let produced_ms = self.produced_at_ms();
        ttl_ms != 0 && produced_ms != 0 && produced_ms.saturating_add(ttl_ms) <= now_ms
    }

    /// When it was produced, ms since the Unix epoch; 0: unknown.
    pub fn produced_at_ms(&self) -> u64 {
        produced_at_ms(&self.record)
    }

    /// A trace event about it; `user` may be empty.
    pub fn trace_event<'a>(
        &'a self,
        hop: &'static str,
        user: &'a str,
        at_us: u64,
    ) -> TraceEvent<'a> {
        let (id, app) = self.push.as_ref().map_or(("", ""), |p| (p.id.as_str(), p.app.as_str()));
        let (traceparent, produced_ms) = (&*self.traceparent, self.produced_at_ms());
        TraceEvent { hop, traceparent, id, app, user, produced_ms, at_us, ..Default::default() }
    }

    /// Whether its trace is sampled.
    pub fn is_sampled(&self) -> bool {
        TraceParent::parse(self.traceparent.as_bytes()).is_some_and(TraceParent::is_sampled)
    }

    /// Messages that are not done.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }

    /// Marks one of its messages as done. Returns whether it was the last.
    pub fn part_done(&self) -> bool {
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// A receipt of this kind about the message for `owner`, if the business asked for it.
    pub fn receipt(
        &self,
        kind: ReceiptKind,
        owner: &Owner,
        seq: u64,
        at_ms: u64,
    ) -> Option<Receipt> {
        let push = self.push.as_ref()?;
        if !push.receipts.wants(ReceiptSet(1 << kind as u32)) {
            return None;
        }
        Some(Receipt {
            kind: kind as i32,
            id: push.id.as_str().to_owned(),
            app: push.app.as_str().to_owned(),
            seq,
            at_ms,
            traceparent: self.traceparent.clone(),
            ..of_owner(owner)
        })
    }

    /// The receipt for the refusal of the message for `owner` (`None`: of the record), which is sent always.
    pub fn refusal(&self, owner: Option<&Owner>, code: &str, reason: &str, at_ms: u64) -> Receipt {
        let (id, app) = self.push.as_ref().map_or_else(Default::default, |p| {
            (p.id.as_str().to_owned(), p.app.as_str().to_owned())
        });
        Receipt {
            kind: ReceiptKind::Refused as i32,
            id,
            app,
            at_ms,
            code: code.to_owned(),
            reason: reason.to_owned(),
            traceparent: self.traceparent.clone(),
            ..owner.map_or_else(Receipt::default, of_owner)
        }
    }
}

/// A receipt that names only the owner of the mailbox.
fn of_owner(owner: &Owner) -> Receipt {
    match owner {
        Owner::User(user) => Receipt { user: user.to_string(), ..Default::default() },
        Owner::Audience(audience) => {
            Receipt { mailbox: audience.to_string(), ..Default::default() }
        }
    }
}

/// Marks one message of each flight as done; returns the flights of which it was the last.
pub fn last_parts(flights: impl Iterator<Item = Arc<Flight>>) -> Vec<Arc<Flight>> {
    flights.filter(|flight| flight.part_done()).collect()
}

/// One message of a flight, for one mailbox.
#[derive(Debug, Clone)]
pub struct Parcel {
    /// The record.
    pub flight: Arc<Flight>,
    /// The mailbox's shard.
    pub shard: Shard,
    /// The argument of the accept script.
    pub message: AcceptMessage,
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::ShardCount;

    #[test]
    fn hazard_71_a_record_for_very_many_users_takes_no_time_for_each_pair_of_them() {
        let count = ShardCount::new(16_384).unwrap();
        let all: Vec<Shard> = count.all().collect();
        let there_and_back = all.iter().chain(all.iter().rev());
        let shards: Vec<Shard> = there_and_back.cycle().take(100_000).copied().collect();
        let partition = Partition { topic: "push".into(), number: 0 };
        let assignment = Assignment::new(1, partition, "id".into(), 1, HashMap::new());
        let reading = Reading::first(Arc::new(assignment), None);
        let record = Record {
            topic: "push".into(),
            partition: 0,
            offset: 7,
            leader_epoch: 3,
            timestamp_ms: None,
            key: None,
            value: bytes::Bytes::new(),
            headers: Vec::new(),
        };
        let begun = std::time::Instant::now();
        let taken = Instant::now();
        let flight = Flight::new(reading, record, None, taken, String::new(), &shards);
        let took = begun.elapsed();
        let last: HashMap<u16, u32> = shards.iter().map(|shard| shard.get()).zip(0..).collect();
        let positions: HashMap<u16, u32> =
            flight.positions().map(|(s, at)| (s, at.index)).collect();
        assert_eq!((positions, flight.positions().count()), (last, 16_384));
        assert!(took < std::time::Duration::from_secs(1), "{took:?}");
    }
}
