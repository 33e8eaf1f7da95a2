use proptest::prelude::*;

use super::*;

/// A mailbox as Redis has it: what it keeps, and the life that it is in.
#[derive(Debug, Clone, Default)]
struct Mailbox {
    epoch: u64,
    oldest: u64,
    chain_before_oldest: u32,
    entries: Vec<(Header, u32)>,
    accepted: u32,
}

impl Mailbox {
    fn newest(&self) -> Point {
        let last = self.entries.last().map(|(header, _)| (header.seq, header.chain));
        let (seq, chain) = last.unwrap_or((Seq(self.oldest - 1), Chain(self.chain_before_oldest)));
        Point { epoch: Epoch(self.epoch), seq, chain }
    }

    /// Accepts a message; its number stands for its content.
    fn accept(&mut self) -> (Header, u32) {
        if self.epoch == 0 {
            (self.epoch, self.oldest) = (1, 1);
        }
        self.accepted += 1;
        let before = self.newest();
        let header = Header {
            epoch: before.epoch,
            seq: before.seq.next(),
            prev_chain: before.chain,
            chain: before.chain.step(self.accepted),
            accepted_at_us: 0,
        };
        self.entries.push((header, self.accepted));
        (header, self.accepted)
    }

    fn evict(&mut self) {
        if self.entries.len() > 1 {
            let (header, _) = self.entries.remove(0);
            (self.oldest, self.chain_before_oldest) = (header.seq.0 + 1, header.chain.0);
        }
    }

    fn read(&self, after: Seq, max: usize) -> Page<u32> {
        let wanted = self.entries.iter().filter(|(header, _)| header.seq > after);
        Page {
            epoch: Epoch(self.epoch),
            after,
            oldest: Seq(self.oldest.max(1)),
            chain_before_oldest: Chain(self.chain_before_oldest),
            newest: self.newest_seq(),
            entries: wanted.take(max).cloned().collect(),
        }
    }

    fn newest_seq(&self) -> Seq {
        if self.epoch == 0 { Seq(0) } else { self.newest().seq }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Accept,
    /// Delivers the record at this index of those under way, twice if so.
    Deliver(usize, bool),
    Drop(usize),
    Open,
    /// Asks for a page of at most this many entries, if none is under way.
    Ask(usize),
    /// The page that was asked for arrives.
    Answer,
    Evict,
    /// A failover: the newest entries are lost.
    Lose(usize),
    /// The mailbox expires; the next one has another epoch.
    Expire,
}

fn step(faults: bool) -> impl Strategy<Value = Step> {
    let calm = prop_oneof![
        4 => Just(Step::Accept),
        4 => (0..8usize, any::<bool>()).prop_map(|(at, twice)| Step::Deliver(at, twice)),
        1 => (0..8usize).prop_map(Step::Drop),
        1 => Just(Step::Open),
        2 => (1..5usize).prop_map(Step::Ask),
        2 => Just(Step::Answer),
    ];
    let rare =
        prop_oneof![Just(Step::Evict), (1..4usize).prop_map(Step::Lose), Just(Step::Expire),];
    match faults {
        true => prop_oneof![8 => calm, 1 => rare].boxed(),
        false => calm.boxed(),
    }
}

struct World {
    mailbox: Mailbox,
    under_way: Vec<(Header, u32)>,
    place: Place<u32>,
    page: Option<Page<u32>>,
    heard: Vec<u32>,
    /// The messages that were accepted before the node was listed.
    before: u32,
    open: bool,
}

impl World {
    fn new() -> Self {
        let (mailbox, place) = (Mailbox::default(), Place::default());
        let (under_way, heard) = (vec![], vec![]);
        Self { mailbox, under_way, place, page: None, heard, before: 0, open: false }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Accept => {
                let record = self.mailbox.accept();
                if self.open {
                    self.under_way.push(record);
                }
            }
            Step::Deliver(at, twice) if !self.under_way.is_empty() => {
                let at = at % self.under_way.len();
                let (header, number) = match twice {
                    true => self.under_way[at],
                    false => self.under_way.remove(at),
                };
                self.heard.extend(self.place.receive(header, number, true));
            }
            Step::Drop(at) if !self.under_way.is_empty() => {
                self.under_way.remove(at % self.under_way.len());
            }
            Step::Open => self.open(),
            Step::Ask(max) if self.place.is_behind() && self.page.is_none() => self.ask(*max),
            Step::Answer => self.answer(),
            Step::Evict => self.mailbox.evict(),
            Step::Lose(count) => {
                let left = self.mailbox.entries.len().saturating_sub(*count);
                self.mailbox.entries.truncate(left);
            }
            Step::Expire => {
                let (accepted, epoch) = (self.mailbox.accepted, self.mailbox.epoch + 1);
                self.mailbox = Mailbox { accepted, epoch, oldest: 1, ..Default::default() };
            }
            _ => (),
        }
    }

