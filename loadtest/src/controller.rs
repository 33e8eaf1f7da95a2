//! Controls agents as if they were one: splits requests among them and merges their answers.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use barid_testkit::process::Process;
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use tonic::transport::Channel;

use crate::audit::{Audit, Outcome, Start};
use crate::histogram;
use crate::rpc::agent_client::AgentClient;
use crate::rpc::floor_client::FloorClient;
use crate::rpc::{
    BroadcastRequest, ChurnRequest, ConnectReply, ConnectRequest, ExpectRequest, Nothing,
};

/// How long an agent or a floor may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Source addresses of each local agent, by turns below and above those of an attacker ([`crate::attacker`]). A pair of
/// addresses has some 28,000 ports; and in a storm each address stays below a node's limit
/// (`limits.address_handshakes_max`, 128).
const SOURCES: u8 = 32;

/// Agents, and the processes of those that were started here.
pub struct Agents {
    clients: Vec<AgentClient<Channel>>,
    local: Vec<Process>,
    _dir: tempfile::TempDir,
}

/// The result of opening connections.
#[derive(Debug, Clone)]
pub struct Connected {
    pub connected: u32,
    /// Connections that failed for good, and why the last one did.
    pub failed: u32,
    pub why_failed: String,
    /// Refused attempts that were retried.
    pub retried: u64,
    /// From when each connection was due until it was welcomed.
    pub took_us: Histogram<u64>,
    /// From the first attempt until the last connection was open.
    pub elapsed: Duration,
}

/// The sums of all agents' reports; [`crate::rpc::AgentReport`] explains the fields.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub connected: u32,
    pub closed: u64,
    pub why_closed: String,
    pub shown: u64,
    pub passed_over: u64,
    pub repeats: u64,
    pub delivered: u64,
    pub resent: u64,
    pub opened: u64,
}

impl Seen {
    /// The outcome of a run of `total` records.
    pub fn outcome(&self, total: u64) -> Outcome {
        let Self { shown, passed_over, repeats, .. } = *self;
        Outcome { shown, lost: total.saturating_sub(shown), passed_over, repeats }
    }
}

impl Agents {
    /// Connects to the named agents; if none are named, starts `local` processes.
    pub async fn start(named: &[String], local: usize) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut addresses = named.to_vec();
        let mut processes = Vec::new();
        if named.is_empty() {
            for number in 0..local {
                let (process, listeners) =
                    spawn(&dir, &format!("agent-{number}"), &["agent"]).await?;
                addresses.push(listeners[0].to_string());
                processes.push(process);
            }
        }
        let clients = addresses.iter().map(|address| async move {
            let client = AgentClient::connect(format!("http://{address}")).await;
            client.with_context(|| format!("agent {address}"))
        });
        let clients = try_join_all(clients).await?;
        ensure!(!clients.is_empty(), "no agents");
        Ok(Self { clients, local: processes, _dir: dir })
    }

    fn clients(&self) -> impl Iterator<Item = AgentClient<Channel>> {
        self.clients.iter().cloned()
    }

    /// Each agent with its part of the request.
    fn parts(&self, request: &ConnectRequest) -> Vec<(AgentClient<Channel>, ConnectRequest)> {
        let agents = u32::try_from(self.clients.len()).unwrap_or(u32::MAX);
        let (is_local, mut first) = (!self.local.is_empty(), request.first);
        let part = |(index, client)| {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let share = |of: u32| of / agents + u32::from(index < of % agents);
            let mut part = ConnectRequest {
                first,
                count: share(request.count),
                rate: share(request.rate),
                at_once_max: share(request.at_once_max).max(1),
                ..request.clone()
            };
            if is_local {
                let network = |host: u8| if host.is_multiple_of(2) { 255 } else { 0 };
                let source = |host| format!("127.{}.{}.{host}", network(host), index + 1);
                part.sources = (1..=SOURCES).map(source).collect();
            }
            first += part.count;
            (client, part)
        };
        self.clients().enumerate().map(part).collect()
    }

    /// Opens connections. Fails if any of them fails.
    pub async fn connect(&self, request: &ConnectRequest) -> anyhow::Result<Connected> {
        self.attempt(request).await?.without_failures()
    }

    /// Opens connections, and counts those that fail.
    pub async fn attempt(&self, request: &ConnectRequest) -> anyhow::Result<Connected> {
        let parts = self.parts(request).into_iter();
        let open = async |(mut client, part): (AgentClient<Channel>, _)| client.open(part).await;
        let replies = try_join_all(parts.map(open)).await?;
        Ok(merge(replies.into_iter().map(tonic::Response::into_inner)))
    }

    /// Drops and opens `rate` connections per second.
    pub async fn churn(
        &self,
        request: &ConnectRequest,
        rate: u32,
        seconds: u32,
    ) -> anyhow::Result<Connected> {
        let whole = ConnectRequest { rate, ..request.clone() };
        let churn = async |(mut client, part): (AgentClient<Channel>, ConnectRequest)| {
            client.churn(ChurnRequest { rate: part.rate, seconds, connect: Some(part) }).await
        };
        let replies = try_join_all(self.parts(&whole).into_iter().map(churn)).await?;
        merge(replies.into_iter().map(tonic::Response::into_inner)).without_failures()
    }

    /// Begins a run. `start`: when its schedule starts, if that is known.
    pub async fn expect(&self, audit: &Audit, start: Option<Start>) -> anyhow::Result<()> {
        let request = ExpectRequest {
            run: audit.run().to_owned(),
            users: u32::try_from(audit.users())?,
            rate: audit.rate().unwrap_or_default(),
            starts_at_ms: start.map(Start::unix_ms).unwrap_or_default(),
            burst: u32::try_from(audit.burst())?,
        };
        let expect = |mut client: AgentClient<Channel>| {
            let request = request.clone();
            async move { client.expect(request).await }
        };
        try_join_all(self.clients().map(expect)).await?;
        Ok(())
    }

    /// A handle for reports while other requests are under way.
    pub fn watch(&self) -> Watch {
        Watch(self.clients.clone())
    }

    /// Process ids of the agents that were started here.
    pub fn pids(&self) -> Vec<u32> {
        self.local.iter().map(Process::pid).collect()
    }

    /// From when the run's messages were due until they were shown, µs.
    pub async fn latencies_us(&self) -> anyhow::Result<Histogram<u64>> {
        let ask = async |mut client: AgentClient<Channel>| client.latencies(Nothing {}).await;
        let mut sum = histogram::new();
        for latencies in try_join_all(self.clients().map(ask)).await? {
            histogram::add(&mut sum, &latencies.into_inner());
        }
        Ok(sum)
    }

    pub async fn report(&self) -> anyhow::Result<Seen> {
        self.watch().report().await
    }

    /// Drops every connection at once.
    pub async fn drop_all(&self) -> anyhow::Result<()> {
        let close = async |mut client: AgentClient<Channel>| client.close(Nothing {}).await;
        try_join_all(self.clients().map(close)).await?;
        Ok(())
    }
}

