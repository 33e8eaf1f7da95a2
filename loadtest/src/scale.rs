//! Many connections on several access nodes, and business messages for them at a fixed rate: what
//! latency, memory and CPU time that takes, by process.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use barid_testkit::Role;
use clap::Args;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::audit::{Audit, Outcome, SETTLE};
use crate::controller::{Agents, Connected, Seen};
use crate::cpu;
use crate::drive::drive;
use crate::histogram::{mean_ms, quantile_ms};
use crate::hops;
use crate::live::{Live, say};
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;
use crate::sandbox::{CpuTimes, Sandbox, Shape, role};
use crate::table::Table;
use crate::usage::Usage;

/// Handshakes under way at once.
const AT_ONCE_MAX: u32 = 256;
/// How long a connection that is refused is tried again, ms at most between two attempts.
const RETRY_MAX_MS: u32 = 2_000;

/// How it is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Access nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    nodes: u16,
    /// Agents that run already, host:port; without any, some are started here.
    #[arg(long, value_delimiter = ',')]
    agents: Vec<String>,
    /// How many are started here.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    local_agents: u8,
    /// Sessions over all nodes, one user each. A process holds some 19,000 where it may have 20,000 open
    /// files: so many nodes and agents are needed.
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    sessions: u32,
    /// Sessions begun a second.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connect_rate: u32,
    /// Records a second, for all users in turn.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    rate: u32,
    /// How long is measured, seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How long the cluster works at that rate before, seconds.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    warmup_seconds: u64,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// How long records wait in the business's producer for others of their batch, ms; it counts into the
    /// latency.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    linger_ms: u32,
    /// Prints the process ids, and waits so many seconds with all connections before it measures, for who wants
    /// to attach a profiler.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    attach_seconds: u64,
    /// Where the result goes.
    #[arg(long, default_value = "target/bench/scale.json")]
    out: PathBuf,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
struct Report {
    nodes: u16,
    agents: usize,
    sessions: u32,
    rate_per_s: u32,
    payload_bytes: u32,
    seconds: u64,
    /// All sessions, from the first begun to the last welcomed.
    connected_in_s: f64,
    connect_p99_ms: f64,
    /// Attempts that were refused and made again.
    connects_retried: u64,
    #[serde(flatten)]
    outcome: Outcome,
    /// Messages that came again and were not shown again.
    resent: u64,
    /// Sessions that a node closed.
    closed: u64,
    latency_mean_ms: f64,
    latency_p50_ms: f64,
    latency_p90_ms: f64,
    latency_p99_ms: f64,
    latency_p999_ms: f64,
    latency_max_ms: f64,
    hops: Table,
    /// By role: resident memory and CPU time with all connections idle, memory at the end, CPU time while
    /// messages flow.
    processes: Table,
}

/// Measures and prints; `false` if something was not delivered once and in order.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let report = measure(options).await?;
    if let Some(directory) = options.out.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let json = serde_json::to_string_pretty(&report)?;
    std::fs::write(&options.out, json + "\n")
        .with_context(|| format!("writing {}", options.out.display()))?;
    use std::io::Write as _;
    std::io::stdout().lock().write_all(report.to_string().as_bytes())?;
    Ok(report.outcome.is_clean() && report.closed == 0)
}

async fn measure(options: &Options) -> anyhow::Result<Report> {
    let mut agents = Agents::start(&options.agents, options.local_agents.into()).await?;
    let mut sandbox = Sandbox::of(Shape { access_nodes: options.nodes.into(), tls: false }).await?;
    let access = sandbox.pids().iter().filter(|(name, _)| role(name) == Role::Access.name());
    let live = Live::start("scale", agents.watch());
    live.server("barid", Usage::Processes(access.map(|(_, pid)| *pid).collect()));
    let connected = connect(options, &mut sandbox, &mut agents, &live).await?;
    say(&format!("{:?}", sandbox.pids()))?;
    sleep(Duration::from_secs(options.attach_seconds)).await;

    let mut meter = Meter::start(&sandbox, &agents)?;
    live.phase("idling");
    let quiet = options.warmup_seconds.max(10);
    sleep(Duration::from_secs(quiet)).await;
    let idle_cores = meter.cores(&sandbox, &agents)?;
    let idle_mib = resident_mib(&sandbox, &agents)?;
    say(&format!("idle: {}", listed(&idle_cores, "cores")))?;

    let business = Business::open(&sandbox.plan(options.payload_bytes, options.linger_ms)).await?;
    if options.warmup_seconds > 0 {
        live.phase("warming up");
        push(options, options.warmup_seconds, &business, &mut agents).await?;
    }
    let before = sandbox.metrics().await?;
    let mut meter = Meter::start(&sandbox, &agents)?;
    live.phase("pushing");
    let (seen, outcome) = push(options, options.seconds, &business, &mut agents).await?;
    let cores = meter.cores(&sandbox, &agents)?;
    let end_mib = resident_mib(&sandbox, &agents)?;
    let mut processes =
        Table::new("process", &["idle_mib", "end_mib", "idle_cores", "pushing_cores"]);
    for name in cores.keys() {
        let figures = [&idle_mib, &end_mib, &idle_cores, &cores];
        processes.row(name, figures.map(|figure| figure.get(name).copied()));
    }
    let latencies_us = agents.latencies_us().await?;
    let latency_mean_ms = mean_ms(&latencies_us);
    let latency = |share| quantile_ms(&latencies_us, share);
    Ok(Report {
        nodes: options.nodes,
        agents: if options.agents.is_empty() {
            options.local_agents.into()
        } else {
            options.agents.len()
        },
        sessions: seen.connected,
        rate_per_s: options.rate,
        payload_bytes: options.payload_bytes,
        seconds: options.seconds,
        connected_in_s: connected.elapsed.as_secs_f64(),
        connect_p99_ms: quantile_ms(&connected.took_us, 0.99),
        connects_retried: connected.retried,
        outcome,
        resent: seen.resent,
        closed: seen.closed,
        latency_mean_ms,
        latency_p50_ms: latency(0.5),
        latency_p90_ms: latency(0.9),
        latency_p99_ms: latency(0.99),
        latency_p999_ms: latency(0.999),
        latency_max_ms: latency(1.0),
        hops: hops::table(&before, &sandbox.metrics().await?, latency_mean_ms),
        processes,
    })
}

