//! A session of an access node, as plainly as can be: the rule by which it writes, and its sync.

use std::collections::VecDeque;

use barid_core::{Chain, Epoch, Generation, Position, Seq};
use barid_mailbox::{AckOutcome, ConfirmOutcome, Page};
use barid_wire::envelope::{self, Header};
use bytes::Bytes;

use crate::mailboxes::Route;

/// A position and the chain there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub seq: u64,
    pub chain: Chain,
}

/// What a session tells its device, or the node.
#[derive(Debug)]
pub enum Out {
    Deliver { generation: Generation, seq: u64, id: String },
    Skip { generation: Generation, to: Mark },
    Welcome(Position),
    Close,
}

#[derive(Debug, PartialEq, Eq)]
enum Trust {
    Sure,
    Asking,
    Checked,
}

#[derive(Debug)]
pub struct Session {
    pub client: usize,
    pub route: Route,
    pub epoch: Epoch,
    pub generation: Generation,
    pub at: Mark,
    /// A page that was read and has not come back yet.
    pub page: Option<Page>,
    pub acked: Mark,
    high: Mark,
    /// What was written and is not acknowledged, each with the last skip behind it.
    sent: VecDeque<(Mark, Mark)>,
    newest: u64,
    wants_read: bool,
    wants_ack: bool,
    trust: Trust,
}

/// What the session asks of Redis next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Ack(Mark),
    Read,
}

impl Session {
    pub fn new(client: usize, route: Route, cursor: Position, newest: Seq) -> Self {
        let at = mark(cursor);
        Self {
            client,
            route,
            epoch: cursor.epoch,
            generation: cursor.generation,
            at,
            page: None,
            acked: at,
            high: at,
            sent: VecDeque::new(),
            newest: newest.0,
            wants_read: newest.0 > at.seq,
            wants_ack: false,
            trust: Trust::Sure,
        }
    }

    pub fn position(&self) -> Position {
        let (epoch, generation) = (self.epoch, self.generation);
        Position { epoch, generation, seq: Seq(self.acked.seq), chain: Some(self.acked.chain) }
    }

    pub fn push(&mut self, entry: &Bytes, out: &mut Vec<Out>) {
        let (header, id) = parse(entry);
        if header.epoch != self.epoch {
            return self.contradicted(out);
        }
        if header.seq.0 <= self.at.seq.max(self.high.seq) {
            if self.chain_at(header.seq.0).is_some_and(|chain| chain != header.chain) {
                self.contradicted(out);
            }
            return;
        }
        self.newest = self.newest.max(header.seq.0);
        if self.page.is_some() || self.wants_read || self.trust == Trust::Asking {
            return;
        }
        if header.seq.0 != self.at.seq + 1 {
            self.wants_read = true;
        } else if header.prev_chain != self.at.chain {
            self.contradicted(out);
        } else {
            self.write(&header, id, out);
        }
    }

    /// A page came back.
    pub fn page(&mut self, page: Page, out: &mut Vec<Out>) {
        if page.epoch != self.epoch || page.newest.0 < self.acked.seq {
            return self.contradicted(out);
        }
        if page.oldest.0 > self.at.seq + 1 {
            let to = Mark { seq: page.oldest.0 - 1, chain: page.chain_before_oldest };
            self.skip(to);
            out.push(Out::Skip { generation: self.generation, to });
        }
        for entry in &page.entries {
            let (header, id) = parse(entry);
            if header.seq.0 <= self.at.seq {
                continue;
            }
            let known = self.chain_at(header.seq.0);
            if header.seq.0 != self.at.seq + 1
                || header.prev_chain != self.at.chain
                || known.is_some_and(|chain| chain != header.chain)
            {
                return self.contradicted(out);
            }
            if id.is_empty() {
                let to = Mark { seq: header.seq.0, chain: header.chain };
                self.skip(to); // it was voided
                out.push(Out::Skip { generation: self.generation, to });
            } else {
                self.write(&header, id, out);
            }
        }
        self.trust = Trust::Sure;
        self.newest = self.newest.min(page.newest.0).max(self.at.seq);
    }

    fn write(&mut self, header: &Header, id: String, out: &mut Vec<Out>) {
        let to = Mark { seq: header.seq.0, chain: header.chain };
        self.at = to;
        if to.seq > self.high.seq {
            self.high = to;
            self.sent.push_back((to, to));
        }
        out.push(Out::Deliver { generation: self.generation, seq: to.seq, id });
    }

