//! Walks through a session's life, each named after what has to hold.

use barid_core::mailbox::{AckOutcome, ConfirmOutcome, ConnectOutcome, Page, UserKey};
use barid_core::{
    AppId, Attempt, Chain, CloseCode, ConnectionId, DeviceId, Epoch, Generation, Incarnation,
    NodeId, Position, ReceiptSet, Seq, SessionRef, UserId,
};
use barid_wire::envelope::{BodyKind, Envelope, Header, SkipReason, encode_body};
use barid_wire::frames::ClientFrame;
use barid_wire::v1;
use bytes::Bytes;

use super::*;

/// µs since the Unix epoch.
const NOW: u64 = 1_000_000_000;
/// When a retry timer is due that was set then.
const LATER: u64 = NOW + 2_000_000;
/// How far ahead an attempt is believed, ms.
const AHEAD: u64 = 10_000;
const SETTINGS: Settings = Settings {
    unacked_max: 4,
    page_entries_max: 3,
    page_bytes_max: 1 << 20,
    ack_interval_ms: 100,
    crossing_ms: 1_000,
};

/// The content of Redis.
#[derive(Clone)]
struct History {
    epoch: Epoch,
    oldest: u64,
    before_oldest: Chain,
    entries: Vec<Entry>,
}

#[derive(Clone)]
struct Entry {
    header: Header,
    envelope: Envelope,
}

impl History {
    fn new() -> Self {
        Self { epoch: Epoch(7), oldest: 1, before_oldest: Chain::START, entries: Vec::new() }
    }

    fn of(count: u64) -> Self {
        let mut history = Self::new();
        (1..=count).for_each(|n| history.add(&format!("m{n}")));
        history
    }

    fn add(&mut self, id: &str) {
        self.add_with(id, |_| ());
    }

    fn add_with(&mut self, id: &str, change: impl FnOnce(&mut Envelope)) {
        let prev_chain = self.entries.last().map_or(self.before_oldest, |e| e.header.chain);
        let seq = Seq(self.oldest + self.entries.len() as u64);
        let header = Header {
            epoch: self.epoch,
            seq,
            prev_chain,
            chain: prev_chain.next(id),
            accepted_at_us: NOW,
        };
        let mut envelope =
            Envelope { id: id.into(), payload: Bytes::from_static(b"hi"), ..Default::default() };
        envelope.set_kind(BodyKind::Text);
        envelope.seq = seq.0;
        envelope.accepted_at_us = NOW;
        change(&mut envelope);
        self.entries.push(Entry { header, envelope });
    }

    fn evict(&mut self, count: usize) {
        for entry in self.entries.drain(..count) {
            self.oldest += 1;
            self.before_oldest = entry.header.chain;
        }
    }

    fn entry(&self, seq: u64) -> &Entry {
        &self.entries[(seq - self.oldest) as usize]
    }

    fn newest(&self) -> Seq {
        Seq(self.oldest + self.entries.len() as u64 - 1)
    }

    fn chain_at(&self, seq: u64) -> Chain {
        if seq + 1 == self.oldest { self.before_oldest } else { self.entry(seq).header.chain }
    }

    fn page(&self, read: ReadFrom) -> Page {
        let fits = self.entries.iter().filter(|e| e.header.seq > read.after);
        Page {
            epoch: self.epoch,
            oldest: Seq(self.oldest),
            chain_before_oldest: self.before_oldest,
            newest: self.newest(),
            entries: fits.take(read.entries_max as usize).map(bytes_of).collect(),
            cursor: None,
        }
    }

    fn cursor(&self, seq: u64) -> Position {
        Position {
            epoch: self.epoch,
            generation: Generation(0),
            seq: Seq(seq),
            chain: Some(self.chain_at(seq)),
        }
    }
}

fn bytes_of(entry: &Entry) -> Bytes {
    [&entry.header.encode()[..], &encode_body(entry.envelope.clone())].concat().into()
}

fn claims() -> Claims {
    let user = UserKey { app: AppId::new("demo").unwrap(), user: UserId::new("alice").unwrap() };
    let token = TokenFingerprint::default();
    Claims {
        user,
        device: None,
        expires_s: u64::MAX,
        groups: Vec::new(),
        token,
        issued_ahead_s: None,
    }
}

fn hello(device: &str) -> ClientFrame {
    ClientFrame::Hello(v1::Hello { device: device.into(), ..Default::default() })
}

fn connecting() -> Connecting {
    Unidentified::new(claims(), 77).frame(hello("phone"), AHEAD).unwrap()
}

fn connected_at(cursor: Position, history: &History) -> Connected {
    let newest = history.newest();
    let outcome = ConnectOutcome::Connected {
        cursor,
        newest,
        replaced: None,
        reset: false,
        evicted: false,
        created: false,
    };
    connecting().answered(outcome, SETTINGS).unwrap().0
}

/// A session and what a device saw of it.
struct Walk {
    session: Connected,
    effects: Vec<Effect>,
    /// The hops that ended with an acknowledgement.
    hops: Vec<PushedAt>,
}

