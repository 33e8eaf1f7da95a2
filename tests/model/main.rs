//! A model test: random interleavings of all operations on mailboxes, run against the code that ships: the scripts on
//! a real Redis, an access node's session (`barid_session`), the Rust SDK's inbox (`barid_client::inbox`) and the
//! purger's history of its shards (`barid_purger::history`).
//!
//! `mailboxes.rs` computes the answer and the effect of each script, and shares no code with the scripts. After each
//! call, the answer and the content of Redis are compared with it, timers to the millisecond. `client.rs` is an
//! application: it fails if a message is shown twice or out of its partition's order. After the last step, all repairs
//! run until nothing is left to do. Then each device must have handled every accepted message, except those that were
//! evicted, expired, replaced by a newer one with the same collapse key, or trimmed while Redis had lost the device. A
//! failing run is shrunk to the relevant steps.
//!
//! `BARID_MODEL_SECONDS` (30) is the duration, and `BARID_MODEL_STEPS` (60) the largest number of steps of a run.
//! docs/reliability.md lists the faults that were planted to check that the model finds them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod client;
mod mailboxes;
mod purger;
mod session;
mod store;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use proptest_state_machine::ReferenceStateMachine;

use crate::store::Store;
use crate::world::{BURST, CLIENTS, Checked, STRANGERS, USERS, World};

/// A step. Every step is possible at any time; one that does not apply does nothing.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// A business produces a record for a user to a partition, or repeats an earlier one.
    Produce { source: usize, user: usize, repeat: Option<usize>, key: Option<usize> },
    /// A record is produced and accepted.
    Send { source: usize, user: usize },
    /// Twice as many records are produced as the list of newest ids has room for, and one of them is repeated.
    Burst { source: usize, user: usize, again: usize },
    /// A purger sends its next group, or a probe.
    Accept { source: usize, purger: usize, count: usize },
    /// Another purger is assigned the partition, and the first one does not know.
    Rebalance { source: usize },
    /// A purger reads some records again, because another shard has lost something.
    ReadAgain { source: usize, back: usize },
    /// The last call for a partition is executed again.
    Redeliver { source: usize },
    /// A push reaches the nodes, not necessarily in order.
    Push { user: usize, nth: usize },
    /// All messages reach a user's devices; if `handled`, they are handled and acknowledged.
    Serve { user: usize, handled: bool },
    /// The fast path drops its pushes; if `told`, the node drops them, and notifies its sessions.
    LosePushes { user: usize, told: bool },
    /// A device connects. Its earlier connection is not closed.
    Connect { client: usize },
    /// A call of an earlier attempt arrives.
    ConnectLate { client: usize },
    /// A session ends.
    Disconnect { client: usize, ghost: bool },
    /// The end of a session is reported again.
    DisconnectLate { nth: usize },
    /// A session is lost without removing its route.
    Vanish { client: usize },
    /// The application finishes some messages, the newest or the oldest first, and the device acknowledges.
    Handle { client: usize, count: usize, newest: bool },
    /// The application does not handle a message.
    Refuse { client: usize },
    /// A device's program restarts; if `crash`, it loses what it did not save.
    Restart { client: usize, crash: bool },
    /// A session gets an answer, acknowledges, or reads; if `ahead`, it makes a call before it gets an earlier answer,
    /// or gets the newest answer first.
    Turn { client: usize, ghost: bool, ahead: bool },
    /// A session confirms its route.
    Confirm { client: usize, ghost: bool },
    /// A device that does not follow the protocol makes a call.
    Stranger { who: usize, call: Call, claim: Claim },
    /// The node's lease lapses, and the node continues under another incarnation.
    Lapse,
    /// The retry timer of a user fires, for all of its devices or for one; if `away`, no node is reached, for that
    /// reason, and the claim is given back.
    Fire { user: usize, only: Option<usize>, away: Option<usize> },
    /// A claim is given back.
    Defer { nth: usize, why: usize },
    /// An earlier acknowledgement arrives, or arrives again.
    AckLate { nth: usize },
    /// A mailbox expires.
    Expire { user: usize },
    /// Time passes: this many quarters of the time for which a mailbox keeps its entries.
    GrowOld { quarters: u64 },
    /// The replica catches up.
    Replicate,
    /// The replica is promoted.
    FailOver,
    /// The replica is promoted, and another record takes the position of a lost one.
    Fork { source: usize, user: usize },
}

/// A call of a device that does not follow the protocol.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Call {
    Connect { late: bool, simple: bool },
    Confirm { late: bool },
    Ack,
    Disconnect,
}

/// The position that such a device claims.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim {
    other_epoch: bool,
    /// Added to the device's generation.
    generation: i32,
    /// Distance from the position behind the newest entry.
    back: u64,
    /// 0: no chain, 1: a wrong chain, else the mailbox's.
    chain: u8,
}

fn claims() -> impl Strategy<Value = Claim> {
    let generation = prop_oneof![6 => Just(0), 2 => Just(-1), 1 => Just(1)];
    (prop::bool::weighted(0.1), generation, 0..7_u64, 0..7_u8).prop_map(
        |(other_epoch, generation, back, chain)| Claim { other_epoch, generation, back, chain },
    )
}

