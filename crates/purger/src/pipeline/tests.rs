//! Records on their way from a log into lanes whose masters come and go: whatever is left out, waits for room,
//! or is read again, nothing below a commit was left behind.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barid_bus::consumer::Assigned;
use barid_bus::{DeadLetters, KafkaConfig, Memory, Producer, Receipts, TopicSource};
use barid_core::{LogPosition, Seq, Shard, ShardCount, SystemClock};
use barid_mailbox::{AcceptGroup, AcceptOutcome, Error as RedisError, GroupOutcome, RedisTime};
use barid_runtime::{Context, Tasks, Tracer};
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::{IntCounter, Registry};
use proptest::prelude::*;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::lanes::{HandOn, Nobody, Outbox, record_of};

const SHARDS: u32 = 12;
const MASTERS: usize = 3;
const PARTITIONS: i32 = 2;

/// The fate of a call to a master.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Executed,
    Away,
    /// It was executed, but its answer was lost.
    AnswerLost,
}

/// A message: partition, offset, index.
type Place = (i32, i64, u32);

#[derive(Default)]
struct State {
    /// Fates of the next calls, by master; later calls succeed.
    fates: [VecDeque<Fate>; MASTERS],
    /// How long a call takes, a master, ms.
    slow: [u64; MASTERS],
    positions: BTreeMap<(i32, u16), LogPosition>,
    accepted: HashSet<Place>,
    /// Partitions and shards that are in a call.
    in_call: HashSet<(i32, u16)>,
}

/// Behaves as the accept script does, where nothing is forgotten.
#[derive(Clone)]
struct Store {
    state: Arc<Mutex<State>>,
    /// How many masters share the shards.
    masters: Arc<AtomicUsize>,
}

impl Store {
    fn new(masters: usize) -> Self {
        Self { state: Arc::default(), masters: Arc::new(AtomicUsize::new(masters)) }
    }

    fn masters(&self) -> usize {
        self.masters.load(Ordering::SeqCst)
    }
}

impl State {
    fn group(&mut self, group: &AcceptGroup) -> GroupOutcome {
        let partition = group.source.partition;
        let key = (partition, group.shard.get());
        assert!(group.prev <= self.positions.get(&key).copied(), "nothing was forgotten");
        let outcome = |message: &barid_mailbox::AcceptMessage| {
            let LogPosition { offset, index, .. } = message.position;
            let place = (partition, offset, index);
            if self.positions.get(&key).is_some_and(|stored| message.position <= *stored) {
                assert!(self.accepted.contains(&place), "{place:?} comes behind a later one");
                return AcceptOutcome::AcceptedBefore;
            }
            self.positions.insert(key, message.position);
            assert!(self.accepted.insert(place), "{place:?} is accepted twice");
            AcceptOutcome::Accepted {
                seq: Seq(1),
                envelope: Bytes::new(),
                online: false,
                nodes: Arc::default(),
                evicted: 0,
            }
        };
        GroupOutcome::Done(group.messages.iter().map(outcome).collect())
    }
}

impl Mailboxes for Store {
    fn shards(&self) -> ShardCount {
        ShardCount::new(SHARDS).unwrap()
    }
    fn lanes(&self) -> usize {
        self.masters()
    }
    fn lane_of(&self, shard: Shard) -> usize {
        usize::from(shard.get()) % self.masters()
    }
    fn redis_time(&self, _: Shard) -> Option<RedisTime> {
        None
    }
    async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, RedisError>> {
        let master = groups.first().map_or(0, |group| self.lane_of(group.shard));
        let (fate, slow) = {
            let mut state = self.state.lock();
            for group in groups {
                let place = (group.source.partition, group.shard.get());
                assert!(state.in_call.insert(place), "{place:?} has a group in a call already");
            }
            (state.fates[master].pop_front(), state.slow[master])
        };
        sleep(Duration::from_millis(slow)).await;
        let away = || Err(RedisError::Away("test".into()));
        let mut state = self.state.lock();
        for group in groups {
            state.in_call.remove(&(group.source.partition, group.shard.get()));
        }
        match fate.unwrap_or(Fate::Executed) {
            Fate::Away => groups.iter().map(|_| away()).collect(),
            Fate::Executed => groups.iter().map(|group| Ok(state.group(group))).collect(),
            Fate::AnswerLost => {
                groups.iter().for_each(|group| drop(state.group(group)));
                groups.iter().map(|_| away()).collect()
            }
        }
    }
    async fn ping(&self) -> Result<(), RedisError> {
        Ok(())
    }
}

