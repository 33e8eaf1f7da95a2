//! The protocol's state on the device's side: the received positions, the messages that the application has, and the
//! acknowledgement that may be sent. A plain state machine without socket, clock or task.
//!
//! A connection feeds it [`Inbox::welcome`], [`Inbox::deliver`] and [`Inbox::skip`]; the application gets
//! [`Inbox::next_message`] and answers with [`Inbox::finished`]; [`Inbox::take_ack`] returns the ack to send.
//! [`Client`] drives it; an application with its own connection can do the same.
//!
//! There are two marks: everything up to `received` has been received, and everything up to `handled` is handled. The
//! positions between them are pending. The server is sent `handled`, in acks and in Hello; messages that it sends
//! again are recognized by their positions. Where positions cannot be compared, messages are recognized by their ids:
//! after a Welcome with another epoch or generation, and after an eviction, which hides whether the history before it
//! is the same.
//!
//! [`Client`]: crate::Client

use std::collections::{HashSet, VecDeque};

use barid_core::limits::WIRE_NUMBER_MAX;
use barid_core::{Chain, Generation, IdHash, Position, Seq};

use crate::event::{Event, SkipReason};
use crate::message::Message;
use crate::store::Checkpoint;

/// Number of ids that are remembered. More than a mailbox has entries (500 by default), because all of them may be sent
/// again after Redis has lost its data.
const RECENT_MAX: usize = 512;
/// Bound of the pending positions. A correct server stays far below.
const PENDING_MAX: usize = 65_536;

/// A device's inbox. `Inbox::default()` is that of a device that was never connected. It holds up to 65,536 pending
/// positions, and the hashes of the 512 ids handled last.
#[derive(Debug, Default)]
pub struct Inbox {
    standing: Option<Standing>,
    pending: VecDeque<Pending>,
    /// Counts the resets. Positions in tickets from before the last one are void.
    resets: u64,
    recent: VecDeque<u64>,
    /// Ids that were handled before the last reset, or ahead of the position before a restart. Each is dropped once,
    /// and not every time, because a business may use an id again.
    seen: HashSet<u64>,
    /// Ids of messages that the application has had since before the last reset.
    ghosts: HashSet<u64>,
    /// Ids that were pending and not handled at an eviction. Each may be received once more.
    twins: HashSet<u64>,
    /// The mailbox no longer has entries up to this position, for this reason. Refused messages up to here are not
    /// sent again.
    gone: Option<(Seq, SkipReason)>,
    /// The last position below `received` that the server has sent again or skipped.
    resent: Seq,
    acked: Seq,
    ack_due: bool,
}

#[derive(Debug, Clone, Copy)]
struct Standing {
    /// The `handled` mark.
    handled: Position,
    received: Seq,
    received_chain: Option<Chain>,
}

#[derive(Debug)]
struct Pending {
    seq: Seq,
    chain: Option<Chain>,
    id: u64,
    state: State,
    /// The server will not send the message again, for this reason.
    withdrawn: Option<SkipReason>,
}

#[derive(Debug)]
enum State {
    /// It is to be given to the application.
    Waiting(Message),
    /// The application has it.
    Out,
    /// The application has it under a void position.
    Ghost,
    /// The application gave it back. The server will send it again, unless it is withdrawn.
    Refused,
    /// It is also pending at an earlier position.
    Twin,
    Done,
}

/// Identifies a message that the application has, for [`Inbox::finished`].
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    resets: u64,
    seq: Seq,
    id: u64,
}

/// A cumulative acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// The generation of the position, so that the server ignores the ack after a reset.
    pub generation: Generation,
    /// Everything up to this position is handled; above 0.
    pub seq: Seq,
}

/// The server violated the protocol; the connection has to be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A message does not follow the last received position.
    #[error("message {got} after {received}: a gap")]
    Gap {
        /// The last received position.
        received: Seq,
        /// The message's position.
        got: Seq,
    },
    /// Too many positions are pending.
    #[error("more than {PENDING_MAX} unacknowledged messages")]
    TooMany,
    /// A message or a skip arrived before the first Welcome.
    #[error("a message before welcome")]
    Early,
    /// A position is above 2^53 - 1, which no server sends.
    #[error("position {0} is above {WIRE_NUMBER_MAX}")]
    OutOfRange(Seq),
}

