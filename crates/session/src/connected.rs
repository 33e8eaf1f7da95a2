//! A connected session: decides which entries are written, tracks acknowledgements, and decides when to read the
//! mailbox.
//!
//! An entry is written only if it follows the last written one: same epoch, next position, and previous chain equal
//! to the last chain. Otherwise the session syncs: it reads pages of the mailbox from its own position. If the
//! mailbox contradicts what was written, the session repeats the device's last acknowledgement: the mailbox compares
//! chains, and resets the device if its history differs.

use barid_core::limits::RESENDS_MAX;
use barid_core::mailbox::{AckOutcome, ConfirmOutcome, Page};
use barid_core::{Chain, CloseCode, Epoch, Generation, Position, ReceiptSet, Seq};
use barid_wire::envelope::{self, Envelope, Header, SkipReason};
use barid_wire::v1::{self, ReceiptKind};

use crate::closing::Closing;
use crate::effect::{AckPoint, Close, Effect, Mark, ReadFrom, SyncCause};
use crate::identity::{Claims, Identity};
use crate::settings::Settings;
use crate::window::{PushedAt, Sent, Wanted, Window};

/// Payload bytes (uncompressed) after which the messages of a page go into another frame.
const FRAME_BYTES: usize = 64 << 10;

/// Result of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// The entry is next: write it now.
    Write,
    /// The entry is next, but not for this device: the effects contain a skip.
    Skipped,
    /// The entry is not written.
    Dropped(Dropped),
}

/// Why a push was not written. A sync delivers it, unless the device has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The device has the entry.
    Known,
    /// The session is reading its mailbox.
    Syncing,
    /// Too many messages are unacknowledged.
    Window,
    /// An earlier position is missing.
    Gap,
    /// The entry belongs to another history.
    Fork,
}

/// How soon an acknowledgement has to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckUrgency {
    /// After the interval between acknowledgements, together with later ones.
    Paced,
    /// At once: the session waits for the answer.
    Urgent,
}

/// Whether the mailbox's history is known to be the one that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    Sure,
    /// They contradict each other; the mailbox is comparing the acknowledged position.
    Asking,
    /// They agree up to the acknowledged position; a sync shows whether they do after it.
    Checked,
}

/// A connected session.
#[derive(Debug)]
pub struct Connected {
    identity: Identity,
    settings: Settings,
    epoch: Epoch,
    generation: Generation,
    window: Window,
    /// The last position of the current pass; below `window.high` only in a re-send.
    at: Mark,
    /// The highest known position of the mailbox.
    newest: Seq,
    /// Why the mailbox has to be read.
    wanted: Option<SyncCause>,
    reading: bool,
    /// The page being read belongs to a void history.
    stale_page: bool,
    /// An acknowledgement is under way.
    acking: bool,
    ack_wanted: bool,
    /// When the mailbox last answered an acknowledgement, ms, modulo 2^32.
    ack_answered_ms: u32,
    trust: Trust,
    /// Re-sends since the last acknowledgement.
    resends: u32,
    /// Entries after the position in Hello were evicted without an acknowledgement, so the device's cursor does not
    /// show that it had them.
    evicted: bool,
    /// The device sends acks without a generation, so that an ack refers to the last Welcome that it has read.
    unnamed_acks: bool,
    /// The positions started anew during this connection.
    started_over: bool,
}

impl Connected {
    pub(crate) fn new(
        identity: Identity,
        cursor: Position,
        newest: Seq,
        evicted: bool,
        settings: Settings,
    ) -> Self {
        let at = mark_of(cursor);
        Self {
            identity,
            settings,
            epoch: cursor.epoch,
            generation: cursor.generation,
            window: Window::new(at),
            at,
            newest,
            wanted: (newest > at.seq).then_some(SyncCause::Connect),
            reading: false,
            stale_page: false,
            acking: false,
            ack_wanted: false,
            ack_answered_ms: 0,
            trust: Trust::Sure,
            resends: 0,
            evicted,
            unnamed_acks: false,
            started_over: false,
        }
    }

