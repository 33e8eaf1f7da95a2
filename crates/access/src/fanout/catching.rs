//! A session that is behind an audience's log, because its device returns or reads slowly: it reads the mailbox from
//! where its device stands, until it reaches the log. Pure: no Redis, no clock.

use barid_core::{Audience, Chain, Epoch, Position, Seq};
use barid_mailbox::Page;
use barid_wire::envelope::{self, Envelope, Header};
use bytes::Bytes;
use tokio::time::Instant;

use crate::fanout::pages::Pages;
use crate::fanout::place::Point;

/// Bytes of bodies that a page gives a device at once, before compression; one message alone may be larger.
const SENT_BYTES: usize = 64 << 10;

/// Where a device stands.
#[derive(Debug)]
pub(super) struct Catching {
    pub audience: Audience,
    /// The last entry that the device has. Without a chain, until the mailbox has told it.
    epoch: Epoch,
    seq: Seq,
    chain: Option<Chain>,
    /// The position was compared with the mailbox, or comes from it.
    verified: bool,
    /// A page is being read.
    reading: bool,
    /// There is nothing to read until the node has heard of more.
    at_end: bool,
    /// The node has heard of more while a page was being read.
    again: bool,
    /// When the device named its position.
    born: Instant,
    /// A page contradicted the device. It may have been read before the device got what it has: only a page that was
    /// asked for since it named its position shows that the history is another one.
    doubts: bool,
    /// A shared page ended before the device's position: its entries are large.
    alone: bool,
}

/// What a page has for the device.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Entries to send, in order.
    pub entries: Vec<Envelope>,
    /// The device's position is of another history: it starts anew.
    pub reset: bool,
}

impl Catching {
    /// A device that names a position. Without a chain, a fork of the history is not noticed.
    pub fn new(audience: Audience, position: Position) -> Self {
        let Position { epoch, seq, chain, .. } = position;
        Self {
            audience,
            epoch,
            seq,
            chain,
            verified: false,
            reading: false,
            at_end: false,
            again: false,
            born: Instant::now(),
            doubts: false,
            alone: false,
        }
    }

    /// A device that was sent everything up to here, and that the log left behind. A page that was read before does not
    /// show what it lacks.
    pub fn behind(audience: Audience, at: Point) -> Self {
        Self { verified: true, doubts: true, ..Self::new(audience, at.into()) }
    }

    /// The device's position; `None` until the mailbox has confirmed it.
    pub fn point(&self) -> Option<Point> {
        let chain = self.chain.filter(|_| self.verified)?;
        Some(Point { epoch: self.epoch, seq: self.seq, chain })
    }

    /// The position as named.
    pub fn position(&self) -> Position {
        let Self { epoch, seq, chain, .. } = *self;
        Position { epoch, seq, chain, ..Default::default() }
    }

    /// Whether a page is being read.
    pub fn is_reading(&self) -> bool {
        self.reading
    }

    /// Where to read, as the seq before the first entry wanted, and since when the page must have been asked for; `None`:
    /// not now. The device's own last entry is read as well, to compare its chain.
    pub fn read_after(&mut self) -> Option<(Seq, Option<Instant>)> {
        if self.reading || self.at_end {
            return None;
        }
        self.reading = true;
        let after = if self.verified { self.seq } else { Seq(self.seq.0.saturating_sub(1)) };
        Some((
            if self.alone { after } else { Pages::begin(after) },
            self.doubts.then_some(self.born),
        ))
    }

    /// The node has heard of more.
    pub fn resume(&mut self) {
        self.at_end = false;
        self.again = self.reading;
    }

