//! `redis.wait_replicas`: what is confirmed is on replicas, and what is not is neither told nor committed.
//! The link of a replica is cut, messages come, the master dies and the purger that knew of them ends, and
//! that replica is promoted. Where fewer than all are waited for, what it lacks is brought back from Kafka.

use std::net::{Ipv4Addr, SocketAddr};

use barid_core::ReceiptSet;
use barid_mailbox::Mailbox;
use barid_runtime::{Context, SecretUrl, Stopped};
use barid_testkit::{Redis, RedisCluster, Relay, Sentinel};

use super::support::*;
use super::three_masters;

impl World {
    fn waiting(&mut self, replicas: u32) {
        // A cut link shows soon; answers have time on a busy machine.
        self.config.redis.wait_timeout_ms = 300;
        self.config.redis.response_timeout_ms = 3000;
        self.config.redis.wait_replicas = replicas;
    }

    async fn opened(mut self) -> Self {
        self.mailbox = Mailbox::open(&self.config.redis, &Context::new().metrics).await.unwrap();
        self
    }

    async fn produce_asking(&self, from: usize, count: usize) {
        for i in from..from + count {
            let value = asking(&i.to_string(), "alice", ReceiptSet::ACCEPTED);
            self.produce("alice", value).await;
        }
    }
}

/// Alice's master and its replicas. The link of the first replica can be cut, and that one is promoted.
struct Bed {
    world: World,
    replicas: Vec<Redis>,
    store: Store,
}

enum Store {
    Sentinel { relay: Relay, sentinel: Sentinel },
    Cluster { cluster: RedisCluster, of_alice: usize, _others: Vec<Redis> },
}

impl Store {
    fn sentinel_log(&self) -> Option<String> {
        match self {
            Self::Sentinel { sentinel, .. } => Some(sentinel.log()),
            Self::Cluster { .. } => None,
        }
    }
}

impl Bed {
    async fn under_sentinel(replicas: usize, waited_for: u32) -> Self {
        let mut world = World::new(false).await;
        let master = world.redis.port();
        let relay = Relay::to(SocketAddr::from((Ipv4Addr::LOCALHOST, master))).await.unwrap();
        let mut followers = Vec::new();
        for number in 0..replicas {
            let replica = Redis::start().await.unwrap();
            let port = if number == 0 { relay.address().port() } else { master };
            replica.follow(port).await.unwrap();
            if number > 0 {
                // By itself it would promote the one that has most.
                let () = replica.query(&["CONFIG", "SET", "replica-priority", "0"]).await.unwrap();
            }
            followers.push(replica);
        }
        let sentinel = Sentinel::start(&world.redis).await.unwrap();
        sentinel.knows_replicas(replicas).await.unwrap();
        world.config.redis.sentinel_master = "main".into();
        world.config.redis.sentinels = vec![SecretUrl::new(sentinel.url())];
        world.waiting(waited_for);
        let store = Store::Sentinel { relay, sentinel };
        Self { world: world.opened().await, replicas: followers, store }
    }

    async fn in_a_cluster(replicas: usize, waited_for: u32) -> Self {
        let mut world = World::new(false).await;
        world.waiting(waited_for);
        let (cluster, _) = three_masters(&mut world).await;
        let shard = world.mailbox.shard_of(&key("alice"));
        let of_alice = cluster.master_of(&format!("{{{shard}}}")).await.unwrap();
        let (mut followers, mut others) = (Vec::new(), Vec::new());
        for master in 0..3 {
            for number in 0..replicas {
                let replica = cluster.replicate(master).await.unwrap();
                if master != of_alice {
                    others.push(replica);
                    continue;
                }
                if number > 0 {
                    let no = ["CONFIG", "SET", "cluster-replica-no-failover", "yes"];
                    let () = replica.query(&no).await.unwrap();
                }
                followers.push(replica);
            }
        }
        let store = Store::Cluster { cluster, of_alice, _others: others };
        Self { world, replicas: followers, store }
    }

    /// Cuts the first replica's link; the other links stay up.
    async fn cut(&self) {
        match &self.store {
            Store::Sentinel { relay, .. } => relay.hold(),
            Store::Cluster { cluster, of_alice, .. } => {
                // It cannot authenticate any more.
                let wrong = ["CONFIG", "SET", "masterauth", "wrong"];
                let () = self.replicas[0].query(&wrong).await.unwrap();
                let master = &cluster.nodes()[*of_alice];
                let _: i64 = master.query(&["CLIENT", "KILL", "TYPE", "replica"]).await.unwrap();
                let down = ["master_link_status:down"];
                self.replicas[0].until_replication(&down, LIMIT).await.unwrap();
                for replica in &self.replicas[1..] {
                    replica.follows().await.unwrap();
                }
            }
        }
    }

    /// The master dies and the first replica is promoted; the other one follows it, and loses what that
    /// one lacks. Then there are as many replicas as before.
    async fn promote(&mut self) {
        match &mut self.store {
            Store::Sentinel { .. } => self.world.redis.kill().unwrap(),
            Store::Cluster { cluster, of_alice, .. } => {
                cluster.node(*of_alice).kill().unwrap();
                let takeover = ["CLUSTER", "FAILOVER", "TAKEOVER"];
                let () = self.replicas[0].query(&takeover).await.unwrap();
            }
        }
        let promoted = &self.replicas[0];
        if let Err(error) = promoted.until_replication(&["role:master"], LIMIT).await {
            panic!("it is not promoted: {error}, Sentinel: {:?}", self.store.sentinel_log());
        }
        let port = format!("master_port:{}", promoted.port());
        for replica in &self.replicas[1..] {
            let follows = [&*port, "master_link_status:up"];
            replica.until_replication(&follows, LIMIT).await.unwrap();
        }
        let next = match &mut self.store {
            Store::Sentinel { .. } => {
                let next = Redis::start().await.unwrap();
                next.follow(promoted.port()).await.unwrap();
                next
            }
            Store::Cluster { cluster, .. } => cluster.replicate_of(promoted).await.unwrap(),
        };
        self.replicas.push(next);
    }
}