impl Inbox {
    /// Restores an inbox from a checkpoint. A position out of range is dropped.
    pub fn resume(checkpoint: &Checkpoint) -> Self {
        let checkpoint = checkpoint.clone().bounded();
        let mut inbox = Self::default();
        inbox.recent.extend(checkpoint.recent.iter().rev().take(RECENT_MAX).rev());
        inbox.seen.extend(&checkpoint.ahead);
        inbox.standing = checkpoint.position.map(Standing::at);
        inbox
    }

    /// Returns the state to save for a restart of the program; `attempt` is that of the last connection. Save it
    /// before an ack is sent, because otherwise a crash in between shows messages again.
    pub fn checkpoint(&self, attempt: u64) -> Checkpoint {
        let ahead = self.pending.iter().filter(|entry| matches!(entry.state, State::Done));
        Checkpoint {
            attempt,
            position: self.position(),
            recent: self.recent.iter().copied().collect(),
            ahead: ahead.map(|entry| entry.id).chain(self.seen.iter().copied()).collect(),
        }
    }

    /// The `handled` mark, for Hello; `None` before the first Welcome.
    pub fn position(&self) -> Option<Position> {
        self.standing.map(|s| s.handled)
    }

    /// Number of positions that are handled and not acknowledged.
    pub fn unacked(&self) -> u64 {
        self.standing.map_or(0, |s| s.handled.seq.0.saturating_sub(self.acked.0))
    }

    /// Handles the position in a Welcome.
    pub fn welcome(&mut self, now: Position, events: &mut Vec<Event>) {
        (self.gone, self.resent) = (None, Seq(0));
        let Some(standing) = self.standing else {
            self.standing = Some(Standing::at(now));
            self.acked = now.seq;
            return;
        };
        let before = standing.handled;
        if (before.epoch, before.generation) != (now.epoch, now.generation) {
            let empty = standing.received == Seq(0);
            self.reset(now);
            if !empty {
                events.push(Event::Reset { before, now });
            }
            return;
        }
        if now.seq > standing.received {
            // Beyond everything received here: another program has used this device.
            self.pending.clear();
            self.twins.clear();
            self.acked = now.seq;
            self.standing = Some(Standing::at(now));
        } else if now.seq > before.seq {
            self.acked = now.seq;
            self.ack_due = false;
        } else {
            self.resume_history(before, now);
        }
    }

    /// Continues the same history at the `handled` mark. Redis may have forgotten later entries and assigned their
    /// positions to other messages. So all pending messages are received again, and recognized by their ids.
    fn resume_history(&mut self, before: Position, now: Position) {
        self.resets += 1;
        self.resent = Seq(0);
        self.twins.clear();
        for entry in self.pending.drain(..) {
            match entry.state {
                State::Out | State::Ghost => self.ghosts.insert(entry.id),
                State::Done => entry.id != 0 && self.seen.insert(entry.id),
                State::Waiting(_) | State::Refused | State::Twin => false,
            };
        }
        self.bound_seen();
        self.standing = Some(Standing::at(before));
        self.acked = now.seq;
        self.ack_due = now.seq < before.seq;
    }

    fn bound_seen(&mut self) {
        if self.seen.len() > RECENT_MAX {
            let recent: HashSet<u64> = self.recent.iter().copied().collect();
            self.seen.retain(|id| recent.contains(id));
        }
    }

    fn reset(&mut self, now: Position) {
        self.resets += 1;
        self.resent = Seq(0);
        self.twins.clear();
        for entry in self.pending.drain(..) {
            if matches!(entry.state, State::Out | State::Ghost) {
                self.ghosts.insert(entry.id);
            }
        }
        self.seen = self.recent.iter().copied().collect();
        self.standing = Some(Standing::at(now));
        self.acked = now.seq;
        self.ack_due = false;
    }

