//! The lanes and the partitions together, over a store that behaves as the accept script does and
//! fails as Redis may: whatever happens, every shard ends up with its part of the log, in order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use barid_bus::consumer::{Assigned, Partition, Reach, Record};
use barid_bus::{DeadLetters, KafkaConfig, Memory, Metadata, Producer, Receipts, TopicSource};
use barid_core::{Seq, ShardCount, SystemClock};
use barid_mailbox::{AcceptOutcome, RedisTime, Source};
use barid_runtime::{Context, Tasks, Tracer};
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::IntCounter;
use proptest::prelude::*;
use tokio::time::timeout;

use super::*;
use crate::config::Config;
use crate::intake::{Decoded, Intake};
use crate::lanes::event::Question;
use crate::lanes::{HandOn, Nobody};
use crate::partitions::Partitions;

const SHARDS: u32 = 4;

/// The fate of a call.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Executed,
    /// It never arrived.
    Lost,
    /// It was executed, but its answer was lost.
    AnswerLost,
    /// Before it, the master fell back to what it was after so many accepted messages.
    Forgets(usize),
    /// Only the first group got through.
    FirstOnly,
}

type Place = (Source, Shard);

/// A shard's accepted messages: whence, and which id.
type Accepted = Vec<(Place, LogPosition)>;

#[derive(Default)]
struct State {
    fates: VecDeque<Fate>,
    positions: BTreeMap<(i32, u16), LogPosition>,
    accepted: BTreeMap<u16, Accepted>,
    outstanding: BTreeMap<(i32, u16), usize>,
}

#[derive(Clone, Default)]
struct Store(Arc<Mutex<State>>);

impl State {
    fn group(&mut self, group: &AcceptGroup) -> GroupOutcome {
        let place = place(group);
        let stored = self.positions.get(&place).copied();
        if group.prev > stored {
            return GroupOutcome::Gap(stored);
        }
        let outcome = |state: &mut Self, message: &barid_mailbox::AcceptMessage| {
            if state.positions.get(&place).is_some_and(|stored| message.position <= *stored) {
                return AcceptOutcome::AcceptedBefore;
            }
            state.positions.insert(place, message.position);
            let log = state.accepted.entry(group.shard.get()).or_default();
            log.push(((group.source.clone(), group.shard), message.position));
            let seq = Seq(log.len() as u64);
            AcceptOutcome::Accepted {
                seq,
                envelope: Bytes::new(),
                online: false,
                nodes: Arc::default(),
                evicted: 0,
            }
        };
        let outcomes = group.messages.iter().map(|message| outcome(self, message)).collect();
        if let Some(raise) = group.raise.filter(|raise| Some(*raise) > stored) {
            assert!(group.messages.is_empty());
            self.positions.insert(place, raise);
        }
        GroupOutcome::Done(outcomes)
    }

    /// Every shard falls back to its first `kept` messages.
    fn forget(&mut self, kept: usize) {
        self.positions.clear();
        for (shard, log) in &mut self.accepted {
            log.truncate(kept);
            for ((source, _), position) in log {
                self.positions.insert((source.partition, *shard), *position);
            }
        }
    }
}

fn place(group: &AcceptGroup) -> (i32, u16) {
    (group.source.partition, group.shard.get())
}

impl Mailboxes for Store {
    fn shards(&self) -> ShardCount {
        ShardCount::new(SHARDS).unwrap()
    }
    fn lanes(&self) -> usize {
        2
    }
    fn lane_of(&self, shard: Shard) -> usize {
        usize::from(shard.get()) % 2
    }
    fn redis_time(&self, _: Shard) -> Option<RedisTime> {
        None
    }
    async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, Error>> {
        let fate = {
            let mut state = self.0.lock();
            for group in groups {
                let calls = state.outstanding.entry(place(group)).or_default();
                *calls += 1;
                assert_eq!(*calls, 1, "one group a shard and partition at once");
            }
            state.fates.pop_front().unwrap_or(Fate::Executed)
        };
        tokio::time::sleep(Duration::from_micros(300)).await;
        let mut state = self.0.lock();
        for group in groups {
            state.outstanding.insert(place(group), 0);
        }
        let away = || Err(Error::Away("test".into()));
        match fate {
            Fate::Lost => return groups.iter().map(|_| away()).collect(),
            Fate::Forgets(kept) => state.forget(kept),
            _ => {}
        }
        let outcomes = groups.iter().enumerate().map(|(i, group)| match fate {
            Fate::FirstOnly if i > 0 => away(),
            _ => Ok(state.group(group)),
        });
        let outcomes: Vec<_> = outcomes.collect();
        if let Fate::AnswerLost = fate {
            return groups.iter().map(|_| away()).collect();
        }
        outcomes
    }
    async fn ping(&self) -> Result<(), Error> {
        Ok(())
    }
}

