//! From the gRPC batches to access nodes, with routes in memory.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barid_core::{
    AppId, Attempt, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef, Shard, ShardCount,
    UserId,
};
use barid_dispatcher::ReapConfig;
use barid_dispatcher::deliver::{Delivery, void_of};
use barid_dispatcher::grpc::BatchService;
use barid_dispatcher::metrics::Metrics;
use barid_dispatcher::nodes::{AccessNode, Nodes, VoidSince};
use barid_dispatcher::reap::Reaper;
use barid_dispatcher::resolve::{Limits, Resolver, Routes};
use barid_mailbox::{DisconnectRequest, Error, RedisTime, Route, UserKey};
use barid_mesh::{Credentials, LinkConfig};
use barid_runtime::{Context, Tasks, Tracer};
use barid_wire::internal::dispatcher_server::DispatcherServer;
use barid_wire::internal::{DispatchBatch, Gone, Resend, ResendDevice, Unreachable};
use parking_lot::Mutex;
use prometheus::Registry;
use support::{Caller, FakeNode, SOON, push, seq};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// Redis in memory.
#[derive(Default)]
struct InMemory {
    // Duration of a read, ms.
    read_ms: AtomicU64,
    routes: Mutex<HashMap<UserKey, Vec<Route>>>,
    removed: Mutex<Vec<DisconnectRequest>>,
}

impl Routes for InMemory {
    async fn tracked(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        self.untracked(user).await
    }
    async fn untracked(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        sleep(Duration::from_millis(self.read_ms.load(Ordering::SeqCst))).await;
        Ok(self.routes.lock().get(user).cloned().unwrap_or_default())
    }
    async fn remove(&self, request: DisconnectRequest) -> Result<(), Error> {
        self.removed.lock().push(request);
        Ok(())
    }
    fn shard_of(&self, user: &UserKey) -> Shard {
        self.shards().shard_of(user.app.as_str(), user.user.as_str())
    }
    fn shards(&self) -> ShardCount {
        ShardCount::new(8).unwrap()
    }
    fn redis_time(&self, _: Shard) -> Option<RedisTime> {
        None
    }
}

struct Cluster {
    routes: Arc<InMemory>,
    nodes: Arc<Nodes>,
    resolver: Resolver<InMemory>,
    metrics: Metrics,
    batches: BatchService<InMemory>,
    address: String,
    _tasks: Tasks,
}

fn user(name: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(name).unwrap() }
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

impl Cluster {
    async fn start(links: LinkConfig, void_since: VoidSince) -> Self {
        let routes = Arc::new(InMemory::default());
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let limits = Limits {
            bytes_max: 1 << 20,
            ttl: Duration::from_secs(600),
            load_timeout: Duration::from_secs(1),
            away: Duration::from_millis(100),
        };
        let resolver = Resolver::new(Arc::clone(&routes), limits, metrics.clone());
        let tasks = Tasks::new(&Context::new());
        let reap = ReapConfig { queue_max: 64, concurrency: 4 };
        let reaper = Reaper::start(Arc::clone(&routes), &reap, metrics.clone(), &tasks.spawner());
        let on_gone = {
            let (resolver, reaper) = (resolver.clone(), reaper.clone());
            Arc::new(move |node: &NodeId, incarnation, gone: Gone| {
                if let Some(void) = void_of(node, incarnation, &gone) {
                    resolver.invalidate(&void.user);
                    reaper.offer(void);
                }
            })
        };
        let links_metrics = metrics.nodes.clone();
        let (plain, lost) = (Credentials::none(), metrics.lost.clone());
        let nodes = Arc::new(Nodes::new(plain, links, links_metrics, lost, void_since, on_gone));
        let delivery = Arc::new(Delivery {
            resolver: resolver.clone(),
            nodes: Arc::clone(&nodes),
            reaper,
            void_after: Duration::from_secs(600),
            metrics: metrics.clone(),
            tracer: Tracer::new(&Registry::new(), 1).unwrap(),
        });
        let batches = BatchService::new(delivery, 4);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = DispatcherServer::new(batches.clone());
        tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { routes, nodes, resolver, metrics, batches, address, _tasks: tasks }
    }

