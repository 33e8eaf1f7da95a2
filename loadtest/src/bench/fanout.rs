//! Fan-out to every session of a node: in bursts, and at a steady rate. The bench is the dispatcher.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{bail, ensure};
use barid_testkit::grpc::{NodeStream, audience_entry};
use bytes::Bytes;
use tokio::time::{Instant, sleep, sleep_until};

use super::trial::{Both, Server, Trial};
use crate::audit::Audit;
use crate::controller::Agents;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::rpc::ConnectRequest;
use crate::target::Target;

/// Bytes of a message.
const PAYLOAD_BYTES: u32 = 100;
/// Messages at once; so many times, and once before to warm up.
const BURST: u32 = 100;
const BURSTS: u32 = 5;
/// Messages a second one by one, and for how many seconds.
const STEADY_PER_S: u32 = 10;
const STEADY_SECONDS: u32 = 20;
/// Of the floor's CPU time, what a delivery may take.
const STEADY_SHARE: f64 = 1.2;
/// Handshakes under way at once.
const AT_ONCE_MAX: u32 = 256;
/// How long the last delivery may take, and how often the agents are asked.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

struct Cost {
    burst_per_s: f64,
    steady_cpu_us: f64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Cost> = trial.both(cost).await?;
    let burst = both.row("fanout_burst_per_s", "1/s", |cost| cost.burst_per_s);
    let steady = both.row("fanout_steady_cpu_us", "µs", |cost| cost.steady_cpu_us);
    let Some(floor) = &both.floor else { return Ok(vec![burst, steady]) };
    Ok(vec![
        burst.against(Goal::AtLeast(floor.burst_per_s)),
        steady.against(Goal::AtMost(STEADY_SHARE * floor.steady_cpu_us)),
    ])
}

async fn cost(trial: &mut Trial<'_>, server: &mut Server) -> anyhow::Result<Cost> {
    let (count, rate) = (trial.options.sessions, trial.options.rate);
    let connect = ConnectRequest { count, rate, at_once_max: AT_ONCE_MAX, ..server.way().await? };
    let mut source = Source::of(server).await?;
    trial.agents.expect(&Audit::new(count, None)).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.settle(trial.options.settle_seconds).await;
    let sessions = u64::from(count);
    let mut total = 0;
    let mut bursts = Duration::ZERO;
    for burst in 0..=BURSTS {
        trial.live.phase("bursts");
        let begun = Instant::now();
        source.broadcast(server, BURST).await?;
        total += sessions * u64::from(BURST);
        delivered(&mut trial.agents, total).await?;
        if burst > 0 {
            bursts += begun.elapsed();
        }
        trial.settle(1).await;
    }
    let burst_per_s = f64::from(BURSTS * BURST) * f64::from(count) / bursts.as_secs_f64();
    say(&format!("bursts: {burst_per_s:.0} deliveries a second"))?;
    trial.live.phase("steady");
    let (begun, before) = (Instant::now(), server.must_know().await?.cpu_s);
    let messages = STEADY_PER_S * STEADY_SECONDS;
    for message in 0..messages {
        sleep_until(begun + Duration::from_secs(1) * message / STEADY_PER_S).await;
        source.broadcast(server, 1).await?;
    }
    total += sessions * u64::from(messages);
    delivered(&mut trial.agents, total).await?;
    let spent = server.must_know().await?.cpu_s - before;
    let steady_cpu_us = spent * 1e6 / (f64::from(messages) * f64::from(count));
    say(&format!("steady: {steady_cpu_us:.2} µs of CPU a delivery"))?;
    trial.settle(1).await;
    let seen = trial.agents.report().await?;
    ensure!(seen.frames == total, "{} deliveries of {total}", seen.frames);
    trial.agents.drop_all().await?;
    Ok(Cost { burst_per_s, steady_cpu_us })
}

/// Where messages come from.
enum Source {
    /// The floor makes them itself.
    Floor,
    Dispatcher(Box<Dispatcher>),
}

impl Source {
    async fn of(server: &mut Server) -> anyhow::Result<Self> {
        let Server::Barid(target) = server else { return Ok(Self::Floor) };
        let Target::Sandbox(sandbox) = target else {
            bail!("the bench is the dispatcher here: that is for a cluster of its own");
        };
        let dispatcher = Dispatcher::connect(sandbox.dispatchers_address().await?).await?;
        Ok(Self::Dispatcher(Box::new(dispatcher)))
    }

    async fn broadcast(&mut self, server: &mut Server, count: u32) -> anyhow::Result<()> {
        match (self, server) {
            (Self::Floor, Server::Floor(floor)) => floor.broadcast(count, PAYLOAD_BYTES).await,
            (Self::Dispatcher(dispatcher), _) => dispatcher.broadcast(count, PAYLOAD_BYTES).await,
            (Self::Floor, Server::Barid(_)) => bail!("another server than it began with"),
        }
    }
}

/// Waits until the agents have seen so many deliveries. That each session sees each message once and in
/// order is theirs to check: they hang up on who does not keep to it.
async fn delivered(agents: &mut Agents, total: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let seen = agents.report().await?;
        ensure!(seen.closed == 0, "{} sessions were closed: {}", seen.closed, seen.why_closed);
        if seen.frames >= total {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{} deliveries of {total}", seen.frames);
        sleep(LOOK).await;
    }
}

/// A dispatcher of one node.
struct Dispatcher {
    stream: NodeStream,
    seq: u64,
}

impl Dispatcher {
    async fn connect(node: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { stream: NodeStream::connect(node).await?, seq: 0 })
    }

    /// In one batch, to everyone.
    async fn broadcast(&mut self, count: u32, payload_bytes: u32) -> anyhow::Result<()> {
        let entries = (0..count).map(|_| self.next(payload_bytes)).collect();
        self.stream.fan_out(barid_testkit::cluster::APP, "", entries).await
    }

    fn next(&mut self, payload_bytes: u32) -> Bytes {
        self.seq += 1;
        let payload = Bytes::from(vec![b'x'; payload_bytes as usize]);
        audience_entry(self.seq, &format!("fanout-{}", self.seq), payload, |_| ())
    }
}
