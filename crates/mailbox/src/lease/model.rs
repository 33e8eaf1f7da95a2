//! Random interleavings of what happens to nodes, their leases, their routes and those who read them, on
//! three masters that go away one by one and come back as they were, older, or empty. The time is turned
//! by hand.
//!
//! What decides is the shipped code: [`Life`](super::life::Life) in each process, `Sight` and `Memory` in
//! each dispatcher. The scripts' part (a later writing is not undone; a route goes only by its own
//! reference; a confirmation yields to a newer attempt) is written down here again; contract tests hold
//! the scripts themselves to it.
//!
//! Held at every moment: no route of a session that is alive is removed while its process renews its
//! lease; nobody begins another life meanwhile; a fresh reader sees whoever has one readable copy. And at
//! the end, once all masters are there: every session has its route and nobody else has, every reader
//! sees exactly the processes that run, and nobody who is connected waits for a message.
//!
//! `BARID_MODEL_SECONDS` (10) is how long it runs, `BARID_MODEL_STEPS` (60) how long a run may get.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod process;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use proptest_state_machine::ReferenceStateMachine;

use world::{MASTERS, NODES, READERS, USERS, World};

/// What may happen. What makes no sense does nothing.
#[derive(Debug, Clone)]
enum Step {
    /// Time passes.
    Wait { seconds: u64 },
    /// A master does not answer.
    Away { master: usize },
    /// It does again.
    Back { master: usize },
    /// A replica takes its place that is so many turns behind.
    BackOlder { master: usize, turns: usize },
    /// It is emptied; connections stand.
    Emptied { master: usize },
    /// A process dies.
    Kill { node: usize },
    /// Another one begins under its name; its machine's clock may be behind.
    Start { node: usize, behind_s: u64 },
    /// A process drains: its sessions end, and it gives up its lease.
    Drain { node: usize },
    /// A process holds still.
    Freeze { node: usize },
    /// It goes on.
    Thaw { node: usize },
    /// A device connects; the session that it had is not told.
    Connect { user: usize, node: usize },
    /// A session ends.
    Disconnect { user: usize },
    /// A message is accepted for a user.
    Message { user: usize },
    /// A push goes through a dispatcher.
    Push { user: usize, reader: usize },
    /// A dispatcher is started again: it knows nobody.
    Fresh { reader: usize },
    /// A reaper gets to what it was told.
    Reap,
}

struct Anything;

impl ReferenceStateMachine for Anything {
    type State = ();
    type Transition = Step;

    fn init_state() -> BoxedStrategy<()> {
        Just(()).boxed()
    }

    fn transitions((): &()) -> BoxedStrategy<Step> {
        let (master, node) = (0..MASTERS, 0..NODES);
        let (user, reader) = (0..USERS, 0..READERS);
        let seconds =
            prop_oneof![6 => Just(3_u64), 4 => 6..30_u64, 2 => 30..400_u64, 1 => 400..1_500_u64];
        let behind_s = prop_oneof![3 => Just(0), 1 => 0..5_000_u64];
        prop_oneof![
            12 => seconds.prop_map(|seconds| Step::Wait { seconds }),
            5 => master.clone().prop_map(|master| Step::Away { master }),
            6 => master.clone().prop_map(|master| Step::Back { master }),
            3 => (master.clone(), 1..4_usize)
                .prop_map(|(master, turns)| Step::BackOlder { master, turns }),
            2 => master.prop_map(|master| Step::Emptied { master }),
            2 => node.clone().prop_map(|node| Step::Kill { node }),
            6 => (node.clone(), behind_s)
                .prop_map(|(node, behind_s)| Step::Start { node, behind_s }),
            1 => node.clone().prop_map(|node| Step::Drain { node }),
            3 => node.clone().prop_map(|node| Step::Freeze { node }),
            4 => node.clone().prop_map(|node| Step::Thaw { node }),
            10 => (user.clone(), node).prop_map(|(user, node)| Step::Connect { user, node }),
            3 => user.clone().prop_map(|user| Step::Disconnect { user }),
            4 => user.clone().prop_map(|user| Step::Message { user }),
            10 => (user, reader.clone()).prop_map(|(user, reader)| Step::Push { user, reader }),
            2 => reader.prop_map(|reader| Step::Fresh { reader }),
            3 => Just(Step::Reap),
        ]
        .boxed()
    }

    fn apply((): (), _: &Step) {}
}

/// `tried` counts the steps: shrinking begins by dropping those that were not reached.
fn run(steps: &[Step], tried: &AtomicUsize) -> Result<(), String> {
    let mut world = World::new();
    for (number, step) in steps.iter().enumerate() {
        tried.fetch_add(1, Ordering::SeqCst);
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
    let length = Duration::from_secs(setting("BARID_MODEL_SECONDS", 10));
    let steps = setting("BARID_MODEL_STEPS", 60) as usize;
    let config = Config {
        cases: 1,
        max_shrink_iters: 20_000,
        max_shrink_time: 60_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut cases = 0;
    while cases == 0 || began.elapsed() < length {
        cases += 1;
        let strategy = Anything::sequential_strategy(1..=steps);
        let result = TestRunner::new(config.clone()).run(&strategy, |((), steps, tried)| {
            run(&steps, &tried.unwrap_or_default()).map_err(TestCaseError::fail)
        });
        match result {
            Ok(()) => {}
            Err(TestError::Fail(why, ((), steps, _))) => {
                let steps: Vec<String> = steps.iter().map(|step| format!("  {step:?}")).collect();
                panic!("{why}\nafter {cases} cases, by the steps\n{}", steps.join("\n"));
            }
            Err(other) => panic!("{other}"),
        }
    }
    println!("{cases} cases in {:?}", began.elapsed());
}
