//! The poll loop, which no outside means stops while the process runs on: it is wedged at the one
//! place where it runs code that is not its own, and `/readyz` is asked as an orchestrator asks it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_core::{Shard, ShardCount};
use barid_mailbox::{AcceptGroup, Error, GroupOutcome, Mailbox, RedisTime};
use barid_purger::{Mailboxes, Service};
use barid_runtime::{AdminConfig, Context, admin};
use barid_testkit::http;
use tokio::sync::RwLock;

use super::support::*;

/// A mailbox of which no copy is to be had while somebody holds the gate: the loop takes one for
/// each ping, and waits.
struct Gated {
    mailbox: Mailbox,
    gate: Arc<RwLock<()>>,
}

impl Clone for Gated {
    fn clone(&self) -> Self {
        drop(tokio::task::block_in_place(|| self.gate.blocking_read()));
        Self { mailbox: self.mailbox.clone(), gate: Arc::clone(&self.gate) }
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
        self.mailbox.accept(groups).await
    }
    async fn ping(&self) -> Result<(), Error> {
        self.mailbox.ping().await
    }
}

async fn readyz(admin: SocketAddr, wanted: impl Fn(u16, &str) -> bool) {
    let begun = Instant::now();
    loop {
        let (status, body) = http::get(admin, "/readyz").await.unwrap();
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
    let gated = Gated { mailbox, gate: Arc::clone(&gate) };
    let service =
        Service::new(world.config.clone(), gated, world.handed.clone(), &context).unwrap();
    let running = tokio::spawn({
        let context = context.clone();
        async move { service.run(&context).await }
    });
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