impl Walk {
    fn new(history: &History, cursor: u64) -> Self {
        let session = connected_at(history.cursor(cursor), history);
        Self { session, effects: Vec::new(), hops: Vec::new() }
    }

    fn push(&mut self, entry: &Entry) -> Pushed {
        self.session.push(&entry.header, &entry.envelope, NOW, &mut self.effects)
    }

    fn push_all(&mut self, history: &History, seqs: std::ops::RangeInclusive<u64>) {
        for seq in seqs {
            assert_eq!(self.push(history.entry(seq)), Pushed::Write, "seq {seq}");
        }
    }

    /// Reads until the session wants no more; returns the causes.
    fn sync(&mut self, history: &History) -> Vec<SyncCause> {
        let mut causes = Vec::new();
        while let Some((read, cause)) = self.session.next_read(true) {
            causes.push(cause);
            self.session.page(history.page(read), NOW, &mut self.effects);
            assert!(causes.len() < 100, "reads for ever");
        }
        causes
    }

    fn ack(&mut self, seq: u64) {
        self.ack_of(seq, Some(self.session.generation().0));
    }

    /// As simple clients do.
    fn ack_unnamed(&mut self, seq: u64) {
        self.ack_of(seq, None);
    }

    fn ack_of(&mut self, seq: u64, generation: Option<u32>) {
        let ack = v1::Ack { seq, generation, ..Default::default() };
        self.session.ack(&ack, NOW, &mut self.effects, |sent| self.hops.extend(sent.pushed));
    }

    /// The acknowledgement that the session wants, answered as advanced.
    fn acked(&mut self) -> Option<u64> {
        let point = self.session.next_ack()?;
        let cursor = point.mark.seq;
        self.session.acked(AckOutcome::Advanced { cursor }, NOW, &mut self.effects);
        Some(cursor.0)
    }

    fn resend(&mut self) -> bool {
        self.session.resend(true, LATER, &mut self.effects)
    }

    fn seen(&mut self) -> Vec<String> {
        let mut seen = Vec::new();
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Deliver(entries) => seen.extend(entries.into_iter().map(|e| e.id)),
                Effect::Skip { to, why } => seen.push(format!("skip to {} {why:?}", to.seq)),
                Effect::Welcome => seen.push("welcome".into()),
                Effect::Receipt(receipt) => {
                    seen.push(format!("{:?} {}", receipt.kind(), receipt.id));
                }
                Effect::Close(close) => seen.push(format!("close {}", close.code.code())),
            }
        }
        seen
    }
}

#[test]
fn the_first_frame_is_a_hello_for_this_token() {
    let refused =
        |claims: Claims, frame| Unidentified::new(claims, 1).frame(frame, AHEAD).unwrap_err();
    let tablet = Claims { device: Some(DeviceId::new("tablet").unwrap()), ..claims() };
    assert_eq!(refused(claims(), ClientFrame::Pong(v1::Pong {})).text, "the first frame is hello");
    assert_eq!(refused(claims(), hello("")).code, CloseCode::BadFrame);
    assert_eq!(refused(claims(), hello(&"x".repeat(65))).code, CloseCode::BadFrame);
    assert!(refused(tablet.clone(), hello("phone")).text.contains("another device"));
    let connecting = Unidentified::new(tablet, 77).frame(hello(""), AHEAD).unwrap();
    assert_eq!(connecting.identity.device.as_str(), "tablet");
    // No attempt: the moment of the handshake.
    assert_eq!(connecting.identity.attempt, Attempt(77));
}

const NOW_MS: u64 = 1_790_000_000_000;

/// A Hello that counts its attempts.
fn counted(attempt: u64, handshake_ms: u64) -> Connecting {
    let hello = v1::Hello { device: "phone".into(), attempt, ..Default::default() };
    Unidentified::new(claims(), handshake_ms).frame(ClientFrame::Hello(hello), AHEAD).unwrap()
}

#[test]
fn hazard_37_a_lower_attempt_is_told_the_known_one_and_may_come_back() {
    for connecting in [counted(5, 77), connecting()] {
        let by = Attempt(1_790_000_000_000);
        let superseded = ConnectOutcome::Superseded { by };
        let refusal = connecting.answered(superseded, SETTINGS).unwrap_err();
        assert_eq!((refusal.close.code, refusal.attempt), (CloseCode::Overloaded, by));
        assert!(CloseCode::reconnects(refusal.close.code.code()));
    }
}

#[test]
fn hazard_37_attempts_far_ahead_of_the_mailboxs_clock_are_not_believed() {
    let far = NOW_MS + AHEAD;
    for (attempt, taken, ahead) in [
        (5, 5, false),
        (NOW_MS - 1, NOW_MS - 1, false),
        (far, far, false),
        (far + 1, NOW_MS, true),
        ((1 << 53) - 1, NOW_MS, true),
        (u64::MAX, NOW_MS, true),
        (0, NOW_MS, false),
    ] {
        let connecting = counted(attempt, NOW_MS);
        let seen = (connecting.identity.attempt, connecting.attempt_ahead);
        assert_eq!(seen, (Attempt(taken), ahead.then_some(Attempt(attempt))), "{attempt}");
    }
}

