//! Steers agents as if they were one: splits what is asked among them, and merges what they saw.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use barid_testkit::process::Process;
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use tonic::transport::Channel;

use crate::audit::{Audit, Outcome};
use crate::histogram;
use crate::rpc::agent_client::AgentClient;
use crate::rpc::floor_client::FloorClient;
use crate::rpc::{
    BroadcastRequest, ChurnRequest, ConnectReply, ConnectRequest, ExpectRequest, Nothing,
};

/// How long a process of ours may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Source addresses of each local agent. A pair of addresses has some 28,000 ports; and devices come from many
/// addresses: all of a storm at once stay below a node's limit for one (`limits.address_handshakes_max`, 512).
const SOURCES: u8 = 32;

/// Agents, and the processes of those that were started here.
pub struct Agents {
    clients: Vec<AgentClient<Channel>>,
    local: Vec<Process>,
    _dir: tempfile::TempDir,
}

/// What came of connecting.
#[derive(Debug, Clone)]
pub struct Connected {
    /// Sessions that were welcomed.
    pub connected: u32,
    /// Attempts that were refused and made again.
    pub retried: u64,
    /// From when each was due until it was welcomed.
    pub took_us: Histogram<u64>,
    /// From the first until the last.
    pub elapsed: Duration,
}

/// What all agents have seen of a run.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Connections that stand.
    pub connected: u32,
    /// Connections that the other side ended, and why one of them was.
    pub closed: u64,
    pub why_closed: String,
    /// Deliveries.
    pub shown: u64,
    pub passed_over: u64,
    pub repeats: u64,
    /// The floor's frames.
    pub frames: u64,
    /// Messages that came again and were not shown again.
    pub resent: u64,
    /// Connections that were welcomed since the agents were started.
    pub opened: u64,
}

impl Seen {
    /// What became of `total` records.
    pub fn outcome(&self, total: u64) -> Outcome {
        let Self { shown, passed_over, repeats, .. } = *self;
        Outcome { shown, lost: total.saturating_sub(shown), passed_over, repeats }
    }
}

impl Agents {
    /// Those that are named; if none are, `local` processes of this machine.
    ///
    /// # Errors
    /// One does not start or cannot be reached.
    pub async fn start(named: &[String], local: usize) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut addresses = named.to_vec();
        let mut processes = Vec::new();
        if named.is_empty() {
            for number in 0..local {
                let (process, addresses_of) =
                    spawn(&dir, &format!("agent-{number}"), &["agent"]).await?;
                addresses.push(addresses_of[0].to_string());
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

    /// Handles, of which any number may ask at once.
    fn clients(&self) -> impl Iterator<Item = AgentClient<Channel>> {
        self.clients.iter().cloned()
    }

    /// Each agent's part of `request`, and the agent.
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
                part.sources =
                    (1..=SOURCES).map(|host| format!("127.0.{}.{host}", index + 1)).collect();
            }
            first += part.count;
            (client, part)
        };
        self.clients().enumerate().map(part).collect()
    }

    /// Connects users over all agents.
    ///
    /// # Errors
    /// Any of them failed.
    pub async fn connect(&self, request: &ConnectRequest) -> anyhow::Result<Connected> {
        let parts = self.parts(request).into_iter();
        let open = async |(mut client, part): (AgentClient<Channel>, _)| client.open(part).await;
        let replies = try_join_all(parts.map(open)).await?;
        merge(replies.into_iter().map(tonic::Response::into_inner))
    }

    /// Closes and opens connections at `rate` a second over all agents.
    ///
    /// # Errors
    /// One was not welcomed again.
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
        merge(replies.into_iter().map(tonic::Response::into_inner))
    }

    /// From now on deliveries are checked against this run.
    ///
    /// # Errors
    /// An agent is gone.
    pub async fn expect(&self, audit: &Audit) -> anyhow::Result<()> {
        let users = u32::try_from(audit.users())?;
        let (rate, starts_at_us) = audit.schedule().unwrap_or_default();
        let run = audit.run().to_owned();
        let burst = u32::try_from(audit.burst())?;
        let request = ExpectRequest { run, users, rate, starts_at_us, burst };
        let expect = |mut client: AgentClient<Channel>| {
            let request = request.clone();
            async move { client.expect(request).await }
        };
        try_join_all(self.clients().map(expect)).await?;
        Ok(())
    }

    /// The same agents, to be asked while these are busy.
    pub fn watch(&self) -> Watch {
        Watch(self.clients.clone())
    }

    /// The processes of those that were started here.
    pub fn pids(&self) -> Vec<u32> {
        self.local.iter().map(Process::pid).collect()
    }

    /// From when the run's messages were due until they were shown, microseconds, over all agents.
    ///
    /// # Errors
    /// An agent is gone.
    pub async fn latencies_us(&self) -> anyhow::Result<Histogram<u64>> {
        let ask = async |mut client: AgentClient<Channel>| client.latencies(Nothing {}).await;
        let each = self.clients().map(ask);
        let mut sum = histogram::new();
        for latencies in try_join_all(each).await? {
            histogram::add(&mut sum, &latencies.into_inner());
        }
        Ok(sum)
    }

    /// What they have seen.
    ///
    /// # Errors
    /// An agent is gone.
    pub async fn report(&self) -> anyhow::Result<Seen> {
        self.watch().report().await
    }

    /// Closes every connection at once.
    ///
    /// # Errors
    /// An agent is gone.
    pub async fn drop_all(&self) -> anyhow::Result<()> {
        let close = async |mut client: AgentClient<Channel>| client.close(Nothing {}).await;
        try_join_all(self.clients().map(close)).await?;
        Ok(())
    }
}

