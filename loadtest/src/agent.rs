//! An agent: a process that holds connections for a controller. It connects on request, reads,
//! acknowledges, checks every delivery, and counts.

use std::collections::{HashMap, VecDeque};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use barid_testkit::certificates;
use clap::Args;
use hdrhistogram::Histogram;
use jsonwebtoken::EncodingKey;
use parking_lot::{Mutex, RwLock};
use tokio::net::{TcpListener, lookup_host};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::audit::{Audit, Start};
use crate::device::{self, Device, Path, Seen, Socket};
use crate::histogram;
use crate::producer::user;
use crate::rpc;
use crate::rpc::agent_server::{Agent, AgentServer};
use crate::rpc::{AgentReport, ChurnRequest, ConnectReply, ConnectRequest, ExpectRequest, Nothing};
use crate::token::sign;

/// Validity of tokens.
const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Limit of a handshake.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a refused connection is retried.
const RETRY_LIMIT: Duration = Duration::from_secs(120);

/// The agent's listener.
#[derive(Debug, Args)]
pub struct Options {
    /// Address for the controller. There is no authentication: do not expose it outside the test network.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// Serves controllers until the process is killed.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let listener = TcpListener::bind(options.listen).await?;
    announce(&[listener.local_addr()?])?;
    let service = AgentServer::new(Service::default());
    let incoming = TcpListenerStream::new(listener);
    tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await?;
    Ok(true)
}

/// Prints the addresses that a process listens on, as its first line of output.
pub fn announce(addresses: &[SocketAddr]) -> std::io::Result<()> {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "listening {}", addresses.join(" "))?;
    out.flush()
}

#[derive(Default)]
struct Service(Arc<State>);

/// The agent's connections and counts.
#[derive(Default)]
struct State {
    /// Oldest first, with the user's number.
    sessions: Mutex<VecDeque<(u32, JoinHandle<()>)>>,
    /// The newest position shown to each user; kept over reconnects.
    positions: Mutex<HashMap<u32, Arc<AtomicU64>>>,
    connected: AtomicU32,
    opened: AtomicU64,
    closed: AtomicU64,
    why_closed: Mutex<String>,
    delivered: AtomicU64,
    resent: AtomicU64,
    audit: RwLock<Option<Arc<Audit>>>,
}

/// A parsed [`ConnectRequest`].
struct Connector {
    nodes: Vec<SocketAddr>,
    sources: Vec<IpAddr>,
    floor: bool,
    slow: bool,
    ping_interval_ms: u32,
    tls: Option<Arc<rustls::ClientConfig>>,
    ack_delay: Duration,
    retry_max: Duration,
    first: u32,
    /// Tokens of the users, starting with `first`.
    tokens: Vec<String>,
}

impl Connector {
    async fn new(request: &ConnectRequest) -> anyhow::Result<Self> {
        let mut nodes = Vec::new();
        for node in &request.nodes {
            let found = lookup_host(node).await.with_context(|| format!("node {node}"))?.next();
            nodes.push(found.with_context(|| format!("node {node} has no address"))?);
        }
        anyhow::ensure!(!nodes.is_empty(), "the request names no node");
        let sources = request.sources.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
        let tls = (!request.roots.is_empty())
            .then(|| certificates::trusting(&request.roots))
            .transpose()?;
        let key = EncodingKey::from_secret(&request.secret);
        let end = request.first.checked_add(request.count).context("user numbers exceed 2^32")?;
        let users = request.first..end;
        let token = |number: u32| {
            let key_id = Some(request.key_id.clone()).filter(|id| !id.is_empty());
            sign(&key, key_id, &request.app, &user(number.into()), TOKEN_LIFE)
        };
        // Signed before times are measured.
        let tokens =
            if request.floor { Vec::new() } else { users.map(token).collect::<Result<_, _>>()? };
        Ok(Self {
            nodes,
            sources,
            floor: request.floor,
            slow: request.slow,
            ping_interval_ms: request.ping_interval_ms,
            tls,
            ack_delay: Duration::from_millis(request.ack_delay_ms.into()),
            retry_max: Duration::from_millis(request.retry_max_ms.into()),
            first: request.first,
            tokens,
        })
    }

