//! The protocol's state on the device's side: the positions received, the messages with the application, and
//! the acknowledgement that may be sent. A plain state machine without socket, clock or task.
//!
//! A connection feeds it [`Inbox::welcome`], [`Inbox::deliver`] and [`Inbox::skip`]; the application gets
//! [`Inbox::next_message`] and answers with [`Inbox::finished`]; [`Inbox::take_ack`] says what to send. [`Client`]
//! drives it; an application that brings its own connection can do the same.
//!
//! Two marks stand in the mailbox's history: everything up to `received` has come, everything up
//! to `handled` is done. Between them lie the pending positions. The server is told `handled`, in
//! acks and when the device comes back; what then comes a second time is dropped by its position.
//! When the positions start anew (a Welcome with another epoch or generation), ids tell instead; and
//! behind what was evicted, which hides whether the history before it is still the one that came.
//!
//! [`Client`]: crate::Client

use std::collections::{HashSet, VecDeque};

use barid_core::{Chain, Generation, IdHash, Position, Seq};

use crate::event::{Event, SkipReason};
use crate::message::Message;
use crate::store::Checkpoint;

/// Ids remembered for after a reset. More than a mailbox has entries (500 by default), because all of them may be
/// sent again after Redis has lost its data.
const RECENT_MAX: usize = 512;
/// Pending positions above which the server is believed broken: it bounds them itself.
const PENDING_MAX: usize = 65_536;

/// One device's inbox. `Inbox::default()` is that of a device that was never connected. It holds 65,536 pending
/// positions and the hashes of the 512 ids handled last.
#[derive(Debug, Default)]
pub struct Inbox {
    standing: Option<Standing>,
    pending: VecDeque<Pending>,
    /// Counts the resets: tickets of an earlier life name positions that are void.
    life: u64,
    recent: VecDeque<u64>,
    /// Handled before the last reset, or ahead of the position before a restart: each is dropped
    /// once. Not simply what is recent: a business may use an id again.
    seen: HashSet<u64>,
    /// With the application since before the last reset.
    ghosts: HashSet<u64>,
    /// Pending and not handled when something was evicted: each comes once more at most.
    twins: HashSet<u64>,
    /// The server keeps nothing up to here: what is refused does not come again.
    gone: Seq,
    acked: Seq,
    ack_due: bool,
}

#[derive(Debug, Clone, Copy)]
struct Standing {
    /// Its seq and chain are the `handled` mark.
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
}

#[derive(Debug)]
enum State {
    /// To be given to the application.
    Waiting(Message),
    /// With the application.
    Out,
    /// With the application under a position that is void now.
    Ghost,
    /// The application did not handle it: it waits to be sent again.
    Refused,
    /// It is pending at an earlier position too, which is done first.
    Twin,
    Done,
}

/// Names a message that the application has; [`Inbox::finished`] takes it back.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    life: u64,
    seq: Seq,
    id: u64,
}

/// A cumulative acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// The generation of the positions; sent along, so that the server ignores it after a reset.
    pub generation: Generation,
    /// Everything up to here is handled; above 0.
    pub seq: Seq,
}

/// The server broke the protocol: the connection cannot be used any longer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A message does not follow on the last position received.
    #[error("message {got} after {received}: a gap")]
    Gap {
        /// The last position received.
        received: Seq,
        /// The message's position.
        got: Seq,
    },
    /// More positions are pending than any server allows.
    #[error("more than {PENDING_MAX} unacknowledged messages")]
    TooMany,
    /// A message or a skip came before the first welcome.
    #[error("a message before welcome")]
    Early,
}

impl Inbox {
    /// Restores an inbox from what [`Self::checkpoint`] returned.
    pub fn resume(checkpoint: &Checkpoint) -> Self {
        let mut inbox = Self::default();
        inbox.recent.extend(checkpoint.recent.iter().rev().take(RECENT_MAX).rev());
        inbox.seen.extend(&checkpoint.ahead);
        inbox.standing = checkpoint.position.map(Standing::at);
        inbox
    }

    /// Returns what to keep over a restart of the program; `attempt` is that of the last connection. Save it
    /// before an acknowledgement is sent: otherwise a crash in between shows messages again.
    pub fn checkpoint(&self, attempt: u64) -> Checkpoint {
        let ahead = self.pending.iter().filter(|entry| matches!(entry.state, State::Done));
        Checkpoint {
            attempt,
            position: self.position(),
            recent: self.recent.iter().copied().collect(),
            ahead: ahead.map(|entry| entry.id).chain(self.seen.iter().copied()).collect(),
        }
    }

    /// The `handled` mark, which Hello names; `None` before the first welcome.
    pub fn position(&self) -> Option<Position> {
        self.standing.map(|s| s.handled)
    }

    /// Positions that were handled and are not acknowledged.
    pub fn unacked(&self) -> u64 {
        self.standing.map_or(0, |s| s.handled.seq.0.saturating_sub(self.acked.0))
    }