fn outbox(metrics: &Metrics, tasks: &Tasks) -> Outbox {
    let config = KafkaConfig::default();
    let producer = Producer::new(&config).unwrap();
    Outbox {
        receipts: Receipts::new(producer.clone(), &config, IntCounter::new("d", "d").unwrap()),
        dead: DeadLetters::new(producer, &config, IntCounter::new("l", "l").unwrap()),
        hand_on: HandOn::new(Nobody, 1, Duration::ZERO, metrics.clone(), tasks.spawner()),
        clock: Arc::new(SystemClock),
        metrics: metrics.clone(),
        tracer: Tracer::new(&prometheus::Registry::new(), 1).unwrap(),
        tasks: tasks.spawner(),
    }
}

/// A log of two partitions, read as the service reads it.
struct World {
    config: Config,
    store: Store,
    partitions: Partitions,
    queues: Vec<Arc<Queue>>,
    _tasks: Tasks,
    events: mpsc::Receiver<Event>,
    intake: Intake,
    next: [i64; 2],
    length: i64,
    /// As it was committed last: offset and metadata.
    committed: BTreeMap<i32, (i64, String)>,
    turns: usize,
    went_back: usize,
    /// The queue of each shard.
    by_shard: [usize; SHARDS as usize],
    /// A shard moves to the other queue each so many turns; 0: none does.
    move_every: usize,
}

fn assigned(number: i32, committed: Option<&(i64, String)>) -> Assigned {
    let (start, memory) = match committed {
        Some((offset, text)) => (Some(*offset), Metadata::decode(text.as_bytes(), *offset).memory),
        None => (None, Memory::default()),
    };
    let (source, id) = (TopicSource::Id("id".into()), Some("id".into()));
    Assigned { partition: partition(number), source, id, start, memory }
}

impl World {
    fn new(fates: Vec<Fate>, length: i64) -> Self {
        let store = Store::default();
        store.0.lock().fates = fates.into();
        Self::over(store, length, BTreeMap::new())
    }

    fn over(store: Store, length: i64, committed: BTreeMap<i32, (i64, String)>) -> Self {
        let mut config = Config::default();
        config.window.call_messages_max = 16;
        config.window.retry_base_ms = 1;
        config.window.retry_max_ms = 10;
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let (sender, events) = mpsc::channel(64);
        let tasks = Tasks::new(&Context::new());
        let queues: Vec<Arc<Queue>> = vec![Arc::default(), Arc::default()];
        for queue in &queues {
            let shared = Shared {
                mailboxes: store.clone(),
                outbox: outbox(&metrics, &tasks),
                events: sender.clone(),
                window: config.window.clone(),
                group_max: 5,
                retry: config.retry().unwrap(),
                away: Arc::default(),
                metrics: metrics.clone(),
            };
            tasks.spawn("a lane", Lane::new(shared, Arc::clone(queue)).run());
        }
        let mut partitions = Partitions::new(store.shards());
        let mut next = [0; 2];
        for number in 0..2 {
            partitions.assign(assigned(number, committed.get(&number)), 1);
            next[number as usize] = committed.get(&number).map_or(0, |(offset, _)| *offset);
        }
        let intake = Intake::new(&config, store.shards(), metrics.traces_ignored.clone());
        let (turns, went_back) = (0, 0);
        Self {
            config,
            store,
            partitions,
            queues,
            _tasks: tasks,
            events,
            intake,
            next,
            length,
            committed,
            turns,
            went_back,
            by_shard: [0, 1, 0, 1],
            move_every: 0,
        }
    }