fn calls() -> impl Strategy<Value = Call> {
    let rarely = || prop::bool::weighted(0.3);
    prop_oneof![
        3 => (rarely(), rarely()).prop_map(|(late, simple)| Call::Connect { late, simple }),
        2 => rarely().prop_map(|late| Call::Confirm { late }),
        4 => Just(Call::Ack),
        1 => Just(Call::Disconnect),
    ]
}

/// Any step may follow any other, so the strategy has no state.
struct Anything;

impl ReferenceStateMachine for Anything {
    type State = ();
    type Transition = Step;

    fn init_state() -> BoxedStrategy<()> {
        Just(()).boxed()
    }

    fn transitions((): &()) -> BoxedStrategy<Step> {
        let (source, user, client) = (0..2_usize, 0..USERS, 0..CLIENTS);
        let repeat = prop::option::weighted(0.15, prop_oneof![Just(0), 0..40_usize]);
        let key = prop::option::weighted(0.4, 0..2_usize);
        let ghost = || prop::bool::weighted(0.25);
        prop_oneof![
            10 => (source.clone(), user.clone()).prop_map(|(source, user)| Step::Send { source, user }),
            8 => (source.clone(), user.clone(), repeat, key)
                .prop_map(|(source, user, repeat, key)| Step::Produce { source, user, repeat, key }),
            1 => (source.clone(), user.clone(), 0..BURST)
                .prop_map(|(source, user, again)| Step::Burst { source, user, again }),
            6 => (source.clone(), prop::bool::weighted(0.2), 1..4_usize)
                .prop_map(|(source, second, count)| Step::Accept { source, purger: second.into(), count }),
            1 => source.clone().prop_map(|source| Step::Rebalance { source }),
            1 => (source.clone(), 1..9_usize).prop_map(|(source, back)| Step::ReadAgain { source, back }),
            2 => source.clone().prop_map(|source| Step::Redeliver { source }),
            8 => (user.clone(), prop_oneof![4 => Just(0), 1 => Just(1_usize)])
                .prop_map(|(user, nth)| Step::Push { user, nth }),
            10 => (user.clone(), prop::bool::ANY).prop_map(|(user, handled)| Step::Serve { user, handled }),
            1 => (user.clone(), prop::bool::ANY).prop_map(|(user, told)| Step::LosePushes { user, told }),
            6 => client.clone().prop_map(|client| Step::Connect { client }),
            1 => client.clone().prop_map(|client| Step::ConnectLate { client }),
            3 => (client.clone(), ghost()).prop_map(|(client, ghost)| Step::Disconnect { client, ghost }),
            1 => client.clone().prop_map(|client| Step::Vanish { client }),
            5 => (client.clone(), 1..4_usize, prop::bool::weighted(0.2))
                .prop_map(|(client, count, newest)| Step::Handle { client, count, newest }),
            2 => client.clone().prop_map(|client| Step::Refuse { client }),
            2 => (client.clone(), prop::bool::ANY).prop_map(|(client, crash)| Step::Restart { client, crash }),
            12 => (client.clone(), ghost(), prop::bool::weighted(0.3))
                .prop_map(|(client, ghost, ahead)| Step::Turn { client, ghost, ahead }),
            3 => (client, ghost()).prop_map(|(client, ghost)| Step::Confirm { client, ghost }),
            1 => (0..3_usize).prop_map(|nth| Step::DisconnectLate { nth }),
            10 => (0..STRANGERS, calls(), claims())
                .prop_map(|(who, call, claim)| Step::Stranger { who, call, claim }),
            1 => Just(Step::Lapse),
            7 => (user.clone(), prop::option::weighted(0.4, 0..4_usize), prop::option::weighted(0.3, 0..4_usize))
                .prop_map(|(user, only, away)| Step::Fire { user, only, away }),
            3 => (0..3_usize, 0..4_usize).prop_map(|(nth, why)| Step::Defer { nth, why }),
            4 => (0..6_usize).prop_map(|nth| Step::AckLate { nth }),
            1 => user.clone().prop_map(|user| Step::Expire { user }),
            4 => (1..5_u64).prop_map(|quarters| Step::GrowOld { quarters }),
            2 => (source, user).prop_map(|(source, user)| Step::Fork { source, user }),
            3 => Just(Step::Replicate),
            2 => Just(Step::FailOver),
        ]
        .boxed()
    }

    fn apply((): (), _: &Step) {}
}

/// `tried` counts the steps: shrinking drops those that were not reached first.
async fn run(store: &mut Store, steps: &[Step], tried: &AtomicUsize) -> Checked {
    let mut world = World::new(store).await;
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

/// Worlds that run in parallel, each with its own Redis: each waits for Redis most of the time.
const WORKERS: usize = 3;

#[test]
fn whatever_happens_the_mailbox_keeps_its_promises() {
    let (began, cases, broken) = (Instant::now(), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (cases, broken) = (&cases, &broken);
        let search = |worker| scope.spawn(move || search(worker, began, cases, broken));
        let workers: Vec<_> = (1..=WORKERS).map(search).collect();
        for worker in workers {
            if let Err(why) = worker.join().expect("a worker lives") {
                panic!("{why}");
            }
        }
    });
    println!("{} cases in {:?}", cases.into_inner(), began.elapsed());
}