/// As long as it is, each of its partitions.
struct Written {
    length: i64,
    /// The next record of each partition.
    next: [i64; PARTITIONS as usize],
    /// How long a seek takes, turns of the loop; and those under way: whereto, and how long yet.
    seek_turns: u32,
    seeks: BTreeMap<i32, (i64, u32)>,
}

impl Log for Written {
    fn take(
        &mut self,
        topic: usize,
        max: usize,
        mut wanted: impl FnMut(&Partition) -> bool,
        out: &mut Vec<Record>,
    ) -> usize {
        let before = out.len();
        for number in (0..PARTITIONS).filter(|_| topic == 1) {
            let next = &mut self.next[number as usize];
            if wanted(&partition(number)) {
                while out.len() - before < max && *next < self.length {
                    out.push(record(number, *next));
                    *next += 1;
                }
            }
        }
        out.len() - before
    }
}

impl Written {
    /// Whether the seek is done.
    fn seek(&mut self, number: i32, to: i64) -> bool {
        let seek = self.seeks.entry(number).or_insert((to, self.seek_turns));
        if seek.1 > 0 {
            seek.1 -= 1;
            return false;
        }
        let (done, _) = self.seeks.remove(&number).unwrap_or((to, 0));
        self.next[number as usize] = done;
        done == to
    }
}

fn partition(number: i32) -> Partition {
    Partition { topic: KafkaConfig::default().topics.push.into(), number }
}

/// How many users a record has.
fn users(offset: i64) -> u32 {
    1 + (offset % 3) as u32
}

fn record(number: i32, offset: i64) -> Record {
    record_of(&partition(number).topic, number, offset, 31)
}

/// No record asks for a receipt and none is refused, so nothing is produced.
fn outbox(metrics: &Metrics, tasks: &Tasks) -> Outbox {
    static PRODUCER: LazyLock<Producer> =
        LazyLock::new(|| Producer::new(&KafkaConfig::default()).unwrap());
    let config = KafkaConfig::default();
    let counter = |name| IntCounter::new(name, name).unwrap();
    Outbox {
        receipts: Receipts::new(PRODUCER.clone(), &config, counter("d")),
        dead: DeadLetters::new(PRODUCER.clone(), &config, counter("l")),
        hand_on: HandOn::new(Nobody, 1, Duration::ZERO, metrics.clone(), tasks.spawner()),
        clock: Arc::new(SystemClock),
        metrics: metrics.clone(),
        tracer: Tracer::new(&Registry::new(), 1).unwrap(),
        tasks: tasks.spawner(),
    }
}

/// How small the window is, how the masters behave, and how long a seek takes.
#[derive(Debug, Clone)]
struct Weather {
    records_max: usize,
    lane_messages_max: usize,
    away_messages_max: usize,
    skipped_records_max: usize,
    call_messages_max: usize,
    fates: [Vec<Fate>; MASTERS],
    slow: [u64; MASTERS],
    seek_turns: u32,
    length: i64,
    /// How many masters there are at first, and from later turns of the loop on.
    masters: usize,
    changes: Vec<(usize, usize)>,
}

/// A pipeline that holds all partitions, the lanes' reports, and their tasks.
fn start(config: &Config, store: &Store) -> (Pipeline<Store>, mpsc::Receiver<Event>, Tasks) {
    let tasks = Tasks::new(&Context::new());
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let (lane_events, events) = mpsc::channel(64);
    let shared = Shared {
        mailboxes: store.clone(),
        outbox: outbox(&metrics, &tasks),
        events: lane_events,
        window: config.window.clone(),
        group_max: config.redis.accept_batch_max,
        retry: config.retry().unwrap(),
        away: Arc::default(),
        metrics,
    };
    let mut pipeline = Pipeline::start(config, shared);
    for number in 0..PARTITIONS {
        let (source, id) = (TopicSource::Id("id".into()), Some("id".into()));
        let (partition, memory) = (partition(number), Memory::default());
        let assigned = Assigned { partition, source, id, start: None, memory };
        pipeline.partitions.assign(assigned, 1);
    }
    (pipeline, events, tasks)
}

