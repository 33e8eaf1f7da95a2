//! Random interleavings of what happens to nodes, their leases, their routes and those who read them, on
//! three masters that go away, stall, come back older or are emptied, and networks that are cut in
//! parts. All of it is in memory, and the time is turned by hand.
//!
//! What decides is the shipped code: `Life`, `Pending` and `Confirming` in each process, `Reading`,
//! `Memory` and `Standing` in each dispatcher. The scripts' part (a later writing is not undone; a route
//! goes only by its own reference; a confirmation yields to a newer attempt) is written down here again,
//! in `master.rs`; contract tests hold the scripts themselves to it.
//!
//! Held at every moment: no route of a session that lives is removed, or held for over, unless nothing of
//! its process could be read for long; nobody begins another life while it is heard, or an earlier one;
//! a reader sees whoever has one readable copy, and keeps whoever cannot be read; a process says that all is confirmed when it is. And at
//! the end, after a bounded time without faults: every session has its route and nothing else has, every
//! reader sees exactly the processes that run, and nobody who is connected waits for a message.
//!
//! Not provided for: a process whose clock is behind that of its predecessor, where no master that it
//! reaches tells it so; and two processes under one name at the same time.
//!
//! `BARID_MODEL_SECONDS` (6) is how long it runs, `BARID_MODEL_STEPS` (80) how long a run may get.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod master;
mod process;
mod reader;
mod world;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use world::{Checked, MASTERS, NODES, READERS, USERS, World};

/// What may happen. What makes no sense does nothing. Sets of masters are bits.
#[derive(Debug, Clone)]
enum Step {
    /// Time passes.
    Wait { ms: u64 },
    /// A master does not answer.
    Away { master: usize },
    /// It does again.
    Back { master: usize },
    /// A master takes calls and executes none of them.
    Stall { master: usize },
    /// It executes them; nobody waits for the answers any longer.
    GoOn { master: usize },
    /// A replica has all that its master has.
    Replicate { master: usize },
    /// It takes its place.
    FailOver { master: usize },
    /// Masters are emptied; connections stand.
    Emptied { masters: u8 },
    /// A master's clock goes forward.
    Ahead { master: usize, seconds: u64 },
    /// A process does not reach these masters, and reaches the others.
    Cut { node: usize, masters: u8 },
    /// A process does not hear what these masters answer.
    Deaf { node: usize, masters: u8 },
    /// As `Cut`, of a dispatcher.
    CutReader { reader: usize, masters: u8 },
    /// A process dies.
    Kill { node: usize },
    /// Another one begins under its name; its machine's clock may be off.
    Start { node: usize, clock_s: i64, cut: u8 },
    /// A process drains: its sessions end, and it gives up its lease.
    Drain { node: usize },
    /// A process is stopped.
    Freeze { node: usize },
    /// It goes on.
    Thaw { node: usize },
    /// A device connects; whoever had its session before may hear of it.
    Connect { user: usize, node: usize, told: bool },
    /// A session ends.
    Disconnect { user: usize },
    /// A message is accepted for a user.
    Message { user: usize },
    /// A push goes through a dispatcher, perhaps by an old route.
    Push { user: usize, reader: usize, old: bool },
    /// Everybody is pushed to again and again, or not.
    Traffic { on: bool },
    /// A dispatcher is started again: it knows nobody.
    Fresh { reader: usize },
    /// A dispatcher is stopped.
    FreezeReader { reader: usize },
    /// It goes on.
    ThawReader { reader: usize },
    /// A dispatcher's reaper is slow from now on.
    HoldRemovals { reader: usize },
    /// It gets to what it was told.
    Remove { reader: usize },
}

const TRAFFIC: u32 = 15;

impl Step {
    /// Each run has some kinds of steps only: what is rare among all is frequent then.
    fn kind(&self) -> Option<u32> {
        Some(match self {
            Self::Away { .. } | Self::Back { .. } => 0,
            Self::Stall { .. } | Self::GoOn { .. } => 1,
            Self::FailOver { .. } | Self::Replicate { .. } => 2,
            Self::Emptied { .. } => 3,
            Self::Ahead { .. } => 4,
            Self::Cut { .. } => 5,
            Self::Deaf { .. } => 6,
            Self::CutReader { .. } => 7,
            Self::Kill { .. } => 8,
            Self::Drain { .. } => 9,
            Self::Freeze { .. } | Self::Thaw { .. } => 10,
            Self::Fresh { .. } => 11,
            Self::FreezeReader { .. } | Self::ThawReader { .. } => 12,
            Self::HoldRemovals { .. } | Self::Remove { .. } => 13,
            Self::Disconnect { .. } => 14,
            Self::Traffic { .. } => TRAFFIC,
            _ => return None,
        })
    }