#[test]
fn hazard_37_an_attempt_beyond_belief_and_the_known_one_comes_behind_that() {
    let known = NOW_MS + 3_600_000;
    let counted_on = |attempt| {
        let connecting = counted(attempt, NOW_MS).counted_on(Attempt(known));
        connecting.map(|connecting| connecting.identity.attempt.0)
    };
    for attempt in [known + 1, known + 2, (1 << 53) - 1, u64::MAX] {
        assert_eq!(counted_on(attempt), Some(known + 1), "{attempt}");
    }
    for attempt in [0, NOW_MS, known] {
        assert_eq!(counted_on(attempt), None, "{attempt}");
    }
}

#[test]
fn hazard_81_a_refusal_that_names_no_attempt_is_final() {
    for attempt in [NOW_MS + AHEAD + 1, (1 << 53) - 1, u64::MAX] {
        let connecting = counted(attempt, NOW_MS);
        assert!(connecting.attempt_ahead.is_some());
        let refusal = Refusal::from(Close::new(CloseCode::Overloaded, "the mailbox is away"));
        assert_eq!(connecting.counted_on(refusal.attempt).map(|c| c.identity.attempt), None);
    }
}

#[test]
fn refusals_of_the_mailbox_become_close_codes() {
    let code = |outcome| connecting().answered(outcome, SETTINGS).unwrap_err().close.code;
    assert_eq!(code(ConnectOutcome::TooManyDevices), CloseCode::Limit);
    assert_eq!(code(ConnectOutcome::TooLate), CloseCode::Overloaded);
    assert_eq!(code(ConnectOutcome::NotCreated), CloseCode::Overloaded);
    let replaced = SessionRef {
        node: NodeId::new("a").unwrap(),
        incarnation: Incarnation(1),
        connection: ConnectionId(2),
    };
    let connected = ConnectOutcome::Connected {
        cursor: History::new().cursor(0),
        newest: Seq(0),
        replaced: Some(replaced.clone()),
        reset: false,
        evicted: false,
        created: false,
    };
    assert_eq!(connecting().answered(connected, SETTINGS).unwrap().1, Some(replaced));
}

#[test]
fn what_follows_is_written_at_once_and_acknowledged_cumulatively() {
    let history = History::of(3);
    let mut walk = Walk::new(&History { entries: vec![], ..history.clone() }, 0);
    assert_eq!(walk.session.next_read(true), None);
    walk.push_all(&history, 1..=3);
    assert_eq!(walk.acked(), None);
    walk.ack(2);
    assert_eq!(walk.acked(), Some(2));
    walk.ack(99);
    assert_eq!(walk.acked(), Some(3), "clamped to what was sent");
    walk.ack(1);
    assert_eq!(walk.acked(), None, "never back");
}

#[test]
fn one_acknowledgement_is_under_way_and_the_latest_follows() {
    let history = History::of(3);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=3);
    walk.ack(1);
    assert_eq!(walk.session.ack_urgency(), Some(AckUrgency::Paced));
    let first = walk.session.next_ack().unwrap();
    walk.ack(2);
    walk.ack(3);
    assert_eq!((walk.session.ack_urgency(), walk.session.next_ack()), (None, None));
    let advanced = AckOutcome::Advanced { cursor: first.mark.seq };
    walk.session.acked(advanced, NOW, &mut walk.effects);
    assert_eq!(walk.acked(), Some(3));
}

#[test]
fn what_came_while_it_was_away_is_delivered_before_anything_newer() {
    let mut history = History::of(7);
    let mut walk = Walk::new(&history, 1);
    // A push that arrives meanwhile waits for the pages.
    history.add("m8");
    let (read, cause) = walk.session.next_read(true).unwrap();
    assert_eq!((cause, read.after, read.entries_max), (SyncCause::Connect, Seq(1), 3));
    assert_eq!(walk.push(history.entry(8)), Pushed::Dropped(Dropped::Syncing));
    walk.session.page(history.page(read), NOW, &mut walk.effects);
    assert_eq!(walk.session.next_read(false), None, "not before the socket took the page");
    walk.sync(&history);
    assert_eq!(walk.seen(), ["m2", "m3", "m4", "m5"], "no more than may be unacknowledged");
    walk.ack(4);
    walk.sync(&history);
    walk.ack(8);
    walk.sync(&history);
    assert_eq!(walk.seen(), ["m6", "m7", "m8"]);
    history.add("m9");
    assert_eq!(walk.push(history.entry(9)), Pushed::Write);
}

#[test]
fn a_gap_is_read_from_the_mailbox() {
    let history = History::of(4);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=1);
    assert_eq!(walk.push(history.entry(3)), Pushed::Dropped(Dropped::Gap));
    assert_eq!(walk.push(history.entry(2)), Pushed::Dropped(Dropped::Syncing));
    assert_eq!(walk.sync(&history), [SyncCause::Gap]);
    assert_eq!(walk.seen(), ["m2", "m3", "m4"]);
    assert_eq!(walk.push(history.entry(4)), Pushed::Dropped(Dropped::Known));
}

