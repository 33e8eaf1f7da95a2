//! Starts an access node, renews its lease, keeps its sessions' routes confirmed, and drains it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use barid_bus::{Follower, Producer, Receipts};
use barid_core::{Clock as _, CloseCode, Incarnation, SystemClock};
use barid_mailbox::{Confirming, Lease, Mailbox, NodeRole, NodeTable};
use barid_mesh::{BATCH_BYTES_MAX, Credentials, Party, Server};
use barid_runtime::{Condition, Context, Stopped, Tasks};
use barid_session::{Close, Seconds};
use barid_wire::internal::access_admin_server::AccessAdminServer;
use barid_wire::internal::access_peer_server::AccessPeerServer;
use barid_wire::internal::access_server::AccessServer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep_until};
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;

use crate::acceptors::Acceptors;
use crate::clock::Clock;
use crate::config::Config;
use crate::error::Error;
use crate::fanout::{Fanout, follow_redis, keep_listed, read_journals, read_missing};
use crate::grpc::AccessService;
use crate::handle::Handle;
use crate::kick::AdminService;
use crate::mailboxes::Mailboxes;
use crate::memory::{self, Marks};
use crate::metrics::Metrics;
use crate::node::Node;
use crate::peers::Peers;
use crate::policy::Policy;
use crate::revocations::{Revocations, follow};
use crate::sessions::Sessions;
use crate::shedding::Shedding;

/// Interval of the steps in which confirmations are sent.
const PACE: Duration = Duration::from_millis(100);
/// Interval of periodic work: readiness, key sets, the load in the lease.
const LOOK: Duration = Duration::from_secs(1);
/// Bound of a request other than a dispatcher's batch.
const CALL_BYTES_MAX: usize = 16 << 10;
/// Share of the drain period over which GoAways are spread; the rest is for the devices that get theirs last.
const GO_AWAY_SHARE: f64 = 0.6;
/// Part of the drain period that is reserved for the steps after the last session.
const DRAIN_RESERVE: Duration = Duration::from_millis(500);
/// Time before the end of draining at which the remaining sessions are closed.
const LAST_CALL: Duration = Duration::from_secs(1);
/// Interval at which the table of address limits is swept, seconds.
const SWEEP_SECONDS: Seconds = 10;

/// A running access node.
pub struct Service {
    config: Config,
    context: Context,
    node: Arc<Node>,
    lease: Lease,
    /// Accept loops of the devices' port.
    accepting: JoinSet<()>,
    tasks: Tasks,
    confirming: Condition,
    listening: Condition,
}

impl Service {
    /// Binds, connects, and acquires the node's lease. `None`: draining began before Redis was available.
    ///
    /// # Errors
    /// A port is in use, or Redis, Kafka or a configured file cannot be used.
    pub async fn start(config: Config, context: Context) -> Result<Option<Self>, Error> {
        let redis = context.progress("redis", "answer");
        let listening = context.progress("listener", "turn of the listeners");
        let wheel = context.progress("wheel", "turn of the heartbeat wheel");
        let confirming = context.progress("confirming", "look at the sessions to confirm");
        let revocations = config.revocations.then(|| context.health.condition("revocations"));
        let tasks = Tasks::new(&context);

        let devices = Acceptors::bind(&config)?;
        let dispatchers = bind("grpc_listen", config.grpc_listen).await?;
        let credentials =
            Credentials::read(&config.internal_tls, Party::Access).map_err(Error::Config)?;
        tasks.spawn(Credentials::TASK, credentials.keep_fresh(&context)?);
        let server = Server::new(config.grpc.clone(), credentials.clone(), &context.metrics)?;
        let ports = (&dispatchers, devices.address());
        let built = build(&config, &context, ports, credentials, &redis, &tasks).await?;
        let Some((node, lease)) = built else { return Ok(None) };
        redis.ready();
        lease.report_to(&context.health, config.lease().ttl);

        tasks.spawn("the heartbeat wheel", tick(Arc::clone(&node), wheel));
        let keys = context.health.condition("keys");
        tasks.spawn("the key set refresh", keep_keys_fresh(Arc::clone(&node), keys));
        tasks.spawn("the fan-out", fan_out(Arc::clone(&node)));
        tasks.spawn("the audiences", keep_audiences(Arc::clone(&node)));
        if let Some(condition) = revocations {
            let follower = Follower::start(&config.kafka, &config.kafka.topics.revocations)?;
            let run = follow::run(Arc::clone(&node), follower, config.kafka.clone(), condition);
            tasks.spawn("the revocations", run);
        }
        let guard = memory::guard(Arc::clone(&node), Marks::new(&config.limits));
        tasks.spawn("the memory guard", guard);
        tasks.spawn("the Redis probe", watch_redis(Arc::clone(&node), redis));
        tasks.spawn("the gRPC server", serve_roles(&node, server, dispatchers));
        context.announce("ws", devices.address());
        let accepting = devices.serve(&node, listening.clone());
        context.announce_done();
        Ok(Some(Self { config, context, node, lease, accepting, tasks, confirming, listening }))
    }

