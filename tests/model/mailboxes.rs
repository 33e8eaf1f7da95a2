//! A shard in memory: the state and the answers of correct scripts. It keeps whole histories, unpacked, and takes no
//! shortcuts.

mod devices;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use barid_core::{Chain, Epoch};

pub use devices::{Acked, Connected, Device, Hello, Place, Route};

use crate::purger::Record;
use crate::world::USERS;

/// The largest number of entries in a mailbox.
pub const ENTRIES_MAX: usize = 4;
/// How long a mailbox keeps entries, in units of the model's clock.
pub const TTL: u64 = 4;
/// The largest number of devices of a user.
pub const DEVICES_MAX: usize = 3;
/// First and longest wait for an acknowledgement, ms.
pub const RETRY_BASE: u64 = 100_000;
pub const RETRY_MAX: u64 = 400_000;
/// The first waits of a claim that is given back, ms.
pub const DEFER_BASE: u64 = 50_000;
pub const DEFER_FULL: u64 = 150_000;
/// The number of ids that a mailbox remembers at least.
const RING: usize = 56;

/// The mailboxes, and the executed positions of two partitions. A replica is a clone of it.
#[derive(Debug, Clone, Default)]
pub struct Shard {
    /// Whether mailboxes keep everything after a loss, for longer than a run.
    pub keeps: bool,
    /// Whether a loss was found.
    pub lost: bool,
    pub positions: [Option<i64>; 2],
    pub boxes: [Mailbox; USERS],
}

#[derive(Debug, Clone)]
pub struct Mailbox {
    pub life: Life,
    /// All entries of this epoch, from seq 1, including removed ones.
    pub entries: Vec<Entry>,
    /// The oldest entry that is kept.
    pub oldest: u64,
    /// Acknowledged entries are not trimmed.
    pub keeps_all: bool,
    /// When its time to live was last renewed, in units.
    renewed: u64,
    ring: VecDeque<String>,
    /// The newest seq of each collapse key.
    pub keys: BTreeMap<String, u64>,
    /// The remembered ids, in order.
    pub devices: Vec<Device>,
    /// Not part of the head: routes stay when it expires, as does the timer.
    pub routes: BTreeMap<&'static str, Route>,
    /// When a route was last connected or confirmed, in units.
    pub(crate) routed: u64,
    /// Devices whose route has expired and whose retry may still be due.
    pub unrouted: BTreeSet<&'static str>,
    pub timer: Timer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    None,
    /// It was not compared with Redis yet.
    New,
    Known(Epoch),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub id: String,
    pub chain: Chain,
    /// It was replaced by a newer entry with the same collapse key.
    pub voided: bool,
    /// When it was accepted, in units.
    at: u64,
}

/// When a device's retry is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    Never,
    /// ms since the Unix epoch.
    At(u64),
    /// This many ms after the last call.
    In(u64),
    /// At a time, or this many ms after the last call, whichever is earlier.
    Sooner(u64, u64),
}

impl Due {
    /// Not later than this many ms after the current call.
    fn or_sooner(self, wait: u64) -> Self {
        match self {
            Self::At(time) => Self::Sooner(time, wait),
            other => other, // set by a call, and not compared with Redis yet
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    None,
    At(u64),
    /// The earliest retry of all devices.
    Earliest,
}

/// The expected outcome of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Expected {
    /// Its seq, the evicted ids, and the id that was collapsed.
    Accepted {
        seq: u64,
        evicted: Vec<String>,
        voided: Option<String>,
    },
    Before,
    Duplicate,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self {
            life: Life::None,
            entries: Vec::new(),
            oldest: 1,
            keeps_all: false,
            renewed: 0,
            ring: VecDeque::new(),
            keys: BTreeMap::new(),
            devices: Vec::new(),
            routes: BTreeMap::new(),
            routed: 0,
            unrouted: BTreeSet::new(),
            timer: Timer::None,
        }
    }
}

