//! Where a node stands in an audience's mailbox. Records arrive from several purgers through several dispatchers: out of
//! order, twice, or not at all. The node reads what is missing from the mailbox. Pure: no Redis, no clock.

use std::collections::{BTreeMap, VecDeque};

use barid_core::{Chain, Epoch, Position, Seq};
use barid_wire::envelope::Header;

/// Records that wait for earlier ones. Beyond it only the highest position is remembered.
const AHEAD_MAX: usize = 64;
/// Positions that are remembered to find where a history that Redis has lost parts of agrees with the known one.
const RECENT_MAX: usize = 64;

/// A position in the mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// The mailbox's epoch; 0: there is no mailbox.
    pub epoch: Epoch,
    /// The last entry.
    pub seq: Seq,
    /// The chain after it.
    pub chain: Chain,
}

impl Point {
    /// Before the first entry of a mailbox that does not exist.
    pub const NONE: Self = Self { epoch: Epoch(0), seq: Seq(0), chain: Chain::START };

    /// Before the entry `seq`, with the chain there.
    pub fn before(epoch: Epoch, seq: Seq, chain: Chain) -> Self {
        Self { epoch, seq: Seq(seq.0.saturating_sub(1)), chain }
    }
}

impl From<Point> for Position {
    fn from(Point { epoch, seq, chain }: Point) -> Self {
        Self { epoch, seq, chain: Some(chain), ..Self::default() }
    }
}

/// The entries after a position, as read.
#[derive(Debug)]
pub(super) struct Page<T> {
    /// 0: there is no mailbox.
    pub epoch: Epoch,
    /// Seq before the first entry that was asked for.
    pub after: Seq,
    pub oldest: Seq,
    pub chain_before_oldest: Chain,
    pub newest: Seq,
    /// In order, from `max(after + 1, oldest)`.
    pub entries: Vec<(Header, T)>,
}

/// A record that waits for earlier ones.
#[derive(Debug)]
struct Waiting<T> {
    header: Header,
    entry: T,
    /// The mailbox has been read since it arrived: the next page was asked for after that, and has it, or Redis has lost
    /// it.
    read: bool,
}

/// A position of which the node has no record.
#[derive(Debug, Clone, Copy)]
struct Seen {
    epoch: Epoch,
    seq: Seq,
    /// As in [`Waiting`].
    read: bool,
}

/// A node's position in one audience's mailbox.
#[derive(Debug)]
pub(super) struct Place<T> {
    /// `None`: the node is not listed yet, so it knows no position.
    at: Option<Point>,
    /// When the entry at `at` was accepted, µs in Redis's time; 0: unknown.
    accepted_at_us: u64,
    /// The last positions of `at`'s epoch, up to `at`.
    recent: VecDeque<(Seq, Chain)>,
    /// Records beyond the next one, by epoch and seq.
    ahead: BTreeMap<(Epoch, Seq), Waiting<T>>,
    /// The highest position that something else has shown: a head, a device's page, a record for which there was no room.
    seen: Option<Seen>,
    /// The last page was not the end of the mailbox.
    partial: bool,
    /// Redis has another history than the node: read from the first known position.
    forked: bool,
}

impl<T> Default for Place<T> {
    fn default() -> Self {
        Self {
            at: None,
            accepted_at_us: 0,
            recent: VecDeque::new(),
            ahead: BTreeMap::new(),
            seen: None,
            partial: false,
            forked: false,
        }
    }
}

impl<T> Place<T> {
    /// The node is listed, and the mailbox ends at `head`. Returns the entries that follow.
    pub fn open(&mut self, head: Point) -> Vec<T> {
        let Some(at) = self.at else {
            self.set(head);
            self.ahead.retain(|(epoch, seq), _| *epoch != head.epoch || *seq > head.seq);
            return self.follow();
        };
        // The listing was confirmed. Records that were accepted after that may have arrived before.
        let known = head.epoch == at.epoch && self.recent.contains(&(head.seq, head.chain));
        if head.epoch == at.epoch && head.seq <= at.seq {
            self.forked |= !known;
        } else {
            self.see(head.epoch, head.seq);
        }
        Vec::new()
    }

    /// A record arrived. It is kept if it has to wait, and `has_room`. Returns the entries that the node has now, in
    /// order.
    pub fn receive(&mut self, header: Header, entry: T, has_room: bool) -> Vec<T> {
        if let Some(at) = self.at {
            if header.epoch == at.epoch && header.seq <= at.seq {
                // Known, unless Redis has given the position to another message.
                let known = self.recent.iter().find(|(seq, _)| *seq == header.seq);
                self.forked |= known.is_some_and(|(_, chain)| *chain != header.chain);
                return Vec::new();
            }
            if self.is_next(&header) {
                self.reach(&header);
                let mut entries = vec![entry];
                entries.extend(self.follow());
                return entries;
            }
        }
        if has_room && self.ahead.len() < AHEAD_MAX {
            let waiting = Waiting { header, entry, read: false };
            self.ahead.insert((header.epoch, header.seq), waiting);
        } else {
            self.see(header.epoch, header.seq);
        }
        Vec::new()
    }

    /// The last entry that the node has; `None`: the node is not listed yet.
    pub fn at(&self) -> Option<Point> {
        self.at
    }

    /// Whether the message with this number in the shard's journal is the node's last. Mostly the number is the time of
    /// acceptance; where it is not, that is unknown.
    pub fn is_numbered(&self, number: u64) -> bool {
        !self.is_behind() && self.accepted_at_us == number
    }

