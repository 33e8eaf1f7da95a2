//! The flow of records from a log into lanes whose masters come and go: whatever is left out, waits for room,
//! or is read again, nothing below a commit was left behind.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::LazyLock;

use barid_bus::consumer::{Assigned, Record};
use barid_bus::{KafkaConfig, Memory, TopicSource};
use barid_core::{Seq, Shard, ShardCount};
use barid_mailbox::{AcceptGroup, AcceptOutcome, Error as RedisError, GroupOutcome, RedisTime};
use barid_runtime::Tracer;
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::{IntCounter, Registry};
use proptest::prelude::*;

use super::*;
use crate::lanes::record_of;

const SHARDS: u32 = 12;
const MASTERS: usize = 3;
const PARTITIONS: i32 = 2;

/// What happens to a call of a master.
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
    /// What is to come, a master; then all goes well.
    fates: [VecDeque<Fate>; MASTERS],
    /// How long a call takes, a master, ms.
    slow: [u64; MASTERS],
    positions: BTreeMap<(i32, u16), LogPosition>,
    accepted: HashSet<Place>,
}

/// Behaves as the accept script does, where nothing is forgotten.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<State>>);

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
        MASTERS
    }
    fn lane_of(&self, shard: Shard) -> usize {
        usize::from(shard.get()) % MASTERS
    }
    fn redis_time(&self, _: Shard) -> Option<RedisTime> {
        None
    }
    async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, RedisError>> {
        let master = groups.first().map_or(0, |group| self.lane_of(group.shard));
        let (fate, slow) = {
            let mut state = self.0.lock();
            (state.fates[master].pop_front(), state.slow[master])
        };
        sleep(Duration::from_millis(slow)).await;
        let away = || Err(RedisError::Away("test".into()));
        let mut state = self.0.lock();
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
fn outbox(metrics: &Metrics) -> Outbox {
    static PRODUCER: LazyLock<Producer> =
        LazyLock::new(|| Producer::new(&KafkaConfig::default()).unwrap());
    let config = KafkaConfig::default();
    let (handoff, _) = mpsc::channel(1);
    let counter = |name| IntCounter::new(name, name).unwrap();
    Outbox {
        receipts: Receipts::new(PRODUCER.clone(), &config, counter("d")),
        dead: DeadLetters::new(PRODUCER.clone(), &config, counter("l")),
        handoff,
        handoff_wait: Duration::ZERO,
        clock: Arc::new(SystemClock),
        metrics: metrics.clone(),
        tracer: Tracer::new(&Registry::new(), 1).unwrap(),
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
}

/// Reads all of the log, as the service does. How often something was read again for a master.
async fn read(weather: Weather) -> usize {
    let store = Store::default();
    let mut config = Config::default();
    {
        let mut state = store.0.lock();
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
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let (lane_events, mut events) = mpsc::channel(64);
    let mut workers = JoinSet::new();
    let outbox = outbox(&metrics);
    let mut flow = Flow::new(&config, &store, outbox, lane_events, metrics, &mut workers).unwrap();
    for number in 0..PARTITIONS {
        let (source, id) = (TopicSource::Id("id".into()), Some("id".into()));
        let (partition, memory) = (partition(number), Memory::default());
        let assigned = Assigned { partition, source, id, start: None, memory };
        flow.partitions.assign(assigned, 1);
    }
    let (length, seek_turns) = (weather.length, weather.seek_turns);
    let next = [0; PARTITIONS as usize];
    let mut log = Written { length, next, seek_turns, seeks: BTreeMap::new() };
    let mut committed = BTreeMap::new();
    let mut again = 0;
    while committed.values().filter(|offset| **offset == length).count() < PARTITIONS as usize {
        while let Ok(event) = events.try_recv() {
            flow.lane_event(event);
        }
        for open in flow.partitions.iter_mut() {
            let number = open.assignment.partition.number;
            if open.seek_to.is_some_and(|to| log.seek(number, to)) {
                open.seek_to = None;
                again += 1;
            }
        }
        let taken = flow.fill(&mut log);
        for commit in flow.partitions.take_commits() {
            let number = commit.partition.number;
            let before = committed.insert(number, commit.offset).unwrap_or(0);
            for offset in before..commit.offset {
                let places = (0..users(offset)).map(|index| (number, offset, index));
                let state = store.0.lock();
                let lost = places.filter(|place| !state.accepted.contains(place)).count();
                assert_eq!(lost, 0, "of record {offset} in {number} was committed");
            }
        }
        if taken > 0 {
            tokio::task::yield_now().await;
        } else if let Ok(Some(event)) = timeout(Duration::from_millis(2), events.recv()).await {
            flow.lane_event(event);
        }
    }
    // What was taken in readings that have ended is still being dropped.
    while flow.records != [0; 3] || flow.queues.iter().any(|queue| queue.load() > 0) {
        flow.lane_event(events.recv().await.expect("lanes live"));
    }
    flow.take_skipped();
    assert_eq!((flow.bytes, flow.skipped), ([0; 3], 0));
    flow.queues.iter().for_each(|queue| queue.close());
    again
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
    (window, masters, 0_u32..6, 40_i64..160).prop_map(|(window, masters, seek_turns, length)| {
        let (mut fates, slow, alone) = masters;
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
