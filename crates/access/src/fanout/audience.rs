//! One audience: its log, its members, and the wake-ups they are due.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use barid_core::{Audience as Name, Epoch, Position, Seq};
use barid_session::Seconds;
use barid_wire::envelope::{self, Envelope, EnvelopeError, Header};
use barid_wire::frames::{Format, join_delivers};
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};

use crate::fanout::place::{Page, Place, Point};
use crate::fanout::report::Report;
use crate::fanout::room::Room;
use crate::frames::{JOINED_BYTES_MAX, framed};
use crate::handle::Handle;

/// Encoded runs cached for the next readers of the same messages.
const RUNS_MAX: usize = 8;
/// One delivery in this many is measured for the hops: reading the clock for each would cost more than the delivery.
const COUNTED_ONE_IN: u32 = 16;

/// A message, and its frames without a mailbox.
#[derive(Debug)]
pub(super) struct Entry {
    /// The position before it, and its own.
    before: Point,
    own: Point,
    /// It does not follow the message before it: the mailbox's history is another one from here on.
    restarts: bool,
    envelope: Envelope,
    at: Seconds,
    /// When its dispatcher queued it for this node, µs in Redis's time; 0: unknown.
    dispatched_us: u64,
    /// The message is traced, and no member has been sent it yet.
    untraced: bool,
    /// Frames by [`Format`]; unset until the first reader of that format. `Some(None)`: nothing to write.
    frames: [Option<Option<Bytes>>; Format::COUNT],
}

impl Entry {
    /// `at`: when this node received it. `dispatched_us`: when its dispatcher queued it for this node.
    ///
    /// # Errors
    /// The payload cannot be decompressed.
    pub(super) fn new(
        header: &Header,
        envelope: Envelope,
        at: Seconds,
        dispatched_us: u64,
    ) -> Result<Self, EnvelopeError> {
        let frame = Format::Proto.encode(&envelope)?;
        let mut frames = [const { None }; Format::COUNT];
        if envelope.raw_bytes == 0 {
            frames[Format::ProtoZstd as usize] = Some(Some(frame.clone()));
        }
        frames[Format::Proto as usize] = Some(Some(frame));
        let untraced = envelope::is_sampled(&envelope);
        let (before, own) = points(header);
        let restarts = false;
        Ok(Self { before, own, restarts, envelope, at, dispatched_us, untraced, frames })
    }

    /// A message that is not delivered any more: it has expired, was voided, or cannot be read.
    pub(super) fn void(header: &Header, at: Seconds) -> Self {
        let (before, own) = points(header);
        Self {
            before,
            own,
            restarts: false,
            envelope: Envelope::default(),
            at,
            dispatched_us: 0,
            untraced: false,
            frames: [const { Some(None) }; Format::COUNT],
        }
    }

    fn bytes(&self) -> usize {
        let frames: usize = self.frames.iter().flatten().flatten().map(Bytes::len).sum();
        size_of::<Self>() + self.envelope.payload.len() + frames
    }

    /// Its frame; `None`: the message cannot be written in this format (a body that is not JSON).
    fn frame(&mut self, format: Format) -> Option<Bytes> {
        let frame = &mut self.frames[format as usize];
        frame.get_or_insert_with(|| format.encode(&self.envelope).ok()).clone()
    }
}

/// The position before an entry, and its own.
fn points(header: &Header) -> (Point, Point) {
    let Header { epoch, seq, prev_chain, chain, .. } = *header;
    (Point::before(epoch, seq, prev_chain), Point { epoch, seq, chain })
}

/// Messages in one WebSocket frame.
#[derive(Debug, Clone)]
pub struct Run {
    first: u32,
    next: u32,
    format: Format,
    /// The frame has no room for another message.
    full: bool,
    /// The position before its first message, and that of its last one.
    pub(super) before: Point,
    pub(super) last: Point,
    /// Messages in it; 0: none of them could be written.
    pub messages: u32,
    /// With its WebSocket header.
    pub frame: Bytes,
}

