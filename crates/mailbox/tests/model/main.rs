//! Random interleavings of everything that may happen to a mailbox, on the real scripts and a real
//! Redis, against a plain model of the mailbox, of devices, and of what stands around them.
//!
//! After each step the scripts' answers and all that Redis holds are compared with `mailboxes.rs`,
//! and timers and routes with what they must be. `client.rs` is an application's view: it fails if
//! something is shown twice or out of its partition's order. After the last step everything that
//! repairs is run until nothing is left to do; then each device must have been shown whatever was
//! accepted and not evicted, expired, or trimmed while Redis had forgotten the device. A failing run
//! is shrunk to the steps that matter.
//!
//! `BARID_MODEL_SECONDS` (20) is how long it runs, `BARID_MODEL_STEPS` (60) how long a run may get.
//!
//! Faults that were planted in the scripts, one at a time, and found within 25 s, most within 1 s:
//! accept without the look at `prev`, at the position, at the ring, without arming, evicting one too
//! many, and not advancing the position over a duplicate; connect without arming, letting an older
//! attempt in, and starting a new device at the newest entry; ack without comparing chains, trimming
//! to the highest cursor, without starting the retries over, without disarming; confirm without
//! arming; fire for who is not behind; disconnect of another's route; a reset without a new
//! generation; a new epoch with the old one's number.
//! Not found within 25 s: an ack that goes back or is of an older generation, connect and confirm
//! without comparing chains. (The contract tests find all of them.)
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod client;
mod mailboxes;
mod purger;
mod session;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use proptest_state_machine::ReferenceStateMachine;

use crate::world::{CLIENTS, Checked, Store, USERS, World};

/// What may happen. Everything is possible at any time; what makes no sense does nothing.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// A business writes a record for a user to a partition; or the user's last one once more.
    Produce { source: usize, user: usize, repeat: bool },
    /// A record that is written and accepted at once.
    Send { source: usize, user: usize },
    /// A purger hands on what it has not, or probes.
    Accept { source: usize, purger: usize, count: usize },
    /// Another purger is given the partition; the first does not know.
    Rebalance { source: usize },
    /// The last call for a partition is executed once more.
    Redeliver { source: usize },
    /// A push reaches the nodes, not always the first one first.
    Push { user: usize, nth: usize },
    /// Everything reaches a user's devices, is handled and acknowledged.
    Serve { user: usize },
    /// The fast path drops what it has.
    LosePushes { user: usize },
    /// A device connects; a connection that it had is not told.
    Connect { client: usize },
    /// A call of an earlier attempt arrives.
    ConnectLate { client: usize },
    /// A session ends.
    Disconnect { client: usize, ghost: bool },
    /// A session is lost, and its route stays.
    Vanish { client: usize },
    /// The application is done with some messages, and the device acknowledges.
    Handle { client: usize, count: usize },
    /// A session acknowledges, reads, or gets what it has read.
    Turn { client: usize, ghost: bool },
    /// A session confirms that it lives.
    Confirm { client: usize, ghost: bool },
    /// The retry time of a user comes.
    Fire { user: usize },
    /// The oldest claim is given back.
    Defer,
    /// An acknowledgement that was sent some while ago arrives (again).
    AckLate { nth: usize },
    /// A mailbox expires.
    Expire { user: usize },
    /// The replica has everything.
    Replicate,
    /// The replica takes over.
    FailOver,
}

/// Any step after any other: the strategy needs to know nothing of the state.
struct Anything;

impl ReferenceStateMachine for Anything {
    type State = ();
    type Transition = Step;

    fn init_state() -> BoxedStrategy<()> {
        Just(()).boxed()
    }

    fn transitions((): &()) -> BoxedStrategy<Step> {
        let (source, user, client) = (0..2_usize, 0..USERS, 0..CLIENTS);
        let ghost = || prop::bool::weighted(0.25);
        prop_oneof![
            10 => (source.clone(), user.clone()).prop_map(|(source, user)| Step::Send { source, user }),
            6 => (source.clone(), user.clone(), prop::bool::weighted(0.1))
                .prop_map(|(source, user, repeat)| Step::Produce { source, user, repeat }),
            6 => (source.clone(), prop::bool::weighted(0.2), 1..4_usize)
                .prop_map(|(source, second, count)| Step::Accept { source, purger: second.into(), count }),
            1 => source.clone().prop_map(|source| Step::Rebalance { source }),
            2 => source.prop_map(|source| Step::Redeliver { source }),
            8 => (user.clone(), prop_oneof![4 => Just(0), 1 => Just(1_usize)])
                .prop_map(|(user, nth)| Step::Push { user, nth }),
            8 => user.clone().prop_map(|user| Step::Serve { user }),
            1 => user.clone().prop_map(|user| Step::LosePushes { user }),
            6 => client.clone().prop_map(|client| Step::Connect { client }),
            1 => client.clone().prop_map(|client| Step::ConnectLate { client }),
            3 => (client.clone(), ghost()).prop_map(|(client, ghost)| Step::Disconnect { client, ghost }),
            1 => client.clone().prop_map(|client| Step::Vanish { client }),
            5 => (client.clone(), 1..4_usize).prop_map(|(client, count)| Step::Handle { client, count }),
            12 => (client.clone(), ghost()).prop_map(|(client, ghost)| Step::Turn { client, ghost }),
            3 => (client, ghost()).prop_map(|(client, ghost)| Step::Confirm { client, ghost }),
            3 => user.clone().prop_map(|user| Step::Fire { user }),
            2 => Just(Step::Defer),
            3 => (0..5_usize).prop_map(|nth| Step::AckLate { nth }),
            1 => user.prop_map(|user| Step::Expire { user }),
            3 => Just(Step::Replicate),
            2 => Just(Step::FailOver),
        ]
        .boxed()
    }