#[test]
fn beyond_the_window_pushes_wait_in_the_mailbox_for_acknowledgements() {
    let history = History::of(6);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=4);
    assert_eq!(walk.push(history.entry(5)), Pushed::Dropped(Dropped::Window));
    assert_eq!(walk.sync(&history), []);
    walk.ack(1);
    assert_eq!(walk.sync(&history), [], "half of the window has to be free");
    walk.ack(2);
    assert_eq!(walk.sync(&history), [SyncCause::Window]);
    assert_eq!(walk.seen(), ["m5", "m6"]);
}

#[test]
fn overflowed_pushes_are_read_from_the_mailbox() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.session.missed();
    assert_eq!(walk.sync(&history), [SyncCause::Overflow]);
    assert_eq!(walk.seen(), ["m1", "m2"]);
}

#[test]
fn skips_say_why_and_carry_the_acknowledgement() {
    let mut history = History::of(1);
    history.evict(1);
    history.add_with("other", |e| e.device = "tablet".into());
    history.add_with("mine", |e| e.device = "phone".into());
    history.add_with("old", |e| {
        e.ttl_ms = 1;
        e.accepted_at_us = NOW - 5_000;
    });
    history.entries[2].header.accepted_at_us = NOW - 5_000;
    history.add_with("void", |e| e.set_voided(SkipReason::Collapsed));
    let mut walk = Walk::new(&history, 1);
    walk.session = connected_at(Position { seq: Seq(0), ..history.cursor(1) }, &history);
    walk.sync(&history);
    assert_eq!(
        walk.seen(),
        [
            "skip to 1 Evicted",
            "skip to 2 OtherDevice",
            "mine",
            "skip to 4 Expired",
            "skip to 5 Collapsed"
        ]
    );
    assert_eq!(walk.acked(), Some(2), "skips right behind the acknowledged position");
    walk.ack(3);
    assert_eq!(walk.acked(), Some(5), "skips behind the last message");
}

#[test]
fn a_pushed_skip_is_told_and_acknowledged() {
    let mut history = History::new();
    history.add_with("other", |e| e.device = "tablet".into());
    let mut walk = Walk::new(&History::new(), 0);
    assert_eq!(walk.push(history.entry(1)), Pushed::Skipped);
    assert_eq!(walk.seen(), ["skip to 1 OtherDevice"]);
    assert_eq!(walk.acked(), Some(1));
}

#[test]
fn an_entry_that_cannot_be_encoded_is_skipped() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    let skip = walk.session.undeliverable(Seq(2));
    let to = Mark { seq: Seq(2), chain: history.chain_at(2) };
    assert_eq!(skip, Effect::Skip { to, why: SkipReason::Unspecified });
    walk.ack(1);
    assert_eq!(walk.acked(), Some(2));
}

#[test]
fn five_resends_then_the_next_one_closes_and_says_exhausted() {
    let mut history = History::of(1);
    history.add_with("m2", |e| e.receipts = ReceiptSet::EXHAUSTED.0);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    for _ in 0..5 {
        assert!(walk.resend());
        assert_eq!(walk.sync(&history), [SyncCause::Resend]);
        assert_eq!(walk.seen(), ["m1", "m2"]);
    }
    assert!(!walk.resend());
    assert_eq!(walk.seen(), ["Exhausted m2", "close 4001"]);
}

#[test]
fn an_acknowledgement_gives_a_message_its_five_resends_back() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    for _ in 0..5 {
        assert!(walk.resend());
        walk.sync(&history);
    }
    walk.ack(1);
    assert_eq!(walk.acked(), Some(1));
    walk.seen();
    assert!(walk.resend());
    walk.sync(&history);
    assert_eq!(walk.seen(), ["m2"], "from the acknowledged position");
}

#[test]
fn hazard_17_a_resend_with_nothing_unacknowledged_counts_nothing_and_tells_the_mailbox_again() {
    let history = History::of(1);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=1);
    walk.ack(1);
    assert_eq!(walk.acked(), Some(1));
    for _ in 0..9 {
        assert!(!walk.resend());
        assert_eq!(walk.sync(&history), [SyncCause::Resend]);
        assert_eq!(walk.acked(), Some(1));
    }
    assert!(walk.seen().is_empty());
}