    /// The session's identity.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The generation in frames.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The device's position, for Welcome and confirmations.
    pub fn position(&self) -> Position {
        let acked = self.window.acked();
        Position {
            epoch: self.epoch,
            generation: self.generation,
            seq: acked.seq,
            chain: Some(acked.chain),
        }
    }

    /// Handles a pushed entry.
    pub fn push(
        &mut self,
        header: &Header,
        entry: &Envelope,
        now_us: u64,
        out: &mut Vec<Effect>,
    ) -> Pushed {
        if header.epoch != self.epoch {
            self.contradicted(out);
            return Pushed::Dropped(Dropped::Fork);
        }
        if header.seq <= self.at.seq.max(self.window.high().seq) {
            return match self.window.chain_at(header.seq) {
                Some(chain) if chain != header.chain => {
                    self.contradicted(out);
                    Pushed::Dropped(Dropped::Fork)
                }
                _ => Pushed::Dropped(Dropped::Known),
            };
        }
        self.newest = self.newest.max(header.seq);
        if self.reading || self.wanted.is_some() || self.trust == Trust::Asking {
            return Pushed::Dropped(Dropped::Syncing);
        }
        if header.seq != self.at.seq.next() {
            self.wanted = Some(SyncCause::Gap);
            return Pushed::Dropped(Dropped::Gap);
        }
        if header.prev_chain != self.at.chain {
            self.contradicted(out);
            return Pushed::Dropped(Dropped::Fork);
        }
        if self.window.len() >= self.settings.unacked_max {
            self.wanted = Some(SyncCause::Window);
            return Pushed::Dropped(Dropped::Window);
        }
        let pushed = PushedAt { written_us: now_us, produced_ms: entry.produced_at_ms };
        match self.advance(header, entry, Some(pushed), now_us, out) {
            None => Pushed::Write,
            Some(why) => {
                out.push(Effect::Skip { to: self.at, why });
                Pushed::Skipped
            }
        }
    }

    /// Handles that the node dropped pushes.
    pub fn missed(&mut self) {
        self.want(SyncCause::Overflow);
    }

    /// Handles a page that was read.
    pub fn page(&mut self, page: Page, now_us: u64, out: &mut Vec<Effect>) {
        self.reading = false;
        if std::mem::take(&mut self.stale_page) {
            return;
        }
        if page.epoch != self.epoch || page.newest < self.window.acked().seq {
            return self.contradicted(out);
        }
        let before = self.at;
        if page.oldest > self.at.seq.next() {
            let to = Mark { seq: Seq(page.oldest.0 - 1), chain: page.chain_before_oldest };
            if self.window.chain_at(to.seq).is_some_and(|chain| chain != to.chain) {
                return self.contradicted(out); // what was written there belongs to another history
            }
            self.skip_what_is_gone(to, page.cursor, out);
        }
        // The device acknowledged everything in the page while it was being read.
        let last = page.entries.last().and_then(|entry| Header::parse(entry).ok());
        let is_overtaken = last.is_some_and(|last| last.seq <= self.at.seq);
        if !self.write_page(page.entries, now_us, out) {
            return self.contradicted(out);
        }
        self.trust = Trust::Sure;
        self.after_page(before, page.newest, is_overtaken, out);
    }

    fn after_page(&mut self, before: Mark, newest: Seq, is_overtaken: bool, out: &mut Vec<Effect>) {
        let full = self.window.len() >= self.settings.unacked_max;
        if self.at == before && !full && !is_overtaken {
            if self.at.seq < newest {
                let text = "the mailbox has an entry that cannot be read";
                out.push(Effect::Close(Close::new(CloseCode::Overloaded, text)));
            }
            // The mailbox has forgotten a pushed entry, or was read before it was accepted. In the latter case the
            // retry timer leads to another read.
            self.newest = newest;
        }
        self.newest = self.newest.max(newest);
        if self.at.seq < self.newest {
            self.want(if full { SyncCause::Window } else { SyncCause::Gap });
        }
    }

