use barid_core::Epoch;
use proptest::prelude::*;

use super::*;
use crate::message::Body;

const G: Generation = Generation(1);

fn at(epoch: u64, generation: u32, seq: u64) -> Position {
    Position {
        epoch: Epoch(epoch),
        generation: Generation(generation),
        seq: Seq(seq),
        chain: Some(Chain::START),
    }
}

fn message(seq: u64, id: &str) -> Message {
    Message { group: None, seq: Seq(seq), id: id.into(), body: Body::Text(id.into()) }
}

/// An inbox behind a recorder of its events.
#[derive(Default)]
struct Device {
    inbox: Inbox,
    events: Vec<Event>,
}

impl Device {
    fn welcomed() -> Self {
        let mut device = Self::default();
        device.welcome(at(7, 1, 0));
        device
    }

    fn welcome(&mut self, position: Position) {
        self.inbox.welcome(position, &mut self.events);
    }

    fn deliver(&mut self, generation: Generation, seq: u64, id: &str) {
        self.inbox.deliver(generation, message(seq, id), &mut self.events).unwrap();
    }

    fn skip(&mut self, to: u64, chain: u32) {
        let why = SkipReason::Expired;
        self.inbox.skip(G, Seq(to), Chain(chain), why, &mut self.events).unwrap();
    }

    /// Skips to `to` as evicted; the position's history is then unknown.
    fn evicted(&mut self, to: u64) {
        let why = SkipReason::Evicted;
        self.inbox.skip(G, Seq(to), Chain(0), why, &mut self.events).unwrap();
    }

    fn take(&mut self) -> Ticket {
        self.inbox.next_message().expect("a message waits").0
    }

    fn finished(&mut self, ticket: Ticket, handled: bool) {
        self.inbox.finished(ticket, handled, &mut self.events);
    }

    fn shown(&mut self) -> Option<String> {
        self.inbox.next_message().map(|(_, message)| message.id)
    }

    fn acked(&mut self) -> Option<u64> {
        self.inbox.take_ack().map(|ack| ack.seq.0)
    }

    /// Handles everything that waits; the ids.
    fn handle_all(&mut self) -> Vec<String> {
        std::iter::from_fn(|| {
            let (ticket, message) = self.inbox.next_message()?;
            self.finished(ticket, true);
            Some(message.id)
        })
        .collect()
    }
}

#[test]
fn messages_are_shown_in_order_and_acknowledged_together() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    assert_eq!(device.acked(), None);
    assert_eq!(device.handle_all(), ["a", "b"]);
    assert_eq!(device.inbox.take_ack(), Some(Ack { generation: G, seq: Seq(2) }));
    assert_eq!(device.acked(), None);
    let position = device.inbox.position().unwrap();
    assert_eq!(position.seq, Seq(2));
    assert_eq!(position.chain, Some(Chain::START.next("a").next("b")));
}

#[test]
fn a_refused_message_that_is_evicted_with_newer_ones_holds_up_nothing() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    let ticket = device.take();
    device.finished(ticket, false);
    device.evicted(2);
    device.deliver(G, 3, "c");
    assert_eq!(device.handle_all(), ["c"]);
    assert_eq!(device.acked(), Some(3));
    let why = SkipReason::Evicted;
    let told = |first, last| Event::Skipped { first: Seq(first), last: Seq(last), why };
    assert_eq!(device.events, [told(1, 1), told(2, 2)]);
}

#[test]
fn a_message_that_is_refused_after_it_was_evicted_holds_up_nothing() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    let ticket = device.take();
    device.evicted(2);
    device.deliver(G, 3, "c");
    device.finished(ticket, false);
    assert_eq!(device.handle_all(), ["c"]);
    assert_eq!(device.acked(), Some(3));
    // The skip did not name "a", which the application had. Now that it gives it back, it is told.
    let why = SkipReason::Evicted;
    let told = |seq| Event::Skipped { first: Seq(seq), last: Seq(seq), why };
    assert_eq!(device.events, [told(2), told(1)]);
}

#[test]
fn a_message_that_is_handled_after_it_was_evicted_is_not_skipped() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    let ticket = device.take();
    device.evicted(1);
    device.finished(ticket, true);
    assert_eq!((device.events.len(), device.acked()), (0, Some(1)));
}