#[test]
fn a_resend_that_crosses_an_acknowledgement_is_left_to_the_next_one() {
    let mut history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    walk.ack(1);
    assert!(!walk.resend());
    assert_eq!(walk.sync(&history), [], "the acknowledgement waits for its turn");
    let point = walk.session.next_ack().unwrap();
    assert!(!walk.resend());
    assert_eq!(walk.sync(&history), [], "it is on its way");
    let advanced = AckOutcome::Advanced { cursor: point.mark.seq };
    walk.session.acked(advanced, NOW, &mut walk.effects);
    assert!(!walk.session.resend(true, NOW + 1_000, &mut walk.effects));
    assert_eq!(walk.sync(&history), [], "it was answered after the timer was claimed");
    assert!(walk.resend());
    assert_eq!(walk.sync(&history), [SyncCause::Resend]);
    assert_eq!(walk.seen(), ["m2"]);
    walk.ack(2);
    assert_eq!(walk.acked(), Some(2));
    // A push that was lost comes with the first one that crosses nothing.
    history.add("m3");
    assert!(!walk.session.resend(true, NOW + 1_000, &mut walk.effects));
    assert_eq!(walk.sync(&history), []);
    assert!(!walk.resend());
    assert_eq!(walk.sync(&history), [SyncCause::Resend]);
    assert_eq!((walk.seen(), walk.acked()), (vec!["m3".to_owned()], Some(2)));
    // And where the clock went back, nothing is taken for a moment ago.
    history.add("m4");
    assert!(walk.session.resend(true, NOW - 5_000_000, &mut walk.effects));
    assert_eq!(walk.sync(&history), [SyncCause::Resend]);
    assert_eq!(walk.seen(), ["m3", "m4"]);
}

#[test]
fn a_lost_push_comes_with_the_resend() {
    let history = History::of(1);
    let mut walk = Walk::new(&History::new(), 0);
    assert!(!walk.resend());
    walk.sync(&history);
    assert_eq!(walk.seen(), ["m1"]);
}

#[test]
fn no_resend_is_counted_while_the_socket_is_stuck() {
    let history = History::of(1);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=1);
    for _ in 0..9 {
        assert!(!walk.session.resend(false, NOW, &mut walk.effects));
    }
    assert!(walk.seen().is_empty());
}

#[test]
fn what_came_from_the_mailbox_is_on_no_hop() {
    let mut history = History::new();
    history.add_with("m1", |e| e.produced_at_ms = 7);
    let mut walk = Walk::new(&history, 0);
    walk.sync(&history);
    walk.ack(1);
    assert_eq!(walk.hops, []);
    history.add_with("m2", |e| e.produced_at_ms = 8);
    walk.push_all(&history, 2..=2);
    walk.ack(2);
    assert_eq!(walk.hops, [PushedAt { written_us: NOW, produced_ms: 8 }]);
}

#[test]
fn what_expired_meanwhile_is_not_sent_again() {
    let mut history = History::new();
    history.add_with("m1", |e| e.ttl_ms = 50);
    history.add("m2");
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    assert!(walk.session.resend(true, NOW + 60_000, &mut walk.effects));
    let (read, _) = walk.session.next_read(true).unwrap();
    walk.session.page(history.page(read), NOW + 60_000, &mut walk.effects);
    assert_eq!(walk.seen(), ["skip to 1 Expired", "m2"]);
    assert_eq!(walk.acked(), Some(1));
}

#[test]
fn what_was_evicted_meanwhile_is_skipped_on_a_resend() {
    let mut history = History::of(3);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=3);
    history.evict(2);
    assert!(walk.resend());
    walk.sync(&history);
    assert_eq!(walk.seen(), ["skip to 2 Evicted", "m3"]);
    assert_eq!(walk.acked(), Some(2));
}

#[test]
fn hazard_03_a_fork_at_the_acknowledged_position_starts_over() {
    let (mut old, mut new) = (History::of(6), History::of(6));
    let mut walk = Walk::new(&old, 6);
    old.add("x");
    new.add("y");
    new.add("z");
    walk.push_all(&old, 7..=7);
    walk.ack(7);
    assert_eq!(walk.acked(), Some(7));
    // Redis forgot x; y took its place, and z comes next.
    assert_eq!(walk.push(new.entry(8)), Pushed::Dropped(Dropped::Fork));
    assert_eq!(walk.session.next_read(true), None, "first it is asked who is right");
    let point = walk.session.next_ack().unwrap();
    assert_eq!((point.mark.seq, point.mark.chain), (Seq(7), old.chain_at(7)));
    let cursor = Position { generation: Generation(1), ..new.cursor(0) };
    walk.session.acked(AckOutcome::Reset { cursor }, NOW, &mut walk.effects);
    walk.sync(&new);
    assert_eq!(walk.seen(), ["welcome", "m1", "m2", "m3", "m4"]);
    assert_eq!(walk.session.generation(), Generation(1));
    // An acknowledgement of the old generation says nothing about the new positions.
    let stale = v1::Ack { seq: 7, generation: Some(0), ..Default::default() };
    walk.session.ack(&stale, NOW, &mut walk.effects, |_| panic!("stale"));
    assert_eq!(walk.acked(), None);
    walk.ack(4);
    walk.sync(&new);
    assert_eq!(walk.seen(), ["m5", "m6", "y", "z"]);
}

/// A0 is acknowledged; a snapshot; A1 and A2 are acknowledged, A3 is being handled; Redis goes back, B1
/// becomes 2, and A1, A2, A3 come behind it.
fn gone_back() -> (History, History) {
    let (mut old, mut new) = (History::new(), History::new());
    ["a0", "a1", "a2", "a3"].iter().for_each(|id| old.add(id));
    ["a0", "b1", "a1", "a2", "a3"].iter().for_each(|id| new.add(id));
    (old, new)
}

