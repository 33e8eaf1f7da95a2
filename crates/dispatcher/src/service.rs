//! Starts the dispatcher, renews its lease, follows the table of nodes, and drains it.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{Clock as _, Incarnation, NodeId, SystemClock};
use barid_mailbox::{
    Error as RedisError, Lease, LeaseEvent, Mailbox, NodeRole, NodeTable, TrackedRoutes,
};
use barid_mesh::{BATCH_BYTES_MAX, Credentials, Party, Server};
use barid_runtime::{Condition, Context, Spawner, Stopped, Tasks, Tracer};
use barid_wire::internal::Gone;
use barid_wire::internal::dispatcher_server::DispatcherServer;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;

use crate::deliver::{Delivery, void_of};
use crate::grpc::BatchService;
use crate::metrics::Metrics;
use crate::nodes::{AccessNode, Nodes, OnGone};
use crate::reap::Reaper;
use crate::resolve::Resolver;
use crate::{Config, Error, RedisRoutes, follow_tracking};

const UNTRACKED: &str = "redis does not report changes of routes; nothing is cached";
/// How often readiness is updated.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// A running dispatcher.
pub struct Service {
    config: Config,
    context: Context,
    lease: Lease,
    batches: BatchService<RedisRoutes>,
    nodes: Arc<Nodes>,
    // Ends the listener.
    stop: CancellationToken,
    tasks: Tasks,
}

impl Service {
    /// Connects, listens, and acquires the lease. Waits while Redis is unavailable. `None`: draining began meanwhile.
    ///
    /// # Errors
    /// Redis cannot be used, the address is in use, or the configuration is invalid.
    pub async fn start(config: Config, context: Context) -> Result<Option<Self>, Error> {
        let metrics = Metrics::new(&context.metrics)?;
        let redis = context.progress("redis", "answer");
        let tracking = context.progress("tracking", "answer on the tracked connection");
        let answering = context.progress("batches", "answer to a batch that waits");
        let open = || Mailbox::open(&config.redis, &context.metrics);
        let Some(mailbox) = context.until_there(&redis, RedisError::is_away, open).await? else {
            return Ok(None);
        };
        let tracked = TrackedRoutes::open(&config.redis).await?;
        let routes = Arc::new(RedisRoutes { mailbox: mailbox.clone(), tracked: tracked.clone() });
        let resolver = Resolver::new(routes, config.limits(), metrics.clone());
        let tasks = Tasks::new(&context);
        let credentials =
            Credentials::read(&config.internal_tls, Party::Dispatcher).map_err(Error::Config)?;
        tasks.spawn(Credentials::TASK, credentials.keep_fresh(&context)?);
        tracked.report_to(tracking.clone());
        let report = {
            let metrics = metrics.clone();
            move |now: bool| {
                metrics.tracking.set(now.into());
                match now {
                    true => tracking.ready(),
                    false => tracking.failing(UNTRACKED),
                }
            }
        };
        let following = follow_tracking(tracked, resolver.clone(), report);
        tasks.spawn("the route tracking", following);
        tasks.spawn("the Redis probe", watch_redis(mailbox.clone(), redis.clone()));
        tasks.spawn("the cache metrics", count_entries(resolver.clone(), metrics.clone()));
        let (delivery, table) = assemble(
            &config,
            &mailbox,
            credentials.clone(),
            resolver,
            metrics,
            context.tracer.clone(),
            &tasks.spawner(),
        );
        let nodes = Arc::clone(&delivery.nodes);
        tasks.spawn("the node table", follow_nodes(table, Arc::clone(&nodes)));
        let batches = BatchService::new(Arc::new(delivery), config.window_batches);
        let stop = CancellationToken::new();
        let server = Server::new(config.grpc.clone(), credentials, &context.metrics)?;
        let address = listen(&config, &context, server, &batches, &stop, &tasks).await?;
        let lease = config.lease();
        let admin = context.announcements().get("admin");
        let incarnation = Incarnation(SystemClock.now_ms());
        let record = lease.record(NodeRole::Dispatcher, address, admin, incarnation)?;
        context.known_as(record.id.as_str());
        let take = || lease.acquire(&mailbox, record.clone());
        let Some(held) = context.until_there(&redis, RedisError::is_away, take).await? else {
            return Ok(None);
        };
        tracing::info!(node = %record.id, address = record.address, "lease acquired");
        held.report_to(&context.health, lease.ttl);
        tasks.spawn("the batch watch", watch_batches(batches.clone(), answering));
        context.announce_done();
        Ok(Some(Self { config, context, lease: held, batches, nodes, stop, tasks }))
    }
}

impl Service {
    /// Runs until draining begins. Then it waits until callers use other dispatchers, finishes the items in flight,
    /// and releases the lease.
    pub async fn work(mut self) -> Stopped {
        loop {
            tokio::select! {
                () = self.context.shutdown.draining() => break,
                event = self.lease.next_event() => self.keep_lease(event),
            }
        }
        self.drain().await
    }