    /// Handles a message of a frame with this `generation`. A message of another generation is dropped.
    ///
    /// # Errors
    /// Returns a [`Violation`] if the message arrived before the first Welcome, leaves a gap, is out of range, or
    /// exceeds the bound of pending positions.
    pub fn deliver(
        &mut self,
        generation: Generation,
        message: Message,
        events: &mut Vec<Event>,
    ) -> Result<(), Violation> {
        let standing = self.standing.as_mut().ok_or(Violation::Early)?;
        if generation != standing.handled.generation {
            return Ok(()); // it was sent before the positions started anew
        }
        check_range(message.seq)?;
        if message.seq <= standing.received {
            self.again(message, events);
            return Ok(());
        }
        if message.seq != standing.received.next() {
            return Err(Violation::Gap { received: standing.received, got: message.seq });
        }
        if self.pending.len() >= PENDING_MAX {
            return Err(Violation::TooMany);
        }
        standing.received = message.seq;
        standing.received_chain = standing.received_chain.map(|chain| chain.next(&message.id));
        let (seq, chain) = (message.seq, standing.received_chain);
        let id = IdHash::of(&message.id).ring;
        let state = if self.twins.remove(&id) {
            State::Twin
        } else if self.ghosts.contains(&id) {
            State::Ghost
        } else if self.seen.remove(&id) {
            State::Done
        } else {
            State::Waiting(message)
        };
        self.pending.push_back(Pending { seq, chain, id, state, withdrawn: None });
        self.settle();
        Ok(())
    }

    /// Handles a message that was received before, because the server has no ack for it.
    fn again(&mut self, message: Message, events: &mut Vec<Event>) {
        self.ack_due = true;
        self.resent = message.seq;
        if let Some(entry) = self.entry(message.seq) {
            entry.withdrawn = None;
            if matches!(entry.state, State::Refused) {
                entry.state = State::Waiting(message);
                return;
            }
        }
        events.push(Event::Duplicate { seq: message.seq, id: message.id });
    }

    /// Handles a skip: positions up to `to` will not be sent, and `chain` is the chain there.
    ///
    /// # Errors
    /// Returns a [`Violation`] if the skip arrived before the first Welcome, or is out of range.
    pub fn skip(
        &mut self,
        generation: Generation,
        to: Seq,
        chain: Chain,
        why: SkipReason,
        events: &mut Vec<Event>,
    ) -> Result<(), Violation> {
        let standing = self.standing.as_mut().ok_or(Violation::Early)?;
        if generation != standing.handled.generation {
            return Ok(());
        }
        check_range(to)?;
        let gone = matches!(why, SkipReason::Evicted | SkipReason::Acknowledged);
        if gone && self.gone.is_none_or(|(seq, _)| seq < to) {
            self.gone = Some((to, why));
        }
        if to <= standing.received {
            self.ack_due = true;
            self.withdraw(to, why);
            self.give_up_refused(events);
            return Ok(());
        }
        let first = standing.received.next();
        standing.received = to;
        standing.received_chain = Some(chain);
        if gone {
            self.give_up_refused(events);
        }
        // Messages that this device acknowledged are not lost.
        if why != SkipReason::Acknowledged {
            events.push(Event::Skipped { first, last: to, why });
        }
        if gone {
            self.compare_ids();
        }
        let (chain, state) = (Some(chain), State::Done);
        self.pending.push_back(Pending { seq: to, chain, id: 0, state, withdrawn: None });
        self.settle();
        Ok(())
    }

    /// Recognizes messages by their ids from now on, because the chain cannot be checked over evicted entries. After
    /// a failover these may have been other messages, and earlier messages may be received again after them.
    fn compare_ids(&mut self) {
        self.bound_seen();
        self.seen.extend(&self.recent);
        let unhandled =
            |entry: &&Pending| matches!(entry.state, State::Waiting(_) | State::Out | State::Ghost);
        self.twins = self.pending.iter().filter(unhandled).map(|entry| entry.id).collect();
    }

    /// Marks messages as withdrawn that the server skips while it sends again: those between the last position that it
    /// sent again and `to`, and those that the application gave back.
    fn withdraw(&mut self, to: Seq, why: SkipReason) {
        // A position that is not above the last one begins the sending anew.
        let from = if self.resent < to { self.resent } else { Seq(0) };
        self.resent = to;
        for entry in self.pending.iter_mut().take_while(|entry| entry.seq <= to) {
            if entry.seq > from || matches!(entry.state, State::Refused) {
                entry.withdrawn.get_or_insert(why);
            }
        }
    }