/// Messages whose acceptance was confirmed. A call that the replicas confirm too late, on a busy machine, is
/// repeated, and Redis answers that its messages were accepted before.
fn accepted(purger: &Running) -> f64 {
    purger.metric_of("messages_total", "accepted") + purger.metric_of("messages_total", "before")
}

/// Waits until the purger says that too few replicas confirm, and has counted it; nothing more is accepted.
async fn waits_for_a_replica(purger: &Running, count: f64, reason: &str) {
    purger.fails("redis", &[reason]).await;
    purger.until("counted", |p| p.metric_of("accept_calls_total", "unreplicated") >= 2.0).await;
    assert_eq!(accepted(purger), count, "nothing is told");
    assert!(purger.metric("lag_records") + purger.metric("in_flight_records") > 0.0);
}

/// All replicas that may be promoted are waited for: accepting stops, and nothing is lost.
async fn nothing_is_confirmed_that_a_replica_lacks(mut bed: Bed, reason: &str) {
    let purger = bed.world.start().await;
    purger.ready().await;
    bed.world.produce_asking(0, 10).await;
    purger.until("accepted", |p| accepted(p) == 10.0).await;
    bed.cut().await;
    bed.world.produce_asking(10, 10).await;
    waits_for_a_replica(&purger, 10.0, reason).await;
    // The master has them, and dies, and so does whoever could have told.
    bed.world.has("alice", 20).await;
    purger.kill();
    bed.promote().await;
    // A purger that knows nothing of the past: everything is there, once, in order.
    let purger = bed.world.start().await;
    bed.world.has("alice", 20).await;
    assert_eq!(bed.world.ids("alice").await, expected(20));
    assert_eq!(bed.world.receipts(20).await.len(), 20);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// One of two is waited for, and the other one is promoted: what was confirmed is lost in Redis, and is
/// known to be, by what the commit says of the shard.
async fn what_is_lost_is_brought_back(mut bed: Bed) {
    let purger = bed.world.start().await;
    purger.ready().await;
    bed.world.produce_asking(0, 10).await;
    purger.until("accepted", |p| accepted(p) == 10.0).await;
    bed.cut().await;
    bed.world.produce_asking(10, 10).await;
    purger.until("accepted", |p| accepted(p) == 20.0).await;
    purger.ready().await;
    assert_eq!(purger.stop().await, Stopped::Clean);
    bed.promote().await;
    assert_eq!(bed.world.ids("alice").await, expected(10), "the promoted one had them all");
    let purger = bed.world.start().await;
    bed.world.has("alice", 20).await;
    assert_eq!(bed.world.ids("alice").await, expected(20));
    purger.until("raised", |p| p.metric("shards_repairing") == 0.0).await;
    assert_eq!((purger.metric("gaps_total"), purger.metric("repairs_total")), (1.0, 1.0));
    // Repaired messages were accepted, and reported, twice.
    let receipts = bed.world.receipts(30).await;
    for id in expected(20) {
        let told = receipts.iter().filter(|receipt| receipt.id == id).count();
        assert_eq!(told, if id.len() == 1 { 1 } else { 2 }, "{id}");
    }
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_a_promoted_replica_without_a_link_loses_nothing_under_sentinel() {
    let bed = Bed::under_sentinel(1, 1).await;
    nothing_is_confirmed_that_a_replica_lacks(bed, "0 of 1 replicas").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_a_promoted_replica_without_a_link_loses_nothing_in_a_redis_cluster() {
    let bed = Bed::in_a_cluster(1, 1).await;
    nothing_is_confirmed_that_a_replica_lacks(bed, "0 of 1 replicas").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_where_both_replicas_are_waited_for_either_may_be_promoted_by_sentinel() {
    let bed = Bed::under_sentinel(2, 2).await;
    nothing_is_confirmed_that_a_replica_lacks(bed, "1 of 2 replicas").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_where_both_replicas_are_waited_for_either_may_be_promoted_in_a_redis_cluster() {
    let bed = Bed::in_a_cluster(2, 2).await;
    nothing_is_confirmed_that_a_replica_lacks(bed, "1 of 2 replicas").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_what_the_promoted_one_of_two_lacks_is_brought_back_under_sentinel() {
    what_is_lost_is_brought_back(Bed::under_sentinel(2, 1).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_what_the_promoted_one_of_two_lacks_is_brought_back_in_a_redis_cluster() {
    what_is_lost_is_brought_back(Bed::in_a_cluster(2, 1).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_05_one_replica_of_two_away_stops_accepting_until_it_is_back() {
    let mut world = World::new(false).await;
    let mut replicas = [Redis::start().await.unwrap(), Redis::start().await.unwrap()];
    for replica in &replicas {
        replica.follow(world.redis.port()).await.unwrap();
    }
    world.waiting(2);
    let world = world.opened().await;
    let purger = world.start().await;
    world.produce_asking(0, 5).await;
    world.has("alice", 5).await;
    purger.ready().await;
    purger.until("accepted", |p| accepted(p) == 5.0).await;
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
