//! A whole dispatcher over a real Redis, with access nodes and callers.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use barid_core::{AppId, Attempt, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef, UserId};
use barid_dispatcher::{Config, Dispatcher};
use barid_mailbox::{
    ConnectOutcome, ConnectRequest, Lease, Mailbox, NodeRecord, NodeRole, NodeTable, RedisConfig,
    UserKey,
};
use barid_runtime::{Context, Role as _, SecretUrl, Stopped};
use barid_testkit::{Redis, Sentinel};
use barid_wire::internal::{DispatchBatch, Gone, Resend, ResendDevice};
use prometheus::Registry;
use support::{Caller, FakeNode, SOON, push, seq};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

struct Cluster {
    redis: Redis,
    mailbox: Mailbox,
    config: RedisConfig,
}

struct Running {
    task: JoinHandle<Stopped>,
    context: Context,
    address: String,
}

fn user(name: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(name).unwrap() }
}

fn session(node: &str, connection: u64) -> SessionRef {
    SessionRef {
        node: NodeId::new(node).unwrap(),
        incarnation: Incarnation(7),
        connection: ConnectionId(connection),
    }
}

impl Cluster {
    async fn start() -> Self {
        Self::on(Redis::start().await.unwrap(), RedisConfig::default()).await
    }

    async fn on(redis: Redis, config: RedisConfig) -> Self {
        let config = RedisConfig { url: SecretUrl::new(redis.url()), shards: 8, ..config };
        let mailbox = Mailbox::open(&config, &Registry::new()).await.unwrap();
        Self { redis, mailbox, config }
    }

    async fn dispatcher(&self, nodes: i64) -> Running {
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            nodes_refresh_ms: 50,
            drain_settle_ms: 200,
            lease_ttl_ms: 900,
            redis: self.config.clone(),
            ..Default::default()
        };
        let context = Context::new();
        let running = Dispatcher::run(config, context.clone());
        let task = tokio::spawn(async move { running.await.unwrap() });
        let addresses = timeout(SOON, context.announcements().wait()).await.unwrap();
        let address = addresses["grpc"].to_string();
        let begun = Instant::now();
        while !context.health.not_ready().is_empty()
            || gauge(&context, "barid_dispatcher_node_links_up") < nodes
        {
            assert!(begun.elapsed() < SOON, "not ready: {:?}", context.health.not_ready());
            sleep(Duration::from_millis(5)).await;
        }
        Running { task, context, address }
    }

    async fn node(&self, name: &str) -> (FakeNode, Lease) {
        let node = FakeNode::start().await;
        let id = NodeId::new(name).unwrap();
        let record = NodeRecord::new(NodeRole::Access, id, Incarnation(7), &node.address);
        let lease = Lease::acquire(&self.mailbox, record, Duration::from_secs(10)).await.unwrap();
        (node, lease)
    }

    /// The dispatchers as callers see them.
    async fn dispatchers(&self) -> NodeTable {
        let refresh = Duration::from_millis(20);
        let mut table = NodeTable::watch(&self.mailbox, NodeRole::Dispatcher, refresh);
        timeout(SOON, table.changed()).await.unwrap();
        table
    }

    async fn connect(&self, name: &str, device: &str, session: SessionRef, attempt: u64) {
        let request = ConnectRequest {
            user: user(name),
            device: DeviceId::new(device).unwrap(),
            session,
            attempt: Attempt(attempt),
            platform: "ios".into(),
            position: None,
        };
        let begun = Instant::now();
        let outcome = loop {
            match self.mailbox.connect(request.clone()).await {
                Ok(outcome) => break outcome,
                // A test cut this connection, too.
                Err(error) => assert!(begun.elapsed() < SOON, "{error}"),
            }
            sleep(Duration::from_millis(10)).await;
        };
        assert!(matches!(outcome, ConnectOutcome::Connected { .. }), "{outcome:?}");
    }
}

fn metric(context: &Context, name: &str) -> prometheus::proto::Metric {
    let families = context.metrics.gather();
    let family = families.iter().find(|family| family.name() == name);
    family.unwrap_or_else(|| panic!("no metric {name}")).get_metric()[0].clone()
}

fn gauge(context: &Context, name: &str) -> i64 {
    metric(context, name).get_gauge().get_value() as i64
}

fn counter(context: &Context, name: &str) -> u64 {
    metric(context, name).get_counter().get_value() as u64
}