/// Reads all of the log, as the service does. How often something was read again for a master.
async fn read(weather: Weather) -> usize {
    let store = Store::new(weather.masters);
    let mut config = Config::default();
    {
        let mut state = store.state.lock();
        state.fates = weather.fates.map(VecDeque::from);
        state.slow = weather.slow;
        let window = &mut config.window;
        window.records_max = weather.records_max;
        window.lane_messages_max = weather.lane_messages_max;
        window.away_messages_max = weather.away_messages_max;
        window.skipped_records_max = weather.skipped_records_max;
        window.call_messages_max = weather.call_messages_max;
        (window.retry_base_ms, window.retry_max_ms) = (1, 10);
    }
    let (mut pipeline, mut events, _tasks) = start(&config, &store);
    let (length, seek_turns) = (weather.length, weather.seek_turns);
    let next = [0; PARTITIONS as usize];
    let mut log = Written { length, next, seek_turns, seeks: BTreeMap::new() };
    let mut committed = BTreeMap::new();
    let mut again = 0;
    let mut changes = weather.changes.into_iter().peekable();
    for turn in 0.. {
        if committed.values().filter(|offset| **offset == length).count() == PARTITIONS as usize {
            break;
        }
        if let Some((_, masters)) = changes.next_if(|(due, _)| *due <= turn) {
            store.masters.store(masters, Ordering::SeqCst);
        }
        if turn % 5 == 0 {
            pipeline.lanes.follow_masters();
        }
        while let Ok(event) = events.try_recv() {
            pipeline.lane_event(event);
        }
        for open in pipeline.partitions.iter_mut() {
            let number = open.assignment.partition.number;
            if open.seek_to.is_some_and(|to| log.seek(number, to)) {
                open.seek_to = None;
                again += 1;
            }
        }
        let taken = pipeline.fill(&mut log);
        for commit in pipeline.partitions.begin_commits() {
            let number = commit.partition.number;
            let before = committed.insert(number, commit.offset).unwrap_or(0);
            for offset in before..commit.offset {
                let places = (0..users(offset)).map(|index| (number, offset, index));
                let state = store.state.lock();
                let lost = places.filter(|place| !state.accepted.contains(place)).count();
                assert_eq!(lost, 0, "of record {offset} in {number} was committed");
            }
        }
        if taken > 0 {
            tokio::task::yield_now().await;
        } else if let Ok(Some(event)) = timeout(Duration::from_millis(2), events.recv()).await {
            pipeline.lane_event(event);
        }
    }
    // Records taken in readings that have ended are still being dropped.
    let under_way = |pipeline: &Pipeline<Store>| {
        let window = (0..PRIORITIES).map(|priority| pipeline.window.records(priority));
        window.sum::<usize>() + pipeline.lanes.load()
    };
    while under_way(&pipeline) > 0 {
        pipeline.lane_event(events.recv().await.expect("lanes live"));
    }
    pipeline.read_left_out();
    let bytes = (0..PRIORITIES).map(|priority| pipeline.window.bytes(priority));
    assert_eq!((bytes.sum::<usize>(), pipeline.left_out.records()), (0, 0));
    pipeline.close();
    again
}

/// Reads for so long, as the service does.
async fn read_for(
    pipeline: &mut Pipeline<Store>,
    events: &mut mpsc::Receiver<Event>,
    log: &mut Written,
    time: Duration,
) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        while let Ok(event) = events.try_recv() {
            pipeline.lane_event(event);
        }
        pipeline.lanes.follow_masters();
        pipeline.fill(log);
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_master_that_is_added_gets_a_lane_of_its_own() {
    for before in [1, 2] {
        a_third_master_serves_alone(before).await;
    }
}

