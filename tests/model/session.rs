//! A session of an access node: the state machine that ships, its route, and the answers that have not reached it.

use std::collections::VecDeque;

use barid_client::SkipReason;
use barid_client::inbox::Ack;
use barid_core::{Generation, Position};
use barid_mailbox::{AckOutcome, ConfirmOutcome, Page};
use barid_session::{
    AckPoint, Close, Closing, Connected, Effect, Mark, Pushed, ReadFrom, Settings,
};
use barid_wire::envelope::{self, Envelope, Header};
use barid_wire::v1;
use bytes::Bytes;

use crate::mailboxes::Route;

/// Small bounds, so that there are many pages, full windows, and re-sends that cross acknowledgements.
pub const SETTINGS: Settings = Settings {
    unacked_max: 6,
    page_entries_max: 3,
    page_bytes_max: 1 << 20,
    ack_interval_ms: 0,
    crossing_ms: 2,
};

/// A session's output to its device, or to the node.
#[derive(Debug)]
pub enum Out {
    Deliver { generation: Generation, entries: Vec<Envelope> },
    Skip { generation: Generation, to: Mark, why: SkipReason },
    Welcome(Position),
    Close(Close),
}

/// A session's call of Redis.
#[derive(Debug)]
pub enum Next {
    Ack(AckPoint),
    Read(ReadFrom),
}

/// An answer of Redis.
#[derive(Debug)]
pub enum Answer {
    Acked(AckOutcome),
    Page(Page),
}

#[derive(Debug)]
pub struct Session {
    pub client: usize,
    pub route: Route,
    /// Answers that have not reached the session, in the order of the calls.
    pub answers: VecDeque<Answer>,
    /// Acknowledgements that have not reached the session.
    pub acks: VecDeque<Ack>,
    connected: Connected,
}

impl Session {
    pub fn new(client: usize, route: Route, connected: Connected) -> Self {
        let (answers, acks) = Default::default();
        Self { client, route, answers, acks, connected }
    }

    pub fn connected(&self) -> &Connected {
        &self.connected
    }

    pub fn push(&mut self, entry: &Bytes, now_us: u64) -> Vec<Out> {
        let (header, entry) = envelope::decode(entry.clone()).expect("an envelope");
        let mut effects = Vec::new();
        let pushed = self.connected.push(&header, &entry, now_us, &mut effects);
        if pushed == Pushed::Write {
            effects.push(Effect::Deliver(vec![entry]));
        }
        self.outs(effects)
    }

    /// An answer of Redis arrives.
    pub fn answered(&mut self, answer: Answer, now_us: u64) -> Vec<Out> {
        let mut effects = Vec::new();
        match answer {
            Answer::Acked(outcome) => self.connected.acked(outcome, now_us, &mut effects),
            Answer::Page(page) => self.connected.page(page, now_us, &mut effects),
        }
        self.outs(effects)
    }

    /// An acknowledgement of the device arrives.
    pub fn acknowledged(&mut self, ack: Ack, now_us: u64) -> Vec<Out> {
        let (generation, seq) = (Some(ack.generation.0), ack.seq.0);
        let ack = v1::Ack { mailbox: String::new(), generation, seq };
        let mut effects = Vec::new();
        self.connected.ack(&ack, now_us, &mut effects, |_| ());
        self.outs(effects)
    }

    pub fn confirmed(&mut self, outcome: ConfirmOutcome) -> Vec<Out> {
        let mut effects = Vec::new();
        self.connected.confirmed(outcome, &mut effects);
        self.outs(effects)
    }

    /// The retry timer has fired.
    pub fn resend(&mut self, now_us: u64) -> Vec<Out> {
        let mut effects = Vec::new();
        self.connected.resend(true, now_us, &mut effects);
        self.outs(effects)
    }

    /// The node has dropped pushes.
    pub fn missed(&mut self) {
        self.connected.missed();
    }

    pub fn next(&mut self) -> Option<Next> {
        match self.connected.next_ack() {
            Some(point) => Some(Next::Ack(point)),
            None => self.connected.next_read(true).map(|(read, _)| Next::Read(read)),
        }
    }

    pub fn close(self) -> Closing {
        self.connected.close(None)
    }

    /// Frames carry the current generation.
    fn outs(&self, effects: Vec<Effect>) -> Vec<Out> {
        let generation = self.connected.generation();
        let out = |effect| match effect {
            Effect::Deliver(entries) => Some(Out::Deliver { generation, entries }),
            Effect::Skip { to, why } => {
                Some(Out::Skip { generation, to, why: SkipReason::from_wire(why.into()) })
            }
            Effect::Welcome => Some(Out::Welcome(self.connected.position())),
            Effect::Receipt(_) => None,
            Effect::Close(close) => Some(Out::Close(close)),
        };
        effects.into_iter().filter_map(out).collect()
    }
}

/// An entry's header and id.
pub fn parse(entry: &Bytes) -> (Header, String) {
    let (header, envelope) = envelope::decode(entry.clone()).expect("an envelope");
    (header, envelope.id)
}