    async fn follow(&self, nodes: &[(&str, u64, &FakeNode)]) {
        let nodes: Vec<AccessNode> = nodes
            .iter()
            .map(|(id, incarnation, fake)| AccessNode {
                id: node(id),
                incarnation: Incarnation(*incarnation),
                address: fake.address.clone(),
            })
            .collect();
        self.nodes.follow(&nodes);
        let begun = Instant::now();
        while self.metrics.nodes.up.get() < nodes.len() as i64 {
            assert!(begun.elapsed() < SOON, "links did not come up");
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn route(&self, name: &str, device: &str, at: &str, incarnation: u64, connection: u64) {
        let route = Route {
            device: DeviceId::new(device).unwrap(),
            session: SessionRef {
                node: node(at),
                incarnation: Incarnation(incarnation),
                connection: ConnectionId(connection),
            },
            attempt: Attempt(1),
            platform: "ios".into(),
        };
        self.routes.routes.lock().entry(user(name)).or_default().push(route);
        self.resolver.invalidate(&user(name));
    }

    async fn removed(&self, count: usize) -> Vec<DisconnectRequest> {
        let begun = Instant::now();
        while self.routes.removed.lock().len() < count {
            assert!(begun.elapsed() < SOON, "routes were not removed");
            sleep(Duration::from_millis(1)).await;
        }
        self.routes.removed.lock().clone()
    }
}

fn never() -> VoidSince {
    Arc::new(|_, _| None)
}

fn resend(name: &str, device: &str, at: &str, incarnation: u64, connection: u64) -> Resend {
    let device = ResendDevice {
        device: device.into(),
        node: at.into(),
        incarnation,
        connection,
        number: 2,
        sampled: None,
    };
    Resend { app: "demo".into(), user: name.into(), devices: vec![device] }
}

#[tokio::test]
async fn each_node_gets_a_push_once_with_its_connections_in_order() {
    let (a, b) = (FakeNode::start().await, FakeNode::start().await);
    let cluster = Cluster::start(LinkConfig::default(), never()).await;
    cluster.follow(&[("a", 1, &a), ("b", 1, &b)]).await;
    cluster.route("alice", "phone", "a", 1, 10);
    cluster.route("alice", "tablet", "b", 1, 20);
    cluster.route("alice", "watch", "a", 1, 11);
    let mut caller = Caller::connect(&cluster.address).await;
    for from in (1..200).step_by(10) {
        caller.push((from..from + 10).map(|n| push("alice", n)).collect()).await;
    }
    let (at_a, at_b) = (a.pushes(200).await, b.pushes(200).await);
    let seqs: Vec<u64> = at_a.iter().map(|push| seq(&push.envelope)).collect();
    assert_eq!(seqs, (1..=200).collect::<Vec<_>>());
    assert_eq!((&at_a[0].connections[..], &at_b[0].connections[..]), (&[10, 11][..], &[20][..]));
    assert_eq!(cluster.metrics.l1_misses.get(), 1 + 9, "one load; its first batch waited for it");
}

#[tokio::test]
async fn a_users_messages_keep_their_order_while_routes_are_being_read() {
    let a = FakeNode::start().await;
    let cluster = Cluster::start(LinkConfig::default(), never()).await;
    cluster.follow(&[("a", 1, &a)]).await;
    cluster.route("alice", "phone", "a", 1, 1);
    cluster.route("bob", "phone", "a", 1, 2);
    cluster.routes.read_ms.store(30, Ordering::SeqCst);
    let mut caller = Caller::connect(&cluster.address).await;
    for n in 1..=40 {
        // Every few batches the route has to be read again, while later batches find it in L1.
        if n % 5 == 0 {
            cluster.resolver.invalidate(&user("alice"));
        }
        caller.send(DispatchBatch {
            pushes: vec![push("alice", n), push("bob", n)],
            ..Default::default()
        });
        sleep(Duration::from_millis(5)).await;
    }
    let pushes = a.pushes(80).await;
    for name in ["alice", "bob"] {
        let of_user = pushes.iter().filter(|push| push.user == name);
        let seqs: Vec<u64> = of_user.map(|push| seq(&push.envelope)).collect();
        assert_eq!(seqs, (1..=40).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn one_stopped_node_delays_no_other() {
    let (stopped, well) = (FakeNode::start().await, FakeNode::start().await);
    // All that is for the well node would fit into its queue, were the machine ever so busy.
    let links = LinkConfig { queue_items_max: 500, batch_items_max: 8, ..Default::default() };
    let cluster = Cluster::start(links, never()).await;
    cluster.follow(&[("stopped", 1, &stopped), ("well", 1, &well)]).await;
    cluster.route("alice", "phone", "stopped", 1, 1);
    cluster.route("bob", "phone", "well", 1, 1);
    stopped.fake.reads.store(false, Ordering::SeqCst);
    let mut caller = Caller::connect(&cluster.address).await;
    let begun = Instant::now();
    for n in 1..=500 {
        let mut pushes = vec![push("alice", n); 4];
        pushes.push(push("bob", n));
        caller.push(pushes).await;
    }
    let at_well = well.pushes(500).await;
    assert_eq!(seq(&at_well[499].envelope), 500);
    // The stopped node's stream breaks after five seconds: nobody waited for that.
    assert!(begun.elapsed() < Duration::from_secs(4), "took {:?}", begun.elapsed());
    let dropped = cluster.metrics.pushes.with_label_values(&["full"]).get();
    assert!(dropped > 1000, "the stopped node's queue is bounded: {dropped} dropped");
    // A re-send that finds the queue full is told, so that its claim is given back.
    let resends =
        vec![resend("alice", "phone", "stopped", 1, 1), resend("bob", "phone", "well", 1, 1)];
    let reply = caller.dispatch(DispatchBatch { resends, ..Default::default() }).await;
    assert_eq!(reply.unreachable, [0]);
    assert_eq!(reply.why, [i32::from(Unreachable::Full)]);
    assert_eq!(well.resends(1).await[0].user, "bob");
}

#[tokio::test]
async fn a_resend_goes_only_to_the_session_that_still_has_the_route() {
    let a = FakeNode::start().await;
    let cluster = Cluster::start(LinkConfig::default(), never()).await;
    cluster.follow(&[("a", 1, &a)]).await;
    cluster.route("alice", "phone", "a", 1, 2);
    cluster.route("carol", "phone", "a", 9, 1);
    cluster.route("dave", "phone", "unknown", 1, 1);
    let mut caller = Caller::connect(&cluster.address).await;
    let resends = vec![
        resend("alice", "phone", "a", 1, 1),
        resend("alice", "phone", "a", 1, 2),
        resend("carol", "phone", "a", 9, 1),
        resend("dave", "phone", "unknown", 1, 1),
        resend("erin", "phone", "a", 1, 1),
    ];
    let reply = caller.dispatch(DispatchBatch { resends, ..Default::default() }).await;
    assert_eq!(
        reply.unreachable,
        [2, 3],
        "nodes that cannot be reached, not sessions that are over"
    );
    let at_a = a.resends(1).await;
    assert_eq!((at_a.len(), at_a[0].connection, at_a[0].device.as_str()), (1, 2, "phone"));
    assert!(cluster.routes.removed.lock().is_empty(), "as far as is known those nodes live");
}

#[tokio::test]
async fn what_a_node_calls_gone_loses_its_route() {
    let a = FakeNode::start().await;
    let cluster = Cluster::start(LinkConfig::default(), never()).await;
    cluster.follow(&[("a", 1, &a)]).await;
    cluster.route("alice", "phone", "a", 1, 5);
    cluster.route("alice", "watch", "a", 1, 6);
    let gone = |device: &str, connection| Gone {
        app: "demo".into(),
        user: "alice".into(),
        device: device.into(),
        connection,
    };
    // The node does not know which device connection 6 was; the route does.
    *a.fake.gone.lock() = vec![gone("phone", 5), gone("", 6)];
    let mut caller = Caller::connect(&cluster.address).await;
    caller.push(vec![push("alice", 1)]).await;
    let mut removed = cluster.removed(2).await;
    removed.sort_by_key(|request| request.session.connection);
    let devices: Vec<_> = removed.iter().map(|request| request.device.as_str()).collect();
    assert_eq!(devices, ["phone", "watch"]);
    assert_eq!(removed[0].session.incarnation, Incarnation(1));
    a.fake.gone.lock().clear();
    cluster.routes.routes.lock().remove(&user("alice"));
    caller.push(vec![push("alice", 2)]).await;
    assert_eq!(cluster.metrics.pushes.with_label_values(&["no_route"]).get(), 1, "L1 forgot too");
}

#[tokio::test]
async fn routes_of_a_life_that_is_over_for_long_are_not_used_and_removed() {
    let a = FakeNode::start().await;
    let void_since: VoidSince =
        Arc::new(|node, incarnation| match (node.as_str(), incarnation.0) {
            ("a", 1) => Some(Duration::MAX), // its newer life is there
            ("b", 1) => Some(Duration::from_secs(599)),
            _ => None,
        });
    let cluster = Cluster::start(LinkConfig::default(), void_since).await;
    cluster.follow(&[("a", 2, &a)]).await;
    cluster.route("alice", "phone", "a", 1, 5);
    cluster.route("alice", "watch", "b", 1, 5);
    cluster.route("alice", "tablet", "a", 2, 6);
    let mut caller = Caller::connect(&cluster.address).await;
    caller.push(vec![push("alice", 1)]).await;
    assert_eq!(a.pushes(1).await[0].connections, [6]);
    let removed = cluster.removed(1).await;
    sleep(Duration::from_millis(50)).await;
    assert_eq!(removed.len(), cluster.routes.removed.lock().len());
    assert_eq!(removed[0].device.as_str(), "phone");
}

#[tokio::test]
async fn finishing_answers_what_was_read_and_ends_the_streams() {
    let a = FakeNode::start().await;
    let cluster = Cluster::start(LinkConfig::default(), never()).await;
    cluster.follow(&[("a", 1, &a)]).await;
    cluster.route("alice", "phone", "a", 1, 1);
    let mut caller = Caller::connect(&cluster.address).await;
    caller.push(vec![push("alice", 1)]).await;
    assert_eq!(cluster.metrics.callers.get(), 1);
    timeout(SOON, cluster.batches.finish()).await.unwrap();
    assert_eq!((cluster.metrics.callers.get(), cluster.batches.unanswered()), (0, 0));
    a.pushes(1).await;
}

#[tokio::test]
async fn hazard_131_a_batch_above_the_bound_ends_its_stream_with_the_reason() {
    let cluster = Cluster::start(LinkConfig::default(), never()).await;
    let mut caller = Caller::connect(&cluster.address).await;
    let mut large = push("alice", 1);
    large.envelope = vec![0; 9 << 20].into();
    caller.send(DispatchBatch { pushes: vec![large], ..Default::default() });
    let told = caller.reply().await.unwrap_err().to_string();
    assert!(told.contains("decoded message length too large"), "{told}");
    Caller::connect(&cluster.address).await.push(vec![push("alice", 2)]).await;
}