async fn a_third_master_serves_alone(before: usize) {
    let (store, config) = (Store::new(before), Config::default());
    store.state.lock().slow = [2, 2, 2];
    let (mut pipeline, mut events, _tasks) = start(&config, &store);
    let mut log = Written { length: 100, next: [0; 2], seek_turns: 0, seeks: BTreeMap::new() };
    let second = Duration::from_secs(1);
    read_for(&mut pipeline, &mut events, &mut log, second).await;
    // There are three masters, each of which gets shards of the others, and serves them for a while; then each of its
    // calls takes a minute.
    store.masters.store(3, Ordering::SeqCst);
    log.length = 200;
    read_for(&mut pipeline, &mut events, &mut log, second).await;
    store.state.lock().slow[2] = 60_000;
    for length in 201..300 {
        log.length = length;
        read_for(&mut pipeline, &mut events, &mut log, second / 10).await;
    }
    let intake = Intake::new(&config, store.shards(), IntCounter::new("i", "i").unwrap());
    let state = store.state.lock();
    for (number, offset) in (0..PARTITIONS).flat_map(|number| (0..299).map(move |o| (number, o))) {
        let reading = &pipeline.partitions.get(&partition(number)).unwrap().reading;
        let Decoded::Parcels(parcels) = intake.decode(reading, record(number, offset), 0) else {
            panic!("refused")
        };
        for parcel in parcels.into_iter().filter(|p| offset < 200 || store.lane_of(p.shard) < 2) {
            let place = (number, offset, parcel.message.position.index);
            assert!(state.accepted.contains(&place), "{place:?} waits for another master");
        }
    }
}

fn check(weather: Weather) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let read = async { timeout(Duration::from_secs(600), read(weather)).await };
    runtime.block_on(read).expect("nothing stands still")
}

/// A master's calls: so many that go well, so many in which it is away, and so on.
fn fates() -> impl Strategy<Value = Vec<Fate>> {
    let spell = (0_usize..5, 0_usize..12, any::<bool>()).prop_map(|(well, away, lost)| {
        let first = if lost { Fate::AnswerLost } else { Fate::Away };
        let away = [vec![first; away.min(1)], vec![Fate::Away; away.saturating_sub(1)]].concat();
        [vec![Fate::Executed; well], away].concat()
    });
    prop::collection::vec(spell, 0..10).prop_map(|spells| spells.concat())
}

fn weather() -> impl Strategy<Value = Weather> {
    let window = (10_usize..80, 3_usize..30, 1_usize..8, 1_usize..60, 1_usize..12);
    let masters = (
        [fates(), fates(), fates()],
        [1_u64..20, 1_u64..20, 1_u64..20],
        // Often one of them alone comes and goes.
        0_usize..2 * MASTERS,
    );
    let changes = prop::collection::vec((0_usize..200, 1..=MASTERS), 0..6);
    let cluster = (1..=MASTERS, changes);
    let log = (0_u32..6, 40_i64..160);
    (window, masters, cluster, log).prop_map(|(window, behaviour, (masters, mut changes), log)| {
        let (seek_turns, length) = log;
        changes.sort_unstable();
        let (mut fates, slow, alone) = behaviour;
        if alone < MASTERS {
            for (master, fates) in fates.iter_mut().enumerate() {
                if master != alone {
                    fates.clear();
                }
            }
        }
        Weather {
            records_max: window.0,
            lane_messages_max: window.1,
            away_messages_max: window.2,
            skipped_records_max: window.3,
            call_messages_max: window.4,
            fates,
            slow,
            seek_turns,
            length,
            masters,
            changes,
        }
    })
}

/// A master is back for two calls while records wait for room, and away again before all else is finished.
#[test]
fn hazard_66_a_master_that_comes_and_goes_while_records_wait_for_room_loses_none() {
    let fates = [
        vec![Fate::Executed; 3],
        vec![Fate::AnswerLost],
        vec![Fate::Away; 5],
        vec![Fate::Executed; 2],
        vec![Fate::Away; 10],
    ];
    let weather = Weather {
        records_max: 23,
        lane_messages_max: 4,
        away_messages_max: 1,
        skipped_records_max: 16,
        call_messages_max: 7,
        fates: [Vec::new(), Vec::new(), fates.concat()],
        slow: [3, 15, 2],
        seek_turns: 0,
        length: 122,
        masters: MASTERS,
        changes: Vec::new(),
    };
    // Maps and `select!` have an order of their own each time.
    let again: usize = (0..60).map(|_| check(weather.clone())).sum();
    assert!(again > 0, "nothing was left out");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn hazard_66_whatever_comes_and_goes_nothing_below_a_commit_was_left_behind(weather in weather()) {
        check(weather);
    }
}
