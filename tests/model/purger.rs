//! Two Kafka partitions, and two purgers that may read each of them: what they read and commit is plain, what
//! they know of the shard is the history that ships.

use barid_core::{LogPosition, Shard, ShardCount};
use barid_purger::history::{History, View};

/// What a business wrote.
#[derive(Debug, Clone)]
pub struct Record {
    pub user: usize,
    pub id: String,
    /// The collapse key.
    pub key: Option<String>,
}

/// A partition of the log.
#[derive(Debug, Default)]
pub struct Partition {
    /// By offset.
    pub records: Vec<Record>,
    pub committed: usize,
    pub purgers: [Purger; 2],
    /// The last group that was executed: it may arrive once more.
    pub last: Option<Group>,
}

/// What a purger does for one partition and one shard.
#[derive(Debug, Default)]
pub struct Purger {
    /// The next offset.
    pub next: usize,
    history: History,
    /// How often it was given the partition, and read it from another place.
    assignment: u64,
    reading: u64,
    /// What the shard had executed, as the commit said that it began with.
    committed: Option<i64>,
    /// What the shard knew when the reading went back for it.
    repaired: Option<Option<i64>>,
}

/// What accept is asked.
#[derive(Debug, Clone)]
pub struct Group {
    pub prev: Option<i64>,
    /// Each with its offset.
    pub messages: Vec<(i64, Record)>,
}

impl Partition {
    /// What a purger sends next; without messages it is a probe. It leaves out what the shard has confirmed, as
    /// far as its reading went back for other shards.
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

    /// The shard has forgotten what came after `known`: a reading goes back for it.
    pub fn gap(&mut self, purger: usize, known: Option<i64>) {
        let state = &mut self.purgers[purger];
        state.next = end_of(known);
        state.reading += 1;
        state.repaired = Some(known);
    }

    /// A reading goes back for another shard.
    pub fn read_again(&mut self, purger: usize, back: usize) {
        let state = &mut self.purgers[purger];
        state.next = state.next.saturating_sub(back);
        state.reading += 1;
        state.repaired = None;
    }

    /// A purger is given the partition, and begins at the commit.
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
    /// The highest position that the shard has confirmed to it: `prev` of its next group.
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