    /// Opens a user's connection, with retries if the request allows them.
    async fn open(&self, number: u32, retried: &AtomicU64) -> anyhow::Result<Socket> {
        let begun = Instant::now();
        loop {
            let opened = tokio::time::timeout(CONNECT_TIMEOUT, self.open_once(number)).await;
            let error = match opened.context("handshake timed out") {
                Ok(Ok(socket)) => return Ok(socket),
                Ok(Err(error)) | Err(error) => error,
            };
            if self.retry_max.is_zero() || begun.elapsed() > RETRY_LIMIT {
                return Err(error);
            }
            retried.fetch_add(1, Ordering::Relaxed);
            sleep(self.retry_max.mul_f64(rand::random())).await;
        }
    }

    async fn open_once(&self, number: u32) -> anyhow::Result<Socket> {
        let node = self.nodes[number as usize % self.nodes.len()];
        let source = self.sources.get(number as usize % self.sources.len().max(1)).copied();
        let path = Path {
            node,
            source,
            narrow: self.slow,
            ping_interval_ms: self.ping_interval_ms,
            tls: self.tls.clone(),
        };
        if self.floor {
            return device::open_plain(&path).await;
        }
        device::open(&path, &self.tokens[(number - self.first) as usize]).await
    }
}

impl State {
    /// Opens and keeps the requested connections.
    async fn connect(self: &Arc<Self>, request: ConnectRequest) -> anyhow::Result<ConnectReply> {
        let connector = Arc::new(Connector::new(&request).await?);
        let permits = Arc::new(Semaphore::new(request.at_once_max.max(1) as usize));
        let (retried, started) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let mut opening = JoinSet::new();
        for index in 0..request.count {
            let mut due = None;
            if request.rate > 0 {
                let at = started + Duration::from_secs(1) * index / request.rate;
                sleep_until(at).await;
                due = Some(at);
            }
            let permit = Arc::clone(&permits).acquire_owned().await?;
            let due = due.unwrap_or_else(Instant::now);
            let (state, connector, retried) =
                (Arc::clone(self), Arc::clone(&connector), Arc::clone(&retried));
            opening.spawn(async move {
                let opened = connector.open(request.first + index, &retried).await;
                let took = due.elapsed();
                drop(permit);
                opened.map(|socket| {
                    state.keep(&connector, request.first + index, socket);
                    took
                })
            });
        }
        let mut tally = Tally::new(started);
        while let Some(opened) = opening.join_next().await {
            tally.count(opened?);
        }
        Ok(tally.reply(retried.load(Ordering::Relaxed)))
    }

    /// Drops one connection after the other, the oldest first, and opens it again.
    async fn churn(self: &Arc<Self>, request: ChurnRequest) -> anyhow::Result<ConnectReply> {
        let connect = request.connect.context("the request names no connections")?;
        let connector = Arc::new(Connector::new(&connect).await?);
        let (retried, started) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let total =
            request.rate.checked_mul(request.seconds).context("rate times seconds exceeds 2^32")?;
        let mut opening = JoinSet::new();
        let mut tally = Tally::new(started);
        for index in 0..total {
            let due = started + Duration::from_secs(1) * index / request.rate;
            sleep_until(due).await;
            let oldest = self.sessions.lock().pop_front();
            let (number, oldest) = oldest.context("no connection is left")?;
            oldest.abort();
            let (state, connector, retried) =
                (Arc::clone(self), Arc::clone(&connector), Arc::clone(&retried));
            opening.spawn(async move {
                // It may be handling a delivery.
                let _ = oldest.await;
                let opened = connector.open(number, &retried).await;
                opened.map(|socket| {
                    state.keep(&connector, number, socket);
                    due.elapsed()
                })
            });
            while let Some(opened) = opening.try_join_next() {
                tally.count(opened?);
            }
        }
        while let Some(opened) = opening.join_next().await {
            tally.count(opened?);
        }
        Ok(tally.reply(retried.load(Ordering::Relaxed)))
    }

    /// Reads a connection in its own task.
    fn keep(self: &Arc<Self>, connector: &Arc<Connector>, number: u32, socket: Socket) {
        let (state, counted) = (Arc::clone(self), Counted::new(self));
        self.opened.fetch_add(1, Ordering::Relaxed);
        let (floor, slow, ack_delay) = (connector.floor, connector.slow, connector.ack_delay);
        let position = Arc::clone(self.positions.lock().entry(number).or_default());
        let task = tokio::spawn(async move {
            let ended = if floor {
                device::read_plain(socket, &state.delivered).await
            } else if slow {
                device::read_slowly(socket).await
            } else {
                let device = Device::new(socket, number, ack_delay, Arc::clone(&state));
                device.resume(position).serve().await
            };
            drop(counted);
            state.closed.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = ended {
                *state.why_closed.lock() = format!("{error:#}");
            }
        });
        self.sessions.lock().push_back((number, task));
    }