    /// Takes the position at which a Welcome says that the device stands.
    pub fn welcome(&mut self, now: Position, events: &mut Vec<Event>) {
        self.gone = Seq(0);
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
            // Further than anything that came here: another program holds this device's place.
            self.pending.clear();
            self.twins.clear();
            self.acked = now.seq;
            self.standing = Some(Standing::at(now));
        } else if now.seq > before.seq {
            self.acked = now.seq;
            self.ack_due = false;
        } else {
            self.go_on(before, now);
        }
    }

    /// The same history as far as it was handled. Of what came behind that, Redis may have forgotten
    /// some and given its positions to other messages: it all comes again, and ids tell what the
    /// application has.
    fn go_on(&mut self, before: Position, now: Position) {
        self.life += 1;
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
        self.life += 1;
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

    /// Takes a message of a frame that carries `generation`. One of another generation is dropped.
    ///
    /// # Errors
    /// The message came before the first welcome, leaves a gap, or is one too many.
    pub fn deliver(
        &mut self,
        generation: Generation,
        message: Message,
        events: &mut Vec<Event>,
    ) -> Result<(), Violation> {
        let standing = self.standing.as_mut().ok_or(Violation::Early)?;
        if generation != standing.handled.generation {
            return Ok(()); // on its way when the positions started anew
        }
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
        self.pending.push_back(Pending { seq, chain, id, state });
        self.settle();
        Ok(())
    }

    /// A message came that had come before: the server has no ack for it.
    fn again(&mut self, message: Message, events: &mut Vec<Event>) {
        self.ack_due = true;
        if let Some(entry) = self.entry(message.seq)
            && matches!(entry.state, State::Refused)
        {
            entry.state = State::Waiting(message);
            return;
        }
        events.push(Event::Duplicate { seq: message.seq, id: message.id });
    }

    /// Takes a skip: positions up to `to` will not be shown, and `chain` is the chain there.
    ///
    /// # Errors
    /// The skip came before the first welcome.
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
        let gone = matches!(why, SkipReason::Evicted | SkipReason::Acknowledged);
        if gone {
            self.gone = self.gone.max(to);
        }
        if to <= standing.received {
            self.ack_due = true;
            self.give_up_refused(to, why, events);
            return Ok(());
        }
        let first = standing.received.next();
        standing.received = to;
        standing.received_chain = Some(chain);
        if gone {
            self.give_up_refused(to, why, events);
        }
        // Messages that this device acknowledged are not lost.
        if why != SkipReason::Acknowledged {
            events.push(Event::Skipped { first, last: to, why });
        }
        if gone {
            self.tell_by_id();
        }
        self.pending.push_back(Pending { seq: to, chain: Some(chain), id: 0, state: State::Done });
        self.settle();
        Ok(())
    }

    /// Compares by id from now on: the chain cannot be checked over entries that Redis no longer keeps. After
    /// a failover other messages may have stood there, and earlier ones may come again behind them.
    fn tell_by_id(&mut self) {
        self.bound_seen();
        self.seen.extend(&self.recent);
        let unhandled =
            |entry: &&Pending| matches!(entry.state, State::Waiting(_) | State::Out | State::Ghost);
        self.twins = self.pending.iter().filter(unhandled).map(|entry| entry.id).collect();
    }

    /// Messages that the application refused cannot come again. They were not handled: after a failover they may
    /// come at another position.
    fn give_up_refused(&mut self, to: Seq, why: SkipReason, events: &mut Vec<Event>) {
        for entry in self.pending.iter_mut().take_while(|entry| entry.seq <= to) {
            if matches!(entry.state, State::Refused) {
                (entry.state, entry.id) = (State::Done, 0);
                events.push(Event::Skipped { first: entry.seq, last: entry.seq, why });
            }
        }
        self.settle();
    }

    /// Takes the next message for the application, in order: nothing passes one that it refused.
    pub fn next_message(&mut self) -> Option<(Ticket, Message)> {
        let life = self.life;
        let entry = self
            .pending
            .iter_mut()
            .find(|entry| matches!(entry.state, State::Waiting(_) | State::Refused))?;
        if matches!(entry.state, State::Refused) {
            return None;
        }
        match std::mem::replace(&mut entry.state, State::Out) {
            State::Waiting(message) => {
                Some((Ticket { life, seq: entry.seq, id: entry.id }, message))
            }
            other => {
                entry.state = other;
                None
            }
        }
    }

    /// The application has handled a message, or (`handled` false) gives it back; in any order. One that is given
    /// back comes again unless it was evicted meanwhile.
    pub fn finished(&mut self, ticket: Ticket, handled: bool) {
        let comes_again = self.twins.remove(&ticket.id);
        if handled {
            self.remember(ticket.id);
            if comes_again {
                self.seen.insert(ticket.id); // also over a reconnect and a restart
            }
        }
        let state = if handled { State::Done } else { State::Refused };
        if ticket.life == self.life {
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
        if !handled {
            // It was evicted while the application had it. The skip was an event already.
            self.give_up_refused(self.gone, SkipReason::Evicted, &mut Vec::new());
        }
        self.settle();
    }

    /// Takes the acknowledgement that is due, if there is one; each is returned once.
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

    /// Moves `handled` over what is done.
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

impl Standing {
    fn at(position: Position) -> Self {
        Self { handled: position, received: position.seq, received_chain: position.chain }
    }
}

#[cfg(test)]
mod tests;