    /// Serves devices until draining begins, then closes all sessions and releases the lease.
    pub async fn work(self) -> Stopped {
        let Self { config, context, node, mut lease, mut accepting, tasks, .. } = self;
        let mut keeping = Keeping::new(&config);
        tokio::select! {
            () = context.shutdown.draining() => (),
            never = keeping.run(&node, &mut lease, &self.confirming) => match never {},
        }
        lease.set_draining();
        self.listening.retire();
        // Routes of sessions that still wait for their GoAway can be lost, so confirming continues.
        let cut = tokio::select! {
            cut = drain(&node, &context) => cut,
            never = keeping.run(&node, &mut lease, &self.confirming) => match never {},
        };
        accepting.shutdown().await;
        let shutdown = &context.shutdown;
        // The lease expires by itself if Redis is unavailable.
        let release = shutdown.cut(Duration::ZERO, lease.release());
        let receipts = flush_receipts(&node, shutdown.deadline());
        tokio::join!(release, shutdown.cut(Duration::ZERO, receipts));
        tasks.shutdown().await;
        match cut {
            0 => Stopped::Clean,
            count => Stopped::Cut { what: "sessions".into(), count },
        }
    }
}

async fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|error| Error::Listen { key, address, error })
}

fn local(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
}

/// Builds the node and acquires its lease. `None`: draining began before Redis was available.
async fn build(
    config: &Config,
    context: &Context,
    (dispatchers, devices): (&TcpListener, SocketAddr),
    credentials: Credentials,
    redis: &Condition,
    tasks: &Tasks,
) -> Result<Option<(Arc<Node>, Lease)>, Error> {
    let metrics = Metrics::new(&context.metrics, config.limits.metric_names_max)?;
    if !config.revocations {
        context.metrics.unregister(Box::new(metrics.revocations_current.clone()))?;
    }
    let policy = Policy::new(config)?;
    context.metrics.register(Box::new(policy.verifier.keys_skipped.clone()))?;
    // Before Redis answers: that may take longer than a certificate is valid.
    if let Some(tls) = &policy.tls {
        tasks.spawn("the certificate refresh", tls.clone().keep_fresh(metrics.clone()));
    }
    let receipts = receipts(config, &metrics)?;
    let open = || Mailbox::open(&config.redis, &context.metrics);
    let is_away = barid_mailbox::Error::is_away;
    let Some(mailbox) = context.until_there(redis, is_away, open).await? else { return Ok(None) };
    let grpc = local(dispatchers);
    context.announce("grpc", grpc);
    let lease = config.lease();
    let admin = context.announcements().get("admin");
    let incarnation = Incarnation(SystemClock.now_ms());
    let mut record = lease.record(NodeRole::Access, grpc, admin, incarnation)?;
    record.devices = config.devices_url(devices);
    context.known_as(record.id.as_str());
    let acquire = || lease.acquire(&mailbox, record.clone());
    let Some(held) = context.until_there(redis, is_away, acquire).await? else { return Ok(None) };
    let incarnation = held.record().incarnation;
    let table = NodeTable::watch(&mailbox, NodeRole::Access, lease.ttl / 4);
    let peers = Peers::new(table, credentials);
    let clock = Arc::new(Clock::new(Arc::new(SystemClock)));
    let node = Node {
        zone: config.zone.clone(),
        revocations: Revocations::new(config.auth.revocations_max, config.revocations),
        sessions: Sessions::new(record.id, incarnation, Arc::clone(&clock)),
        fanout: Fanout::new(&config.limits, config.redis.audience_confirm_seconds(), &metrics),
        mailboxes: Mailboxes::new(mailbox, Arc::clone(&clock), metrics.clone()),
        clock,
        policy,
        peers,
        receipts,
        metrics,
        tracer: context.tracer.clone(),
        shutdown: context.shutdown.clone(),
    };
    node.policy.verifier.refresh().await;
    Ok(Some((Arc::new(node), held)))
}

