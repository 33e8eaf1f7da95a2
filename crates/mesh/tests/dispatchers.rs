//! The pool and its links against real tonic servers that misbehave as told.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use barid_core::{Incarnation, NodeId, Shard, ShardCount};
use barid_mesh::{
    Credentials, DispatchPool, LinkConfig, MeshConfig, MeshMetrics, Peer, Unavailable,
};
use barid_testkit::grpc::{FakeDispatcher, Server};
use barid_wire::internal::{DispatchBatch, DispatchReply, Push, Resend, ResendDevice, Unreachable};
use prometheus::Registry;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

const SOON: Duration = Duration::from_secs(5);

/// A dispatcher that notes what it gets.
#[derive(Clone)]
struct Fake {
    answers: Arc<AtomicBool>,
    unanswered: Arc<AtomicUsize>,
    unanswered_max: Arc<AtomicUsize>,
}

impl Fake {
    fn answer(&self, batch: &DispatchBatch) -> Option<DispatchReply> {
        let now = self.unanswered.fetch_add(1, Ordering::SeqCst) + 1;
        self.unanswered_max.fetch_max(now, Ordering::SeqCst);
        if !self.answers.load(Ordering::SeqCst) {
            return None;
        }
        self.unanswered.fetch_sub(1, Ordering::SeqCst);
        let lost =
            |(index, resend): (u32, &Resend)| (resend.devices[0].device == "lost").then_some(index);
        let unreachable: Vec<u32> = (0u32..).zip(&batch.resends).filter_map(lost).collect();
        let why = vec![Unreachable::Full.into(); unreachable.len()];
        Some(DispatchReply { batch: batch.batch, unreachable, why })
    }
}

struct Running {
    peer: Peer,
    fake: Fake,
    server: Server,
}

impl Running {
    async fn start(name: &str, seen: &mpsc::Sender<(NodeId, DispatchBatch)>) -> Self {
        let id = NodeId::new(name).unwrap();
        let fake = Fake {
            answers: Arc::new(AtomicBool::new(true)),
            unanswered: Arc::default(),
            unanswered_max: Arc::default(),
        };
        let answering = (fake.clone(), id.clone(), seen.clone());
        let server = FakeDispatcher::start(move |batch| {
            let (fake, id, seen) = &answering;
            let reply = fake.answer(&batch);
            seen.try_send((id.clone(), batch)).unwrap();
            reply
        });
        let server = server.await.unwrap();
        let address = server.address.clone();
        let peer = Peer { id, incarnation: Incarnation(1), address, draining: false };
        Self { peer, fake, server }
    }

    fn kill(&mut self) {
        self.server.kill();
    }
}

fn push(user: &str, number: u32) -> Push {
    let envelope = number.to_be_bytes().to_vec().into();
    Push { app: "demo".into(), user: user.into(), envelope, ..Push::default() }
}

fn number(push: &Push) -> u32 {
    u32::from_be_bytes(push.envelope[..].try_into().unwrap())
}

fn resend(devices: &[&str]) -> Resend {
    let device = |name: &&str| ResendDevice { device: (*name).into(), ..Default::default() };
    Resend {
        app: "demo".into(),
        user: "alice".into(),
        devices: devices.iter().map(device).collect(),
    }
}

fn shard() -> Shard {
    ShardCount::new(64).unwrap().shard_of("demo", "alice")
}

fn pool(peers: &watch::Sender<Vec<Peer>>, config: MeshConfig) -> (DispatchPool, MeshMetrics) {
    let metrics = MeshMetrics::new(&Registry::new(), "test").unwrap();
    (
        DispatchPool::over(peers.subscribe(), Credentials::none(), config, metrics.clone())
            .unwrap(),
        metrics,
    )
}

