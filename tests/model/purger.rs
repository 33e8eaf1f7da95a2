//! Two Kafka partitions, and two purgers that may read each of them.

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
    /// The highest position that the shard has confirmed to it: `prev` of its next group.
    pub confirmed: Option<i64>,
}

/// What accept is asked.
#[derive(Debug, Clone)]
pub struct Group {
    pub prev: Option<i64>,
    /// Each with its offset.
    pub messages: Vec<(i64, Record)>,
}

impl Partition {
    /// What a purger sends next; without messages it is a probe.
    pub fn group(&self, purger: usize, count: usize) -> Group {
        let Purger { next, confirmed } = self.purgers[purger];
        let records = self.records.iter().enumerate().skip(next).take(count);
        let messages = records.map(|(offset, record)| (offset as i64, record.clone()));
        Group { prev: confirmed, messages: messages.collect() }
    }

    /// The group was executed.
    pub fn done(&mut self, purger: usize, group: &Group) {
        let state = &mut self.purgers[purger];
        state.next += group.messages.len();
        state.confirmed = state.confirmed.max(group.messages.last().map(|message| message.0));
        self.committed = self.committed.max(state.next);
    }

    /// The shard has forgotten what came after `known`.
    pub fn gap(&mut self, purger: usize, known: Option<i64>) {
        let next = known.map_or(0, |offset| offset as usize + 1);
        self.purgers[purger] = Purger { next, confirmed: known };
    }
}