#[test]
fn a_message_that_is_refused_after_an_earlier_connection_acknowledged_it_is_told_as_such() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    let ticket = device.take();
    let why = SkipReason::Acknowledged;
    device.inbox.skip(G, Seq(1), Chain(0), why, &mut device.events).unwrap();
    device.finished(ticket, false);
    let (first, last) = (Seq(1), Seq(1));
    assert_eq!(device.events, [Event::Skipped { first, last, why }]);
}

#[test]
fn an_ack_never_passes_a_message_that_is_not_handled() {
    let mut device = Device::welcomed();
    for (seq, id) in [(1, "a"), (2, "b"), (3, "c")] {
        device.deliver(G, seq, id);
    }
    let (a, b, c) = (device.take(), device.take(), device.take());
    device.finished(c, true);
    assert_eq!(device.acked(), None);
    device.finished(a, true);
    assert_eq!(device.acked(), Some(1));
    device.finished(b, true);
    assert_eq!(device.acked(), Some(3));
}

#[test]
fn hazard_03_what_took_anothers_place_while_the_device_was_away_is_shown() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "x");
    device.deliver(G, 2, "y");
    let x = device.take(); // it is being handled, and "y" waits
    // The connection breaks, Redis forgets both, "z" becomes 1 and they are accepted again.
    device.welcome(at(7, 1, 0));
    device.deliver(G, 1, "z");
    device.finished(x, true);
    assert_eq!(device.acked(), None, "what was handled is not what now stands there");
    assert_eq!(device.handle_all(), ["z"]);
    device.deliver(G, 2, "x");
    device.deliver(G, 3, "y");
    assert_eq!(device.handle_all(), ["y"], "x was handled");
    assert_eq!(device.acked(), Some(3));
}

#[test]
fn hazard_03_a_fork_whose_place_was_evicted_shows_nothing_twice() {
    let mut device = Device::welcomed();
    for (seq, id) in [(1, "x"), (2, "y"), (3, "z")] {
        device.deliver(G, seq, id);
    }
    let x = device.take();
    device.finished(x, true);
    let y = device.take(); // it is being handled, and "z" waits
    // Redis forgets all three, others take their places and are evicted, and they are accepted again.
    device.evicted(6);
    for (seq, id) in [(7, "x"), (8, "y"), (9, "z"), (10, "new")] {
        device.deliver(G, seq, id);
    }
    device.finished(y, true);
    assert_eq!(device.handle_all(), ["z", "new"]);
    assert_eq!(device.acked(), Some(10));
}

#[test]
fn hazard_03_what_waited_for_the_application_is_shown_when_the_connection_breaks_too() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "x");
    device.deliver(G, 2, "refused");
    device.deliver(G, 3, "z");
    let x = device.take();
    let refused = device.take();
    device.finished(refused, false);
    device.evicted(6);
    // Redis goes back to before the eviction, while "x" is being handled.
    device.welcome(at(7, 1, 0));
    for (seq, id) in [(1, "x"), (2, "refused"), (3, "z")] {
        device.deliver(G, seq, id);
    }
    device.finished(x, true);
    assert_eq!(device.handle_all(), ["refused", "z"]);
    assert_eq!(device.acked(), Some(3));
}

#[test]
fn hazard_03_what_was_handled_behind_an_eviction_is_not_shown_again_after_a_reconnect() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    // Redis went back, others took the place of "a", and were evicted while it is being handled.
    device.evicted(30);
    let ticket = device.take();
    device.finished(ticket, true);
    assert_eq!(device.acked(), Some(30));
    let checkpoint = device.inbox.checkpoint(1);
    let there = device.inbox.position().unwrap();
    device.welcome(there);
    device.deliver(G, 31, "a");
    assert_eq!(device.shown(), None);
    let mut restarted = Device { inbox: Inbox::resume(&checkpoint), events: Vec::new() };
    restarted.welcome(there);
    restarted.deliver(G, 31, "a");
    assert_eq!(restarted.shown(), None);
}

#[test]
fn what_came_before_is_not_shown_again_but_acknowledged_again() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    let a = device.take();
    device.deliver(G, 1, "a"); // a re-send while the application has it
    device.deliver(G, 2, "b"); // and while it waits
    assert_eq!(device.events.len(), 2);
    device.finished(a, true);
    assert_eq!(device.handle_all(), ["b"]);
    assert_eq!(device.acked(), Some(2));
    device.deliver(G, 2, "b"); // the ack got lost
    assert_eq!(device.shown(), None);
    assert_eq!(device.acked(), Some(2));
}

