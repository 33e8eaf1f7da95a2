//! Whole delayers over a real Redis, with dispatchers that answer as told.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::sync::Arc;
use std::time::Duration;

use barid_core::{
    AppId, Attempt, Chain, ConnectionId, DeviceId, IdHash, Incarnation, NodeId, Owner, Position,
    Seq, SessionRef, UserId,
};
use barid_delayer::{Config, Delayer};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AcceptOutcome, AckRequest, ConfirmRequest, ConnectOutcome,
    ConnectRequest, DeviceState, GroupOutcome, Lease, LogPosition, Mailbox, NodeRecord, NodeRole,
    RedisConfig, Source, UserKey,
};
use barid_runtime::{Context, Role as _, SecretUrl, Stopped};
use barid_testkit::Redis;
use barid_testkit::grpc::{FakeDispatcher, Server};
use barid_wire::envelope::{Header, encode_body};
use barid_wire::internal::{DispatchReply, Resend, Unreachable};
use barid_wire::v1::Envelope;
use bytes::Bytes;
use futures::future::join_all;
use parking_lot::Mutex;
use prometheus::Registry;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

const SOON: Duration = Duration::from_secs(15);

/// A dispatcher's answer to re-sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nodes {
    Reached,
    Unreachable,
    /// That life of them is over.
    Void,
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
            let why = match nodes {
                Nodes::Reached | Nodes::Silent => None,
                Nodes::Unreachable => Some(Unreachable::Down),
                Nodes::Void => Some(Unreachable::Void),
            };
            let count = if why.is_some() { batch.resends.len() } else { 0 };
            for resend in batch.resends {
                seen.try_send((Instant::now(), resend)).unwrap();
            }
            let reply = DispatchReply {
                batch: batch.batch,
                unreachable: (0..count as u32).collect(),
                why: vec![why.unwrap_or_default().into(); count],
            };
            (nodes != Nodes::Silent).then_some(reply)
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
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut RedisConfig)) -> Self {
        let redis = Redis::start().await.unwrap();
        let mut config = RedisConfig {
            url: SecretUrl::new(redis.url()),
            shards: 8,
            retry_base_ms: 300,
            retry_max_ms: 5_000,
            retry_jitter: 0.0,
            ..Default::default()
        };
        change(&mut config);
        let mailbox = Mailbox::open(&config, &Registry::new()).await.unwrap();
        Self { redis, mailbox, config, offset: 0 }
    }

    fn delayer(&self) -> (JoinHandle<Stopped>, Context) {
        self.delayer_with(|_| {})
    }

    fn delayer_with(&self, change: impl FnOnce(&mut Config)) -> (JoinHandle<Stopped>, Context) {
        let mut config = Config {
            poll_ms: 10,
            poll_idle_ms: 20,
            defer_ms: 50,
            nodes_refresh_ms: 50,
            redis: self.config.clone(),
            ..Default::default()
        };
        change(&mut config);
        let context = Context::new();
        let running = Delayer::run(config, context.clone());
        (tokio::spawn(async move { running.await.unwrap() }), context)
    }

    async fn dispatcher(&self, nodes: Nodes) -> (mpsc::Receiver<(Instant, Resend)>, Fake, Lease) {
        let (seen, resends) = mpsc::channel(4096);
        let (fake, address) = Fake::start(nodes, seen).await;
        let id = NodeId::new("d1").unwrap();
        let record = NodeRecord::new(NodeRole::Dispatcher, id, Incarnation(1), address);
        let lease = Lease::acquire(&self.mailbox, record, Duration::from_secs(10)).await.unwrap();
        (resends, fake, lease)
    }

    /// A device connects.
    async fn connect(&self, name: &str) -> Position {
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
        cursor
    }

    async fn phone(&self, name: &str) -> DeviceState {
        self.mailbox.inspect(&user(name)).await.unwrap().devices.remove(0)
    }

    /// CPU time that Redis has used, seconds.
    async fn cpu_seconds(&self) -> f64 {
        let info: String = self.redis.query(&["INFO", "cpu"]).await.unwrap();
        let of = |name: &str| -> f64 {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap().trim().parse().unwrap()
        };
        of("used_cpu_user") + of("used_cpu_sys")
    }

    /// An online device with one message that it does not acknowledge.
    async fn behind(&mut self, name: &str) -> (Position, Bytes) {
        (self.connect(name).await, self.accept(name).await)
    }

    async fn accept(&mut self, name: &str) -> Bytes {
        self.offset += 1;
        let id = format!("m{}", self.offset);
        let message = AcceptMessage {
            position: LogPosition { leader_epoch: 0, offset: self.offset, index: 0 },
            app: user(name).app,
            owner: Owner::User(user(name).user),
            id: IdHash::of(&id),
            collapse_key: None,
            body: encode_body(Envelope { id, ..Default::default() }),
        };
        let group = AcceptGroup {
            shard: self.mailbox.shard_of(&user(name)),
            source: Source { topic_id: "t".into(), partition: 0 },
            prev: None,
            raise: None,
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
    for number in 1..=3 {
        let (at, resend) = next(&mut resends).await;
        let device = &resend.devices[0];
        assert_eq!((resend.user.as_str(), resend.devices.len()), ("alice", 1));
        assert_eq!((device.device.as_str(), device.node.as_str()), ("phone", "n1"));
        assert_eq!((device.incarnation, device.connection, device.number), (7, 3, number));
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
        seen.push((resend.user, resend.devices[0].number));
    }
    // Those of the third try, if one is early, are not counted.
    seen.retain(|(_, number)| *number <= 2);
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
        assert_eq!(resend.devices[0].number, 1, "its node cannot be reached");
    }
    *fake.nodes.lock() = Nodes::Reached;
    while next(&mut resends).await.1.devices[0].number == 1 {}
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
    assert_eq!(next(&mut resends).await.1.devices[0].number, 1);
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

/// A node was killed. All of its devices are behind, and none of them comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_29_the_sessions_of_a_killed_node_cost_redis_next_to_nothing() {
    const SESSIONS: usize = 5_000;
    let mut cluster = Cluster::start_with(|config| {
        config.retry_max_ms = 60_000;
        config.retry_jitter = 1.0; // as spread as they are after some minutes
    })
    .await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Void).await;
    let _drain = tokio::spawn(async move { while resends.recv().await.is_some() {} });
    let (_delayer, context) = cluster.delayer_with(|config| {
        *config = Config { redis: config.redis.clone(), ..Default::default() };
    });
    let names: Vec<String> = (0..SESSIONS).map(|n| format!("user-{n}")).collect();
    join_all(names.iter().map(|name| cluster.connect(name))).await;
    let window = Duration::from_secs(8);
    let quiet = cluster.cpu_seconds().await;
    sleep(window).await;
    let quiet = cluster.cpu_seconds().await - quiet;
    for name in &names {
        cluster.accept(name).await;
    }
    // The first round finds out.
    let begun = Instant::now();
    while fired(&context) < SESSIONS as u64 {
        assert!(begun.elapsed() < 4 * SOON, "{}", fired(&context));
        sleep(Duration::from_millis(20)).await;
    }
    let (before, rounds) = (cluster.cpu_seconds().await, fired(&context));
    sleep(window).await;
    let (used, rounds) = (cluster.cpu_seconds().await - before, fired(&context) - rounds);
    println!(
        "redis: quiet {quiet:.3} s, with void sessions {used:.3} s; {rounds} rounds in {window:?}"
    );
    // Twice a second each they would be 80,000.
    assert!(rounds < SESSIONS as u64 / 4, "{rounds} rounds");
    let most = 2.0 * quiet + 0.05 * window.as_secs_f64();
    assert!(used < most, "{used} s of redis, {quiet} s while all was quiet");
}