/// A subscription that has begun, or goes on in another history: the messages after this position are delivered.
#[derive(Debug)]
pub struct Begun {
    /// The audience.
    pub audience: Name,
    /// The position.
    pub position: Position,
}

/// Result of one read by a member.
#[derive(Debug, Default)]
pub struct Read {
    /// Messages that left the log before the member read them.
    pub missed: u32,
    /// The log no longer has what comes next for the device, or never had: its mailbox is read instead.
    pub behind: bool,
    /// The mailbox's history is another one from this position on, which is returned once: read again.
    pub restart: Option<Point>,
    /// The device is to be told that, or that a subscription has begun, before anything else.
    pub begun: Option<Begun>,
    /// Messages to write; `None` if there are none.
    pub run: Option<Run>,
    /// Reported once the frame is written; `None` for most frames.
    pub report: Option<Box<Report>>,
}

/// The stored messages, by number. Numbers wrap.
#[derive(Debug, Default)]
struct Log {
    entries: VecDeque<Entry>,
    /// Number of the oldest one.
    first: u32,
    runs: VecDeque<Run>,
    bytes: usize,
    /// How many of them are [`Entry::untraced`].
    untraced: usize,
    /// The position of the last message that was appended.
    end: Option<Point>,
    /// Number of the last message that began another history and has left the log.
    popped_restart: Option<u32>,
    /// The hub lists this audience as holding messages.
    listed: bool,
}

impl Log {
    fn end(&self) -> u32 {
        self.first.wrapping_add(self.entries.len() as u32)
    }

    fn push(&mut self, mut entry: Entry, bytes_max: usize) {
        // Forward within an epoch, entries are missing, which their seqs tell.
        entry.restarts = self.end.is_some_and(|Point { epoch, seq, chain }| {
            let before = entry.before;
            let is_fork = before.seq == seq && before.chain != chain;
            before.epoch != epoch || before.seq < seq || is_fork
        });
        self.end = Some(entry.own);
        self.bytes += entry.bytes();
        self.untraced += usize::from(entry.untraced);
        self.entries.push_back(entry);
        while self.bytes > bytes_max && self.entries.len() > 1 {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            if entry.restarts {
                self.popped_restart = Some(self.first);
            }
            self.bytes -= entry.bytes();
            self.untraced -= usize::from(entry.untraced);
            self.first = self.first.wrapping_add(1);
        }
        // Cached runs may be larger than what is left in the log.
        self.forget_runs();
    }

    /// The number of the first message after a position; `None`: the log does not have it.
    fn number_after(&self, point: Point) -> Option<u32> {
        let index = match point.epoch {
            // The mailbox did not exist: all of its first life.
            Epoch(0) => self.entries.iter().rposition(|entry| entry.before.seq == Seq(0)),
            _ => self.entries.iter().position(|entry| entry.before == point),
        };
        index.map(|index| self.first.wrapping_add(index as u32))
    }

    fn forget_runs(&mut self) {
        let runs: usize = self.runs.iter().map(|run| run.frame.len()).sum();
        self.bytes -= runs;
        self.runs.clear();
    }

    fn read(&mut self, mailbox: &Arc<str>, format: Format, slot: u32, member: &mut Next) -> Read {
        let Next { next, told } = member;
        let behind = self.end().wrapping_sub(*next);
        let missed = behind.saturating_sub(self.entries.len() as u32);
        let is_missed = |number: u32| number.wrapping_sub(*next) < missed;
        let missed_restart = self.popped_restart.is_some_and(is_missed);
        *next = next.wrapping_add(missed);
        let Some(entry) = self.entries.get(next.wrapping_sub(self.first) as usize) else {
            return Read { missed, ..Read::default() };
        };
        if (entry.restarts || missed_restart) && !std::mem::replace(told, true) {
            return Read { missed, restart: Some(entry.before), ..Read::default() };
        }
        *told = false;
        let run = match self.known(format, *next) {
            Some(run) => run.clone(),
            None => self.join(mailbox, format, *next),
        };
        *next = run.next;
        let report = self.report(mailbox, &run, slot);
        Read { missed, run: Some(run), report, ..Read::default() }
    }