#[test]
fn a_refused_message_comes_again_before_anything_newer() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    let a = device.take();
    device.finished(a, false);
    assert_eq!(device.shown(), None);
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    assert_eq!(device.handle_all(), ["a", "b"]);
    assert_eq!(device.acked(), Some(2));
}

#[test]
fn a_refused_message_that_expires_is_skipped() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    let a = device.take();
    device.finished(a, false);
    device.skip(1, 5);
    assert_eq!(device.handle_all(), ["b"]);
    assert_eq!(device.acked(), Some(2));
}

#[test]
fn hazard_87_a_message_that_expires_with_the_application_and_is_given_back_holds_up_nothing() {
    let mut device = Device::welcomed();
    for (seq, id) in [(1, "a"), (2, "b"), (3, "c")] {
        device.deliver(G, seq, id);
    }
    let (a, b) = (device.take(), device.take());
    // The server sends again: a, and not b, which has expired.
    device.deliver(G, 1, "a");
    device.skip(2, 5);
    device.finished(b, false);
    let (first, last) = (Seq(2), Seq(2));
    let skipped = Event::Skipped { first, last, why: SkipReason::Expired };
    assert_eq!(device.events.last(), Some(&skipped));
    device.finished(a, false);
    assert_eq!(device.shown(), None, "a will be sent again");
    device.deliver(G, 1, "a");
    assert_eq!(device.handle_all(), ["a", "c"]);
    assert_eq!(device.acked(), Some(3));
}

#[test]
fn a_message_of_a_second_pass_is_withdrawn_only_by_that_pass() {
    let mut device = Device::welcomed();
    for (seq, id) in [(1, "a"), (2, "b"), (3, "c")] {
        device.deliver(G, seq, id);
    }
    let _a = device.take();
    let b = device.take();
    for seq in [1, 2] {
        device.deliver(G, seq, if seq == 1 { "a" } else { "b" });
    }
    // The next pass begins with a hole.
    device.skip(1, 5);
    device.finished(b, false);
    assert_eq!(device.shown(), None, "b will be sent again");
    device.deliver(G, 2, "b");
    assert_eq!(device.handle_all(), ["b", "c"]);
}

#[test]
fn hazard_88_a_message_given_back_after_its_eviction_is_sent_again_where_it_came_back() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    let a = device.take();
    device.evicted(2);
    // After a failover, the mailbox has the message once more.
    device.deliver(G, 3, "a");
    device.finished(a, false);
    assert_eq!(device.acked(), Some(2), "it is not handled");
    device.deliver(G, 3, "a");
    assert_eq!(device.handle_all(), ["a"]);
    assert_eq!(device.acked(), Some(3));
}

#[test]
fn hazard_61_positions_of_an_inbox_are_bounded() {
    for seq in [WIRE_NUMBER_MAX + 1, 1 << 63, u64::MAX] {
        let mut device = Device::welcomed();
        let refused = Err(Violation::OutOfRange(Seq(seq)));
        let skip = SkipReason::Expired;
        let events = &mut device.events;
        assert_eq!(device.inbox.skip(G, Seq(seq), Chain(1), skip, events), refused);
        assert_eq!(device.inbox.deliver(G, message(seq, "a"), events), refused);
        let position = Some(at(7, 1, seq));
        let checkpoint = Checkpoint { position, ..Default::default() };
        assert_eq!(Inbox::resume(&checkpoint).position(), None);
    }
    let mut device = Device::welcomed();
    device.skip(WIRE_NUMBER_MAX, 1);
    let beyond = device.inbox.deliver(G, message(WIRE_NUMBER_MAX + 1, "a"), &mut device.events);
    assert_eq!(beyond, Err(Violation::OutOfRange(Seq(WIRE_NUMBER_MAX + 1))));
}

#[test]
fn a_gap_is_a_violation() {
    let mut device = Device::welcomed();
    let gap = device.inbox.deliver(G, message(2, "b"), &mut device.events);
    assert_eq!(gap, Err(Violation::Gap { received: Seq(0), got: Seq(2) }));
    let mut stranger = Device::default();
    let early = stranger.inbox.deliver(G, message(1, "a"), &mut stranger.events);
    assert_eq!(early, Err(Violation::Early));
}