fn receipts(config: &Config, metrics: &Metrics) -> Result<Option<Receipts>, Error> {
    if !config.receipts {
        return Ok(None);
    }
    let producer = Producer::new(&config.kafka)?;
    Ok(Some(Receipts::new(producer, &config.kafka, metrics.receipts_dropped.clone())))
}

/// Turns the wheel once a second, and keeps the condition `turning` true.
async fn tick(node: Arc<Node>, turning: Condition) {
    let mut second = interval(Duration::from_secs(1));
    let started = second.tick().await;
    turning.ready();
    loop {
        let now = second.tick().await;
        let now = Seconds::try_from((now - started).as_secs()).unwrap_or(Seconds::MAX);
        // Seconds that a paused machine has missed are caught up, because each has a slot of the wheel.
        for now in node.clock.seconds() + 1..=now {
            node.clock.set_seconds(now);
            node.sessions.wheel.turn(now);
            node.fanout.sweep(now);
            if now.is_multiple_of(SWEEP_SECONDS) {
                node.policy.admission.sweep();
            }
        }
        node.metrics.addresses.set(node.policy.admission.addresses() as i64);
        node.metrics.blocked_addresses.set(node.policy.admission.count_blocked() as i64);
        node.metrics.unidentified.set(node.policy.admission.unidentified() as i64);
        node.metrics.users.set(node.sessions.registry.users() as i64);
        node.metrics.wheel_entries.set(node.sessions.wheel.entries() as i64);
        turning.ready();
    }
}

async fn keep_keys_fresh(node: Arc<Node>, condition: Condition) {
    let verifier = &node.policy.verifier;
    let mut look = interval(LOOK);
    loop {
        look.tick().await;
        match verifier.missing() {
            Some(source) => condition.failing(format!("key set {source} was not read in time")),
            None => condition.ready(),
        }
        let age = verifier.key_set_age().map_or(0, |age| age.as_secs() as i64);
        node.metrics.key_set_age.set(age);
        verifier.refresh().await;
    }
}

async fn fan_out(node: Arc<Node>) {
    node.fanout.run().await;
}

async fn keep_audiences(node: Arc<Node>) {
    let Node { fanout, mailboxes, sessions, clock, .. } = &*node;
    let listed = keep_listed(fanout, mailboxes, sessions);
    let missing = read_missing(fanout, mailboxes, clock);
    let journals = read_journals(fanout, mailboxes);
    tokio::join!(listed, follow_redis(fanout, mailboxes), missing, journals);
}

async fn watch_redis(node: Arc<Node>, condition: Condition) {
    condition.probe(LOOK, || node.mailboxes.store().ping()).await;
}

fn serve_roles(
    node: &Arc<Node>,
    server: Server,
    listener: TcpListener,
) -> impl Future<Output = ()> + use<> {
    let service = AccessService::new(Arc::clone(node));
    let admin = AdminService::new(Arc::clone(node));
    let peer = AccessPeerServer::new(service.clone()).max_decoding_message_size(CALL_BYTES_MAX);
    let admin = AccessAdminServer::new(admin).max_decoding_message_size(CALL_BYTES_MAX);
    let dispatchers = server.only(&[Party::Dispatcher]);
    let deliver = AccessServer::new(service).max_decoding_message_size(BATCH_BYTES_MAX);
    let routes = Routes::new(InterceptedService::new(deliver, dispatchers))
        .add_service(InterceptedService::new(peer, server.only(&[Party::Access])))
        .add_service(InterceptedService::new(admin, server.only(&[Party::Operator])));
    let settings = |server: tonic::transport::Server| {
        server.http2_keepalive_interval(Some(Duration::from_secs(10)))
    };
    server.serve(listener, routes, settings, std::future::pending())
}