    fn skip(&mut self, to: Mark) {
        let at = self.at.seq;
        while let Some(gone) =
            self.sent.iter().position(|(sent, _)| sent.seq > at && sent.seq <= to.seq)
        {
            let (_, end) = self.sent.remove(gone).expect("it was found");
            match gone.checked_sub(1) {
                Some(before) => self.sent[before].1 = end,
                None => {
                    self.acked = end;
                    self.wants_ack = true;
                }
            }
        }
        if to.seq > self.high.seq {
            self.high = to;
            match self.sent.back_mut() {
                Some(last) => last.1 = to,
                None => {
                    self.acked = to;
                    self.wants_ack = true;
                }
            }
        }
        self.at = to;
    }

    /// The device acknowledged.
    pub fn acknowledged(&mut self, generation: Generation, seq: u64) {
        if generation != self.generation {
            return;
        }
        while let Some((sent, to)) = self.sent.front().copied()
            && sent.seq <= seq
        {
            self.sent.pop_front();
            self.acked = to;
            self.wants_ack = true;
        }
        if self.at.seq < self.acked.seq {
            self.at = self.acked;
        }
    }

    /// Redis answered an acknowledgement.
    pub fn acked(&mut self, outcome: AckOutcome, out: &mut Vec<Out>) {
        match outcome {
            AckOutcome::Advanced { .. } if self.trust == Trust::Asking => {
                self.trust = Trust::Checked;
                self.at = self.acked;
                self.wants_read = true;
            }
            AckOutcome::Advanced { .. } => (),
            AckOutcome::Reset { cursor } => {
                let page = self.page.take(); // it belongs to a history that is void
                drop(page);
                *self = Self::new(self.client, self.route, cursor, cursor.seq);
                self.wants_read = true;
                out.push(Out::Welcome(cursor));
            }
            AckOutcome::Stale => out.push(Out::Close),
        }
    }

    /// Redis answered a confirmation.
    pub fn confirmed(&mut self, outcome: ConfirmOutcome, out: &mut Vec<Out>) {
        match outcome {
            ConfirmOutcome::Superseded => out.push(Out::Close),
            ConfirmOutcome::Confirmed { epoch, newest, .. } => {
                if epoch != self.epoch || newest.0 < self.acked.seq {
                    self.contradicted(out);
                } else if newest.0 > self.newest.max(self.at.seq) {
                    self.wants_read = true;
                }
            }
        }
    }

    /// The retry timer was due.
    pub fn resend(&mut self) {
        // An acknowledgement on its way decides anew about the timer.
        if self.page.is_some() || self.trust == Trust::Asking || self.wants_ack {
            return;
        }
        if self.sent.is_empty() {
            self.wants_ack = true;
        } else {
            self.at = self.acked;
        }
        self.wants_read = true;
    }

    pub fn next(&mut self) -> Option<Next> {
        if std::mem::take(&mut self.wants_ack) {
            return Some(Next::Ack(self.acked));
        }
        if self.trust == Trust::Asking || !std::mem::take(&mut self.wants_read) {
            return None;
        }
        Some(Next::Read)
    }

    /// What the session still owes Redis when it ends.
    pub fn owed(&self) -> Option<Mark> {
        self.wants_ack.then_some(self.acked)
    }

    fn chain_at(&self, seq: u64) -> Option<Chain> {
        let marks = self.sent.iter().flat_map(|(sent, to)| [sent, to]);
        let mut marks = [&self.acked, &self.high].into_iter().chain(marks);
        marks.find(|mark| mark.seq == seq).map(|mark| mark.chain)
    }

    fn contradicted(&mut self, out: &mut Vec<Out>) {
        match self.trust {
            Trust::Sure => {
                self.trust = Trust::Asking;
                self.wants_ack = true;
            }
            Trust::Asking => (),
            Trust::Checked => out.push(Out::Close),
        }
    }
}

pub fn mark(position: Position) -> Mark {
    Mark { seq: position.seq.0, chain: position.chain.expect("cursors have a chain") }
}

/// An entry's header and id.
pub fn parse(entry: &Bytes) -> (Header, String) {
    let (header, envelope) = envelope::decode(entry.clone()).expect("an envelope");
    (header, envelope.id)
}