impl Shard {
    /// Returns an error if there is a gap.
    pub fn accept(
        &mut self,
        source: usize,
        prev: Option<i64>,
        messages: &[(i64, Record)],
        now: u64,
    ) -> Result<Vec<Expected>, Option<i64>> {
        if prev > self.positions[source] {
            self.lost = true;
            return Err(self.positions[source]);
        }
        let keep = self.lost && self.keeps;
        let accept = |(offset, record): &(i64, Record)| {
            if Some(*offset) <= self.positions[source] {
                return Expected::Before;
            }
            self.positions[source] = Some(*offset);
            self.boxes[record.user].accept(record, now, keep)
        };
        let expected: Vec<_> = messages.iter().map(accept).collect();
        // All messages to a user in a call are one change, which arms the timer once.
        for ((_, record), expected) in messages.iter().zip(&expected) {
            if matches!(expected, Expected::Accepted { .. }) {
                self.boxes[record.user].arm();
            }
        }
        Ok(expected)
    }
}

impl Mailbox {
    fn accept(&mut self, record: &Record, now: u64, keep: bool) -> Expected {
        self.open(now);
        if self.ring.contains(&record.id) {
            return Expected::Duplicate;
        }
        self.keeps_all |= keep && self.oldest == 1;
        let id = record.id.clone();
        let chain = self.chain().next(&id);
        self.entries.push(Entry { id: id.clone(), chain, voided: false, at: now });
        self.ring.push_back(id);
        if self.ring.len() > RING {
            self.ring.pop_front();
        }
        let voided = record.key.as_ref().and_then(|key| self.collapse(key));
        let mut oldest = self.oldest.max((self.newest() + 1).saturating_sub(ENTRIES_MAX as u64));
        while oldest < self.newest() && self.entries[oldest as usize - 1].at + TTL <= now {
            oldest += 1;
        }
        let evicted = self.leave(oldest);
        Expected::Accepted { seq: self.newest(), evicted, voided }
    }

    /// The older entry with the key keeps its position and loses its content.
    fn collapse(&mut self, key: &str) -> Option<String> {
        let old = self.keys.insert(key.to_owned(), self.newest())?;
        let entry = &mut self.entries[old as usize - 1];
        entry.voided = true;
        Some(entry.id.clone())
    }

    /// Sets the oldest entry. Returns the ids of the removed entries.
    pub fn leave(&mut self, oldest: u64) -> Vec<String> {
        let gone = self.between(self.oldest, oldest);
        self.oldest = oldest;
        self.keys.retain(|_, seq| *seq >= oldest);
        gone
    }

    /// Head and queue expire. Returns the ids of the entries.
    pub fn expire(&mut self) -> Vec<String> {
        let routes = std::mem::take(&mut self.routes);
        let (timer, routed) = (self.timer, self.routed);
        let old = std::mem::replace(self, Self { routes, timer, routed, ..Self::default() });
        old.entries.into_iter().map(|entry| entry.id).collect()
    }

    /// Routes expire together if none was connected or confirmed for the time to live.
    pub fn forget_routes(&mut self, now: u64) {
        if (now - self.routed) * 16 >= TTL * 17 {
            self.unrouted.extend(std::mem::take(&mut self.routes).into_keys());
        }
    }

    /// Whether it has expired. A sixteenth of the time is added, so that not every use renews it.
    pub fn is_forgotten(&self, now: u64) -> bool {
        self.life != Life::None && (now - self.renewed) * 16 >= TTL * 17
    }

    /// Whether the mailbox exists and has not expired.
    fn open(&mut self, now: u64) {
        if self.life == Life::None {
            self.life = Life::New;
        }
        self.renewed = now;
    }

    /// The ids from a position up to another.
    pub fn between(&self, from: u64, to: u64) -> Vec<String> {
        (from..to)
            .filter_map(|seq| self.entries.get(seq as usize - 1))
            .map(|e| e.id.clone())
            .collect()
    }

    /// The entries that can be read there, without collapsed ones.
    pub fn contents(&self, from: u64, to: u64) -> Vec<String> {
        let entries = (from..to).filter_map(|seq| self.entries.get(seq as usize - 1));
        entries.map(|e| if e.voided { String::new() } else { e.id.clone() }).collect()
    }

    pub fn newest(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The chain after a position of this epoch.
    pub fn chain_at(&self, seq: u64) -> Option<Chain> {
        match seq.checked_sub(1) {
            None => Some(Chain::START),
            Some(index) => self.entries.get(index as usize).map(|entry| entry.chain),
        }
    }

    /// The chain after a position, if it is kept.
    pub fn kept_chain_at(&self, seq: u64) -> Option<Chain> {
        self.chain_at(seq).filter(|_| seq + 1 >= self.oldest)
    }

    fn chain(&self) -> Chain {
        self.entries.last().map_or(Chain::START, |entry| entry.chain)
    }
}
