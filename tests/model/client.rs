//! A device with an SDK: it shows each message once, acknowledges what was handled, and tells what
//! must never happen to an application.

use std::collections::{HashMap, HashSet, VecDeque};

use barid_core::{Chain, Generation, Position, Seq};

use crate::session::{Mark, mark};
use crate::world::{Checked, check};

#[derive(Debug, Default)]
pub struct Client {
    /// The number of its connection.
    pub current: Option<u64>,
    /// Connection attempts so far.
    pub attempts: u64,
    /// Every id that the application was shown.
    pub shown: HashSet<String>,
    /// Ids that it need not be shown: evicted, expired, from before it was there, or trimmed while
    /// Redis had forgotten the device.
    pub missed: HashSet<String>,
    /// What was handled.
    standing: Option<Position>,
    received: u64,
    received_chain: Chain,
    pending: VecDeque<(Mark, Option<String>)>,
    /// Shown before the positions started anew, or before an eviction: each is dropped once.
    seen: HashSet<String>,
    /// The furthest record of each partition that was shown.
    furthest: HashMap<String, usize>,
}

impl Client {
    pub fn position(&self) -> Option<Position> {
        self.standing
    }

    pub fn is_new(&self) -> bool {
        self.standing.is_none()
    }

    pub fn welcome(&mut self, now: Position) -> Checked {
        let Some(before) = self.standing else {
            self.start(now);
            return Ok(());
        };
        if (before.epoch, before.generation) != (now.epoch, now.generation) {
            self.seen = self.shown.clone();
            self.start(now);
            return Ok(());
        }
        check!(mark(now) == mark(before), "it said {before:?} and is welcomed at {now:?}");
        // What came behind that and was not handled may have been forgotten, and its positions given
        // to other messages: whatever comes now is told by its id.
        self.seen.extend(self.pending.drain(..).filter_map(|(_, id)| id));
        self.start(now);
        Ok(())
    }

    fn start(&mut self, now: Position) {
        self.standing = Some(now);
        self.received = now.seq.0;
        self.received_chain = mark(now).chain;
        self.pending.clear();
    }

    pub fn deliver(&mut self, generation: Generation, seq: u64, id: &str) -> Checked {
        let standing = self.standing.ok_or("a message before the welcome")?;
        if generation != standing.generation || seq <= self.received {
            return Ok(());
        }
        check!(seq == self.received + 1, "{seq} after {}: a gap", self.received);
        self.received = seq;
        self.received_chain = self.received_chain.next(id);
        self.pending.push_back((Mark { seq, chain: self.received_chain }, Some(id.to_owned())));
        if self.seen.remove(id) {
            return Ok(());
        }
        check!(self.shown.insert(id.to_owned()), "{id} is shown twice");
        let (source, number) = source_of(id);
        let furthest = self.furthest.entry(source.to_owned()).or_default();
        let in_order = number >= *furthest || self.missed.contains(id);
        check!(in_order, "{id} is shown after record {furthest} of its partition");
        *furthest = number.max(*furthest);
        Ok(())
    }

    /// Something was evicted.
    pub fn skip(&mut self, generation: Generation, to: Mark) -> Checked {
        let standing = self.standing.ok_or("a skip before the welcome")?;
        if generation == standing.generation && to.seq > self.received {
            // Nothing shows whether what came before is still in the mailbox's history.
            self.seen.clone_from(&self.shown);
            self.received = to.seq;
            self.received_chain = to.chain;
            self.pending.push_back((to, None));
        }
        Ok(())
    }

    /// The application is done with so many; returns the acknowledgement.
    pub fn handle(&mut self, count: usize) -> Option<(Generation, u64)> {
        let standing = self.standing.as_mut()?;
        for (done, _) in self.pending.drain(..count.min(self.pending.len())) {
            standing.seq = Seq(done.seq);
            standing.chain = Some(done.chain);
        }
        (standing.seq.0 > 0).then_some((standing.generation, standing.seq.0))
    }
}

/// Ids are `<partition>-<number of the record>`.
fn source_of(id: &str) -> (&str, usize) {
    let (source, number) = id.split_once('-').expect("an id of this test");
    (source, number.parse().expect("a number"))
}