    /// Handles a page that was read after `after`. Entries that have expired at `now_ms` are left out.
    pub fn page(&mut self, after: Seq, page: &Page, now_ms: u64) -> Found {
        let mut found = Found::default();
        self.reading = false;
        let before = (self.seq, self.verified, self.alone);
        // An entry that cannot be read keeps its place.
        let entry = |entry: &Bytes| {
            let header = Header::parse(entry).ok()?;
            Some((header, envelope::decode(entry.clone()).ok().map(|(_, envelope)| envelope)))
        };
        let entries: Vec<(Header, Option<Envelope>)> =
            page.entries.iter().filter_map(entry).collect();
        let before_oldest = Point::before(page.epoch, page.oldest, page.chain_before_oldest);
        found.reset = page.epoch != self.epoch
            || self.seq > page.newest
            || !self.agrees(&entries, before_oldest);
        // A device of epoch 0 has nothing that a page could lack.
        if found.reset && !self.doubts && self.epoch.0 != 0 {
            self.doubts = true;
            return Found::default();
        }
        self.doubts = false;
        self.verified = true;
        if found.reset || self.seq < before_oldest.seq {
            self.set(before_oldest); // in the latter case, entries in between were evicted
        }
        // A page that does not begin where it has to is of no use.
        let is_end = after <= self.seq && self.seq >= page.newest;
        let last = entries.last().map_or(Seq(0), |(header, _)| header.seq);
        self.alone = !found.reset && last < page.newest && last <= self.seq;
        let mut bytes = 0;
        for (header, envelope) in entries {
            if bytes >= SENT_BYTES {
                break; // the page is shared: it is asked for again once these have been sent
            }
            if header.seq == self.seq.next() && Some(header.prev_chain) == self.chain {
                self.set(Point { epoch: header.epoch, seq: header.seq, chain: header.chain });
                let delivered = |envelope: &Envelope| {
                    envelope.voided == 0 && !envelope::expired(envelope, now_ms)
                };
                let envelope = envelope.filter(delivered);
                bytes += envelope.as_ref().map_or(0, body_bytes);
                found.entries.extend(envelope);
            }
        }
        // Nothing came of it: not again before the node has heard of more.
        let is_idle = !found.reset && before == (self.seq, self.verified, self.alone);
        self.at_end = (is_end || is_idle) && !std::mem::take(&mut self.again);
        found
    }

    fn set(&mut self, point: Point) {
        (self.epoch, self.seq, self.chain) = (point.epoch, point.seq, Some(point.chain));
    }

    /// Whether the mailbox's history contains the device's position, as far as the page shows. A device that names no
    /// chain takes the mailbox's.
    fn agrees(&mut self, entries: &[(Header, Option<Envelope>)], oldest: Point) -> bool {
        let chain = if self.seq == oldest.seq {
            Some(oldest.chain)
        } else {
            let own = entries.iter().find(|(header, _)| header.seq == self.seq);
            let next = entries.iter().find(|(header, _)| header.seq == self.seq.next());
            own.map(|(header, _)| header.chain).or(next.map(|(header, _)| header.prev_chain))
        };
        let Some(chain) = chain else { return true };
        *self.chain.get_or_insert(chain) == chain
    }
}

/// Bytes of a body, before compression.
fn body_bytes(envelope: &Envelope) -> usize {
    envelope.payload.len().max(envelope.raw_bytes as usize)
}

#[cfg(test)]
mod tests {
    use barid_core::GroupId;
    use barid_wire::envelope::{HEADER_BYTES, encode_body};

    use super::*;

    /// A mailbox of `newest` entries that has evicted some.
    fn page(epoch: u64, oldest: u64, newest: u64, salt: u32, after: u64) -> Page {
        let mut chain = Chain::START;
        let (mut entries, mut before) = (Vec::new(), chain);
        for seq in 1..=newest {
            let prev_chain = chain;
            chain = chain.step(salt + seq as u32);
            if seq + 1 == oldest {
                before = chain;
            }
            if seq >= oldest && seq > after {
                let (epoch, seq) = (Epoch(epoch), Seq(seq));
                let header = Header { epoch, seq, prev_chain, chain, accepted_at_us: 0 };
                let body = Envelope { id: format!("m{}", seq.0), ..Default::default() };
                entries.push([&header.encode()[..], &encode_body(body)].concat().into());
            }
        }
        let (oldest, newest) = (Seq(oldest), Seq(newest));
        let chain_before_oldest = before;
        let epoch = Epoch(epoch);
        Page { epoch, oldest, chain_before_oldest, newest, entries, cursor: None }
    }

    fn chain_at(salt: u32, seq: u64) -> Chain {
        (1..=seq).fold(Chain::START, |chain, seq| chain.step(salt + seq as u32))
    }

    fn at(epoch: u64, seq: u64, chain: Option<Chain>) -> Catching {
        let audience = Audience::Group(GroupId::new("eng").unwrap());
        let position = Position { epoch: Epoch(epoch), seq: Seq(seq), chain, ..Default::default() };
        Catching::new(audience, position)
    }