#[tokio::test]
async fn a_changed_route_reaches_l1_by_invalidation() {
    let cluster = Cluster::start().await;
    let ((a, _la), (b, _lb)) = (cluster.node("a").await, cluster.node("b").await);
    let dispatcher = cluster.dispatcher(2).await;
    let mut caller = Caller::connect(&dispatcher.address).await;
    for round in 0..20 {
        let (at, node) = if round % 2 == 0 { ("a", &a) } else { ("b", &b) };
        cluster.connect("alice", "phone", session(at, round + 1), round + 1).await;
        let invalidated = Instant::now();
        // The push message of Redis is on its way: wait for it as long as a timer would.
        let before = node.pushes(0).await.len();
        while node.pushes(0).await.len() == before {
            assert!(invalidated.elapsed() < Duration::from_secs(2), "L1 is stale");
            caller.push(vec![push("alice", round)]).await;
            sleep(Duration::from_millis(1)).await;
        }
        let last = node.pushes(0).await.pop().unwrap();
        assert_eq!((last.connections[..].to_vec(), seq(&last.envelope)), (vec![round + 1], round));
        for _ in 0..3 {
            caller.push(vec![push("alice", round)]).await;
        }
    }
    assert!(counter(&dispatcher.context, "barid_dispatcher_l1_hits_total") >= 40);
}

#[tokio::test]
async fn gone_removes_the_route_from_redis() {
    let cluster = Cluster::start().await;
    let (a, _lease) = cluster.node("a").await;
    let dispatcher = cluster.dispatcher(1).await;
    cluster.connect("alice", "phone", session("a", 1), 1).await;
    cluster.connect("alice", "watch", session("a", 2), 1).await;
    *a.fake.gone.lock() = vec![Gone {
        app: "demo".into(),
        user: "alice".into(),
        device: String::new(),
        connection: 1,
    }];
    let mut caller = Caller::connect(&dispatcher.address).await;
    caller.push(vec![push("alice", 1)]).await;
    let begun = Instant::now();
    while cluster.mailbox.read_routes(&user("alice")).await.unwrap().len() == 2 {
        assert!(begun.elapsed() < SOON, "the route stays");
        sleep(Duration::from_millis(5)).await;
    }
    let routes = cluster.mailbox.read_routes(&user("alice")).await.unwrap();
    assert_eq!((routes.len(), routes[0].device.as_str()), (1, "watch"));
}

#[tokio::test]
async fn resends_read_redis_and_tell_what_cannot_be_reached() {
    let cluster = Cluster::start().await;
    let (a, _lease) = cluster.node("a").await;
    let dispatcher = cluster.dispatcher(1).await;
    cluster.connect("alice", "phone", session("a", 1), 1).await;
    cluster.connect("bob", "phone", session("nowhere", 1), 1).await;
    let resend = |name: &str, node: &str, connection| Resend {
        app: "demo".into(),
        user: name.into(),
        devices: vec![ResendDevice {
            device: "phone".into(),
            node: node.into(),
            incarnation: 7,
            connection,
            number: 3,
            sampled: None,
        }],
    };
    let resends =
        vec![resend("alice", "a", 1), resend("alice", "a", 9), resend("bob", "nowhere", 1)];
    let mut caller = Caller::connect(&dispatcher.address).await;
    let reply = caller.dispatch(DispatchBatch { resends, ..Default::default() }).await;
    assert_eq!(reply.unreachable, [2]);
    let at_a = a.resends(1).await;
    assert_eq!((at_a.len(), at_a[0].connection), (1, 1));
}

