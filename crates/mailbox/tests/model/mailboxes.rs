//! A shard in memory: what scripts that keep every promise would hold.

use std::collections::VecDeque;

use barid_core::{Chain, Epoch};

/// Entries that a mailbox keeps.
pub const ENTRIES_MAX: usize = 4;
/// Ids that a mailbox remembers.
const RING: usize = 64;

/// Two mailboxes and how far two partitions were executed. A clone of it is what a replica has.
#[derive(Debug, Clone, Default)]
pub struct Shard {
    pub positions: [Option<i64>; 2],
    pub boxes: [Mailbox; 2],
    /// The number of the session that each client's route names.
    pub routes: [Option<u64>; 4],
}

#[derive(Debug, Clone)]
pub struct Mailbox {
    /// `None`: there is none, or nobody has looked at it since it was made.
    pub epoch: Option<Epoch>,
    /// All of this epoch, from seq 1: also those that are gone.
    pub entries: Vec<Entry>,
    /// The oldest that is kept.
    pub oldest: u64,
    ring: VecDeque<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub id: String,
    pub chain: Chain,
}

/// What must become of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Expected {
    Accepted { seq: u64, evicted: Vec<String> },
    Before,
    Duplicate,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self { epoch: None, entries: Vec::new(), oldest: 1, ring: VecDeque::new() }
    }
}

impl Shard {
    /// `Err`: a gap.
    pub fn accept(
        &mut self,
        source: usize,
        prev: Option<i64>,
        messages: &[(i64, usize, String)],
    ) -> Result<Vec<Expected>, Option<i64>> {
        if prev > self.positions[source] {
            return Err(self.positions[source]);
        }
        let accept = |(offset, user, id): &(i64, usize, String)| {
            if Some(*offset) <= self.positions[source] {
                return Expected::Before;
            }
            self.positions[source] = Some(*offset);
            self.boxes[*user].accept(id)
        };
        Ok(messages.iter().map(accept).collect())
    }
}

impl Mailbox {
    fn accept(&mut self, id: &str) -> Expected {
        if self.ring.iter().any(|other| other == id) {
            return Expected::Duplicate;
        }
        let chain = self.chain().next(id);
        self.entries.push(Entry { id: id.to_owned(), chain });
        self.ring.push_back(id.to_owned());
        if self.ring.len() > RING {
            self.ring.pop_front();
        }
        let seq = self.newest();
        let oldest = self.oldest.max((seq + 1).saturating_sub(ENTRIES_MAX as u64));
        Expected::Accepted { seq, evicted: self.leave(oldest) }
    }

    /// Another oldest entry; the ids of those before it, that are no longer kept.
    pub fn leave(&mut self, oldest: u64) -> Vec<String> {
        let gone = self.between(self.oldest, oldest);
        self.oldest = oldest;
        gone
    }

    /// The ids from a position to before another.
    pub fn between(&self, from: u64, to: u64) -> Vec<String> {
        (from..to)
            .filter_map(|seq| self.entries.get(seq as usize - 1))
            .map(|e| e.id.clone())
            .collect()
    }

    pub fn newest(&self) -> u64 {
        self.entries.len() as u64
    }

    fn chain(&self) -> Chain {
        self.entries.last().map_or(Chain::START, |entry| entry.chain)
    }
}
