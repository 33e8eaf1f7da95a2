//! Whole delayers over a real Redis, with dispatchers that answer as told.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::sync::Arc;
use std::time::Duration;

use barid_core::{
    AppId, Attempt, Chain, ConnectionId, DeviceId, IdHash, Incarnation, NodeId, Position, Seq,
    SessionRef, UserId,
};
use barid_delayer::{Config, Delayer};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AcceptOutcome, AckRequest, ConnectOutcome, ConnectRequest,
    GroupOutcome, Lease, LogPosition, Mailbox, NodeRecord, NodeRole, RedisConfig, Source, UserKey,
};
use barid_runtime::{Context, Role as _, SecretUrl, Stopped};
use barid_testkit::Redis;
use barid_testkit::grpc::{FakeDispatcher, Server};
use barid_wire::envelope::{Header, encode_body};
use barid_wire::internal::{DispatchReply, Resend};
use barid_wire::v1::Envelope;
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::Registry;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

const SOON: Duration = Duration::from_secs(15);

/// What a dispatcher does with re-sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nodes {
    Reached,
    Unreachable,
    /// The dispatcher itself does not answer.
    Silent,
}

struct Fake {
    nodes: Arc<Mutex<Nodes>>,
    _server: Server,
}

impl Fake {
    async fn start(nodes: Nodes, seen: mpsc::Sender<(Instant, Resend)>) -> (Self, String) {
        let nodes = Arc::new(Mutex::new(nodes));
        let told = Arc::clone(&nodes);
        let server = FakeDispatcher::start(move |batch| {
            let nodes = *told.lock();
            let unreachable = match nodes {
                Nodes::Reached | Nodes::Silent => vec![],
                Nodes::Unreachable => (0..batch.resends.len() as u32).collect(),
            };
            for resend in batch.resends {
                seen.try_send((Instant::now(), resend)).unwrap();
            }
            (nodes != Nodes::Silent).then_some(DispatchReply { batch: batch.batch, unreachable })
        });
        let server = server.await.unwrap();
        let address = server.address.clone();
        (Self { nodes, _server: server }, address)
    }
}

struct Cluster {
    redis: Redis,
    mailbox: Mailbox,
    config: RedisConfig,
    offset: i64,
}

impl Cluster {
    async fn start() -> Self {
        let redis = Redis::start().await.unwrap();
        let config = RedisConfig {
            url: SecretUrl::new(redis.url()),
            shards: 8,
            retry_base_ms: 300,
            retry_max_ms: 5_000,
            retry_jitter: 0.0,
            ..Default::default()
        };
        let mailbox = Mailbox::open(&config, &Registry::new()).await.unwrap();
        Self { redis, mailbox, config, offset: 0 }
    }

    fn delayer(&self) -> (JoinHandle<Stopped>, Context) {
        let config = Config {
            poll_ms: 10,
            poll_idle_ms: 20,
            defer_ms: 50,
            nodes_refresh_ms: 50,
            redis: self.config.clone(),
            ..Default::default()
        };
        let context = Context::new();
        let running = Delayer::run(config, context.clone());
        (tokio::spawn(async move { running.await.unwrap() }), context)
    }

    async fn dispatcher(&self, nodes: Nodes) -> (mpsc::Receiver<(Instant, Resend)>, Fake, Lease) {
        let (seen, resends) = mpsc::channel(4096);
        let (fake, address) = Fake::start(nodes, seen).await;
        let record = NodeRecord {
            id: NodeId::new("d1").unwrap(),
            role: NodeRole::Dispatcher,
            address,
            incarnation: Incarnation(1),
            load: 0,
            draining: false,
            zone: String::new(),
            admin: String::new(),
            devices: String::new(),
        };
        let lease = Lease::acquire(&self.mailbox, record, Duration::from_secs(10)).await.unwrap();
        (resends, fake, lease)
    }

    /// An online device with one message that it does not acknowledge.
    async fn behind(&mut self, name: &str) -> (Position, Bytes) {
        let request = ConnectRequest {
            user: user(name),
            device: DeviceId::new("phone").unwrap(),
            session: session(),
            attempt: Attempt(1),
            platform: "ios".into(),
            position: None,
        };
        let outcome = self.mailbox.connect(request).await.unwrap();
        let ConnectOutcome::Connected { cursor, .. } = outcome else { panic!("{outcome:?}") };
        (cursor, self.accept(name).await)
    }

    async fn accept(&mut self, name: &str) -> Bytes {
        self.offset += 1;
        let id = format!("m{}", self.offset);
        let message = AcceptMessage {
            position: LogPosition { leader_epoch: 0, offset: self.offset, index: 0 },
            app: user(name).app,
            user: user(name).user,
            id: IdHash::of(&id),
            collapse_key: None,
            body: encode_body(Envelope { id, ..Default::default() }),
        };
        let group = AcceptGroup {
            shard: self.mailbox.shard_of(&user(name)),
            source: Source { topic_id: "t".into(), partition: 0 },
            prev: None,
            messages: vec![message],
        };
        let outcome = self.mailbox.accept(&[group]).await.remove(0).unwrap();
        let GroupOutcome::Done(mut done) = outcome else { panic!("{outcome:?}") };
        let AcceptOutcome::Accepted { envelope, online: true, .. } = done.remove(0) else {
            panic!("{done:?}")
        };
        envelope
    }
}

fn user(name: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(name).unwrap() }
}

fn session() -> SessionRef {
    SessionRef {
        node: NodeId::new("n1").unwrap(),
        incarnation: Incarnation(7),
        connection: ConnectionId(3),
    }
}

async fn next(resends: &mut mpsc::Receiver<(Instant, Resend)>) -> (Instant, Resend) {
    timeout(SOON, resends.recv()).await.expect("no re-send").unwrap()
}