#[tokio::test]
async fn a_lost_tracking_connection_empties_l1_and_comes_back() {
    let cluster = Cluster::start().await;
    let ((a, _la), (b, _lb)) = (cluster.node("a").await, cluster.node("b").await);
    let dispatcher = cluster.dispatcher(2).await;
    let mut caller = Caller::connect(&dispatcher.address).await;
    cluster.connect("alice", "phone", session("a", 1), 1).await;
    caller.push(vec![push("alice", 1)]).await;
    a.pushes(1).await;
    let _: i64 = cluster.redis.query(&["CLIENT", "KILL", "TYPE", "normal"]).await.unwrap_or(0);
    // While nobody reports changes the route moves.
    let begun = Instant::now();
    cluster.connect("alice", "phone", session("b", 2), 2).await;
    while b.pushes(0).await.is_empty() {
        assert!(begun.elapsed() < SOON, "L1 is stale");
        caller.push(vec![push("alice", 2)]).await;
        sleep(Duration::from_millis(20)).await;
    }
    while gauge(&dispatcher.context, "barid_dispatcher_tracking") == 0 {
        assert!(begun.elapsed() < SOON, "tracking does not come back");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_80_l1_follows_the_master_that_sentinel_promotes() {
    /// The Sentinel waits 3 s before it acts.
    const PROMOTED: Duration = Duration::from_secs(60);
    let master = Redis::start().await.unwrap();
    let replica = Redis::start().await.unwrap();
    replica.follow(master.port()).await.unwrap();
    let sentinel = Sentinel::start(&master).await.unwrap();
    sentinel.knows_replicas(1).await.unwrap();
    let sentinels = vec![SecretUrl::new(sentinel.url())];
    let config = RedisConfig { sentinel_master: "main".into(), sentinels, ..Default::default() };
    let mut cluster = Cluster::on(master, config).await;
    let ((a, _la), (b, _lb)) = (cluster.node("a").await, cluster.node("b").await);
    let dispatcher = cluster.dispatcher(2).await;
    let mut caller = Caller::connect(&dispatcher.address).await;
    cluster.connect("alice", "phone", session("a", 1), 1).await;
    caller.push(vec![push("alice", 1)]).await;
    a.pushes(1).await;

    cluster.redis.kill().unwrap();
    replica.until_replication(&["role:master"], PROMOTED).await.unwrap();
    let begun = Instant::now();
    while gauge(&dispatcher.context, "barid_dispatcher_tracking") == 0
        || !dispatcher.context.health.not_ready().is_empty()
    {
        let failing = dispatcher.context.health.not_ready();
        assert!(begun.elapsed() < PROMOTED, "{failing:?}, Sentinel: {}", sentinel.log());
        sleep(Duration::from_millis(50)).await;
    }
    // L1 answers, and a change empties it: changes are reported by the new master.
    let hits = || counter(&dispatcher.context, "barid_dispatcher_l1_hits_total");
    cluster.connect("alice", "phone", session("b", 2), 2).await;
    let begun = Instant::now();
    while b.pushes(0).await.is_empty() {
        assert!(begun.elapsed() < SOON, "L1 is stale");
        caller.push(vec![push("alice", 2)]).await;
        sleep(Duration::from_millis(20)).await;
    }
    let before = hits();
    for _ in 0..3 {
        caller.push(vec![push("alice", 3)]).await;
    }
    assert!(hits() > before, "L1 is not used");
    let pushed_to_a = a.pushes(0).await.len();
    cluster.connect("alice", "phone", session("a", 3), 3).await;
    let begun = Instant::now();
    while a.pushes(0).await.len() == pushed_to_a {
        assert!(begun.elapsed() < SOON, "L1 is stale");
        caller.push(vec![push("alice", 4)]).await;
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn draining_is_told_finishes_and_leaves() {
    let cluster = Cluster::start().await;
    let (a, _lease) = cluster.node("a").await;
    let dispatcher = cluster.dispatcher(1).await;
    cluster.connect("alice", "phone", session("a", 1), 1).await;
    let mut table = cluster.dispatchers().await;
    assert!(!table.snapshot()[0].draining);
    let mut caller = Caller::connect(&dispatcher.address).await;
    dispatcher.context.shutdown.begin(Duration::from_secs(10));
    // Until the callers know, it goes on.
    caller.push(vec![push("alice", 1)]).await;
    a.pushes(1).await;
    while !table.snapshot()[0].draining {
        timeout(SOON, table.changed()).await.unwrap();
    }
    assert_eq!(timeout(SOON, dispatcher.task).await.unwrap().unwrap(), Stopped::Clean);
}

#[tokio::test]
async fn a_deadline_that_cuts_items_off_is_told_with_their_number() {
    let cluster = Cluster::start().await;
    let (a, _lease) = cluster.node("a").await;
    let dispatcher = cluster.dispatcher(1).await;
    cluster.connect("alice", "phone", session("a", 1), 1).await;
    a.fake.reads.store(false, Ordering::SeqCst);
    let mut caller = Caller::connect(&dispatcher.address).await;
    caller.push((0..50).map(|n| push("alice", n)).collect()).await;
    dispatcher.context.shutdown.begin(Duration::from_millis(800));
    let stopped = timeout(SOON, dispatcher.task).await.unwrap().unwrap();
    let Stopped::Cut { what, count } = stopped else { panic!("{stopped:?}") };
    assert_eq!(what, "batches and items");
    assert!((40..=50).contains(&count), "{count}");
}

#[tokio::test]
async fn hazard_27_a_lease_that_was_gone_stands_again_in_the_same_incarnation() {
    let cluster = Cluster::start().await;
    let dispatcher = cluster.dispatcher(0).await;
    let table = cluster.dispatchers().await;
    let before = table.snapshot()[0].clone();
    assert_eq!(before.address, dispatcher.address);
    let key = format!("barid:node:{}", before.id);
    let _: u64 = cluster.redis.query(&["DEL", &key]).await.unwrap();
    let begun = Instant::now();
    // Written again, and renewed twice: a new life would have begun by then.
    let (mut first, mut number) = (None, 0);
    while first.is_none_or(|first| number < first + 2) {
        assert!(begun.elapsed() < SOON, "it is not written again");
        sleep(Duration::from_millis(5)).await;
        let written: Option<u64> = cluster.redis.query(&["HGET", &key, "number"]).await.unwrap();
        number = written.unwrap_or(number);
        first = first.or(written);
    }
    let life: u64 = cluster.redis.query(&["HGET", &key, "incarnation"]).await.unwrap();
    assert_eq!(life, before.incarnation.0);
    assert_eq!(*table.snapshot(), [before]);
    while !dispatcher.context.health.not_ready().is_empty() {
        assert!(begun.elapsed() < SOON, "{:?}", dispatcher.context.health.not_ready());
        sleep(Duration::from_millis(5)).await;
    }
}