/// Runs until the time is over or a run fails. The worker of the failing run shrinks it, and the others stop.
fn search(worker: usize, began: Instant, cases: &AtomicUsize, broken: &AtomicUsize) -> Checked {
    let seconds = Duration::from_secs(setting("BARID_MODEL_SECONDS", 30));
    let steps = setting("BARID_MODEL_STEPS", 60) as usize;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = std::cell::RefCell::new(runtime.block_on(Store::start(worker.is_multiple_of(2))));
    let config = Config {
        cases: 1,
        max_shrink_iters: 20_000,
        max_shrink_time: 60_000,
        failure_persistence: None,
        ..Config::default()
    };
    while broken.load(Ordering::SeqCst) == 0 {
        let strategy = Anything::sequential_strategy(1..=steps);
        let result = TestRunner::new(config.clone()).run(&strategy, |((), steps, tried)| {
            let tried = tried.unwrap_or_default();
            let result = runtime.block_on(run(&mut store.borrow_mut(), &steps, &tried));
            let Err(why) = result else { return Ok(()) };
            match broken.compare_exchange(0, worker, Ordering::SeqCst, Ordering::SeqCst) {
                Err(other) if other != worker => Ok(()),
                _ => Err(TestCaseError::fail(why)),
            }
        });
        let tried = cases.fetch_add(1, Ordering::SeqCst) + 1;
        match result {
            Ok(()) if began.elapsed() >= seconds => return Ok(()),
            Ok(()) => (),
            Err(TestError::Fail(why, ((), steps, _))) => {
                let steps: Vec<String> = steps.iter().map(|step| format!("  {step:?}")).collect();
                return Err(format!(
                    "{why}\nafter {tried} cases, by the steps\n{}",
                    steps.join("\n")
                ));
            }
            Err(other) => return Err(other.to_string()),
        }
    }
    Ok(())
}

/// A message that Redis has lost was pushed and handled. The message at its position is evicted before Redis is asked,
/// so no chain is left to compare with. The lost message comes again, behind it.
#[tokio::test]
async fn hazard_03_a_fork_whose_place_was_evicted_shows_nothing_twice() {
    let steps = [
        Step::Connect { client: 0 },
        Step::Replicate,
        Step::Produce { source: 0, user: 0, repeat: None, key: None },
        Step::Produce { source: 0, user: 0, repeat: None, key: None },
        Step::Send { source: 1, user: 0 },
        Step::Send { source: 0, user: 0 },
        Step::FailOver,
        Step::Push { user: 0, nth: 0 },
        Step::Send { source: 0, user: 0 },
        Step::Send { source: 0, user: 0 },
    ];
    let mut store = Store::start(false).await;
    run(&mut store, &steps, &AtomicUsize::new(0)).await.unwrap();
}

/// A device that Redis has forgotten confirms while three others are online, so there is no room for it. One of them
/// leaves, and the device acknowledges.
#[tokio::test]
async fn a_device_that_an_acknowledgement_makes_known_is_sent_to_again() {
    let nothing = Claim { other_epoch: false, generation: 0, back: 0, chain: 0 };
    let steps = [
        Step::Stranger {
            who: 2,
            call: Call::Connect { late: false, simple: false },
            claim: nothing,
        },
        Step::Connect { client: 3 },
        Step::Send { source: 0, user: 1 },
        Step::Connect { client: 2 },
        Step::Stranger { who: 3, call: Call::Confirm { late: false }, claim: nothing },
        Step::Disconnect { client: 2, ghost: false },
        Step::Stranger { who: 3, call: Call::Ack, claim: Claim { back: 2, chain: 2, ..nothing } },
    ];
    let mut store = Store::start(false).await;
    run(&mut store, &steps, &AtomicUsize::new(0)).await.unwrap();
}

/// A failover restores an older session's route. An acknowledgement of the newer session, which has no route now, covers
/// what is left, and the next one resets the device behind it.
#[tokio::test]
async fn a_device_that_a_session_without_a_route_resets_is_sent_to_again() {
    let steps = [
        Step::Send { source: 0, user: 0 },
        Step::Send { source: 0, user: 1 },
        Step::Connect { client: 1 },
        Step::Connect { client: 0 },
        Step::Replicate,
        Step::Connect { client: 1 },
        Step::Serve { user: 0, handled: true },
        Step::Connect { client: 2 },
        Step::Send { source: 0, user: 0 },
        Step::Confirm { client: 0, ghost: false },
        Step::Serve { user: 1, handled: true },
        Step::FailOver,
        Step::AckLate { nth: 1 },
        Step::Serve { user: 0, handled: true },
    ];
    let mut store = Store::start(false).await;
    run(&mut store, &steps, &AtomicUsize::new(0)).await.unwrap();
}