#[tokio::test]
async fn what_is_not_acknowledged_is_resent_with_backoff_until_it_is() {
    let mut cluster = Cluster::start().await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Reached).await;
    let (_delayer, _context) = cluster.delayer();
    let begun = Instant::now();
    let (cursor, envelope) = cluster.behind("alice").await;
    let mut waits = Vec::new();
    for attempt in 1..=3 {
        let (at, resend) = next(&mut resends).await;
        let device = &resend.devices[0];
        assert_eq!((resend.user.as_str(), resend.devices.len()), ("alice", 1));
        assert_eq!((device.device.as_str(), device.node.as_str()), ("phone", "n1"));
        assert_eq!((device.incarnation, device.connection, device.attempt), (7, 3, attempt));
        waits.push(at.duration_since(begun).as_millis());
    }
    // 300 ms, then 600 and 1200 ms more.
    for (wait, due) in waits.iter().zip([300, 900, 2100]) {
        assert!((due..due + 500).contains(wait), "{waits:?}");
    }
    let header = Header::parse(&envelope).unwrap();
    let ack = AckRequest {
        user: user("alice"),
        device: DeviceId::new("phone").unwrap(),
        session: session(),
        epoch: header.epoch,
        generation: cursor.generation,
        seq: header.seq,
        chain: header.chain,
    };
    cluster.mailbox.ack(ack).await.unwrap();
    assert!(timeout(Duration::from_millis(2600), resends.recv()).await.is_err(), "acknowledged");
    let inspection = cluster.mailbox.inspect(&user("alice")).await.unwrap();
    assert_eq!(inspection.timer_due_ms, None);
    assert_eq!((header.seq, header.prev_chain), (Seq(1), Chain::START));
}

#[tokio::test]
async fn two_delayers_resend_nothing_twice() {
    let mut cluster = Cluster::start().await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Reached).await;
    let delayers = [cluster.delayer(), cluster.delayer(), cluster.delayer()];
    let users: Vec<String> = (0..60).map(|n| format!("user-{n}")).collect();
    for name in &users {
        cluster.behind(name).await;
    }
    let mut seen = Vec::new();
    while seen.len() < users.len() * 2 {
        let (_, resend) = next(&mut resends).await;
        seen.push((resend.user, resend.devices[0].attempt));
    }
    // Those of the third try, if one is early, are not counted.
    seen.retain(|(_, attempt)| *attempt <= 2);
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count, "nothing twice");
    let fired: Vec<u64> = delayers.iter().map(|(_, context)| fired(context)).collect();
    assert!(fired.iter().sum::<u64>() >= 120, "{fired:?}");
}

fn fired(context: &Context) -> u64 {
    let families = context.metrics.gather();
    let family = families.iter().find(|family| family.name() == "barid_delayer_fired_total");
    family.unwrap().get_metric()[0].get_counter().get_value() as u64
}

#[tokio::test]
async fn an_outage_inside_costs_the_device_no_try() {
    let mut cluster = Cluster::start().await;
    let (mut resends, fake, _lease) = cluster.dispatcher(Nodes::Unreachable).await;
    let (_delayer, _context) = cluster.delayer();
    cluster.behind("alice").await;
    for _ in 0..6 {
        let (_, resend) = next(&mut resends).await;
        assert_eq!(resend.devices[0].attempt, 1, "its node cannot be reached");
    }
    *fake.nodes.lock() = Nodes::Reached;
    while next(&mut resends).await.1.devices[0].attempt == 1 {}
}

#[tokio::test]
async fn without_a_dispatcher_timers_wait_and_readiness_says_so() {
    let mut cluster = Cluster::start().await;
    let (_delayer, context) = cluster.delayer();
    cluster.behind("alice").await;
    sleep(Duration::from_millis(1000)).await;
    assert_eq!(fired(&context), 0);
    let not_ready = context.health.not_ready();
    assert!(not_ready.iter().any(|(name, _)| *name == "dispatchers"), "{not_ready:?}");
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Reached).await;
    assert_eq!(next(&mut resends).await.1.devices[0].attempt, 1);
    let begun = Instant::now();
    while !context.health.not_ready().is_empty() {
        assert!(begun.elapsed() < SOON, "{:?}", context.health.not_ready());
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_redis_that_is_away_is_waited_for() {
    let mut cluster = Cluster::start().await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Reached).await;
    let (_delayer, context) = cluster.delayer();
    cluster.behind("alice").await;
    next(&mut resends).await;
    cluster.redis.stop().unwrap();
    let begun = Instant::now();
    while context.health.not_ready().iter().all(|(name, _)| *name != "redis") {
        assert!(begun.elapsed() < SOON, "readiness does not say that redis is away");
        sleep(Duration::from_millis(20)).await;
    }
    cluster.redis.cont().unwrap();
    next(&mut resends).await;
}

#[tokio::test]
async fn draining_finishes_the_claim_and_ends_clean() {
    let mut cluster = Cluster::start().await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Reached).await;
    let (delayer, context) = cluster.delayer();
    cluster.behind("alice").await;
    next(&mut resends).await;
    context.shutdown.begin(Duration::from_secs(5));
    assert_eq!(timeout(SOON, delayer).await.unwrap().unwrap(), Stopped::Clean);
}

#[tokio::test]
async fn a_deadline_that_cuts_claims_off_is_told_with_their_number() {
    let mut cluster = Cluster::start().await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Silent).await;
    let (delayer, context) = cluster.delayer();
    cluster.behind("alice").await;
    next(&mut resends).await;
    context.shutdown.begin(Duration::from_millis(200));
    let stopped = timeout(SOON, delayer).await.unwrap().unwrap();
    assert_eq!(stopped, Stopped::Cut { what: "claims".into(), count: 1 });
}