    /// The next shard moves to the other queue, unless it is on its way already.
    fn move_a_shard(&mut self) {
        let at = (self.turns / self.move_every) % self.by_shard.len();
        let shard = self.store.shards().all().nth(at).unwrap();
        let (from, to) = (self.by_shard[at], 1 - self.by_shard[at]);
        if self.queues[from].redirect(shard, &self.queues[to]) {
            self.by_shard[at] = to;
        }
    }

    /// The process dies, and another one takes over from what was committed.
    async fn succeed(self) -> Self {
        self.partitions.iter().for_each(|open| open.reading.end());
        self.queues.iter().for_each(|queue| queue.close());
        // Calls under way are executed, or lost.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let move_every = self.move_every;
        let next = Self::over(self.store.clone(), self.length, self.committed.clone());
        Self { move_every, ..next }
    }

    fn commit(&mut self) {
        for commit in self.partitions.begin_commits() {
            let (text, left_out) = commit.metadata.encode(commit.offset, 3_000);
            assert_eq!(left_out, 0);
            self.committed.insert(commit.partition.number, (commit.offset, text));
        }
    }

    /// Reads both partitions to their ends, and until everything is finished and mended.
    async fn run(&mut self) {
        self.run_for(usize::MAX).await;
    }

    /// Waits until idle shards were probed and nothing fails any more, and mends what the probes have found.
    async fn probe(&mut self) {
        let interval = Duration::from_millis(self.config.window.probe_interval_ms);
        let mut calm = 0;
        while calm < 3 {
            calm += usize::from(self.store.0.lock().fates.is_empty());
            tokio::time::sleep(interval).await;
            while let Ok(event) = self.events.try_recv() {
                self.hear(event);
            }
            timeout(Duration::from_secs(600), self.run()).await.expect("finishes");
        }
    }

    /// Likewise, for so many turns at most.
    async fn run_for(&mut self, turns: usize) {
        for _ in 0..turns {
            self.turns += 1;
            if self.turns.is_multiple_of(7) {
                self.commit();
            }
            if self.move_every > 0 && self.turns.is_multiple_of(self.move_every) {
                self.move_a_shard();
            }
            let took = self.take(0) | self.take(1);
            if !took {
                if self.partitions.unfinished() == 0 && self.seek() && !self.mending() {
                    self.commit();
                    return;
                }
                let event = timeout(Duration::from_millis(50), self.events.recv()).await;
                event.into_iter().for_each(|event| self.hear(event.expect("lanes live")));
            }
            while let Ok(event) = self.events.try_recv() {
                self.hear(event);
            }
            let _ = self.seek();
        }
    }

    /// Asks, goes back and raises as the service does. Whether there is more of that to come.
    fn mending(&mut self) -> bool {
        let (shards, now) = (self.store.shards(), Instant::now());
        let mut mending = false;
        for open in self.partitions.iter_mut() {
            let assignment = Arc::clone(&open.assignment);
            let ask = |round, asked: Vec<(Shard, Option<LogPosition>)>| {
                let mut by_lane: BTreeMap<usize, Vec<_>> = BTreeMap::new();
                for (shard, raise) in asked {
                    let lane = self.by_shard[usize::from(shard.get())];
                    by_lane.entry(lane).or_default().push((shard, raise));
                }
                for (lane, shards) in &by_lane {
                    let (assignment, shards) = (Arc::clone(&assignment), shards.clone());
                    self.queues[*lane].ask(Question { assignment, round, shards });
                }
                by_lane.len()
            };
            if let Some((round, asked)) = open.questions(shards) {
                let missing = ask(round, asked.into_iter().map(|s| (s, None)).collect());
                open.asked(missing, now + Duration::from_secs(2));
            }
            if open.must_rewind(now) {
                open.rewind(Reach { low: 0, high: self.length, since: 0 });
                self.went_back += 1;
            }
            if let Some(raised) = open.closing() {
                let round = open.next_round();
                let missing = ask(round, raised.into_iter().map(|(s, at)| (s, Some(at))).collect());
                open.close(round, missing);
            }
            mending |= open.is_asking() || open.repairing() > 0;
        }
        mending
    }