    /// Reads until there is nothing more; the ids, and whether there was a reset.
    fn read(device: &mut Catching, mailbox: impl Fn(u64) -> Page) -> (Vec<String>, bool) {
        let (mut ids, mut reset) = (Vec::new(), false);
        for _ in 0..10 {
            let Some((after, _)) = device.read_after() else { return (ids, reset) };
            let found = device.page(after, &mailbox(after.0), 0);
            reset |= found.reset;
            ids.extend(found.entries.into_iter().map(|entry| entry.id));
        }
        panic!("reads for ever: {device:?}");
    }

    fn ids(seqs: std::ops::RangeInclusive<u64>) -> Vec<String> {
        seqs.map(|seq| format!("m{seq}")).collect()
    }

    #[test]
    fn a_page_from_before_the_device_got_its_last_message_does_not_reset_it() {
        let mut device = at(7, 65, Some(chain_at(0, 65)));
        let (after, since) = device.read_after().unwrap();
        assert_eq!((after, since), (Seq(64), None));
        let old = device.page(after, &page(7, 1, 64, 0, 64), 0);
        assert!(!old.reset && device.point().is_none());
        let (after, since) = device.read_after().unwrap();
        assert!(since.is_some());
        let found = device.page(after, &page(7, 1, 66, 0, after.0), 0);
        assert_eq!((found.reset, found.entries.len()), (false, 1));
        // Wake-ups while a page is being read cause no further reading beside it.
        let (after, _) = device.read_after().unwrap();
        device.resume();
        assert_eq!(device.read_after(), None);
        device.page(after, &page(7, 1, 66, 0, after.0), 0);
        assert!(device.read_after().is_some(), "it was woken meanwhile");
    }

    #[test]
    fn hazard_169_what_a_page_gives_at_once_is_bounded_before_compression() {
        let mut page = page(7, 1, 8, 0, 0);
        for entry in &mut page.entries {
            let body = Envelope { raw_bytes: 30_000, ..Default::default() };
            *entry = [&entry[..HEADER_BYTES], &encode_body(body)].concat().into();
        }
        let mut device = at(7, 0, None);
        let mut sent = Vec::new();
        while let Some((after, _)) = device.read_after() {
            sent.push(device.page(after, &page, 0).entries.len());
        }
        assert_eq!(sent, [3, 3, 2, 0]);
    }

    #[test]
    fn a_device_reads_what_came_after_its_position_and_all_of_another_history() {
        for (mut device, mailbox, wanted, reset) in [
            (at(7, 3, Some(chain_at(0, 3))), (7, 1, 6, 0), ids(4..=6), false),
            (at(7, 3, None), (7, 1, 6, 0), ids(4..=6), false),
            (at(7, 6, Some(chain_at(0, 6))), (7, 1, 6, 0), vec![], false),
            (at(7, 0, None), (7, 1, 6, 0), ids(1..=6), false),
            // Evicted in between.
            (at(7, 1, Some(chain_at(0, 1))), (7, 4, 6, 0), ids(4..=6), false),
            (at(7, 3, Some(chain_at(0, 3))), (7, 4, 6, 0), ids(4..=6), false),
            // A failover: another history with the same epoch, at the same seq and behind the end.
            (at(7, 3, Some(chain_at(0, 3))), (7, 1, 6, 50), ids(1..=6), true),
            (at(7, 6, Some(chain_at(0, 6))), (7, 1, 6, 50), ids(1..=6), true),
            (at(7, 9, Some(chain_at(0, 9))), (7, 1, 6, 0), ids(1..=6), true),
            // A new epoch.
            (at(7, 3, Some(chain_at(0, 3))), (8, 1, 2, 0), ids(1..=2), true),
            (at(7, 3, Some(chain_at(0, 3))), (0, 1, 0, 0), vec![], true),
        ] {
            let shown = format!("{device:?} {mailbox:?}");
            let (epoch, oldest, newest, salt) = mailbox;
            let of = |after| page(epoch, oldest, newest, salt, after);
            assert_eq!(read(&mut device, of), (wanted, reset), "{shown}");
            let end =
                Point { epoch: Epoch(epoch), seq: Seq(newest), chain: chain_at(salt, newest) };
            assert_eq!(device.point(), Some(end), "{shown}");
        }
    }
}
