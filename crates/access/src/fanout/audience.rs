//! One audience: its log, its members, and whom of them to tell.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use barid_session::Seconds;
use barid_wire::envelope::{self, Envelope, EnvelopeError};
use barid_wire::frames::{Format, join_delivers};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::fanout::report::Report;
use crate::fanout::room::Room;
use crate::frames::framed;
use crate::handle::Handle;

/// Bytes of messages that share a frame; one alone may be larger.
const RUN_BYTES_MAX: usize = 16 << 10;
/// Runs that are kept for the next readers of the same messages.
const RUNS_MAX: usize = 8;
/// Of so many deliveries one is on the hops: to look at the clock for each would cost more than to find it.
const COUNTED_ONE_IN: u32 = 16;

/// A message, and its frames without a mailbox.
#[derive(Debug)]
pub(super) struct Entry {
    envelope: Envelope,
    at: Seconds,
    /// When its dispatcher queued it for this node, µs in Redis's time; 0: not known.
    dispatched_us: u64,
    /// Its trace is recorded, and nobody was written it yet.
    untraced: bool,
    /// By [`Format`]: not asked for yet, or what came of it.
    frames: [Option<Option<Bytes>>; Format::COUNT],
}

impl Entry {
    /// Taken at `at`; queued for this node at `dispatched_us`.
    ///
    /// # Errors
    /// Its payload is broken.
    pub(super) fn new(
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
        Ok(Self { envelope, at, dispatched_us, untraced, frames })
    }

    fn bytes(&self) -> usize {
        let frames: usize = self.frames.iter().flatten().flatten().map(Bytes::len).sum();
        size_of::<Self>() + self.envelope.payload.len() + frames
    }

    /// Its frame; `None`: it has none of this format (a body that is no JSON).
    fn frame(&mut self, format: Format) -> Option<Bytes> {
        let frame = &mut self.frames[format as usize];
        frame.get_or_insert_with(|| format.encode(&self.envelope).ok()).clone()
    }
}

/// Messages in one WebSocket frame.
#[derive(Debug, Clone)]
pub struct Run {
    first: u32,
    next: u32,
    format: Format,
    /// There was no room for more.
    full: bool,
    /// Messages in it; 0: none of them could be written.
    pub messages: u32,
    /// With its WebSocket header.
    pub frame: Bytes,
}

/// What a member finds.
#[derive(Debug, Default)]
pub struct Read {
    /// Messages that had left the log.
    pub missed: u32,
    /// What to write; `None`: nothing.
    pub run: Option<Run>,
    /// What is to be told of it once it is written; mostly nothing.
    pub report: Option<Box<Report>>,
}

/// Messages by number; numbers wrap.
#[derive(Debug, Default)]
struct Log {
    entries: VecDeque<Entry>,
    /// Number of the oldest one.
    first: u32,
    runs: VecDeque<Run>,
    bytes: usize,
    /// So many of them are [`Entry::untraced`].
    untraced: usize,
    /// It is among those that hold something.
    listed: bool,
}

impl Log {
    fn end(&self) -> u32 {
        self.first.wrapping_add(self.entries.len() as u32)
    }

    fn push(&mut self, entry: Entry, bytes_max: usize) {
        self.bytes += entry.bytes();
        self.untraced += usize::from(entry.untraced);
        self.entries.push_back(entry);
        while self.bytes > bytes_max && self.entries.len() > 1 {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.bytes -= entry.bytes();
            self.untraced -= usize::from(entry.untraced);
            self.first = self.first.wrapping_add(1);
        }
        // They may hold more than is left.
        self.forget_runs();
    }

    fn forget_runs(&mut self) {
        let runs: usize = self.runs.iter().map(|run| run.frame.len()).sum();
        self.bytes -= runs;
        self.runs.clear();
    }