    fn take(&mut self, number: i32) -> bool {
        let offset = self.next[number as usize];
        let open = self.partitions.get_mut(&partition(number)).unwrap();
        if offset >= self.length || !open.wants() {
            return false;
        }
        assert!(open.track(offset, 0));
        let record = record(number, offset);
        let Decoded::Parcels(parcels) = self.intake.decode(&open.reading, record, 0) else {
            panic!("refused");
        };
        for parcel in parcels {
            let lane = self.by_shard[usize::from(parcel.shard.get())];
            self.queues[lane].push(1, parcel);
        }
        self.next[number as usize] += 1;
        true
    }

    fn hear(&mut self, event: Event) {
        match event {
            Event::Finished(flights) => {
                flights.iter().for_each(|flight| self.partitions.finish(flight));
            }
            Event::Gap { reading, shard, back_to } => {
                self.partitions.gap(&reading, shard, back_to);
            }
            Event::Answered(answer) => {
                self.partitions.answered(&answer);
            }
        }
    }

    /// True: both partitions are at their ends.
    fn seek(&mut self) -> bool {
        self.mending();
        for open in self.partitions.iter_mut() {
            if let Some(offset) = open.seek_to.take() {
                self.next[open.assignment.partition.number as usize] = offset;
            }
        }
        self.next == [self.length; 2]
    }
}

fn partition(number: i32) -> Partition {
    Partition { topic: "push".into(), number }
}

fn record(number: i32, offset: i64) -> Record {
    record_of("push", number, offset, 11)
}