    fn open(&mut self) {
        if !self.open {
            self.before = self.mailbox.accepted;
        }
        self.open = true;
        let head = if self.mailbox.epoch == 0 {
            Point { epoch: Epoch(0), seq: Seq(0), chain: Chain::START }
        } else {
            self.mailbox.newest()
        };
        self.heard.extend(self.place.open(head));
    }

    fn ask(&mut self, max: usize) {
        self.page = Some(self.mailbox.read(self.place.read_after(), max));
    }

    fn answer(&mut self) {
        if let Some(page) = self.page.take() {
            self.heard.extend(self.place.page(page));
        }
    }

    /// Evidence of the head arrives, and the mailbox is read until the node is not behind.
    fn settle(&mut self) {
        self.answer();
        self.open();
        for _ in 0..100 {
            if !self.place.is_behind() {
                return;
            }
            self.ask(4);
            self.answer();
        }
        panic!("reads for ever: {:?}", self.place);
    }
}

proptest! {
    /// Whatever is dropped, repeated or reordered: once the node hears of the head, it has each message once, in order.
    #[test]
    fn hazard_162_a_lost_or_overtaken_record_is_read_from_the_mailbox(
        steps in prop::collection::vec(step(false), 0..80)
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.run(step));
        world.settle();
        let wanted: Vec<u32> = (world.before + 1..=world.mailbox.accepted).collect();
        prop_assert_eq!(world.heard, wanted);
    }

    /// With failovers, evictions and expiry as well: what Redis has at the end was heard, in its order, and nothing is
    /// read for ever.
    #[test]
    fn hazard_163_what_redis_keeps_after_a_failover_is_heard(
        steps in prop::collection::vec(step(true), 0..80)
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.run(step));
        world.settle();
        let kept: Vec<u32> = world.mailbox.entries.iter().map(|(_, number)| *number).collect();
        let kept: Vec<u32> = kept.into_iter().filter(|number| *number > world.before).collect();
        let mut at = 0;
        for number in &world.heard {
            if kept.get(at) == Some(number) {
                at += 1;
            }
        }
        prop_assert_eq!(at, kept.len(), "kept {:?}, heard {:?}", kept, world.heard);
        let is_calm = !steps.iter().any(|step| matches!(step, Step::Lose(_) | Step::Expire));
        let in_order = world.heard.is_sorted_by(|a, b| a < b);
        prop_assert!(in_order || !is_calm, "without a loss nothing is repeated: {:?}", world.heard);
    }
}

#[test]
fn a_record_that_redis_has_lost_does_not_have_the_mailbox_read_for_ever() {
    let mut world = World::new();
    world.open();
    for _ in 0..3 {
        world.mailbox.accept();
    }
    let lost = world.mailbox.entries.pop().unwrap();
    world.mailbox.entries.pop();
    assert_eq!(world.place.receive(lost.0, lost.1, true), [] as [u32; 0]);
    world.settle();
    assert_eq!(world.heard, [1]);
}