    /// Every member is sampled equally often, so that members woken late count as much as others.
    fn report(&mut self, mailbox: &Arc<str>, run: &Run, slot: u32) -> Option<Box<Report>> {
        let counts = slot.wrapping_add(run.first).is_multiple_of(COUNTED_ONE_IN);
        if !counts && self.untraced == 0 {
            return None;
        }
        let first = run.first.wrapping_sub(self.first) as usize;
        let count = run.next.wrapping_sub(run.first) as usize;
        let mut entries = self.entries.iter_mut().skip(first).take(count).peekable();
        let oldest = entries.peek()?;
        let hop = counts.then_some((oldest.dispatched_us, oldest.envelope.produced_at_ms));
        let untraced = if self.untraced == 0 { 0 } else { count };
        let traced: Vec<_> = entries
            .take(untraced)
            .filter_map(|entry| std::mem::take(&mut entry.untraced).then(|| entry.envelope.clone()))
            .collect();
        self.untraced -= traced.len();
        let is_seen = hop.is_some() || !traced.is_empty();
        is_seen.then(|| Box::new(Report { mailbox: Arc::clone(mailbox), hop, traced }))
    }

    fn known(&self, format: Format, first: u32) -> Option<&Run> {
        let whole = |run: &&Run| run.full || run.next == self.end();
        self.runs.iter().find(|run| run.first == first && run.format == format && whole(run))
    }

    fn join(&mut self, mailbox: &str, format: Format, first: u32) -> Run {
        let skipped = first.wrapping_sub(self.first) as usize;
        let (mut frames, mut bytes, mut next, mut full) = (Vec::new(), 0, first, false);
        let before_first = self.entries.get(skipped).map_or(Point::NONE, |entry| entry.before);
        let mut last = before_first;
        for entry in self.entries.iter_mut().skip(skipped) {
            let before = entry.bytes();
            let frame = entry.frame(format);
            self.bytes += entry.bytes() - before;
            let more = frame.as_ref().map_or(0, Bytes::len);
            full = next != first && (bytes + more > JOINED_BYTES_MAX || entry.restarts);
            if full {
                break;
            }
            bytes += more;
            next = next.wrapping_add(1);
            last = entry.own;
            frames.extend(frame);
        }
        let messages = frames.len() as u32;
        let frame = match messages {
            0 => Bytes::new(),
            _ => framed(format.encoding(), &join_delivers(format.encoding(), mailbox, 0, &frames)),
        };
        let run = Run { first, next, format, full, before: before_first, last, messages, frame };
        if self.runs.len() == RUNS_MAX
            && let Some(oldest) = self.runs.pop_front()
        {
            self.bytes -= oldest.frame.len();
        }
        self.bytes += run.frame.len();
        self.runs.push_back(run.clone());
        run
    }
}

/// Members by slot.
#[derive(Debug, Default)]
struct Slots {
    slots: Vec<Option<Arc<Handle>>>,
    free: Vec<u32>,
}

/// Progress of waking the members.
#[derive(Debug, Default)]
struct Walk {
    /// When the round began; `None`: every member has been woken for all messages.
    since: Option<Instant>,
    /// The next slot to wake.
    at: usize,
    /// A message arrived since the round began, so another round follows.
    again: bool,
}

/// The sessions that receive the same messages.
#[derive(Debug)]
pub(super) struct Audience {
    /// The audience's name in frames.
    mailbox: Arc<str>,
    log: Mutex<Log>,
    /// The number after the last message of the log.
    end: AtomicU32,
    members: Mutex<Slots>,
    walk: Mutex<Walk>,
    standing: Mutex<Standing>,
    /// This node is listed as having members: it receives every message that is accepted from now on.
    live: AtomicBool,
    room: Arc<Room>,
}

/// Where the node stands in the audience's mailbox. Locked before the log.
#[derive(Debug, Default)]
struct Standing {
    place: Place<Entry>,
    /// A reading of the mailbox is scheduled or under way.
    reading: bool,
}