    fn apply((): (), _: &Step) {}
}

/// `tried` counts the steps: shrinking begins by dropping those that were not reached.
async fn run(store: &mut Store, steps: &[Step], tried: &AtomicUsize) -> Checked {
    let mut world = World::new(store).await?;
    for (number, step) in steps.iter().enumerate() {
        tried.fetch_add(1, Ordering::SeqCst);
        world.step(step).await.map_err(|broken| format!("step {}: {broken}", number + 1))?;
    }
    world.settle().await.map_err(|broken| format!("at the end: {broken}"))
}

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn whatever_happens_the_mailbox_keeps_its_promises() {
    let seconds = Duration::from_secs(setting("BARID_MODEL_SECONDS", 20));
    let steps = setting("BARID_MODEL_STEPS", 60) as usize;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = std::cell::RefCell::new(runtime.block_on(Store::start()));
    let config = Config {
        cases: 8,
        max_shrink_iters: 20_000,
        max_shrink_time: 60_000,
        failure_persistence: None,
        ..Config::default()
    };
    let began = Instant::now();
    let mut cases = 0;
    while cases == 0 || began.elapsed() < seconds {
        let strategy = Anything::sequential_strategy(1..=steps);
        let result = TestRunner::new(config.clone()).run(&strategy, |((), steps, tried)| {
            let tried = tried.unwrap_or_default();
            let result = runtime.block_on(run(&mut store.borrow_mut(), &steps, &tried));
            result.map_err(TestCaseError::fail)
        });
        match result {
            Ok(()) => cases += config.cases,
            Err(TestError::Fail(why, ((), steps, _))) => {
                let steps: Vec<String> = steps.iter().map(|step| format!("  {step:?}")).collect();
                panic!("{why}\nafter {cases} cases, by the steps\n{}", steps.join("\n"));
            }
            Err(other) => panic!("{other}"),
        }
    }
    println!("{cases} cases in {:?}", began.elapsed());
}

/// A message that Redis had forgotten was pushed and handled. What took its place is evicted before
/// Redis is asked, so that nothing is left to compare with; the message itself comes again behind it.
#[tokio::test]
async fn hazard_03_a_fork_whose_place_was_evicted_shows_nothing_twice() {
    let steps = [
        Step::Connect { client: 0 },
        Step::Replicate,
        Step::Produce { source: 0, user: 0, repeat: false },
        Step::Produce { source: 0, user: 0, repeat: false },
        Step::Send { source: 1, user: 0 },
        Step::Send { source: 0, user: 0 },
        Step::FailOver,
        Step::Push { user: 0, nth: 0 },
        Step::Send { source: 0, user: 0 },
        Step::Send { source: 0, user: 0 },
    ];
    let mut store = Store::start().await;
    run(&mut store, &steps, &AtomicUsize::new(0)).await.unwrap();
}

/// A failover brings an older session's route back; an acknowledgement of the newer one, which has no
/// route now, catches up with what is left, and the next one resets the device behind it.
#[tokio::test]
async fn a_device_that_a_session_without_a_route_resets_is_sent_to_again() {
    let steps = [
        Step::Send { source: 0, user: 0 },
        Step::Send { source: 0, user: 1 },
        Step::Connect { client: 1 },
        Step::Connect { client: 0 },
        Step::Replicate,
        Step::Connect { client: 1 },
        Step::Serve { user: 0 },
        Step::Connect { client: 2 },
        Step::Send { source: 0, user: 0 },
        Step::Confirm { client: 0, ghost: false },
        Step::Serve { user: 1 },
        Step::FailOver,
        Step::AckLate { nth: 1 },
        Step::Serve { user: 0 },
    ];
    let mut store = Store::start().await;
    run(&mut store, &steps, &AtomicUsize::new(0)).await.unwrap();
}