    /// Skips messages that the application gave back and that will not be sent again. They do not count as handled,
    /// because after a failover they may be received at another position. If such a message is also pending there, the
    /// server will send it again.
    fn give_up_refused(&mut self, events: &mut Vec<Event>) {
        let mut given_up = Vec::new();
        for entry in &mut self.pending {
            if matches!(entry.state, State::Twin) && given_up.contains(&entry.id) {
                entry.state = State::Refused;
            }
            let evicted = self.gone.filter(|(to, _)| entry.seq <= *to).map(|(_, why)| why);
            if let (State::Refused, Some(why)) = (&entry.state, entry.withdrawn.or(evicted)) {
                given_up.push(entry.id);
                (entry.state, entry.id) = (State::Done, 0);
                events.push(Event::Skipped { first: entry.seq, last: entry.seq, why });
            }
        }
        self.settle();
    }

    /// Returns the next message for the application. Messages stay in order, so that none is returned while an
    /// earlier one that was given back is missing.
    pub fn next_message(&mut self) -> Option<(Ticket, Message)> {
        let resets = self.resets;
        let entry = self
            .pending
            .iter_mut()
            .find(|entry| matches!(entry.state, State::Waiting(_) | State::Refused))?;
        if matches!(entry.state, State::Refused) {
            return None;
        }
        match std::mem::replace(&mut entry.state, State::Out) {
            State::Waiting(message) => {
                Some((Ticket { resets, seq: entry.seq, id: entry.id }, message))
            }
            other => {
                entry.state = other;
                None
            }
        }
    }

    /// Records that the application has handled a message, or (`handled` false) gives it back. The order does not
    /// matter. A message that is given back is sent again, unless it has expired, was collapsed or was evicted
    /// meanwhile; then an [`Event::Skipped`] names its position.
    pub fn finished(&mut self, ticket: Ticket, handled: bool, events: &mut Vec<Event>) {
        let comes_again = self.twins.remove(&ticket.id);
        if handled {
            self.remember(ticket.id);
            if comes_again {
                self.seen.insert(ticket.id); // also over a reconnect and a restart
            }
        }
        let state = if handled { State::Done } else { State::Refused };
        if ticket.resets == self.resets {
            if let Some(entry) = self.entry(ticket.seq) {
                entry.state = state;
            }
        } else {
            self.ghosts.remove(&ticket.id);
            let twin = self
                .pending
                .iter_mut()
                .find(|entry| entry.id == ticket.id && matches!(entry.state, State::Ghost));
            match twin {
                Some(entry) => entry.state = state,
                None if handled => {
                    self.seen.insert(ticket.id);
                }
                None => {}
            }
        }
        if handled {
            self.settle();
        } else {
            self.give_up_refused(events);
        }
    }

    /// Takes the ack that is due, if there is one. Each is returned once.
    pub fn take_ack(&mut self) -> Option<Ack> {
        let handled = self.standing?.handled;
        if !std::mem::take(&mut self.ack_due) || handled.seq == Seq(0) {
            return None;
        }
        self.acked = handled.seq;
        Some(Ack { generation: handled.generation, seq: handled.seq })
    }

    /// Whether [`Self::take_ack`] has one.
    pub fn ack_due(&self) -> bool {
        self.ack_due
    }

    fn entry(&mut self, seq: Seq) -> Option<&mut Pending> {
        let at = self.pending.binary_search_by_key(&seq, |entry| entry.seq).ok()?;
        self.pending.get_mut(at)
    }

    fn remember(&mut self, id: u64) {
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(id);
    }

    /// Advances `handled` over positions that are done.
    fn settle(&mut self) {
        let Some(standing) = self.standing.as_mut() else { return };
        while let Some(Pending { seq, chain, state: State::Done | State::Twin, .. }) =
            self.pending.front()
        {
            standing.handled.seq = *seq;
            standing.handled.chain = *chain;
            self.ack_due = true;
            self.pending.pop_front();
        }
    }
}

/// Refuses a position that could overflow when it is incremented.
fn check_range(seq: Seq) -> Result<(), Violation> {
    if seq.0 <= WIRE_NUMBER_MAX { Ok(()) } else { Err(Violation::OutOfRange(seq)) }
}

impl Standing {
    fn at(position: Position) -> Self {
        Self { handled: position, received: position.seq, received_chain: position.chain }
    }
}

#[cfg(test)]
mod tests;
