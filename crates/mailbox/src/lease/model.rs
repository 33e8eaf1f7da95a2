//! Model test of leases, routes and their readers: random interleavings on three masters that become unreachable,
//! stall, go back in time or are emptied, and on partitioned networks. Everything is in memory, with a manual clock.
//!
//! Decisions are made by the shipped code: `LeaseState`, `Pending` and `Confirming` in each process, `Reading`,
//! `Memory` and `Standing` in each dispatcher. `master.rs` repeats what the scripts do (an earlier write does not undo
//! a later one; a route is removed only by its own reference; a confirmation yields to a newer attempt); contract tests
//! check the scripts themselves.
//!
//! Invariants at every moment: no route of a running session is removed or considered over, unless nothing of its
//! process could be read for long; a process begins no other incarnation while its writes are confirmed, and never an
//! earlier one; a reader sees every node that has a readable copy, and keeps nodes that it cannot read; a process says
//! that all sessions are confirmed only when they are. At the end, after a bounded time without faults: every session
//! has its route and there are no other routes, every reader sees exactly the running processes, and no connected user
//! waits for a message.
//!
//! Not covered: a process whose clock is behind its predecessor's, if no master that it reaches shows this; two
//! processes with one name at the same time.
//!
//! `BARID_MODEL_SECONDS` (6) is how long it runs, `BARID_MODEL_STEPS` (80) how long a run may get.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod ground;
mod master;
mod process;
mod reader;
mod steps;
mod world;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use self::ground::Checked;
use self::steps::{Step, steps};
use self::world::World;

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

/// A busy machine makes the test longer, not weaker.
const CASES_MIN: usize = 1_000;

/// Runs random cases until the time is over or a failure is found, which is shrunk.
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

#[test]
fn hazard_85_a_late_copy_of_an_earlier_life_does_not_hide_the_later_one() {
    let wait = |ms| Step::Wait { ms };
    let steps = [
        Step::Start { node: 0, clock_s: 0, cut: 0 },
        Step::Start { node: 2, clock_s: 0, cut: 0 },
        wait(2_532),
        Step::Deaf { node: 2, masters: 1 },
        Step::Connect { user: 0, node: 0, told: false },
        Step::Stall { master: 2 },
        Step::Stall { master: 1 },
        wait(64_468),
        Step::Resume { master: 2 },
        Step::Away { master: 0 },
        wait(43_000),
    ];
    run(&steps).unwrap();
}