/// Asks agents what they have seen, and nothing else.
pub struct Watch(Vec<AgentClient<Channel>>);

impl Watch {
    /// What they have seen.
    ///
    /// # Errors
    /// An agent is gone.
    pub async fn report(&mut self) -> anyhow::Result<Seen> {
        let each = self.0.iter_mut().map(|client| client.report(Nothing {}));
        let mut seen = Seen::default();
        for report in try_join_all(each).await? {
            let report = report.into_inner();
            seen.connected += report.connected;
            seen.closed += report.closed;
            seen.shown += report.shown;
            seen.passed_over += report.passed_over;
            seen.repeats += report.repeats;
            seen.frames += report.frames;
            seen.resent += report.resent;
            seen.opened += report.opened;
            if !report.why_closed.is_empty() {
                seen.why_closed = report.why_closed;
            }
        }
        Ok(seen)
    }
}

fn merge(replies: impl Iterator<Item = ConnectReply>) -> anyhow::Result<Connected> {
    let mut sum =
        Connected { connected: 0, retried: 0, took_us: histogram::new(), elapsed: Duration::ZERO };
    for reply in replies {
        let ConnectReply { connected, failed, retried, took_us, elapsed_us, why } = reply;
        ensure!(failed == 0, "{failed} connections failed: {why}");
        sum.connected += connected;
        sum.retried += retried;
        histogram::add(&mut sum.took_us, &took_us.unwrap_or_default());
        sum.elapsed = sum.elapsed.max(Duration::from_micros(elapsed_us));
    }
    Ok(sum)
}

/// A running floor.
pub struct Floor {
    client: FloorClient<Channel>,
    process: Process,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Floor {
    /// Starts one that listens at this address of the machine.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(host: IpAddr) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let listen = SocketAddr::new(host, 0).to_string();
        let (process, addresses) = spawn(&dir, "floor", &["floor", "--listen", &listen]).await?;
        let [steering, address] = addresses[..] else { anyhow::bail!("two listeners") };
        let client = FloorClient::connect(format!("http://{steering}")).await?;
        Ok(Self { client, process, address, _dir: dir })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// How to connect to it; nothing is said about users.
    pub fn way(&self) -> ConnectRequest {
        ConnectRequest { nodes: vec![self.address.to_string()], floor: true, ..Default::default() }
    }

    /// To every connection.
    ///
    /// # Errors
    /// It is gone.
    pub async fn broadcast(&mut self, count: u32, payload_bytes: u32) -> anyhow::Result<()> {
        self.client.broadcast(BroadcastRequest { count, payload_bytes }).await?;
        Ok(())
    }
}

/// Starts this program once more with these arguments; tells where it listens.
async fn spawn(
    dir: &tempfile::TempDir,
    name: &str,
    arguments: &[&str],
) -> anyhow::Result<(Process, Vec<SocketAddr>)> {
    let log = dir.path().join(name);
    let mut process = Process::spawn(name, std::env::current_exe()?, &log, |command| {
        command.args(arguments);
    })?;
    let begun = Instant::now();
    loop {
        let output = process.output();
        let line = output.lines().find_map(|line| line.strip_prefix("listening "));
        if let Some(line) = line.filter(|_| output.ends_with('\n')) {
            let addresses = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
            return Ok((process, addresses));
        }
        process.must_run()?;
        ensure!(begun.elapsed() < START_LIMIT, "{name} does not start: {output}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