#[test]
fn hazard_34_whose_acks_name_no_generation_is_closed_when_positions_start_anew() {
    let (old, new) = gone_back();
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&old, 1..=4);
    walk.ack_unnamed(3);
    assert_eq!(walk.acked(), Some(3));
    assert_eq!(walk.push(new.entry(5)), Pushed::Dropped(Dropped::Fork));
    walk.session.next_ack().unwrap();
    let cursor = Position { generation: Generation(1), ..new.cursor(0) };
    walk.session.acked(AckOutcome::Reset { cursor }, NOW, &mut walk.effects);
    // It was under way: of a3 in the old history, b1 to a3 in the new one.
    walk.ack_unnamed(4);
    assert_eq!(walk.seen(), ["close 4006"], "no welcome that it might not have read");
    let owed = walk.session.close(None).ack;
    assert!(owed.is_none_or(|ack| ack.generation == Generation(0)), "{owed:?}");
}

#[test]
fn hazard_34_the_first_ack_without_a_generation_after_a_reset_closes() {
    let (old, new) = gone_back();
    let mut walk = Walk::new(&old, 3);
    walk.sync(&old);
    assert_eq!(walk.seen(), ["a3"]);
    assert_eq!(walk.push(new.entry(5)), Pushed::Dropped(Dropped::Fork));
    walk.session.next_ack().unwrap();
    let cursor = Position { generation: Generation(1), ..new.cursor(0) };
    walk.session.acked(AckOutcome::Reset { cursor }, NOW, &mut walk.effects);
    walk.sync(&new);
    assert_eq!(walk.seen(), ["welcome", "a0", "b1", "a1", "a2"]);
    walk.ack_unnamed(4);
    assert_eq!((walk.seen(), walk.acked()), (vec!["close 4006".into()], None));
}

#[test]
fn hazard_56_what_the_device_acknowledged_in_an_earlier_session_is_not_evicted() {
    // A late ack of 1 to 3 is executed between this session's Hello and its read.
    let mut history = History::of(5);
    let page = |history: &History, read, cursor| Page {
        cursor: Some(history.cursor(cursor)),
        ..history.page(read)
    };
    let mut walk = Walk::new(&history, 0);
    let (read, _) = walk.session.next_read(true).unwrap();
    let kept = history.clone();
    history.evict(3);
    walk.session.page(page(&history, read, 3), NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["skip to 3 Acknowledged", "m4", "m5"]);
    // Two of them were evicted, after it had acknowledged one.
    let mut walk = Walk::new(&kept, 0);
    let (read, _) = walk.session.next_read(true).unwrap();
    let one = Some(kept.cursor(1));
    let partly = Page { cursor: one, ..history.page(read) };
    walk.session.page(partly, NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["skip to 1 Acknowledged", "skip to 3 Evicted", "m4", "m5"]);
    // The device named a position whose next entry was evicted: its cursor was moved over that.
    let outcome = ConnectOutcome::Connected {
        cursor: kept.cursor(0),
        newest: Seq(5),
        replaced: None,
        reset: false,
        evicted: true,
        created: false,
    };
    let session = connecting().answered(outcome, SETTINGS).unwrap().0;
    let mut walk = Walk { session, effects: Vec::new(), hops: Vec::new() };
    let (read, _) = walk.session.next_read(true).unwrap();
    walk.session.page(page(&history, read, 3), NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["skip to 3 Evicted", "m4", "m5"]);
    // A cursor of another generation says nothing.
    let mut walk = Walk::new(&kept, 0);
    let (read, _) = walk.session.next_read(true).unwrap();
    let other = Some(Position { generation: Generation(1), ..history.cursor(3) });
    walk.session.page(Page { cursor: other, ..history.page(read) }, NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["skip to 3 Evicted", "m4", "m5"]);
}

#[test]
fn the_same_position_with_another_message_is_a_fork_even_if_nothing_follows() {
    let (mut old, mut new) = (History::of(1), History::of(1));
    old.add("x");
    new.add("y");
    let mut walk = Walk::new(&History::of(1), 1);
    walk.push_all(&old, 2..=2);
    walk.ack(2);
    assert_eq!(walk.acked(), Some(2));
    assert_eq!(walk.push(new.entry(2)), Pushed::Dropped(Dropped::Fork));
    assert_eq!(walk.session.ack_urgency(), Some(AckUrgency::Urgent));
    assert!(walk.session.next_ack().is_some());
}

#[test]
fn hazard_03_an_ack_that_was_on_its_way_does_not_answer_for_a_fork_that_came_after_it() {
    let (mut old, mut new) = (History::of(1), History::of(1));
    old.add("x");
    new.add("y");
    new.add("z");
    let mut walk = Walk::new(&History::of(1), 1);
    walk.push_all(&old, 2..=2);
    walk.ack(2);
    let on_its_way = walk.session.next_ack().unwrap();
    assert_eq!(walk.push(new.entry(3)), Pushed::Dropped(Dropped::Fork));
    let advanced = AckOutcome::Advanced { cursor: on_its_way.mark.seq };
    walk.session.acked(advanced, NOW, &mut walk.effects);
    assert_eq!(walk.session.next_read(true), None, "nobody has compared yet");
    assert_eq!(walk.session.ack_urgency(), Some(AckUrgency::Urgent));
    walk.session.next_ack().unwrap();
    let cursor = Position { generation: Generation(1), ..new.cursor(0) };
    walk.session.acked(AckOutcome::Reset { cursor }, NOW, &mut walk.effects);
    walk.sync(&new);
    assert_eq!(walk.seen(), ["welcome", "m1", "y", "z"]);
}