    /// Skips positions up to `to`, which the mailbox no longer has. Those up to the device's cursor were acknowledged
    /// in an earlier session whose last ack arrived late; those after the cursor were evicted.
    fn skip_what_is_gone(&mut self, to: Mark, cursor: Option<Position>, out: &mut Vec<Effect>) {
        let evicted = std::mem::take(&mut self.evicted);
        let own = cursor.filter(|cursor| !evicted && cursor.generation == self.generation);
        let own = own.map(mark_of);
        let own = own.map(|own| if own.seq >= to.seq { to } else { own });
        if let Some(own) = own.filter(|own| own.seq > self.at.seq) {
            self.skip_to(own);
            out.push(Effect::Skip { to: own, why: SkipReason::Acknowledged });
        }
        if to.seq > self.at.seq {
            self.skip_to(to);
            out.push(Effect::Skip { to, why: SkipReason::Evicted });
        }
    }

    /// Writes the entries of a page. Returns false if the page contradicts what was written.
    fn write_page(
        &mut self,
        entries: Vec<bytes::Bytes>,
        now_us: u64,
        out: &mut Vec<Effect>,
    ) -> bool {
        let mut batch = Batch::default();
        let mut follows = true;
        for bytes in entries {
            // An entry with a broken body still has a position: it is skipped.
            let Ok(header) = Header::parse(&bytes) else { break };
            if header.seq <= self.at.seq {
                continue;
            }
            let known = self.window.chain_at(header.seq);
            follows = header.seq == self.at.seq.next()
                && header.prev_chain == self.at.chain
                && known.is_none_or(|chain| chain == header.chain);
            let first = header.seq > self.window.high().seq;
            if !follows || first && self.window.len() >= self.settings.unacked_max {
                break;
            }
            match envelope::decode(bytes) {
                Ok((_, entry)) => match self.advance(&header, &entry, None, now_us, out) {
                    None => batch.deliver(entry, out),
                    Some(why) => batch.skip(self.at, why, out),
                },
                Err(_) => {
                    self.skip_to(mark_at(&header));
                    batch.skip(self.at, SkipReason::Unspecified, out);
                }
            }
        }
        batch.finish(out);
        follows
    }

    /// Advances over the next entry. Returns why it is skipped; `None` if it is delivered.
    fn advance(
        &mut self,
        header: &Header,
        entry: &Envelope,
        pushed: Option<PushedAt>,
        now_us: u64,
        out: &mut Vec<Effect>,
    ) -> Option<SkipReason> {
        let mark = mark_at(header);
        if let Some(why) = self.skips(entry, now_us) {
            self.skip_to(mark);
            if why == SkipReason::Expired {
                let wanted = wanted(entry);
                self.receipt(ReceiptSet::EXPIRED, wanted.as_deref(), mark.seq, now_us, out);
            }
            return Some(why);
        }
        self.at = mark;
        if mark.seq > self.window.high().seq {
            let wanted = wanted(entry);
            self.receipt(ReceiptSet::SENT, wanted.as_deref(), mark.seq, now_us, out);
            self.window.sent(Sent { mark, to: mark, pushed, receipt: wanted });
        }
        None
    }

    fn skips(&self, entry: &Envelope, now_us: u64) -> Option<SkipReason> {
        if entry.voided() != SkipReason::Unspecified {
            return Some(entry.voided());
        }
        if !entry.device.is_empty() && entry.device != self.identity.device.as_str() {
            return Some(SkipReason::OtherDevice);
        }
        envelope::expired(entry, now_us / 1000).then_some(SkipReason::Expired)
    }

    /// Advances over skipped positions. Messages among them that were written earlier (in a re-send) no longer need an
    /// acknowledgement.
    fn skip_to(&mut self, to: Mark) {
        let gone = |sent: &Sent| sent.mark.seq > self.at.seq && sent.mark.seq <= to.seq;
        let gone: Vec<Seq> =
            self.window.iter().filter(|sent| gone(sent)).map(|sent| sent.mark.seq).collect();
        for seq in gone {
            self.ack_wanted |= self.window.withdraw(seq);
        }
        if to.seq > self.window.high().seq {
            self.ack_wanted |= self.window.skipped(to);
        }
        self.at = to;
    }