/// A node is out of reach for minutes, as it were, and back.
#[tokio::test]
async fn hazard_29_a_node_that_was_cut_off_is_sent_to_soon_after_it_confirms() {
    let mut cluster = Cluster::start_with(|config| config.retry_max_ms = 600_000).await;
    let (mut resends, fake, _lease) = cluster.dispatcher(Nodes::Unreachable).await;
    let (_delayer, _context) = cluster.delayer_with(|config| config.defer_ms = 100);
    let (cursor, _) = cluster.behind("alice").await;
    let mut deferred = 0;
    while deferred < 6 {
        next(&mut resends).await;
        let begun = Instant::now();
        while deferred == cluster.phone("alice").await.defers {
            assert!(begun.elapsed() < SOON, "it is given back");
            sleep(Duration::from_millis(5)).await;
        }
        deferred = cluster.phone("alice").await.defers;
    }
    let waits = cluster.mailbox.inspect(&user("alice")).await.unwrap();
    assert!(waits.timer_due_ms.unwrap() > waits.now_ms + 2_000, "{waits:?}");
    *fake.nodes.lock() = Nodes::Reached;
    let request = ConfirmRequest {
        user: user("alice"),
        device: DeviceId::new("phone").unwrap(),
        session: session(),
        attempt: Attempt(1),
        platform: "ios".into(),
        position: cursor,
    };
    cluster.mailbox.confirm(request).await.unwrap();
    let waits = cluster.mailbox.inspect(&user("alice")).await.unwrap();
    assert!(waits.timer_due_ms.unwrap() <= waits.now_ms + 300, "{waits:?}");
    assert_eq!(next(&mut resends).await.1.devices[0].number, 1);
}

/// The node's lease ends; whether a dispatcher is asked about its devices 2 s later.
async fn asked_behind_a_lease(nodes_refresh_ms: u64) -> bool {
    let mut cluster = Cluster::start().await;
    let (mut resends, _fake, _lease) = cluster.dispatcher(Nodes::Void).await;
    let SessionRef { node: id, incarnation, .. } = session();
    let record = NodeRecord::new(NodeRole::Access, id, incarnation, "127.0.0.1:1");
    let ttl = Duration::from_secs(30);
    let lease = Lease::acquire(&cluster.mailbox, record, ttl).await.unwrap();
    let (_delayer, _context) =
        cluster.delayer_with(|config| config.nodes_refresh_ms = nodes_refresh_ms);
    sleep(Duration::from_secs(1)).await;
    lease.release().await;
    sleep(Duration::from_secs(2)).await;
    cluster.behind("alice").await;
    timeout(Duration::from_secs(2), resends.recv()).await.is_ok()
}

/// Old news of a node may be wrong: it may be back, and have confirmed its sessions.
#[tokio::test]
async fn hazard_86_devices_of_a_gone_node_are_put_off_only_by_leases_that_were_just_read() {
    let (fresh, old) = tokio::join!(asked_behind_a_lease(50), asked_behind_a_lease(60_000));
    assert_eq!((fresh, old), (false, true));
}
