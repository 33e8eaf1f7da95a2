//! A device with the SDK's inbox, and its application, which checks what it is shown.

use std::collections::{HashMap, HashSet, VecDeque};

use barid_client::inbox::{Ack, Inbox, Ticket};
use barid_client::{Body, Checkpoint, Message, SkipReason};
use barid_core::{Generation, Position, Seq};
use barid_session::Mark;

use crate::world::{Checked, check};

/// Messages that the application handles at once.
const AT_ONCE: usize = 4;

#[derive(Debug, Default)]
pub struct Client {
    /// Index of its session.
    pub current: Option<u64>,
    /// Connection attempts so far.
    pub attempts: u64,
    /// Ids that the application was shown.
    pub shown: HashSet<String>,
    /// Ids that the application has handled.
    pub handled: HashSet<String>,
    /// Ids that it need not be shown: evicted, expired, older than the device, or trimmed while Redis had forgotten the
    /// device.
    pub missed: HashSet<String>,
    inbox: Inbox,
    /// Messages that the application is handling.
    held: VecDeque<(Ticket, String)>,
    /// Ids that may be shown again: given back, or being handled when the application ended.
    again: HashSet<String>,
    /// The state saved for a restart.
    saved: Checkpoint,
    /// Ids handled since it was saved.
    unsaved: HashSet<String>,
    /// The last record of each partition that was shown.
    furthest: HashMap<String, usize>,
}

impl Client {
    pub fn position(&self) -> Option<Position> {
        self.inbox.position()
    }

    pub fn is_new(&self) -> bool {
        self.position().is_none()
    }

    pub fn welcome(&mut self, now: Position) -> Checked {
        if let Some(before) = self.position()
            && (before.epoch, before.generation) == (now.epoch, now.generation)
        {
            let there = (now.seq, now.chain) == (before.seq, before.chain);
            check!(there, "it said {before:?} and is welcomed at {now:?}");
        }
        self.inbox.welcome(now, &mut Vec::new());
        self.save();
        self.show()
    }

    pub fn deliver(&mut self, generation: Generation, seq: u64, id: &str) -> Checked {
        let body = Body::Text(String::new());
        let message = Message { group: None, seq: Seq(seq), id: id.into(), body };
        let delivered = self.inbox.deliver(generation, message, &mut Vec::new());
        delivered.map_err(|violation| violation.to_string())?;
        self.show()
    }

    /// A skip: there is nothing up to a position.
    pub fn skip(&mut self, generation: Generation, to: Mark, why: SkipReason) -> Checked {
        let skipped = self.inbox.skip(generation, to.seq, to.chain, why, &mut Vec::new());
        skipped.map_err(|violation| violation.to_string())?;
        self.show()
    }

    /// The application takes messages from the inbox, as many as it has room for.
    fn show(&mut self) -> Checked {
        while self.held.len() < AT_ONCE
            && let Some((ticket, message)) = self.inbox.next_message()
        {
            let id = message.id;
            self.held.push_back((ticket, id.clone()));
            if self.again.remove(&id) {
                continue;
            }
            check!(self.shown.insert(id.clone()), "{id} is shown twice");
            let (source, number) = source_of(&id);
            let furthest = self.furthest.entry(source.to_owned()).or_default();
            let in_order = number >= *furthest || self.missed.contains(&id);
            check!(in_order, "{id} is shown after record {furthest} of its partition");
            *furthest = number.max(*furthest);
        }
        Ok(())
    }

    /// The application finishes `count` messages, the newest or the oldest first. Returns whether it had any.
    pub fn handle(&mut self, count: usize, newest: bool) -> Checked<bool> {
        let any = !self.held.is_empty();
        for _ in 0..count {
            let next = if newest { self.held.pop_back() } else { self.held.pop_front() };
            let Some((ticket, id)) = next else { break };
            self.inbox.finished(ticket, true, &mut Vec::new());
            self.unsaved.insert(id.clone());
            self.handled.insert(id);
            self.show()?;
        }
        Ok(any)
    }

    /// The application gives back its oldest message.
    pub fn refuse(&mut self) -> Checked {
        let Some((ticket, id)) = self.held.pop_front() else { return Ok(()) };
        self.inbox.finished(ticket, false, &mut Vec::new());
        self.again.insert(id);
        self.show()
    }

    /// The acknowledgement to send. The state is saved before.
    pub fn ack(&mut self) -> Option<Ack> {
        let ack = self.inbox.take_ack()?;
        self.save();
        Some(ack)
    }

    fn save(&mut self) {
        self.saved = self.inbox.checkpoint(self.attempts);
        self.unsaved.clear();
    }

    /// The program restarts with the saved state.
    pub fn restart(&mut self, crash: bool) {
        if !crash {
            self.save();
        }
        self.again.extend(self.held.drain(..).map(|(_, id)| id));
        self.again.extend(self.unsaved.drain());
        self.inbox = Inbox::resume(&self.saved);
        self.current = None;
    }
}

/// Ids are `<partition>-<number of the record>`.
fn source_of(id: &str) -> (&str, usize) {
    let (source, number) = id.split_once('-').expect("an id of this test");
    (source, number.parse().expect("a number"))
}