    /// A new incarnation is confirmed at once, because no route names a dispatcher.
    fn keep_lease(&self, event: LeaseEvent) {
        match event {
            LeaseEvent::NewIncarnation(incarnation) => self.lease.set_confirmed(incarnation),
            LeaseEvent::Lapsed | LeaseEvent::WasGone | LeaseEvent::Forgot(_) => {}
        }
    }

    async fn drain(self) -> Stopped {
        let shutdown = &self.context.shutdown;
        self.lease.set_draining();
        let finished = shutdown.cut(Duration::ZERO, async {
            sleep(Duration::from_millis(self.config.drain_settle_ms)).await;
            self.batches.finish().await;
            while self.nodes.pending() > 0 {
                sleep(Duration::from_millis(2)).await;
            }
        });
        let in_time = finished.await.is_some();
        self.stop.cancel();
        // The lease expires by itself if Redis is unavailable.
        shutdown.cut(Duration::ZERO, self.lease.release()).await;
        let count = self.batches.unanswered() + self.nodes.pending() as u64;
        self.tasks.shutdown().await;
        match (in_time, count) {
            (true, _) | (false, 0) => Stopped::Clean,
            (false, count) => Stopped::Cut { what: "batches and items".into(), count },
        }
    }
}

fn assemble(
    config: &Config,
    mailbox: &Mailbox,
    credentials: Credentials,
    resolver: Resolver<RedisRoutes>,
    metrics: Metrics,
    tracer: Tracer,
    tasks: &Spawner,
) -> (Delivery<RedisRoutes>, NodeTable) {
    let reaper = Reaper::start(resolver.routes(), &config.reap, metrics.clone(), tasks);
    let refresh = Duration::from_millis(config.nodes_refresh_ms);
    let table = NodeTable::watch(mailbox, NodeRole::Access, refresh);
    let void_since = {
        let table = table.clone();
        Arc::new(move |node: &NodeId, incarnation| table.void_since(node, incarnation))
    };
    let nodes = Nodes::new(
        credentials,
        config.links.clone(),
        metrics.nodes.clone(),
        metrics.lost.clone(),
        void_since,
        on_gone(&resolver, &reaper),
    );
    let delivery = Delivery {
        resolver,
        nodes: Arc::new(nodes),
        reaper,
        void_after: Duration::from_secs(config.void_after_seconds),
        metrics,
        tracer,
    };
    (delivery, table)
}

/// Handles a node's answer that a session is gone: removes the route from L1 at once, and soon from Redis.
fn on_gone(resolver: &Resolver<RedisRoutes>, reaper: &Reaper) -> OnGone {
    let (resolver, reaper) = (resolver.clone(), reaper.clone());
    Arc::new(move |node: &NodeId, incarnation: Incarnation, gone: Gone| {
        if let Some(void) = void_of(node, incarnation, &gone) {
            resolver.invalidate(&void.user);
            reaper.offer(void);
        }
    })
}

async fn listen(
    config: &Config,
    context: &Context,
    server: Server,
    batches: &BatchService<RedisRoutes>,
    stop: &CancellationToken,
    tasks: &Tasks,
) -> Result<std::net::SocketAddr, Error> {
    let failed = |error| Error::Listen { address: config.listen, error };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    context.announce("grpc", address);
    let callers = server.only(&[Party::Purger, Party::Delayer]);
    let service = DispatcherServer::new(batches.clone());
    let service = service.max_decoding_message_size(BATCH_BYTES_MAX);
    let routes = Routes::new(InterceptedService::new(service, callers));
    let keepalive = Duration::from_millis(config.links.keepalive_interval_ms);
    let keepalive_timeout = Duration::from_millis(config.links.keepalive_timeout_ms);
    let settings = move |server: tonic::transport::Server| {
        server
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .http2_keepalive_interval(Some(keepalive))
            .http2_keepalive_timeout(Some(keepalive_timeout))
    };
    let stop = stop.clone().cancelled_owned();
    tasks.spawn("the gRPC server", server.serve(listener, routes, settings, stop));
    Ok(address)
}

async fn follow_nodes(mut table: NodeTable, nodes: Arc<Nodes>) {
    loop {
        let living: Vec<AccessNode> = table
            .snapshot()
            .iter()
            .map(|record| AccessNode {
                id: record.id.clone(),
                incarnation: record.incarnation,
                address: record.address.clone(),
            })
            .collect();
        nodes.follow(&living);
        table.changed().await;
    }
}

async fn watch_redis(mailbox: Mailbox, condition: Condition) {
    condition.probe(WATCH_EVERY, || mailbox.ping()).await;
}

async fn count_entries(resolver: Resolver<RedisRoutes>, metrics: Metrics) {
    loop {
        metrics.l1_entries.set(i64::try_from(resolver.entries()).unwrap_or(i64::MAX));
        sleep(WATCH_EVERY).await;
    }
}

/// Keeps the condition true while unanswered batches are answered one after the other.
async fn watch_batches(batches: BatchService<RedisRoutes>, condition: Condition) {
    let mut answered = batches.answered();
    loop {
        let now = batches.answered();
        if now != answered || batches.unanswered() == 0 {
            condition.ready();
        }
        answered = now;
        sleep(WATCH_EVERY).await;
    }
}