    fn report(&self) -> AgentReport {
        let audit = self.audit.read().clone();
        let totals = audit.map(|audit| audit.totals());
        let of = |count: fn(&crate::audit::Totals) -> u64| totals.as_ref().map_or(0, count);
        AgentReport {
            connected: self.connected.load(Ordering::Relaxed),
            closed: self.closed.load(Ordering::Relaxed),
            why_closed: self.why_closed.lock().clone(),
            shown: of(|totals| totals.shown),
            passed_over: of(|totals| totals.passed_over),
            repeats: of(|totals| totals.repeats),
            foreign: of(|totals| totals.foreign),
            delivered: self.delivered.load(Ordering::Relaxed),
            resent: self.resent.load(Ordering::Relaxed),
            opened: self.opened.load(Ordering::Relaxed),
        }
    }
}

impl Seen for Arc<State> {
    fn shown(&self, number: u32, id: &str) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
        if let Some(audit) = &*self.audit.read() {
            audit.shown(number, id);
        }
    }

    fn resent(&self) {
        self.resent.fetch_add(1, Ordering::Relaxed);
    }

    fn for_everyone(&self, messages: usize) {
        self.delivered.fetch_add(messages as u64, Ordering::Relaxed);
    }
}

/// Counts a connection as open until it is dropped.
struct Counted(Arc<State>);

impl Counted {
    fn new(state: &Arc<State>) -> Self {
        state.connected.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(state))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The results of connection attempts.
struct Tally {
    started: Instant,
    last: Instant,
    took_us: Histogram<u64>,
    failed: u32,
    why: String,
}

impl Tally {
    fn new(started: Instant) -> Self {
        let (took_us, why) = (histogram::new(), String::new());
        Self { started, last: started, took_us, failed: 0, why }
    }

    fn count(&mut self, opened: anyhow::Result<Duration>) {
        match opened {
            Ok(took) => {
                self.last = Instant::now();
                self.took_us.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
            }
            Err(error) => {
                self.failed += 1;
                self.why = format!("{error:#}");
            }
        }
    }

    fn reply(self, retried: u64) -> ConnectReply {
        ConnectReply {
            connected: u32::try_from(self.took_us.len()).unwrap_or(u32::MAX),
            failed: self.failed,
            retried,
            took_us: Some(histogram::to_wire(&self.took_us)),
            elapsed_us: u64::try_from((self.last - self.started).as_micros()).unwrap_or(u64::MAX),
            why: self.why,
        }
    }
}

fn failed(error: anyhow::Error) -> Status {
    Status::internal(format!("{error:#}"))
}

#[tonic::async_trait]
impl Agent for Service {
    async fn open(
        &self,
        request: Request<ConnectRequest>,
    ) -> Result<Response<ConnectReply>, Status> {
        self.0.connect(request.into_inner()).await.map(Response::new).map_err(failed)
    }

    async fn expect(&self, request: Request<ExpectRequest>) -> Result<Response<Nothing>, Status> {
        let ExpectRequest { run, users, rate, starts_at_ms, burst } = request.into_inner();
        let is_scheduled = rate > 0 && starts_at_ms > 0;
        let schedule = is_scheduled.then(|| (rate, Start::at_unix_ms(starts_at_ms)));
        *self.0.audit.write() = Some(Arc::new(Audit::of_run(run, users, burst, schedule)));
        self.0.closed.store(0, Ordering::Relaxed);
        self.0.resent.store(0, Ordering::Relaxed);
        Ok(Response::new(Nothing {}))
    }

    async fn report(&self, _: Request<Nothing>) -> Result<Response<AgentReport>, Status> {
        Ok(Response::new(self.0.report()))
    }

    async fn latencies(&self, _: Request<Nothing>) -> Result<Response<rpc::Histogram>, Status> {
        let audit = self.0.audit.read().clone();
        let latencies = audit.map_or_else(histogram::new, |audit| audit.latencies_us());
        Ok(Response::new(histogram::to_wire(&latencies)))
    }

    async fn close(&self, _: Request<Nothing>) -> Result<Response<Nothing>, Status> {
        for (_, session) in self.0.sessions.lock().drain(..) {
            session.abort();
        }
        self.0.positions.lock().clear();
        while self.0.connected.load(Ordering::Relaxed) > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        Ok(Response::new(Nothing {}))
    }

    async fn churn(
        &self,
        request: Request<ChurnRequest>,
    ) -> Result<Response<ConnectReply>, Status> {
        self.0.churn(request.into_inner()).await.map(Response::new).map_err(failed)
    }
}