async fn up(pool: &DispatchPool, metrics: &MeshMetrics, count: i64) {
    let begun = Instant::now();
    while metrics.link.up.get() != count {
        assert!(begun.elapsed() < SOON, "links did not come up");
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(pool.any_available(), count > 0);
}

#[tokio::test]
async fn pushes_of_a_user_arrive_in_order_at_one_dispatcher() {
    let (seen, mut batches) = mpsc::channel(1024);
    let (a, b) = (Running::start("a", &seen).await, Running::start("b", &seen).await);
    let peers = watch::Sender::new(vec![a.peer.clone(), b.peer.clone()]);
    let (pool, metrics) = pool(&peers, MeshConfig::default());
    up(&pool, &metrics, 2).await;
    let dispatcher = pool.dispatcher_of(shard()).unwrap();
    for n in 0..500 {
        pool.push(shard(), push("alice", n)).await;
    }
    assert_eq!(pool.flush(Instant::now() + SOON).await, 0);
    let mut numbers = Vec::new();
    let mut owners = std::collections::HashSet::new();
    while let Ok((id, batch)) = batches.try_recv() {
        owners.insert(id);
        numbers.extend(batch.pushes.iter().map(number));
    }
    assert_eq!(numbers, (0..500).collect::<Vec<_>>());
    assert_eq!(owners.into_iter().collect::<Vec<_>>(), [dispatcher]);
    assert_eq!(metrics.pushes.with_label_values(&["answered"]).get(), 500);
}

#[tokio::test]
async fn a_window_bounds_unanswered_batches_and_a_full_queue_drops_after_the_wait() {
    let (seen, mut batches) = mpsc::channel(1024);
    let a = Running::start("a", &seen).await;
    a.fake.answers.store(false, Ordering::SeqCst);
    let peers = watch::Sender::new(vec![a.peer.clone()]);
    let link = LinkConfig { window_batches: 3, queue_items_max: 4, ..Default::default() };
    let (pool, metrics) = pool(&peers, MeshConfig { push_wait_ms: 50, link });
    up(&pool, &metrics, 1).await;
    for n in 0..3 {
        pool.push(shard(), push("alice", n)).await;
        timeout(SOON, batches.recv()).await.unwrap().unwrap();
    }
    // The task holds one more, and four are queued: the next one waits and is dropped.
    for n in 3..8 {
        pool.push(shard(), push("alice", n)).await;
        sleep(Duration::from_millis(5)).await;
    }
    let begun = Instant::now();
    pool.push(shard(), push("alice", 8)).await;
    assert!(begun.elapsed() >= Duration::from_millis(50));
    assert_eq!(metrics.pushes.with_label_values(&["full"]).get(), 1);
    assert_eq!(a.fake.unanswered_max.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_killed_dispatcher_hands_its_pushes_to_the_next_one_at_once() {
    let (seen, mut batches) = mpsc::channel(4096);
    let (a, b) = (Running::start("a", &seen).await, Running::start("b", &seen).await);
    let peers = watch::Sender::new(vec![a.peer.clone(), b.peer.clone()]);
    let (pool, metrics) = pool(&peers, MeshConfig::default());
    up(&pool, &metrics, 2).await;
    pool.push(shard(), push("alice", 0)).await;
    let (owner, _) = timeout(SOON, batches.recv()).await.unwrap().unwrap();
    assert_eq!(pool.flush(Instant::now() + SOON).await, 0);
    let (mut first, next) = if owner == a.peer.id { (a, b) } else { (b, a) };
    first.fake.answers.store(false, Ordering::SeqCst);
    for n in 1..100 {
        pool.push(shard(), push("alice", n)).await;
    }
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.resend(shard(), resend(&["phone"])).await }
    });
    sleep(Duration::from_millis(50)).await;
    let killed = Instant::now();
    first.kill();
    let mut moved = Vec::new();
    while moved.len() < 99 {
        let (id, batch) = timeout(SOON, batches.recv()).await.unwrap().unwrap();
        if id == next.peer.id {
            moved.extend(batch.pushes.iter().map(number));
        }
    }
    assert_eq!(moved, (1..100).collect::<Vec<_>>(), "all of them, in order");
    assert!(killed.elapsed() < Duration::from_secs(1), "took {:?}", killed.elapsed());
    // Nothing is known of a re-send's effect: its caller decides.
    assert_eq!(waiting.await.unwrap(), Err(Unavailable));
    assert_eq!(pool.resend(shard(), resend(&["phone"])).await, Ok(vec![]));
}

#[tokio::test]
async fn a_resend_tells_which_devices_could_not_be_reached() {
    let (seen, _batches) = mpsc::channel(64);
    let a = Running::start("a", &seen).await;
    let peers = watch::Sender::new(vec![a.peer.clone()]);
    let (pool, _) = pool(&peers, MeshConfig::default());
    let both = tokio::join!(
        pool.resend(shard(), resend(&["phone", "lost", "tablet", "lost"])),
        pool.resend(shard(), resend(&["lost", "phone"])),
    );
    let full = |index| (index, Unreachable::Full);
    assert_eq!(both, (Ok(vec![full(1), full(3)]), Ok(vec![full(0)])));
}

#[tokio::test]
async fn without_a_dispatcher_pushes_are_dropped_after_the_wait_and_resends_are_unavailable() {
    let peers = watch::Sender::new(vec![]);
    let config = MeshConfig { push_wait_ms: 30, ..Default::default() };
    let (pool, metrics) = pool(&peers, config);
    assert!(!pool.any_available());
    pool.push(shard(), push("alice", 0)).await;
    assert_eq!(metrics.pushes.with_label_values(&["unavailable"]).get(), 1);
    assert_eq!(pool.resend(shard(), resend(&["phone"])).await, Err(Unavailable));
}

#[tokio::test]
async fn an_outage_of_all_dispatchers_is_waited_for_once_and_not_by_every_push() {
    let peers = watch::Sender::new(vec![]);
    let config = MeshConfig { push_wait_ms: 100, ..Default::default() };
    let (pool, metrics) = pool(&peers, config);
    let begun = Instant::now();
    for n in 0..1000 {
        pool.push(shard(), push("alice", n)).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "took {:?}", begun.elapsed());
    assert_eq!(metrics.pushes.with_label_values(&["unavailable"]).get(), 1000);
}