/// What followed from a record, a page or a head.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Messages that the members can read now.
    pub appended: usize,
    /// Messages that found no room; every member misses them.
    pub dropped: usize,
    /// The log was empty before.
    pub begun: bool,
    /// The node is listed for the first time: subscriptions have begun.
    pub opened: bool,
    /// The mailbox has to be read; returned once until it has been.
    pub read: bool,
}

impl Audience {
    pub(super) fn new(mailbox: &str, room: Arc<Room>) -> Self {
        Self {
            mailbox: mailbox.into(),
            log: Mutex::default(),
            end: AtomicU32::new(0),
            members: Mutex::default(),
            walk: Mutex::default(),
            standing: Mutex::default(),
            live: AtomicBool::new(false),
            room,
        }
    }

    /// The node is listed, and the mailbox ends at `head`.
    pub(super) fn open(&self, head: Point) -> Progress {
        let mut standing = self.standing.lock();
        let opened = standing.place.at().is_none();
        if opened {
            // The first message may already be of another history.
            self.log.lock().end = Some(head);
        }
        let entries = standing.place.open(head);
        self.live.store(true, Ordering::Release);
        Progress { opened, ..self.progress(standing, entries) }
    }

    /// A record arrived.
    pub(super) fn receive(&self, header: Header, entry: Entry) -> Progress {
        let mut standing = self.standing.lock();
        let entries = standing.place.receive(header, entry, !self.room.is_full());
        self.progress(standing, entries)
    }

    /// Where to read the mailbox from, as the seq before the first entry wanted; `None`: what was missing has arrived.
    pub(super) fn read_after(&self) -> Option<Seq> {
        let mut standing = self.standing.lock();
        standing.reading = standing.place.is_behind();
        standing.reading.then(|| standing.place.read_after())
    }

    /// Whether the message with this number in the shard's journal is the node's last; false: unknown.
    pub(super) fn is_numbered(&self, number: u64) -> bool {
        self.standing.lock().place.is_numbered(number)
    }

    /// The mailbox was read for a device, up to here.
    pub(super) fn hear_of(&self, epoch: Epoch, newest: Seq) -> Progress {
        let mut standing = self.standing.lock();
        standing.place.see(epoch, newest);
        self.progress(standing, Vec::new())
    }

    /// The mailbox was read.
    pub(super) fn page(&self, page: Page<Entry>) -> Progress {
        let mut standing = self.standing.lock();
        let entries = standing.place.page(page);
        standing.reading = false;
        self.progress(standing, entries)
    }

    /// Appends the entries, while no other thread moves the place.
    fn progress(&self, mut standing: MutexGuard<'_, Standing>, entries: Vec<Entry>) -> Progress {
        let mut progress = Progress::default();
        for entry in entries {
            if self.room.is_full() {
                progress.dropped += 1;
            } else {
                progress.begun |= self.append(entry);
                progress.appended += 1;
            }
        }
        progress.read =
            standing.place.is_behind() && !std::mem::replace(&mut standing.reading, true);
        progress
    }

    /// Number of members.
    pub(super) fn len(&self) -> usize {
        let members = self.members.lock();
        members.slots.len() - members.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a member. It reads the messages that arrive from now on.
    pub(super) fn join(audience: &Arc<Self>, handle: &Arc<Handle>) -> Member {
        let mut members = audience.members.lock();
        let handle = Some(Arc::clone(handle));
        let slot = match members.free.pop() {
            Some(slot) => {
                members.slots[slot as usize] = handle;
                slot
            }
            None => {
                members.slots.push(handle);
                members.slots.len() as u32 - 1
            }
        };
        drop(members);
        let next = Next { next: audience.end.load(Ordering::Acquire), told: false };
        Member { audience: Arc::clone(audience), slot, next }
    }

    /// Appends a message. Returns whether the log was empty before.
    fn append(&self, entry: Entry) -> bool {
        let mut log = self.log.lock();
        let before = log.bytes;
        log.push(entry, self.room.log_bytes_max);
        self.room.changed(before, log.bytes);
        self.end.store(log.end(), Ordering::Release);
        !std::mem::replace(&mut log.listed, true)
    }

    /// Drops messages that were received before `oldest`. Returns whether any are left.
    pub(super) fn forget_before(&self, oldest: Seconds) -> bool {
        let mut log = self.log.lock();
        let before = log.bytes;
        while log.entries.front().is_some_and(|entry| entry.at < oldest) {
            log.pop();
        }
        if log.entries.is_empty() {
            (log.entries, log.runs, log.listed) = (VecDeque::new(), VecDeque::new(), false);
        }
        self.room.changed(before, log.bytes);
        log.listed
    }

    /// Recounts the bytes that the log holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let log = self.log.lock();
        let runs: usize = log.runs.iter().map(|run| run.frame.len()).sum();
        runs + log.entries.iter().map(Entry::bytes).sum::<usize>()
    }