/// A record for one to three of so many users, without a receipt.
pub(crate) fn record_of(topic: &str, number: i32, offset: i64, users: i64) -> Record {
    let user = |i: i64| format!("\"u{}\"", (offset * 7 + i64::from(number) * 3 + i * 5) % users);
    let users: Vec<String> = (0..=offset % 3).map(user).collect();
    let users = users.join(",");
    let value =
        format!(r#"{{"id":"{number}-{offset}","app":"a","to":{{"users":[{users}]}},"text":""}}"#);
    Record {
        topic: topic.into(),
        partition: number,
        offset,
        leader_epoch: 0,
        timestamp_ms: None,
        key: None,
        value: value.into(),
        headers: Vec::new(),
    }
}

/// A parcel for a shard, from a partition of its own.
pub(crate) fn parcel(shard: u16, offset: i64) -> Parcel {
    let shards = ShardCount::new(64).unwrap();
    let mut partitions = Partitions::new(shards);
    partitions.assign(assigned(0, None), 1);
    let ignored = IntCounter::new("i", "i").unwrap();
    let intake = Intake::new(&Config::default(), shards, ignored);
    let reading = &partitions.get(&partition(0)).unwrap().reading;
    let Decoded::Parcels(mut parcels) = intake.decode(reading, record(0, offset), 0) else {
        panic!("refused")
    };
    let shard = shards.all().nth(shard.into()).unwrap();
    Parcel { shard, ..parcels.remove(0) }
}

/// Log positions that each shard must hold, by partition.
fn expected(world: &World) -> BTreeMap<(u16, i32), Vec<LogPosition>> {
    let mut expected: BTreeMap<(u16, i32), Vec<LogPosition>> = BTreeMap::new();
    for number in 0..2 {
        let open = world.partitions.get(&partition(number)).unwrap();
        for offset in 0..world.length {
            let taken = world.intake.decode(&open.reading, record(number, offset), 0);
            let Decoded::Parcels(parcels) = taken else { panic!("refused") };
            for parcel in parcels {
                let held = expected.entry((parcel.shard.get(), number)).or_default();
                held.push(parcel.message.position);
            }
        }
    }
    expected
}

fn held(world: &World) -> BTreeMap<(u16, i32), Vec<LogPosition>> {
    let mut held: BTreeMap<(u16, i32), Vec<LogPosition>> = BTreeMap::new();
    for (shard, log) in &world.store.0.lock().accepted {
        for ((source, _), position) in log {
            held.entry((*shard, source.partition)).or_default().push(*position);
        }
    }
    held
}

fn check(fates: Vec<Fate>) {
    check_moving(fates, 0);
}

/// Likewise, while a shard moves to the other lane each so many turns.
fn check_moving(fates: Vec<Fate>, move_every: usize) {
    paused(async {
        let mut world = World { move_every, ..World::new(fates, 120) };
        timeout(Duration::from_secs(600), world.run()).await.expect("finishes");
        settle(&mut world).await;
    });
}

/// Sends each shard more messages, because only the next batch for a shard notices a loss, and checks that each
/// holds its part of the log.
async fn settle(world: &mut World) {
    world.store.0.lock().fates.clear();
    world.length = 150;
    timeout(Duration::from_secs(600), world.run()).await.expect("finishes");
    let (held, expected) = (held(world), expected(world));
    for (place, expected) in expected {
        assert_eq!(held[&place], expected, "shard and partition {place:?}");
    }
    assert!(world.committed.values().all(|(offset, _)| *offset == 150), "{:?}", world.committed);
    assert!(world.queues.iter().all(|queue| queue.load() == 0));
    assert!(world.config.check().is_ok());
}

fn paused(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(test);
}

/// Purgers that die after so many turns each, over a store that fails; then everything forgets down to
/// `kept` messages a shard, and a last one takes over.
fn check_successors(fates: Vec<Fate>, lives: &[usize], kept: usize) {
    paused(async {
        let mut world = World::new(fates, 120);
        for turns in lives {
            let life = world.run_for(*turns);
            timeout(Duration::from_secs(600), life).await.expect("finishes");
            world = world.succeed().await;
        }
        let undisturbed = world.store.0.lock().fates.is_empty();
        world.store.0.lock().forget(kept);
        timeout(Duration::from_secs(600), world.run()).await.expect("finishes");
        if !undisturbed {
            // A question may be lost, or answered before something is forgotten again: probes find out.
            world.probe().await;
        }
        // Without any more messages: the successor has asked.
        let held: usize = held(&world).values().map(Vec::len).sum();
        let expected: usize = expected(&world).values().map(Vec::len).sum();
        assert_eq!(held, expected, "of those below the commits");
        settle(&mut world).await;
    });
}

#[test]
fn hazard_26_a_successor_knows_what_the_shards_must_know() {
    check_successors(Vec::new(), &[10_000], 10);
}

#[test]
fn hazard_45_shards_that_forgot_together_are_read_again_together() {
    paused(async {
        let mut world = World::new(Vec::new(), 120);
        timeout(Duration::from_secs(600), world.run()).await.expect("finishes");
        world.store.0.lock().forget(0);
        world.length = 121;
        timeout(Duration::from_secs(600), world.run()).await.expect("finishes");
        assert_eq!(world.went_back, 2, "once a partition");
        settle(&mut world).await;
    });
}

#[test]
fn hazard_01_an_overtaken_batch_is_found_by_its_gap() {
    // The first calls are lost on their way, as by NOSCRIPT, and the store falls back meanwhile.
    check(vec![Fate::Executed, Fate::Executed, Fate::Lost, Fate::Forgets(0), Fate::Executed]);
}

#[test]
fn answers_that_are_lost_repeat_nothing() {
    check(vec![Fate::AnswerLost; 12]);
}

#[test]
fn a_store_that_forgets_twice_while_it_is_repaired_is_repaired() {
    let forgets = [3, 0, 5, 1, 0].map(Fate::Forgets);
    check(forgets.into_iter().flat_map(|fate| [Fate::Executed, fate, fate]).collect());
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        5 => Just(Fate::Executed),
        2 => Just(Fate::Lost),
        2 => Just(Fate::AnswerLost),
        2 => Just(Fate::FirstOnly),
        2 => (0usize..40).prop_map(Fate::Forgets),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]
    #[test]
    fn whatever_happens_every_shard_gets_its_part_in_order(fates in prop::collection::vec(fate(), 0..40)) {
        check(fates);
    }

    #[test]
    fn a_shard_that_moves_between_lanes_stays_in_order_and_knows_what_it_has_confirmed(
        fates in prop::collection::vec(fate(), 0..40),
        move_every in 1_usize..30,
    ) {
        check_moving(fates, move_every);
    }

    #[test]
    fn hazard_26_whoever_takes_over_repairs_what_was_forgotten(
        fates in prop::collection::vec(fate(), 0..40),
        lives in prop::collection::vec(1_usize..300, 1..4),
        kept in 0_usize..60,
    ) {
        check_successors(fates, &lives, kept);
    }
}