/// Reads the agents' reports.
#[derive(Clone)]
pub struct Watch(Vec<AgentClient<Channel>>);

impl Watch {
    pub async fn report(&mut self) -> anyhow::Result<Seen> {
        let reports = self.0.iter_mut().map(|client| client.report(Nothing {}));
        let mut seen = Seen::default();
        for report in try_join_all(reports).await? {
            let report = report.into_inner();
            seen.connected += report.connected;
            seen.closed += report.closed;
            seen.shown += report.shown;
            seen.passed_over += report.passed_over;
            seen.repeats += report.repeats;
            seen.delivered += report.delivered;
            seen.resent += report.resent;
            seen.opened += report.opened;
            if !report.why_closed.is_empty() {
                seen.why_closed = report.why_closed;
            }
        }
        Ok(seen)
    }
}

impl Connected {
    fn without_failures(self) -> anyhow::Result<Self> {
        ensure!(self.failed == 0, "{} connections failed: {}", self.failed, self.why_failed);
        Ok(self)
    }
}

fn merge(replies: impl Iterator<Item = ConnectReply>) -> Connected {
    let mut sum = Connected {
        connected: 0,
        failed: 0,
        why_failed: String::new(),
        retried: 0,
        took_us: histogram::new(),
        elapsed: Duration::ZERO,
    };
    for reply in replies {
        let ConnectReply { connected, failed, retried, took_us, elapsed_us, why } = reply;
        sum.connected += connected;
        sum.failed += failed;
        if failed > 0 {
            sum.why_failed = why;
        }
        sum.retried += retried;
        histogram::add(&mut sum.took_us, &took_us.unwrap_or_default());
        sum.elapsed = sum.elapsed.max(Duration::from_micros(elapsed_us));
    }
    sum
}

/// A running floor.
pub struct Floor {
    client: FloorClient<Channel>,
    process: Process,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Floor {
    /// Starts a floor that listens at this address of the machine.
    pub async fn start(host: IpAddr) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let listen = SocketAddr::new(host, 0).to_string();
        let (process, addresses) = spawn(&dir, "floor", &["floor", "--listen", &listen]).await?;
        let [control, address] = addresses[..] else { anyhow::bail!("floor has two listeners") };
        let client = FloorClient::connect(format!("http://{control}")).await?;
        Ok(Self { client, process, address, _dir: dir })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// A request that connects to it, without users.
    pub fn connect_request(&self) -> ConnectRequest {
        ConnectRequest { nodes: vec![self.address.to_string()], floor: true, ..Default::default() }
    }

    /// Sends messages to every connection.
    pub async fn broadcast(&mut self, count: u32, payload_bytes: u32) -> anyhow::Result<()> {
        self.client.broadcast(BroadcastRequest { count, payload_bytes }).await?;
        Ok(())
    }
}

/// Starts this program once more with other arguments, and returns the addresses that it listens on.
pub async fn spawn(
    dir: &tempfile::TempDir,
    name: &str,
    arguments: &[&str],
) -> anyhow::Result<(Process, Vec<SocketAddr>)> {
    let log = dir.path().join(name);
    let mut process = Process::spawn(name, std::env::current_exe()?, &log, |command| {
        command.args(arguments);
    })?;
    let started = Instant::now();
    loop {
        let output = process.output();
        let line = output.lines().find_map(|line| line.strip_prefix("listening "));
        if let Some(line) = line.filter(|_| output.ends_with('\n')) {
            let addresses = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
            return Ok((process, addresses));
        }
        process.must_run()?;
        ensure!(started.elapsed() < START_LIMIT, "{name} does not start: {output}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