/// Connects everybody.
async fn connect(
    options: &Options,
    sandbox: &mut Sandbox,
    agents: &mut Agents,
    live: &Live,
) -> anyhow::Result<Connected> {
    let request = ConnectRequest {
        count: options.sessions,
        rate: options.connect_rate,
        at_once_max: AT_ONCE_MAX,
        retry_max_ms: RETRY_MAX_MS,
        ..sandbox.way().await?
    };
    live.phase("connecting");
    let connected = agents.connect(&request).await?;
    say(&format!(
        "{} sessions in {:.0} s, {} attempts refused and made again",
        connected.connected,
        connected.elapsed.as_secs_f64(),
        connected.retried
    ))?;
    Ok(connected)
}

/// Produces for so many seconds, and waits until everything has settled.
async fn push(
    options: &Options,
    seconds: u64,
    business: &Arc<Business>,
    agents: &mut Agents,
) -> anyhow::Result<(Seen, Outcome)> {
    let total = u64::from(options.rate) * seconds;
    let audit = Arc::new(Audit::new(options.sessions, Some(options.rate)));
    let (_, seen) =
        drive(agents, business, Pace::Scheduled(total), &audit, SETTLE, |_| Ok(())).await?;
    let outcome = seen.outcome(total);
    let why =
        if seen.closed > 0 { format!("; closed: {}", seen.why_closed) } else { String::new() };
    say(&format!("{outcome}{why}"))?;
    Ok((seen, outcome))
}

/// CPU time between two moments.
struct Meter {
    since: Instant,
    before: CpuTimes,
}

impl Meter {
    fn start(sandbox: &Sandbox, agents: &Agents) -> anyhow::Result<Self> {
        Ok(Self { since: Instant::now(), before: sandbox.cpu_times(agents)? })
    }

    fn cores(&mut self, sandbox: &Sandbox, agents: &Agents) -> anyhow::Result<CpuTimes> {
        let (elapsed, mut spent) = (self.since.elapsed(), sandbox.cpu_times(agents)?);
        for (name, seconds) in &mut spent {
            *seconds -= self.before.get(name).copied().unwrap_or_default();
            *seconds /= elapsed.as_secs_f64();
        }
        Ok(spent)
    }
}

fn resident_mib(sandbox: &Sandbox, agents: &Agents) -> anyhow::Result<BTreeMap<String, f64>> {
    sandbox.by_role(agents, |pid| Ok(cpu::resident_bytes(pid)? as f64 / (1024.0 * 1024.0)))
}

fn listed(values: &BTreeMap<String, f64>, unit: &str) -> String {
    let each: Vec<_> = values.iter().map(|(name, value)| format!("{name} {value:.2}")).collect();
    format!("{} {unit}", each.join(", "))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nodes, agents, sessions, rate_per_s, payload_bytes, seconds, outcome, .. } =
            self;
        writeln!(
            f,
            "{sessions} sessions on {nodes} nodes, held by {agents} agents; {rate_per_s} messages of \
             {payload_bytes} bytes a second for {seconds} s"
        )?;
        let Self { connected_in_s, connect_p99_ms, connects_retried, resent, closed, .. } = self;
        writeln!(
            f,
            "connected in {connected_in_s:.0} s, p99 {connect_p99_ms:.0} ms, {connects_retried} refused and \
             tried again\n\
             {outcome}; sent again though shown: {resent}; sessions closed: {closed}"
        )?;
        writeln!(
            f,
            "produce to device: p50 {:.1} ms   p90 {:.1} ms   p99 {:.1} ms   p99.9 {:.1} ms   max {:.0} ms",
            self.latency_p50_ms,
            self.latency_p90_ms,
            self.latency_p99_ms,
            self.latency_p999_ms,
            self.latency_max_ms,
        )?;
        writeln!(f, "\n{}\n\n{}", self.hops, self.processes)
    }
}
