//! Two Kafka partitions, and two purgers that may read each of them. What they know of the shard is the purger's
//! history that ships; the rest is a simple model.

use barid_core::{LogPosition, Shard, ShardCount};
use barid_purger::history::{History, View};

/// A produced record.
#[derive(Debug, Clone)]
pub struct Record {
    pub user: usize,
    pub id: String,
    /// Collapse key.
    pub key: Option<String>,
}

/// A partition of the log.
#[derive(Debug, Default)]
pub struct Partition {
    /// The records, by offset.
    pub records: Vec<Record>,
    pub committed: usize,
    pub purgers: [Purger; 2],
    /// The last executed group, which may arrive again.
    pub last: Option<Group>,
}

/// A purger's state of one partition and one shard.
#[derive(Debug, Default)]
pub struct Purger {
    /// The next offset.
    pub next: usize,
    history: History,
    /// The number of times that it was assigned the partition or went back.
    assignment: u64,
    reading: u64,
    /// The executed position that the commit names.
    committed: Option<i64>,
    /// The position that the shard knew when the purger went back for it.
    repaired: Option<Option<i64>>,
}

/// A call of accept.
#[derive(Debug, Clone)]
pub struct Group {
    pub prev: Option<i64>,
    /// The messages, each with its offset.
    pub messages: Vec<(i64, Record)>,
}

impl Partition {
    /// The next group of a purger; a probe if it has no messages. It omits messages that the shard has confirmed, if the
    /// purger went back for another shard.
    pub fn group(&mut self, purger: usize, count: usize) -> Group {
        let prev = self.purgers[purger].confirmed();
        let state = &mut self.purgers[purger];
        state.next = state.next.max(end_of(prev));
        let records = self.records.iter().enumerate().skip(state.next).take(count);
        let messages = records.map(|(offset, record)| (offset as i64, record.clone()));
        Group { prev, messages: messages.collect() }
    }

    /// The group was executed.
    pub fn done(&mut self, purger: usize, group: &Group) {
        let state = &mut self.purgers[purger];
        state.next += group.messages.len();
        let view = state.view();
        state.history.confirm(shard(), view, group.messages.last().map(|message| at(message.0)));
        self.committed = self.committed.max(state.next);
    }

    /// The shard has lost everything after `known`: the purger goes back for it.
    pub fn gap(&mut self, purger: usize, known: Option<i64>) {
        let state = &mut self.purgers[purger];
        state.next = end_of(known);
        state.reading += 1;
        state.repaired = Some(known);
    }

    /// The purger goes back for another shard.
    pub fn read_again(&mut self, purger: usize, back: usize) {
        let state = &mut self.purgers[purger];
        state.next = state.next.saturating_sub(back);
        state.reading += 1;
        state.repaired = None;
    }

    /// A purger is assigned the partition, and begins at the committed offset.
    pub fn assign(&mut self, purger: usize) {
        let state = &mut self.purgers[purger];
        state.next = self.committed;
        state.assignment += 1;
        state.reading = 0;
        state.committed = self.committed.checked_sub(1).map(|offset| offset as i64);
        state.repaired = None;
    }
}

impl Purger {
    /// The highest position that the shard has confirmed: `prev` of the next group.
    fn confirmed(&mut self) -> Option<i64> {
        let view = self.view();
        self.history.confirmed(shard(), view).map(|position| position.offset)
    }

    fn view(&self) -> View {
        View {
            assignment: self.assignment,
            reading: self.reading + 1,
            committed: self.committed.map(at),
            repaired: self.repaired.map(|known| known.map(at)),
        }
    }
}

/// The store has one shard.
fn shard() -> Shard {
    ShardCount::new(1).expect("a count").all().next().expect("a shard")
}

pub fn at(offset: i64) -> LogPosition {
    LogPosition { leader_epoch: 0, offset, index: 0 }
}

/// The offset behind a position.
fn end_of(known: Option<i64>) -> usize {
    known.map_or(0, |offset| offset as usize + 1)
}