/// Handles events of the lease, confirms routes, and sheds sessions.
struct Keeping {
    confirming: Confirming<Handle>,
    shedding: Shedding,
}

impl Keeping {
    fn new(config: &Config) -> Self {
        let every = Duration::from_secs(config.sync.confirm_interval_seconds);
        let per_second = config.sync.confirms_per_second;
        Self {
            confirming: Confirming::new(per_second, every, PACE, Instant::now()),
            shedding: Shedding::new(config.balance.clone(), config.zone.clone()),
        }
    }

    /// Never returns.
    async fn run(&mut self, node: &Node, lease: &mut Lease, condition: &Condition) -> Infallible {
        let Self { confirming, shedding } = self;
        let mut pace = interval(PACE);
        let mut look = interval(LOOK);
        loop {
            tokio::select! {
                event = lease.next_event() => confirming.handle(node, event),
                _ = pace.tick() => {
                    confirming.tick(node, Instant::now());
                    if let Some(incarnation) = confirming.finished_incarnation() {
                        tracing::info!(incarnation = incarnation.0, "all sessions confirmed");
                        lease.set_confirmed(incarnation);
                    }
                }
                _ = look.tick() => {
                    condition.ready();
                    lease.set_load(u64::try_from(node.metrics.sessions.get()).unwrap_or(0));
                    if !node.shutdown.is_draining() {
                        shedding.step(&node.sessions, &node.peers, &node.metrics);
                    }
                }
            }
        }
    }
}

/// Sends GoAway to all devices at a steady rate, and waits until they have gone. Returns how many sessions were left at
/// the deadline.
async fn drain(node: &Arc<Node>, context: &Context) -> u64 {
    let (shutdown, begun) = (&context.shutdown, Instant::now());
    let all_gone = async {
        let deadline = shutdown.deadline() - DRAIN_RESERVE;
        send_go_away(node, deadline.saturating_duration_since(begun).mul_f64(GO_AWAY_SHARE)).await;
        let (mut look, mut late) = (interval(PACE), interval(LOOK));
        while node.metrics.connections.get() > 0 {
            tokio::select! {
                _ = look.tick() => (),
                // For devices whose Hello was under way when draining began.
                _ = late.tick() => for handle in node.sessions.registry.all() {
                    handle.send_go_away();
                },
            }
        }
    };
    tokio::pin!(all_gone);
    if shutdown.cut(DRAIN_RESERVE + LAST_CALL, &mut all_gone).await.is_some() {
        return 0;
    }
    for handle in node.sessions.registry.all() {
        handle.close(Close::new(CloseCode::Draining, "this node is being drained"));
    }
    // Only sessions count: their acknowledgements and routes have to be stored. Sockets may be cut off.
    match shutdown.cut(DRAIN_RESERVE, all_gone).await {
        Some(()) => 0,
        None => u64::try_from(node.metrics.sessions.get()).unwrap_or(0),
    }
}

/// Sends GoAway to each device that is connected, spread evenly over `span`.
async fn send_go_away(node: &Node, span: Duration) {
    let begun = Instant::now();
    let handles = node.sessions.registry.all();
    let spread_ms = span.as_millis() as u64;
    tracing::info!(sessions = handles.len(), spread_ms, "sending GoAway to devices");
    let total = handles.len().max(1) as f64;
    for (index, handle) in handles.iter().enumerate() {
        let at = begun + span.mul_f64(index as f64 / total);
        if at > Instant::now() {
            sleep_until(at).await;
        }
        handle.send_go_away();
    }
}

async fn flush_receipts(node: &Node, deadline: Instant) {
    if let Some(receipts) = &node.receipts {
        let left = receipts.flush(deadline).await;
        if left > 0 {
            tracing::warn!(left, "receipts were not delivered");
        }
    }
}

#[cfg(test)]
mod tests;