#[test]
fn skipped_positions_are_told_and_acknowledged_in_their_turn() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.skip(4, 99);
    device.deliver(G, 5, "e");
    let (first, last) = (Seq(2), Seq(4));
    assert_eq!(device.events, [Event::Skipped { first, last, why: SkipReason::Expired }]);
    assert_eq!(device.acked(), None);
    assert_eq!(device.handle_all(), ["a", "e"]);
    assert_eq!(device.acked(), Some(5));
    assert_eq!(device.inbox.position().unwrap().chain, Some(Chain(99).next("e")));
}

#[test]
fn a_reconnect_repeats_the_ack_that_the_server_missed() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    device.handle_all();
    assert_eq!(device.acked(), Some(2));
    device.welcome(at(7, 1, 1));
    assert_eq!(device.acked(), Some(2));
    device.deliver(G, 2, "b");
    assert_eq!(device.shown(), None);
}

#[test]
fn what_is_with_the_application_survives_a_reconnect() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    let a = device.take();
    device.welcome(at(7, 1, 0));
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    device.finished(a, true);
    assert_eq!(device.handle_all(), ["b"]);
    assert_eq!(device.acked(), Some(2));
}

#[test]
fn after_a_reset_ids_tell_what_was_seen() {
    let mut device = Device::welcomed();
    for (seq, id) in [(1, "a"), (2, "b"), (3, "c")] {
        device.deliver(G, seq, id);
    }
    device.handle_all();
    device.welcome(at(7, 2, 0)); // a fork: "c" is forgotten, "x" took its place
    assert!(matches!(device.events[..], [Event::Reset { .. }]));
    let g = Generation(2);
    device.deliver(G, 4, "late"); // of the void generation
    for (seq, id) in [(1, "a"), (2, "b"), (3, "x"), (4, "c")] {
        device.deliver(g, seq, id);
    }
    assert_eq!(device.handle_all(), ["x"]);
    assert_eq!(device.inbox.take_ack(), Some(Ack { generation: g, seq: Seq(4) }));
    device.deliver(g, 5, "a"); // the business uses an id again, much later
    assert_eq!(device.handle_all(), ["a"]);
}

#[test]
fn a_message_with_the_application_during_a_reset_is_not_shown_twice() {
    for handled_before_it_returns in [true, false] {
        let mut device = Device::welcomed();
        device.deliver(G, 1, "a");
        let a = device.take();
        device.welcome(at(8, 1, 0));
        if handled_before_it_returns {
            device.finished(a, true);
            device.deliver(G, 1, "a");
        } else {
            device.deliver(G, 1, "a");
            assert_eq!(device.shown(), None);
            assert_eq!(device.acked(), None);
            device.finished(a, true);
        }
        assert_eq!(device.shown(), None);
        assert_eq!(device.acked(), Some(1));
    }
}

#[test]
fn a_message_refused_after_a_reset_is_shown_again() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    let a = device.take();
    device.welcome(at(8, 1, 0));
    device.deliver(G, 1, "a");
    device.finished(a, false);
    device.deliver(G, 1, "a");
    assert_eq!(device.handle_all(), ["a"]);
}

#[test]
fn the_first_message_of_a_new_mailbox_is_no_reset() {
    let mut device = Device::default();
    device.welcome(at(0, 0, 0));
    device.welcome(at(7, 1, 0));
    assert_eq!(device.events, []);
    device.deliver(G, 1, "a");
    assert_eq!(device.handle_all(), ["a"]);
}

#[test]
fn a_checkpoint_brings_back_the_position_and_the_ids() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.deliver(G, 2, "b");
    let a = device.take();
    device.finished(a, true);
    let checkpoint = device.inbox.checkpoint(5);
    assert_eq!(checkpoint.position.unwrap().seq, Seq(1)); // "b" was not handled

    let mut restarted = Device { inbox: Inbox::resume(&checkpoint), events: vec![] };
    restarted.welcome(at(9, 1, 0));
    restarted.deliver(G, 1, "a");
    restarted.deliver(G, 2, "b");
    assert_eq!(restarted.handle_all(), ["b"]);
}

#[test]
fn a_server_that_is_further_is_believed() {
    let mut device = Device::welcomed();
    device.deliver(G, 1, "a");
    device.welcome(at(7, 1, 5)); // another program of this device acknowledged up to there
    device.deliver(G, 6, "f");
    assert_eq!(device.handle_all(), ["f"]);
    assert_eq!(device.acked(), Some(6));
}

