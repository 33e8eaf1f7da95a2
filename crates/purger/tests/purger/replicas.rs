//! `redis.wait_replicas`: what is confirmed is on replicas, and what is not is neither told nor committed.
//! The link of a replica is cut, messages come, the master dies with the purger that knew of them, and
//! the replica is promoted.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use barid_mailbox::Mailbox;
use barid_runtime::{Context, SecretUrl, Stopped};
use barid_testkit::{Redis, RedisCluster, Relay, Sentinel};

use super::support::*;

impl World {
    async fn opened(mut self) -> Self {
        // A cut link shows soon; answers have time on a busy machine.
        self.config.redis.wait_timeout_ms = 300;
        self.config.redis.response_timeout_ms = 3000;
        self.mailbox = Mailbox::open(&self.config.redis, &Context::new().metrics).await.unwrap();
        self
    }

    async fn produce_asking(&self, from: usize, count: usize) {
        for i in from..from + count {
            let value = record(&i.to_string(), "alice", r#","receipts":["accepted"]"#);
            self.produce("alice", value).await;
        }
    }
}

/// Waits until the purger says that no replica confirms, and has counted it; nothing more is accepted.
async fn waits_for_a_replica(purger: &Running, accepted: f64, reason: &str) {
    purger.fails("redis", &[reason]).await;
    purger.until("counted", |p| p.metric_of("accept_calls_total", "unreplicated") >= 2.0).await;
    assert_eq!(purger.metric_of("messages_total", "accepted"), accepted, "nothing is told");
    assert!(purger.metric("lag_records") + purger.metric("in_flight_records") > 0.0);
}

/// What a purger that knows nothing of the past makes of it: everything is there, once, in order.
async fn nothing_is_lost(world: &World, count: usize) {
    let purger = world.start().await;
    world.has("alice", count).await;
    assert_eq!(world.ids("alice").await, expected(count));
    assert_eq!(world.receipts(count).await.len(), count);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_a_promoted_replica_without_a_link_loses_nothing_under_sentinel() {
    let mut world = World::new(false).await;
    let master_port = world.redis.port();
    let relay = Relay::to(SocketAddr::from((Ipv4Addr::LOCALHOST, master_port))).await.unwrap();
    let replica = Redis::start().await.unwrap();
    replica.follow(relay.address().port()).await.unwrap();
    let sentinel = Sentinel::start(&world.redis).await.unwrap();
    sentinel.knows_replicas(1).await.unwrap();
    world.config.redis.sentinel_master = "main".into();
    world.config.redis.sentinels = vec![SecretUrl::new(sentinel.url())];
    world.config.redis.wait_replicas = 1;
    let mut world = world.opened().await;

    let purger = world.start().await;
    world.produce_asking(0, 10).await;
    world.has("alice", 10).await;
    purger.until("accepted", |p| p.metric_of("messages_total", "accepted") == 10.0).await;
    relay.hold();
    world.produce_asking(10, 10).await;
    waits_for_a_replica(&purger, 10.0, "0 of 1 replicas").await;
    // The master has them, and dies, and so does whoever could have told.
    world.has("alice", 20).await;
    purger.kill();
    world.redis.kill().unwrap();
    let end = Instant::now() + LIMIT;
    while !replica.info("replication").await.unwrap().contains("role:master") {
        assert!(Instant::now() < end, "the replica is not promoted");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // Without a replica of its own it confirms nothing either.
    let next = Redis::start().await.unwrap();
    next.follow(replica.port()).await.unwrap();
    nothing_is_lost(&world, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_a_promoted_replica_without_a_link_loses_nothing_in_a_redis_cluster() {
    let mut cluster = RedisCluster::start(3).await.unwrap();
    let mut world = World::new(false).await;
    let mut urls = cluster.urls().into_iter().map(SecretUrl::new);
    world.config.redis.cluster = true;
    world.config.redis.url = urls.next().unwrap();
    world.config.redis.urls = urls.collect();
    world.config.redis.wait_replicas = 1;
    let world = world.opened().await;
    // Only alice's master has a replica; messages are for nobody else.
    let shard = world.mailbox.shard_of(&key("alice"));
    let slot = format!("{{{shard}}}");
    let mut of_alice = None;
    for (index, node) in cluster.nodes().iter().enumerate() {
        if node.query::<Option<String>>(&["GET", &slot]).await.is_ok() {
            of_alice = Some(index);
        }
    }
    let of_alice = of_alice.unwrap();
    let replica = cluster.replicate(of_alice).await.unwrap();

    let purger = world.start().await;
    world.produce_asking(0, 10).await;
    world.has("alice", 10).await;
    purger.until("accepted", |p| p.metric_of("messages_total", "accepted") == 10.0).await;
    // The replica cannot authenticate any more: its link is cut, everybody else's stands.
    let _: () = replica.query(&["CONFIG", "SET", "masterauth", "wrong"]).await.unwrap();
    let master = &cluster.nodes()[of_alice];
    let _: i64 = master.query(&["CLIENT", "KILL", "TYPE", "replica"]).await.unwrap();
    world.produce_asking(10, 10).await;
    waits_for_a_replica(&purger, 10.0, "of 1 replicas").await;
    world.has("alice", 20).await;
    purger.kill();
    cluster.node(of_alice).kill().unwrap();
    let _: () = replica.query(&["CLUSTER", "FAILOVER", "TAKEOVER"]).await.unwrap();
    let next = cluster.replicate_of(&replica).await.unwrap();
    nothing_is_lost(&world, 20).await;
    drop(next);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_one_replica_of_two_away_stops_accepting_until_it_is_back() {
    let mut world = World::new(false).await;
    let mut replicas = [Redis::start().await.unwrap(), Redis::start().await.unwrap()];
    for replica in &replicas {
        replica.follow(world.redis.port()).await.unwrap();
    }
    world.config.redis.wait_replicas = 2;
    let world = world.opened().await;
    let purger = world.start().await;
    world.produce_asking(0, 5).await;
    world.has("alice", 5).await;
    purger.ready().await;
    purger.until("accepted", |p| p.metric_of("messages_total", "accepted") == 5.0).await;
    replicas[1].kill().unwrap();
    purger.fails("redis", &["1 of 2 replicas"]).await;
    world.produce_asking(5, 5).await;
    waits_for_a_replica(&purger, 5.0, "1 of 2 replicas").await;
    replicas[1].restart().await.unwrap();
    replicas[1].follow(world.redis.port()).await.unwrap();
    purger.ready().await;
    world.has("alice", 10).await;
    assert_eq!(world.receipts(10).await.len(), 10);
    assert_eq!(purger.stop().await, Stopped::Clean);
}