#[test]
fn a_page_whose_entries_were_all_acknowledged_meanwhile_ends_nothing() {
    let mut history = History::of(3);
    let mut walk = Walk::new(&History::of(0), 0);
    walk.push_all(&history, 1..=3);
    assert!(walk.resend());
    let (read, _) = walk.session.next_read(true).unwrap();
    history.add("m4");
    let page = history.page(read);
    walk.ack(3);
    walk.session.page(page, NOW, &mut walk.effects);
    walk.sync(&history);
    assert_eq!(walk.seen(), ["m4"]);
}

/// x and y were written; Redis goes back, p and q take their positions and are evicted, x and y come behind them.
/// A re-send finds nothing kept up to y's position, where the chain is q's.
#[test]
fn hazard_03_a_fork_whose_places_were_evicted_is_seen_by_the_chain_before_the_oldest() {
    let (mut old, mut new) = (History::of(1), History::of(1));
    ["x", "y"].iter().for_each(|id| old.add(id));
    ["p", "q", "x", "y"].iter().for_each(|id| new.add(id));
    new.evict(3);
    let mut walk = Walk::new(&History::of(1), 1);
    walk.push_all(&old, 2..=3);
    assert!(walk.resend());
    walk.sync(&new);
    assert_eq!(walk.acked(), Some(1), "it is asked who is right");
    walk.sync(&new);
    assert_eq!(walk.seen(), ["close 4006"], "x and y are not written twice");
}

#[test]
fn a_fork_behind_the_acknowledged_position_sends_the_device_to_say_hello_again() {
    let (mut old, mut new) = (History::of(1), History::of(1));
    old.add("x");
    new.add("y");
    let mut walk = Walk::new(&History::of(1), 1);
    walk.push_all(&old, 2..=2);
    assert_eq!(walk.push(new.entry(2)), Pushed::Dropped(Dropped::Fork));
    assert_eq!(walk.acked(), Some(1), "the acknowledged part is the same");
    walk.sync(&new);
    assert_eq!(walk.seen(), ["close 4006"], "y is never shown in x's place");
}

#[test]
fn a_false_alarm_costs_one_read() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    let mut late = history.entry(2).clone();
    late.header.epoch = Epoch(3);
    assert_eq!(walk.push(&late), Pushed::Dropped(Dropped::Fork));
    assert_eq!(walk.acked(), Some(0));
    walk.sync(&history);
    assert_eq!(walk.seen(), ["m1", "m2"]);
    assert_eq!(walk.push(history.entry(2)), Pushed::Dropped(Dropped::Known));
}

#[test]
fn hazard_18_another_epoch_voids_positions() {
    let history = History::of(57);
    let mut walk = Walk::new(&history, 57);
    let mut fresh = History { epoch: Epoch(8), ..History::of(0) };
    fresh.add("first");
    assert_eq!(walk.push(fresh.entry(1)), Pushed::Dropped(Dropped::Fork));
    let point = walk.session.next_ack().unwrap();
    assert_eq!(point.epoch, Epoch(7));
    let cursor = Position { generation: Generation(1), ..fresh.cursor(0) };
    walk.session.acked(AckOutcome::Reset { cursor }, NOW, &mut walk.effects);
    walk.sync(&fresh);
    assert_eq!(walk.seen(), ["welcome", "first"]);
}

#[test]
fn a_page_of_a_history_that_became_void_is_dropped() {
    let history = History::of(3);
    let mut walk = Walk::new(&history, 1);
    let (read, _) = walk.session.next_read(true).unwrap();
    walk.session.confirmed(
        ConfirmOutcome::Confirmed { restored: true, epoch: Epoch(8), newest: Seq(1) },
        &mut walk.effects,
    );
    walk.session.next_ack().unwrap();
    let fresh = History { epoch: Epoch(8), ..History::of(1) };
    let cursor = Position { generation: Generation(1), ..fresh.cursor(0) };
    walk.session.acked(AckOutcome::Reset { cursor }, NOW, &mut walk.effects);
    walk.session.page(history.page(read), NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["welcome"]);
}

#[test]
fn confirmations_find_what_was_missed_and_who_was_replaced() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::of(1), 1);
    let stands =
        |newest| ConfirmOutcome::Confirmed { restored: true, epoch: Epoch(7), newest: Seq(newest) };
    walk.session.confirmed(stands(1), &mut walk.effects);
    assert_eq!(walk.sync(&history), []);
    walk.session.confirmed(stands(2), &mut walk.effects);
    assert_eq!(walk.sync(&history), [SyncCause::Confirm]);
    walk.session.confirmed(ConfirmOutcome::Superseded, &mut walk.effects);
    assert_eq!(walk.seen(), ["m2", "close 4502"]);
}