#[tokio::test]
async fn a_push_waits_for_a_dispatcher_that_is_just_coming() {
    let (seen, mut batches) = mpsc::channel(64);
    let peers = watch::Sender::new(vec![]);
    let (pool, _) = pool(&peers, MeshConfig::default());
    let pushing = pool.push(shard(), push("alice", 5));
    let coming = async {
        sleep(Duration::from_millis(20)).await;
        let a = Running::start("a", &seen).await;
        peers.send_replace(vec![a.peer.clone()]);
        a
    };
    let _a = tokio::join!(pushing, coming);
    let (_, batch) = timeout(SOON, batches.recv()).await.unwrap().unwrap();
    assert_eq!(number(&batch.pushes[0]), 5);
}

#[tokio::test]
async fn a_silent_peer_is_noticed_and_a_draining_one_is_left() {
    let (seen, mut batches) = mpsc::channel(64);
    let (a, b) = (Running::start("a", &seen).await, Running::start("b", &seen).await);
    let peers = watch::Sender::new(vec![a.peer.clone(), b.peer.clone()]);
    let link = LinkConfig { reply_timeout_ms: 100, ..Default::default() };
    let (pool, metrics) = pool(&peers, MeshConfig { link, ..Default::default() });
    up(&pool, &metrics, 2).await;
    pool.push(shard(), push("alice", 0)).await;
    let (owner, _) = timeout(SOON, batches.recv()).await.unwrap().unwrap();
    let (first, next) = if owner == a.peer.id { (a, b) } else { (b, a) };
    // It reads and does not answer: the push moves on after the time-out.
    first.fake.answers.store(false, Ordering::SeqCst);
    pool.push(shard(), push("alice", 1)).await;
    assert_eq!(timeout(SOON, batches.recv()).await.unwrap().unwrap().0, first.peer.id);
    assert_eq!(timeout(SOON, batches.recv()).await.unwrap().unwrap().0, next.peer.id);
    // Back again, and then draining: new work goes to the other one.
    first.fake.answers.store(true, Ordering::SeqCst);
    up(&pool, &metrics, 2).await;
    let draining = Peer { draining: true, ..first.peer.clone() };
    peers.send_replace(vec![draining.clone(), next.peer.clone()]);
    sleep(Duration::from_millis(20)).await;
    pool.push(shard(), push("alice", 2)).await;
    assert_eq!(timeout(SOON, batches.recv()).await.unwrap().unwrap().0, next.peer.id);
    // With no other one, the draining one still serves.
    peers.send_replace(vec![draining]);
    sleep(Duration::from_millis(20)).await;
    pool.push(shard(), push("alice", 3)).await;
    assert_eq!(timeout(SOON, batches.recv()).await.unwrap().unwrap().0, first.peer.id);
}

/// Passes bytes on until it is frozen; then it is a half-open peer: no byte, no end.
async fn freezable(to: String) -> (String, Arc<AtomicBool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let frozen = Arc::new(AtomicBool::new(false));
    let freeze = Arc::clone(&frozen);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(&to).await.unwrap();
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::spawn(pass(from_client, to_server, Arc::clone(&freeze)));
            tokio::spawn(pass(from_server, to_client, Arc::clone(&freeze)));
        }
    });
    (address, frozen)
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    frozen: Arc<AtomicBool>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if frozen.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn an_idle_half_open_peer_is_noticed_by_keepalive() {
    let (seen, _batches) = mpsc::channel(64);
    let a = Running::start("a", &seen).await;
    let (address, frozen) = freezable(a.peer.address.clone()).await;
    let peers = watch::Sender::new(vec![Peer { address, ..a.peer.clone() }]);
    let link = LinkConfig {
        keepalive_interval_ms: 50,
        keepalive_timeout_ms: 100,
        reply_timeout_ms: 60_000,
        ..Default::default()
    };
    let (pool, metrics) = pool(&peers, MeshConfig { link, ..Default::default() });
    up(&pool, &metrics, 1).await;
    frozen.store(true, Ordering::SeqCst);
    up(&pool, &metrics, 0).await;
    frozen.store(false, Ordering::SeqCst);
    up(&pool, &metrics, 1).await;
}

#[tokio::test]
async fn a_dispatcher_that_left_the_table_is_still_sent_what_was_queued_for_it() {
    let (seen, mut batches) = mpsc::channel(64);
    let a = Running::start("a", &seen).await;
    let peers = watch::Sender::new(vec![a.peer.clone()]);
    let (pool, metrics) = pool(&peers, MeshConfig::default());
    pool.push(shard(), push("alice", 1)).await; // queued: the link still connects
    peers.send_replace(vec![]);
    let (_, batch) = timeout(SOON, batches.recv()).await.unwrap().unwrap();
    assert_eq!(number(&batch.pushes[0]), 1);
    up(&pool, &metrics, 0).await;
    assert_eq!(metrics.link.pending.get(), 0);
}