    /// Skips an entry that was to be delivered and cannot be encoded.
    pub fn undeliverable(&mut self, seq: Seq) -> Effect {
        let chain = self.window.chain_at(seq).unwrap_or_default();
        self.ack_wanted |= self.window.withdraw(seq);
        Effect::Skip { to: Mark { seq, chain }, why: SkipReason::Unspecified }
    }

    /// Number of unacknowledged messages.
    pub fn unacked(&self) -> usize {
        self.window.len()
    }

    /// Handles an ack of the device. `done` is called for each message.
    pub fn ack(
        &mut self,
        ack: &v1::Ack,
        now_us: u64,
        out: &mut Vec<Effect>,
        mut done: impl FnMut(&Sent),
    ) {
        match ack.generation {
            // The device may have sent it before it read the new Welcome. Then the seq could refer to an entry of the
            // new history that the device has not received.
            None if self.started_over => return self.history_changed(out),
            None => self.unnamed_acks = true,
            Some(generation) if generation != self.generation.0 => return,
            Some(_) => (),
        }
        let mut receipts = Vec::new();
        let moved = self.window.ack(Seq(ack.seq), |sent| {
            done(&sent);
            if let Some(wanted) = sent.receipt {
                receipts.push((wanted, sent.mark.seq));
            }
        });
        for (wanted, seq) in receipts {
            self.receipt(ReceiptSet::ACKED, Some(&wanted), seq, now_us, out);
        }
        if moved {
            self.ack_wanted = true;
            self.resends = 0;
            if self.at.seq < self.window.acked().seq {
                self.at = self.window.acked();
            }
        }
    }

    /// Handles the mailbox's answer to an acknowledgement.
    pub fn acked(&mut self, outcome: AckOutcome, now_us: u64, out: &mut Vec<Effect>) {
        self.acking = false;
        self.ack_answered_ms = (now_us / 1000) as u32;
        match outcome {
            AckOutcome::Advanced { .. } => {
                // An acknowledgement under way may have been compared before the history changed.
                if self.trust == Trust::Asking && !self.ack_wanted {
                    self.trust = Trust::Checked;
                    self.at = self.window.acked();
                    self.want(SyncCause::Fork);
                }
            }
            AckOutcome::Reset { cursor } => self.start_over(cursor, out),
            // This session acknowledges under one generation only. So the mailbox has reset the device, and the
            // answer was lost. The device learns its position by a new Hello.
            AckOutcome::Stale => self.history_changed(out),
        }
    }

    fn start_over(&mut self, cursor: Position, out: &mut Vec<Effect>) {
        self.ack_wanted = false;
        if self.unnamed_acks {
            // Its next ack may be under way, and would be taken for one of the new history.
            return self.history_changed(out);
        }
        self.started_over = true;
        self.epoch = cursor.epoch;
        self.generation = cursor.generation;
        self.at = mark_of(cursor);
        self.window = Window::new(self.at);
        self.newest = self.at.seq;
        self.stale_page = self.reading;
        self.trust = Trust::Sure;
        self.resends = 0;
        out.push(Effect::Welcome);
        self.want(SyncCause::Fork);
    }

    /// Closes the connection, so that a new Hello finds the device's position.
    fn history_changed(&self, out: &mut Vec<Effect>) {
        let text = "the mailbox's history changed: positions start anew";
        out.push(Effect::Close(Close::new(CloseCode::HistoryChanged, text)));
    }

    /// Handles a due retry timer. `flushed`: everything so far was written to the socket. Returns whether messages
    /// are sent again.
    pub fn resend(&mut self, flushed: bool, now_us: u64, out: &mut Vec<Effect>) -> bool {
        let blocked = self.wanted == Some(SyncCause::Window);
        if self.reading || !flushed || self.trust == Trust::Asking {
            return false; // the socket is still being written to
        }
        if self.ack_crosses(now_us) {
            return false;
        }
        if self.window.is_empty() {
            // The mailbox has the device behind its last entry, because a push or an acknowledgement was lost.
            self.ack_wanted = true;
            self.want(SyncCause::Resend);
            return false;
        }
        if self.wanted.is_some() && !blocked {
            return false;
        }
        if self.resends >= RESENDS_MAX {
            self.exhaust(now_us, out);
            return false;
        }
        self.resends += 1;
        self.at = self.window.acked();
        self.wanted = Some(SyncCause::Resend);
        true
    }