    /// Something else than a record shows that the mailbox goes this far: a head, a page that was read for a device.
    pub fn see(&mut self, epoch: Epoch, seq: Seq) {
        match &mut self.seen {
            Some(seen) if seen.epoch == epoch && seen.seq >= seq => {}
            seen => *seen = Some(Seen { epoch, seq, read: false }),
        }
    }

    /// Whether the mailbox has to be read.
    pub fn is_behind(&self) -> bool {
        let Some(at) = self.at else { return false };
        let is_beyond = |seen: Seen| seen.epoch != at.epoch || seen.seq > at.seq;
        self.forked || self.partial || !self.ahead.is_empty() || self.seen.is_some_and(is_beyond)
    }

    /// Where to read from, as the seq before the first entry wanted: the last known entry, whose chain is compared.
    pub fn read_after(&self) -> Seq {
        let known = match self.recent.front() {
            Some((first, _)) if self.forked => *first,
            _ => self.at.map_or(Seq(0), |at| at.seq),
        };
        Seq(known.0.saturating_sub(1))
    }

    /// The mailbox was read. Returns the entries that are new to the node, in order; [`Self::is_behind`] says whether to
    /// read again.
    pub fn page(&mut self, read: Page<T>) -> Vec<T> {
        let Some(at) = self.at else { return Vec::new() };
        self.ahead.retain(|_, waiting| !std::mem::replace(&mut waiting.read, true));
        self.seen = self.seen.filter(|seen| !seen.read).map(|seen| Seen { read: true, ..seen });
        self.partial = false;
        if read.epoch.0 == 0 {
            // Empty or expired. A record of its next life is of another epoch.
            self.forked = false;
            return Vec::new();
        }
        if read.after != self.read_after() {
            // It was asked for before the place moved: it shows what is next, but not what is lost.
            return if read.epoch == at.epoch { self.take(read) } else { self.read_again() };
        }
        let before_oldest = Point::before(read.epoch, read.oldest, read.chain_before_oldest);
        if read.epoch != at.epoch {
            self.restart(before_oldest);
            // Only a page from the beginning has all of them.
            return if read.after < read.oldest { self.take(read) } else { self.read_again() };
        }
        if self.forked {
            self.forked = false;
            self.agree(&read, before_oldest);
            return self.take(read);
        }
        let first = read.entries.first().map(|(header, _)| header);
        let continues = match first {
            Some(header) if header.seq == at.seq => header.chain == at.chain,
            Some(header) if header.seq == at.seq.next() => header.prev_chain == at.chain,
            // What lay between was evicted.
            Some(header) => header.seq > at.seq,
            None => read.newest >= at.seq,
        };
        if !continues {
            self.forked = true;
            return self.read_again();
        }
        if read.oldest > at.seq.next() {
            self.set(before_oldest); // what lay between was evicted
        }
        self.take(read)
    }

    fn read_again(&mut self) -> Vec<T> {
        self.partial = true;
        Vec::new()
    }

    /// Goes to the last position that both histories have; else to the beginning of what Redis has.
    fn agree(&mut self, read: &Page<T>, before_oldest: Point) {
        let known = |seq: Seq, chain: Chain| self.recent.contains(&(seq, chain));
        let last = read.entries.iter().rev().find(|(header, _)| known(header.seq, header.chain));
        let place = last.map_or(before_oldest, |(header, _)| Point {
            epoch: read.epoch,
            seq: header.seq,
            chain: header.chain,
        });
        self.restart(place);
    }

    /// Takes what follows the place from a page, and then from the records that wait.
    fn take(&mut self, read: Page<T>) -> Vec<T> {
        let mut entries = Vec::new();
        let last = read.entries.last().map_or(read.newest, |(header, _)| header.seq);
        for (header, entry) in read.entries {
            if self.is_next(&header) {
                self.reach(&header);
                entries.push(entry);
            }
        }
        entries.extend(self.follow());
        let at = self.at.map_or(Seq(0), |at| at.seq);
        // A record that waited may have been taken in place of one that this page does not reach.
        self.partial = at < read.newest || last < read.newest;
        entries
    }

    /// A mailbox that did not exist when the node was listed (epoch 0) begins with seq 1 of any epoch.
    fn is_next(&self, header: &Header) -> bool {
        self.at.is_some_and(|at| match at.epoch {
            Epoch(0) => header.seq == Seq(1),
            epoch => {
                header.epoch == epoch
                    && header.seq == at.seq.next()
                    && header.prev_chain == at.chain
            }
        })
    }

    /// Takes the waiting records that are next, and drops those that cannot become it.
    fn follow(&mut self) -> Vec<T> {
        let mut entries = Vec::new();
        loop {
            let next = self.ahead.iter().find(|(_, waiting)| self.is_next(&waiting.header));
            let Some(key) = next.map(|(key, _)| *key) else { break };
            let Some(Waiting { header, entry, .. }) = self.ahead.remove(&key) else { break };
            self.reach(&header);
            entries.push(entry);
        }
        if let Some(at) = self.at {
            self.ahead.retain(|(epoch, seq), _| *epoch != at.epoch || *seq > at.seq);
        }
        entries
    }

    /// Moves to an entry.
    fn reach(&mut self, header: &Header) {
        self.set(Point { epoch: header.epoch, seq: header.seq, chain: header.chain });
        self.accepted_at_us = header.accepted_at_us;
    }

    fn set(&mut self, at: Point) {
        (self.at, self.accepted_at_us) = (Some(at), 0);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((at.seq, at.chain));
    }

    /// Begins anew at a position; what waits of other epochs, or up to there, is dropped.
    fn restart(&mut self, at: Point) {
        self.recent.clear();
        self.forked = false;
        self.set(at);
        self.ahead.retain(|(epoch, seq), _| *epoch == at.epoch && *seq > at.seq);
    }
}

#[cfg(test)]
mod tests;