    fn read(&mut self, mailbox: &Arc<str>, format: Format, slot: u32, next: &mut u32) -> Read {
        let behind = self.end().wrapping_sub(*next);
        let missed = behind.saturating_sub(self.entries.len() as u32);
        *next = next.wrapping_add(missed);
        if *next == self.end() {
            return Read { missed, ..Read::default() };
        }
        let run = match self.known(format, *next) {
            Some(run) => run.clone(),
            None => self.join(mailbox, format, *next),
        };
        *next = run.next;
        let report = self.report(mailbox, &run, slot);
        Read { missed, run: Some(run), report }
    }

    /// Each member's turn comes with every message, so that those who are told late count as well as others.
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
        for entry in self.entries.iter_mut().skip(skipped) {
            let before = entry.bytes();
            let frame = entry.frame(format);
            self.bytes += entry.bytes() - before;
            let more = frame.as_ref().map_or(0, Bytes::len);
            full = next != first && bytes + more > RUN_BYTES_MAX;
            if full {
                break;
            }
            bytes += more;
            next = next.wrapping_add(1);
            frames.extend(frame);
        }
        let messages = frames.len() as u32;
        let frame = match messages {
            0 => Bytes::new(),
            _ => framed(format.encoding(), &join_delivers(format.encoding(), mailbox, 0, &frames)),
        };
        let run = Run { first, next, format, full, messages, frame };
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

/// How far its members are told.
#[derive(Debug, Default)]
struct Walk {
    /// Since when; `None`: they know all there is.
    since: Option<Instant>,
    /// The slot to go on with.
    at: usize,
    /// Something came since it began.
    again: bool,
}

/// Sessions that are told the same.
#[derive(Debug)]
pub(super) struct Audience {
    /// What frames call it.
    mailbox: Arc<str>,
    log: Mutex<Log>,
    /// The log's end.
    end: AtomicU32,
    members: Mutex<Slots>,
    walk: Mutex<Walk>,
    room: Arc<Room>,
}

impl Audience {
    pub(super) fn new(mailbox: &str, room: Arc<Room>) -> Self {
        Self {
            mailbox: mailbox.into(),
            log: Mutex::default(),
            end: AtomicU32::new(0),
            members: Mutex::default(),
            walk: Mutex::default(),
            room,
        }
    }

    /// How many members it has.
    pub(super) fn len(&self) -> usize {
        let members = self.members.lock();
        members.slots.len() - members.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a member, who reads what comes from now on.
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
        let next = audience.end.load(Ordering::Acquire);
        Member { audience: Arc::clone(audience), slot, next }
    }

    /// Takes a message. True if the audience held nothing before.
    pub(super) fn append(&self, entry: Entry) -> bool {
        let mut log = self.log.lock();
        let before = log.bytes;
        log.push(entry, self.room.log_bytes_max);
        self.room.changed(before, log.bytes);
        self.end.store(log.end(), Ordering::Release);
        !std::mem::replace(&mut log.listed, true)
    }

    /// Drops what was taken before `oldest`; whether something is left.
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

    /// Bytes that its log holds, counted anew.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let log = self.log.lock();
        let runs: usize = log.runs.iter().map(|run| run.frame.len()).sum();
        runs + log.entries.iter().map(Entry::bytes).sum::<usize>()
    }

    /// Something came: its members have to be told. False if somebody is at it.
    pub(super) fn start_round(&self) -> bool {
        let mut walk = self.walk.lock();
        walk.again = true;
        let first = walk.since.is_none();
        walk.since.get_or_insert_with(Instant::now);
        first
    }

    /// Tells up to so many members; how many it were, and once all are told, how long that took.
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

/// A session's place in an audience.
#[derive(Debug)]
pub struct Member {
    audience: Arc<Audience>,
    slot: u32,
    /// The number of the next message to read.
    next: u32,
}

impl Member {
    /// What is to be written next.
    pub fn read(&mut self, format: Format) -> Read {
        let audience = &*self.audience;
        if audience.end.load(Ordering::Acquire) == self.next {
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

    pub(super) fn leave(&self) {
        let mut members = self.audience.members.lock();
        members.slots[self.slot as usize] = None;
        members.free.push(self.slot);
    }
}