    /// Whether the timer may have been claimed before an acknowledgement that is under way or was just answered. That
    /// acknowledgement removes the timer, or leaves it to fire again, so that ignoring this claim is safe.
    fn ack_crosses(&self, now_us: u64) -> bool {
        let since_ms = ((now_us / 1000) as u32).wrapping_sub(self.ack_answered_ms);
        self.ack_wanted || self.acking || since_ms < self.settings.crossing_ms
    }

    fn exhaust(&mut self, now_us: u64, out: &mut Vec<Effect>) {
        for sent in self.window.iter() {
            let wanted = sent.receipt.as_deref();
            self.receipt(ReceiptSet::EXHAUSTED, wanted, sent.mark.seq, now_us, out);
        }
        let text = "five re-sends were not acknowledged";
        out.push(Effect::Close(Close::new(CloseCode::AckTimeout, text)));
    }

    /// Handles the mailbox's answer to a confirmation.
    pub fn confirmed(&mut self, outcome: ConfirmOutcome, out: &mut Vec<Effect>) {
        match outcome {
            ConfirmOutcome::Superseded => {
                let text = "a newer connection of this device took over";
                out.push(Effect::Close(Close::new(CloseCode::Replaced, text)));
            }
            ConfirmOutcome::Confirmed { epoch, newest, .. } => {
                if epoch != self.epoch || newest < self.window.acked().seq {
                    self.contradicted(out);
                } else if newest > self.newest.max(self.at.seq) {
                    self.want(SyncCause::Confirm);
                }
            }
        }
    }

    /// Handles a new token.
    ///
    /// # Errors
    /// The token is for another user or device.
    pub fn refresh(&self, claims: &Claims) -> Result<(), Close> {
        let device = claims.device.as_ref().is_none_or(|device| *device == self.identity.device);
        if claims.user == self.identity.user && device {
            return Ok(());
        }
        Err(Close::new(CloseCode::BadToken, "the new token is for another app, user or device"))
    }

    /// The page to read now. `flushed`: everything so far was written to the socket.
    pub fn next_read(&mut self, flushed: bool) -> Option<(ReadFrom, SyncCause)> {
        if self.reading || !flushed || self.trust == Trust::Asking {
            return None;
        }
        let cause = self.wanted?;
        let resending = self.at.seq < self.window.high().seq;
        let room = self.settings.unacked_max.saturating_sub(self.window.len());
        // After the window was full, reads wait until it is half empty, to read pages instead of single entries.
        let enough = if cause == SyncCause::Window { self.settings.unacked_max / 2 } else { 1 };
        if !resending && room < enough.max(1) {
            self.wanted = Some(SyncCause::Window);
            return None;
        }
        let room = if resending { u32::MAX } else { u32::try_from(room).unwrap_or(u32::MAX) };
        self.wanted = None;
        self.reading = true;
        let read = ReadFrom {
            after: self.at.seq,
            entries_max: self.settings.page_entries_max.min(room),
            bytes_max: self.settings.page_bytes_max,
        };
        Some((read, cause))
    }

    /// Whether an acknowledgement has to be stored, and how soon.
    pub fn ack_urgency(&self) -> Option<AckUrgency> {
        let possible = self.ack_wanted && !self.acking;
        // No entry is written until the mailbox has compared.
        let urgent = self.trust == Trust::Asking;
        possible.then_some(if urgent { AckUrgency::Urgent } else { AckUrgency::Paced })
    }

    /// The acknowledgement to store now.
    pub fn next_ack(&mut self) -> Option<AckPoint> {
        if self.acking || !self.ack_wanted {
            return None;
        }
        self.ack_wanted = false;
        let mark = self.window.acked();
        self.acking = true;
        Some(AckPoint { epoch: self.epoch, generation: self.generation, mark })
    }