/// An event between a device, its application and a cluster that may lose its newest writes.
#[derive(Debug, Clone)]
enum Step {
    Push,
    Send,
    Resend,
    Take,
    Finish { which: prop::sample::Index, handled: bool },
    Ack,
    Reconnect,
    Restart,
    Fork { lost: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let finish = (any::<prop::sample::Index>(), prop::bool::weighted(0.8))
        .prop_map(|(which, handled)| Step::Finish { which, handled });
    prop_oneof![
        4 => Just(Step::Push),
        5 => Just(Step::Send),
        1 => Just(Step::Resend),
        4 => Just(Step::Take),
        5 => finish,
        3 => Just(Step::Ack),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Restart),
        1 => (0usize..4).prop_map(|lost| Step::Fork { lost }),
    ]
}

/// A mailbox, its session, and an application that takes what the inbox gives it.
#[derive(Default)]
struct World {
    device: Device,
    log: Vec<String>,
    pushed: usize,
    generation: u32,
    acked: u64,
    sent: u64,
    out: Vec<(Ticket, String)>,
    handled: Vec<String>,
}

impl World {
    fn push(&mut self) {
        self.pushed += 1;
        self.log.push(format!("m{}", self.pushed));
    }

    fn welcome(&mut self) {
        self.sent = self.acked;
        self.device.welcome(at(7, self.generation, self.acked));
    }

    fn send(&mut self) {
        if let Some(id) = self.log.get(self.sent as usize).cloned() {
            self.sent += 1;
            self.device.deliver(Generation(self.generation), self.sent, &id);
        }
    }

    fn resend(&mut self) {
        let sent = std::mem::replace(&mut self.sent, self.acked);
        while self.sent < sent {
            self.send();
        }
    }

    fn take(&mut self) {
        if let Some((ticket, message)) = self.device.inbox.next_message() {
            self.out.push((ticket, message.id));
        }
    }

    fn finish(&mut self, which: usize, handled: bool) {
        let (ticket, id) = self.out.swap_remove(which);
        self.device.finished(ticket, handled);
        if handled {
            self.handled.push(id);
        }
    }

    fn ack(&mut self) {
        if let Some(ack) = self.device.inbox.take_ack()
            && ack.generation.0 == self.generation
        {
            // A node clamps: this connection may not have sent yet what the one before had.
            self.acked = self.acked.max(ack.seq.0.min(self.sent));
        }
    }

    fn reconnect(&mut self) {
        let position = self.device.inbox.position().expect("there was a welcome");
        if position.generation.0 == self.generation {
            self.acked = self.acked.max(position.seq.0);
        }
        self.welcome();
    }

    /// Another process of the same device: only the checkpoint survives.
    fn restart(&mut self) {
        self.out.clear();
        self.device.inbox = Inbox::resume(&self.device.inbox.checkpoint(0));
        self.reconnect();
    }

    /// The newest entries are lost, and come back from Kafka behind another one.
    fn fork(&mut self, lost: usize) {
        let back = self.log.split_off(self.log.len().saturating_sub(lost));
        self.push();
        self.log.extend(back);
        self.generation += 1;
        self.acked = 0;
        self.welcome();
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Push => self.push(),
            Step::Send => self.send(),
            Step::Resend => self.resend(),
            Step::Take => self.take(),
            Step::Finish { .. } if self.out.is_empty() => {}
            Step::Finish { which, handled } => self.finish(which.index(self.out.len()), *handled),
            Step::Ack => self.ack(),
            Step::Reconnect => self.reconnect(),
            Step::Restart => self.restart(),
            Step::Fork { lost } => self.fork(*lost),
        }
    }

    /// Nothing goes wrong any more.
    fn calm(&mut self) {
        for _ in 0..2 {
            while !self.out.is_empty() {
                self.finish(0, true);
            }
            self.resend();
            for _ in 0..self.log.len() {
                self.send();
                self.take();
                while !self.out.is_empty() {
                    self.finish(0, true);
                }
            }
            self.ack();
        }
    }
}

proptest! {
    #[test]
    fn whatever_happens_each_message_is_handled_once_and_acknowledged(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let mut world = World::default();
        world.welcome();
        for step in &steps {
            world.run(step);
        }
        world.calm();
        prop_assert_eq!(world.acked, world.log.len() as u64);
        let mut handled = world.handled.clone();
        handled.sort();
        let mut log = world.log.clone();
        log.sort();
        prop_assert_eq!(handled, log);
    }
}
