//! A loop that hangs, and tasks that panic, while the process runs on. Both are planted in the mailbox and the
//! hand-off, which the purger is given, and the admin port is asked as an orchestrator asks it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_core::{Shard, ShardCount};
use barid_mailbox::{AcceptGroup, Error, GroupOutcome, Mailbox, RedisTime};
use barid_purger::{Handoff, Mailboxes, Service};
use barid_runtime::{AdminConfig, Context, admin};
use barid_testkit::http;
use barid_wire::internal::Push;
use tokio::sync::RwLock;

use super::support::*;

/// A mailbox that cannot be cloned while somebody holds the gate: the loop clones it for each ping, and hangs.
struct Gated {
    mailbox: Mailbox,
    gate: Arc<RwLock<()>>,
    /// Whether accepting panics.
    panics: bool,
}

impl Clone for Gated {
    fn clone(&self) -> Self {
        drop(tokio::task::block_in_place(|| self.gate.blocking_read()));
        Self { mailbox: self.mailbox.clone(), gate: Arc::clone(&self.gate), panics: self.panics }
    }
}

impl Mailboxes for Gated {
    fn shards(&self) -> ShardCount {
        self.mailbox.shards()
    }
    fn lanes(&self) -> usize {
        self.mailbox.lanes()
    }
    fn lane_of(&self, shard: Shard) -> usize {
        self.mailbox.lane_of(shard)
    }
    fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        self.mailbox.redis_time(shard)
    }
    async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, Error>> {
        assert!(!self.panics, "as planned");
        self.mailbox.accept(groups).await
    }
    async fn ping(&self) -> Result<(), Error> {
        self.mailbox.ping().await
    }
}

async fn readyz(admin: SocketAddr, wanted: impl Fn(u16, &str) -> bool) {
    until(admin, "/readyz", wanted).await;
}

async fn until(admin: SocketAddr, path: &str, wanted: impl Fn(u16, &str) -> bool) {
    let begun = Instant::now();
    loop {
        let (status, body) = http::get(admin, path).await.unwrap();
        if wanted(status, &body) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{status}: {body}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_purger_whose_poll_loop_is_wedged_is_not_ready() {
    let world = World::new(true).await;
    let mut context = Context::new();
    context.stalled_after = Duration::from_secs(2);
    admin::serve(&AdminConfig::local(0), "purger", &context).unwrap();
    let admin = context.announcements().get("admin").unwrap();
    let gate = Arc::new(RwLock::new(()));
    let mailbox = Mailbox::open(&world.config.redis, &context.metrics).await.unwrap();
    let gated = Gated { mailbox, gate: Arc::clone(&gate), panics: false };
    let config = world.config.clone();
    let service = Service::start(config, gated, world.handed.clone(), context.clone()).unwrap();
    let running = tokio::spawn(service.work());
    readyz(admin, |status, _| status == 200).await;
    let closed = gate.write().await;
    readyz(admin, |_, body| body.contains("consumer: no poll for ")).await;
    world.produce_to_alice(0, 1).await;
    drop(closed);
    readyz(admin, |status, _| status == 200).await;
    world.has("alice", 1).await;
    context.shutdown.begin(Duration::from_secs(10));
    running.await.unwrap().unwrap();
}

/// A dispatcher that panics on every push.
#[derive(Clone)]
struct Panicking;

impl Handoff for Panicking {
    async fn push(&self, _: Shard, _: Push) {
        panic!("as planned");
    }
    fn any_available(&self) -> bool {
        true
    }
    async fn flush(&self, _: tokio::time::Instant) -> usize {
        0
    }
}

/// Accepts a message for alice, and waits until `/healthz` names the task that panicked meanwhile.
async fn names_the_task(world: World, panics: bool, handoff: impl Handoff, named: &str) {
    let context = Context::new();
    admin::serve(&AdminConfig::local(0), "purger", &context).unwrap();
    let admin = context.announcements().get("admin").unwrap();
    let mailbox = Mailbox::open(&world.config.redis, &context.metrics).await.unwrap();
    let mailbox = Gated { mailbox, gate: Arc::default(), panics };
    let service = Service::start(world.config.clone(), mailbox, handoff, context.clone()).unwrap();
    let running = tokio::spawn(service.work());
    until(admin, "/healthz", |status, _| status == 200).await;
    world.produce_to_alice(0, 1).await;
    until(admin, "/healthz", |status, body| status == 503 && body.contains(named)).await;
    context.shutdown.begin(Duration::from_secs(1));
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_panics_is_named() {
    let world = World::new(true).await;
    let handed = world.handed.clone();
    names_the_task(world, true, handed, "tasks: a lane to Redis ended").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_on_that_panics_is_named() {
    let world = World::new(true).await;
    world.connect("alice").await;
    names_the_task(world, false, Panicking, "tasks: the hand-on to a dispatcher ended").await;
}