    /// Each run has so many nodes, users and dispatchers only, for the same reason.
    fn be_of(&mut self, (nodes, users, readers): (usize, usize, usize)) {
        match self {
            Self::Cut { node, .. }
            | Self::Deaf { node, .. }
            | Self::Kill { node }
            | Self::Start { node, .. }
            | Self::Drain { node }
            | Self::Freeze { node }
            | Self::Thaw { node } => *node %= nodes,
            Self::Connect { user, node, .. } => (*user, *node) = (*user % users, *node % nodes),
            Self::Disconnect { user } | Self::Message { user } => *user %= users,
            Self::Push { user, reader, .. } => {
                (*user, *reader) = (*user % users, *reader % readers);
            }
            Self::CutReader { reader, .. }
            | Self::Fresh { reader }
            | Self::FreezeReader { reader }
            | Self::ThawReader { reader }
            | Self::HoldRemovals { reader }
            | Self::Remove { reader } => *reader %= readers,
            _ => {}
        }
    }
}

fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let (master, node) = (0..MASTERS, 0..NODES);
    let (user, reader) = (0..USERS, 0..READERS);
    // All, none, one, or two of them.
    let masters = 0..1_u8 << MASTERS;
    let ms = prop_oneof![
        3 => 500..5_000_u64, 4 => 5_000..20_000_u64, 3 => 20_000..70_000_u64,
        3 => 70_000..200_000_u64,
    ];
    let clock_s = prop_oneof![3 => Just(0), 1 => -3_000..3_000_i64];
    let cut = prop_oneof![3 => Just(0), 1 => masters.clone()];
    let step = prop_oneof![
        20 => ms.prop_map(|ms| Step::Wait { ms }),
        12 => (user.clone(), node.clone(), prop::bool::weighted(0.7))
            .prop_map(|(user, node, told)| Step::Connect { user, node, told }),
        9 => (node.clone(), clock_s, cut)
            .prop_map(|(node, clock_s, cut)| Step::Start { node, clock_s, cut }),
        5 => (user.clone(), reader.clone(), any::<bool>())
            .prop_map(|(user, reader, old)| Step::Push { user, reader, old }),
        2 => any::<bool>().prop_map(|on| Step::Traffic { on }),
        3 => user.clone().prop_map(|user| Step::Message { user }),
        2 => user.prop_map(|user| Step::Disconnect { user }),
        4 => node.clone().prop_map(|node| Step::Kill { node }),
        1 => node.clone().prop_map(|node| Step::Drain { node }),
        3 => node.clone().prop_map(|node| Step::Freeze { node }),
        4 => node.clone().prop_map(|node| Step::Thaw { node }),
        4 => (node.clone(), masters.clone()).prop_map(|(node, masters)| Step::Cut { node, masters }),
        2 => (node, masters.clone()).prop_map(|(node, masters)| Step::Deaf { node, masters }),
        4 => (reader.clone(), masters.clone())
            .prop_map(|(reader, masters)| Step::CutReader { reader, masters }),
        2 => reader.clone().prop_map(|reader| Step::Fresh { reader }),
        1 => reader.clone().prop_map(|reader| Step::FreezeReader { reader }),
        2 => reader.clone().prop_map(|reader| Step::ThawReader { reader }),
        1 => reader.clone().prop_map(|reader| Step::HoldRemovals { reader }),
        2 => reader.prop_map(|reader| Step::Remove { reader }),
        3 => master.clone().prop_map(|master| Step::Away { master }),
        4 => master.clone().prop_map(|master| Step::Back { master }),
        2 => master.clone().prop_map(|master| Step::Stall { master }),
        3 => master.clone().prop_map(|master| Step::GoOn { master }),
        3 => master.clone().prop_map(|master| Step::Replicate { master }),
        3 => master.clone().prop_map(|master| Step::FailOver { master }),
        3 => masters.prop_map(|masters| Step::Emptied { masters }),
        1 => (master, 1..100_u64).prop_map(|(master, seconds)| Step::Ahead { master, seconds }),
    ];
    let some = prop_oneof![
        14 => step.prop_map(|step| vec![step]),
        1 => (0..NODES, 31_000..45_000_u64, prop::option::of(0..READERS))
            .prop_map(|(node, ms, fresh)| silence(node, ms, fresh)),
        1 => (0..NODES, 0..READERS, 0..7_u8, 30_000..200_000_u64, any::<bool>())
            .prop_map(|(node, reader, masters, ms, stopped)| parted(node, reader, masters, ms, stopped)),
    ];
    let kinds = prop_oneof![1 => Just(u32::MAX), 4 => any::<u32>()];
    let few = (1..=NODES, prop_oneof![Just(1), Just(2), Just(USERS)], 1..=READERS);
    (kinds, few, prop::collection::vec(some, 1..=count)).prop_map(|(kinds, few, some)| {
        let mut steps = some.concat();
        steps.retain(|step| step.kind().is_none_or(|kind| kinds & (1 << kind) != 0));
        steps.iter_mut().for_each(|step| step.be_of(few));
        if kinds & (1 << TRAFFIC) != 0 {
            steps.insert(0, Step::Traffic { on: true });
        }
        steps
    })
}