#[test]
fn a_lost_answer_to_a_reset_ends_in_a_new_hello() {
    let mut walk = Walk::new(&History::of(1), 1);
    walk.session.acked(AckOutcome::Stale, NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["close 4006"]);
}

#[test]
fn a_push_of_what_redis_forgot_does_not_make_it_read_for_ever() {
    let mut forgotten = History::of(3);
    let kept = History::of(1);
    forgotten.add("m4");
    let mut walk = Walk::new(&kept, 1);
    assert_eq!(walk.push(forgotten.entry(4)), Pushed::Dropped(Dropped::Gap));
    assert_eq!(walk.sync(&kept), [SyncCause::Gap]);
    assert!(walk.seen().is_empty());
}

#[test]
fn an_unreadable_mailbox_closes_instead_of_reading_for_ever() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.session.missed();
    let (read, _) = walk.session.next_read(true).unwrap();
    let page = Page { entries: vec![Bytes::from_static(b"junk")], ..history.page(read) };
    walk.session.page(page, NOW, &mut walk.effects);
    assert_eq!(walk.seen(), ["close 4005"]);
}

#[test]
fn receipts_tell_what_was_asked_for() {
    let mut history = History::new();
    history.add_with("both", |e| e.receipts = ReceiptSet::SENT.with(ReceiptSet::ACKED).0);
    history.add("none");
    history.add_with("late", |e| {
        e.receipts = ReceiptSet::EXPIRED.0;
        e.ttl_ms = 1;
        e.accepted_at_us = NOW - 5_000;
    });
    history.entries[2].header.accepted_at_us = NOW - 5_000;
    let mut walk = Walk::new(&History::new(), 0);
    for seq in 1..=3 {
        walk.push(history.entry(seq));
    }
    walk.ack(2);
    assert_eq!(walk.seen(), ["Sent both", "Expired late", "skip to 3 Expired", "Acked both"]);
}

#[test]
fn a_refresh_is_for_the_same_user_and_device() {
    let walk = Walk::new(&History::new(), 0);
    assert!(walk.session.refresh(&claims()).is_ok());
    let bob = UserKey { user: UserId::new("bob").unwrap(), ..claims().user };
    let tablet = DeviceId::new("tablet").unwrap();
    for other in [Claims { user: bob, ..claims() }, Claims { device: Some(tablet), ..claims() }] {
        assert_eq!(walk.session.refresh(&other).unwrap_err().code, CloseCode::BadToken);
    }
}

#[test]
fn what_is_owed_to_the_mailbox_outlives_the_session() {
    let history = History::of(2);
    let mut walk = Walk::new(&History::new(), 0);
    walk.push_all(&history, 1..=2);
    walk.ack(1);
    walk.session.next_ack().unwrap();
    walk.ack(2);
    let closing = walk.session.close(None);
    assert_eq!(closing.ack.unwrap().mark.seq, Seq(2));
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is lost, doubled or out of order on the fast path, the device sees its mailbox in
        /// order and without gaps, and a sync brings all of it.
        #[test]
        fn every_message_comes_once_and_in_order(
            steps in proptest::collection::vec((0u8..6, 0u64..12), 1..80)
        ) {
            let mut history = History::new();
            let mut walk = Walk::new(&history, 0);
            let mut device: Vec<String> = Vec::new();
            for (step, number) in steps {
                let newest = history.newest().0;
                match step {
                    0 | 1 => {
                        history.add(&format!("m{}", newest + 1));
                        if step == 0 {
                            let entry = history.entry(newest + 1).clone();
                            if walk.push(&entry) == Pushed::Write {
                                device.push(entry.envelope.id);
                            }
                        }
                    }
                    2 if newest > 0 => {
                        let entry = history.entry(number % newest + 1).clone();
                        if walk.push(&entry) == Pushed::Write {
                            device.push(entry.envelope.id);
                        }
                    }
                    3 => walk.ack(device.len() as u64),
                    4 => { walk.resend(); }
                    _ => { walk.sync(&history); }
                }
                while walk.acked().is_some() {}
                take(&mut walk, &mut device)?;
            }
            for _ in 0..1 + history.newest().0 {
                walk.ack(device.len() as u64);
                walk.session.missed();
                walk.sync(&history);
                take(&mut walk, &mut device)?;
            }
            prop_assert_eq!(device.len() as u64, history.newest().0);
        }
    }

    /// A device takes what is new to it, and drops what it has.
    fn take(walk: &mut Walk, device: &mut Vec<String>) -> Result<(), TestCaseError> {
        if walk.effects.iter().any(|e| matches!(e, Effect::Close(_))) {
            walk.effects.clear();
            return Err(TestCaseError::reject("five re-sends"));
        }
        for id in walk.seen() {
            let seq: usize = id[1..].parse().unwrap();
            if seq == device.len() + 1 {
                device.push(id);
            } else {
                prop_assert!(seq <= device.len(), "gap before {}", seq);
            }
        }
        Ok(())
    }
}