    /// Ends the session.
    pub fn close(self, close: Option<Close>) -> Closing {
        let mark = self.window.acked();
        let owed = self.ack_wanted || self.acking;
        let ack = owed.then_some(AckPoint { epoch: self.epoch, generation: self.generation, mark });
        Closing { ack, close }
    }

    fn want(&mut self, cause: SyncCause) {
        self.wanted.get_or_insert(cause);
    }

    /// Handles that the mailbox's history differs from what was written.
    fn contradicted(&mut self, out: &mut Vec<Effect>) {
        match self.trust {
            Trust::Sure => {
                self.trust = Trust::Asking;
                self.ack_wanted = true;
            }
            Trust::Asking => (),
            // The histories agree up to the acknowledged position and differ after it. The device's next Hello tells,
            // by its position and chain, what it has.
            Trust::Checked => {
                self.history_changed(out);
            }
        }
    }

    fn receipt(
        &self,
        kind: ReceiptSet,
        wanted: Option<&Wanted>,
        seq: Seq,
        now_us: u64,
        out: &mut Vec<Effect>,
    ) {
        let Some(wanted) = wanted.filter(|wanted| ReceiptSet(wanted.receipts).wants(kind)) else {
            return;
        };
        let mut receipt = v1::Receipt {
            id: wanted.id.clone(),
            app: self.identity.user.app.to_string(),
            user: self.identity.user.user.to_string(),
            device: self.identity.device.to_string(),
            seq: seq.0,
            at_ms: now_us / 1000,
            traceparent: wanted.traceparent.clone(),
            ..Default::default()
        };
        receipt.set_kind(match kind {
            ReceiptSet::SENT => ReceiptKind::Sent,
            ReceiptSet::ACKED => ReceiptKind::Acked,
            ReceiptSet::EXPIRED => ReceiptKind::Expired,
            _ => ReceiptKind::Exhausted,
        });
        out.push(Effect::Receipt(Box::new(receipt)));
    }
}

/// Consecutive entries of a page, collected into frames.
#[derive(Default)]
struct Batch {
    entries: Vec<Envelope>,
    bytes: usize,
    skip: Option<(Mark, SkipReason)>,
}

impl Batch {
    fn deliver(&mut self, entry: Envelope, out: &mut Vec<Effect>) {
        if let Some((to, why)) = self.skip.take() {
            out.push(Effect::Skip { to, why });
        }
        self.bytes += entry.payload.len().max(entry.raw_bytes as usize);
        self.entries.push(entry);
        if self.bytes >= FRAME_BYTES {
            self.flush_entries(out);
        }
    }

    fn skip(&mut self, to: Mark, why: SkipReason, out: &mut Vec<Effect>) {
        self.flush_entries(out);
        if let Some((earlier, other)) = self.skip.replace((to, why))
            && other != why
        {
            out.push(Effect::Skip { to: earlier, why: other });
        }
    }

    fn flush_entries(&mut self, out: &mut Vec<Effect>) {
        if !self.entries.is_empty() {
            out.push(Effect::Deliver(std::mem::take(&mut self.entries)));
            self.bytes = 0;
        }
    }

    fn finish(mut self, out: &mut Vec<Effect>) {
        self.flush_entries(out);
        if let Some((to, why)) = self.skip {
            out.push(Effect::Skip { to, why });
        }
    }
}

fn mark_of(position: Position) -> Mark {
    Mark { seq: position.seq, chain: position.chain.unwrap_or(Chain::START) }
}

fn mark_at(header: &Header) -> Mark {
    Mark { seq: header.seq, chain: header.chain }
}

fn wanted(entry: &Envelope) -> Option<Box<Wanted>> {
    let any =
        ReceiptSet::SENT.0 | ReceiptSet::ACKED.0 | ReceiptSet::EXPIRED.0 | ReceiptSet::EXHAUSTED.0;
    (entry.receipts & any != 0 || envelope::is_sampled(entry)).then(|| {
        Box::new(Wanted {
            id: entry.id.clone(),
            receipts: entry.receipts,
            traceparent: entry.traceparent.clone(),
            produced_ms: entry.produced_at_ms,
        })
    })
}