/// A process is stopped past its lease and not for long enough to begin another life; a dispatcher may
/// begin meanwhile.
fn silence(node: usize, ms: u64, fresh: Option<usize>) -> Vec<Step> {
    let mut steps = vec![Step::Freeze { node }, Step::Wait { ms }];
    steps.extend(fresh.map(|reader| Step::Fresh { reader }));
    steps.extend([Step::Wait { ms: 12_000 }, Step::Thaw { node }]);
    steps
}

/// A process and a dispatcher are on two sides of a network for some time; the process may be stopped
/// when that ends.
fn parted(node: usize, reader: usize, masters: u8, ms: u64, stopped: bool) -> Vec<Step> {
    let others = !masters & 7;
    let mut steps = vec![
        Step::Cut { node, masters },
        Step::CutReader { reader, masters: others },
        Step::Wait { ms },
    ];
    if stopped {
        steps.extend([Step::Freeze { node }, Step::Wait { ms: 35_000 }]);
    }
    steps.extend([
        Step::CutReader { reader, masters: 0 },
        Step::Wait { ms: 12_000 },
        Step::Thaw { node },
    ]);
    steps
}

fn run(steps: &[Step]) -> Checked {
    let mut world = World::new();
    for (number, step) in steps.iter().enumerate() {
        world.step(step).map_err(|broken| format!("step {}: {broken}", number + 1))?;
    }
    world.settle().map_err(|broken| format!("at the end: {broken}"))
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn whatever_masters_do_living_routes_stay_and_dead_ones_go() {
    let began = Instant::now();
    let (cases, broken) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..2).map(|_| scope.spawn(|| search(began, &cases, &broken))).collect();
        for worker in workers {
            if let Err(why) = worker.join().expect("a worker lives") {
                panic!("{why}");
            }
        }
    });
    println!("{} cases in {:?}", cases.into_inner(), began.elapsed());
}

/// A machine that has no time for it makes the test longer, not weaker.
const CASES_MIN: usize = 1_000;

/// Until the time is over, or one of them has found something, which it shrinks.
fn search(began: Instant, cases: &AtomicUsize, broken: &AtomicBool) -> Checked {
    let length = Duration::from_secs(setting("BARID_MODEL_SECONDS", 6));
    let strategy = steps(setting("BARID_MODEL_STEPS", 80) as usize);
    let config = Config {
        cases: 1,
        max_shrink_iters: 20_000,
        max_shrink_time: 60_000,
        failure_persistence: None,
        ..Config::default()
    };
    loop {
        let found = std::cell::OnceCell::new();
        let result = TestRunner::new(config.clone()).run(&strategy, |steps| {
            run(&steps).map_err(|why| {
                found.get_or_init(|| began.elapsed());
                TestCaseError::fail(why)
            })
        });
        let tried = cases.fetch_add(1, Ordering::SeqCst) + 1;
        match result {
            Ok(()) if broken.load(Ordering::SeqCst) => return Ok(()),
            Ok(()) if began.elapsed() >= length && tried >= CASES_MIN => return Ok(()),
            Ok(()) => {}
            Err(TestError::Fail(why, steps)) => {
                if broken.swap(true, Ordering::SeqCst) {
                    return Ok(());
                }
                let steps: Vec<String> = steps.iter().map(|step| format!("  {step:?}")).collect();
                let after = found.get().copied().unwrap_or_default();
                return Err(format!(
                    "{why}\nafter {tried} cases in {after:?}, by the steps\n{}",
                    steps.join("\n")
                ));
            }
            Err(other) => return Err(other.to_string()),
        }
    }
}

#[test]
fn hazard_65_sessions_of_a_master_that_is_emptied_before_its_first_renewal_are_confirmed() {
    let steps = [
        Step::Start { node: 0, clock_s: 0, cut: 2 },
        Step::Cut { node: 0, masters: 0 },
        Step::Connect { user: 1, node: 0, told: true },
        Step::Emptied { masters: 2 },
    ];
    run(&steps).unwrap();
}