    /// Starts a round of wake-ups for a new message. Returns false if one is under way, which then covers the message.
    pub(super) fn start_round(&self) -> bool {
        let mut walk = self.walk.lock();
        walk.again = true;
        let first = walk.since.is_none();
        walk.since.get_or_insert_with(Instant::now);
        first
    }

    /// Wakes up to `count_max` members. Returns how many were woken and, at the end of a round, how long the round
    /// took.
    pub(super) fn notify(&self, count_max: usize) -> (usize, Option<Duration>) {
        let mut walk = self.walk.lock();
        if walk.at == 0 {
            walk.again = false;
        }
        let members = self.members.lock();
        let mut notified = 0;
        while notified < count_max
            && let Some(slot) = members.slots.get(walk.at)
        {
            if let Some(handle) = slot {
                handle.notify_fanout();
                notified += 1;
            }
            walk.at += 1;
        }
        if walk.at < members.slots.len() {
            return (notified, None);
        }
        walk.at = 0;
        if walk.again {
            return (notified, None);
        }
        (notified, walk.since.take().map(|since| since.elapsed()))
    }
}

/// A session's membership of an audience, with its read position.
#[derive(Debug)]
pub struct Member {
    audience: Arc<Audience>,
    slot: u32,
    next: Next,
}

/// Where a member reads.
#[derive(Debug, Clone, Copy)]
struct Next {
    /// The number of the next message to read.
    next: u32,
    /// The member has been told that the history is another one from there on.
    told: bool,
}

impl Member {
    /// Reads the next run of messages.
    pub fn read(&mut self, format: Format) -> Read {
        let audience = &*self.audience;
        if audience.end.load(Ordering::Acquire) == self.next.next {
            return Read::default();
        }
        let mut log = audience.log.lock();
        let before = log.bytes;
        let read = log.read(&audience.mailbox, format, self.slot, &mut self.next);
        if log.bytes != before {
            audience.room.changed(before, log.bytes);
        }
        read
    }

    /// Whether the node receives the audience's messages.
    pub(super) fn is_live(&self) -> bool {
        self.audience.live.load(Ordering::Acquire)
    }

    /// The position of the last message before the one that the member reads next; of epoch 0: none is known.
    pub(super) fn point(&self) -> Point {
        let standing = self.audience.standing.lock();
        let log = self.audience.log.lock();
        let ahead = log.end().wrapping_sub(self.next.next) as usize;
        // A member that is behind the log reads on from its oldest message.
        let index = log.entries.len().saturating_sub(ahead);
        let next = log.entries.get(index).map(|entry| entry.before);
        next.or(standing.place.at()).unwrap_or(Point::NONE)
    }

    /// Has the member read the log from just after this position. Returns false if the log does not have it.
    pub(super) fn enter(&mut self, point: Point) -> bool {
        let standing = self.audience.standing.lock();
        let log = self.audience.log.lock();
        let next = match log.number_after(point) {
            Some(number) => number,
            None if standing.place.at() == Some(point) => log.end(),
            None => return false,
        };
        // A device that stands right before the next message knows the history that this begins.
        let entry = log.entries.get(next.wrapping_sub(log.first) as usize);
        self.next = Next { next, told: entry.is_some_and(|entry| entry.before == point) };
        true
    }

    pub(super) fn leave(&self) {
        let mut members = self.audience.members.lock();
        members.slots[self.slot as usize] = None;
        members.free.push(self.slot);
    }
}
