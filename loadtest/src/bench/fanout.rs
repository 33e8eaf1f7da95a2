//! Fan-out to every session of a node, in bursts and at a steady rate. The load tool acts as the dispatcher; in
//! `audience` it acts as a business, so that messages pass Kafka and the mailbox of everyone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use barid_testkit::grpc::{NodeStream, audience_entry};
use bytes::Bytes;
use tokio::time::{Instant, sleep, sleep_until};

use super::trial::{Both, Server, Trial};
use crate::audit::Audit;
use crate::controller::Agents;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::producer::Business;
use crate::rpc::ConnectRequest;
use crate::target::Target;

const PAYLOAD_BYTES: u32 = 100;
/// Messages sent at once.
const BURST: u32 = 100;
/// Bursts that are measured, after one that is not.
const BURSTS: u32 = 5;
/// Messages per second, sent one by one.
const STEADY_PER_S: u32 = 10;
const STEADY_SECONDS: u32 = 20;
/// The goal for CPU time per delivery, relative to the floor.
const STEADY_RATIO: f64 = 1.2;
/// The goal for bursts of stored messages, relative to fan-out alone.
const STORED_RATIO: f64 = 0.8;
const HANDSHAKES_MAX: u32 = 256;
/// How long the last delivery may take.
const LIMIT: Duration = Duration::from_secs(60);
const REPORT_INTERVAL: Duration = Duration::from_millis(5);

/// What fan-out costs a server.
struct Cost {
    /// Deliveries per second of bursts.
    burst_per_s: f64,
    /// CPU time of the server per delivery at a steady rate.
    steady_cpu_us: f64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Cost> = trial
        .both(async |trial, server| {
            let source = Source::new(server).await?;
            cost(trial, server, source).await
        })
        .await?;
    let burst = both.row("fanout_burst_per_s", "1/s", |cost| cost.burst_per_s);
    let steady = both.row("fanout_steady_cpu_us", "µs", |cost| cost.steady_cpu_us);
    let Some(floor) = &both.floor else { return Ok(vec![burst, steady]) };
    Ok(vec![
        burst.against(Goal::AtLeast(floor.burst_per_s)),
        steady.against(Goal::AtMost(STEADY_RATIO * floor.steady_cpu_us)),
    ])
}

/// Messages for everyone that are stored, beside fan-out alone on another node.
pub async fn stored(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    trial.needs_own_cluster()?;
    let mut floor = None;
    if !trial.options.no_floor {
        let mut server = trial.barid().await?;
        let source = Source::new(&mut server).await?;
        floor = Some(cost(trial, &mut server, source).await.context("fan-out alone")?);
    }
    let mut server = trial.barid().await?;
    let source = Source::business(&server).await?;
    let both = Both { floor, barid: cost(trial, &mut server, source).await? };
    let burst = both.row("audience_burst_per_s", "1/s", |cost| cost.burst_per_s);
    let steady = both.row("audience_steady_cpu_us", "µs", |cost| cost.steady_cpu_us);
    let Some(floor) = &both.floor else { return Ok(vec![burst, steady]) };
    Ok(vec![burst.against(Goal::AtLeast(STORED_RATIO * floor.burst_per_s)), steady])
}

async fn cost(
    trial: &mut Trial<'_>,
    server: &mut Server,
    mut source: Source,
) -> anyhow::Result<Cost> {
    let (count, rate) = (trial.options.sessions, trial.options.rate);
    let request = server.connect_request().await?;
    let connect = ConnectRequest { count, rate, at_once_max: HANDSHAKES_MAX, ..request };
    trial.agents.expect(&Audit::new(count, None), None).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.settle(trial.options.settle_seconds).await;
    let sessions = u64::from(count);
    let mut total = trial.agents.report().await?.delivered;
    let mut bursts = Duration::ZERO;
    for burst in 0..=BURSTS {
        trial.live.phase("bursts");
        let started = Instant::now();
        source.broadcast(server, BURST).await?;
        total += sessions * u64::from(BURST);
        delivered(&mut trial.agents, total).await?;
        if burst > 0 {
            bursts += started.elapsed();
        }
        trial.settle(1).await;
    }
    let burst_per_s = f64::from(BURSTS * BURST) * f64::from(count) / bursts.as_secs_f64();
    say(&format!("bursts: {burst_per_s:.0} deliveries per second"))?;
    trial.live.phase("steady");
    let (started, before) = (Instant::now(), server.known_usage().await?.cpu_s);
    let messages = STEADY_PER_S * STEADY_SECONDS;
    for message in 0..messages {
        sleep_until(started + Duration::from_secs(1) * message / STEADY_PER_S).await;
        source.broadcast(server, 1).await?;
    }
    total += sessions * u64::from(messages);
    delivered(&mut trial.agents, total).await?;
    let spent = server.known_usage().await?.cpu_s - before;
    let steady_cpu_us = spent * 1e6 / (f64::from(messages) * f64::from(count));
    say(&format!("steady: {steady_cpu_us:.2} µs of CPU time per delivery"))?;
    trial.settle(1).await;
    let seen = trial.agents.report().await?;
    ensure!(seen.delivered == total, "{} deliveries, expected {total}", seen.delivered);
    trial.agents.drop_all().await?;
    Ok(Cost { burst_per_s, steady_cpu_us })
}

/// The origin of messages.
enum Source {
    /// The floor generates them itself.
    Floor,
    Dispatcher(Box<Dispatcher>),
    /// Produces to Kafka; the number of the next message.
    Business(Arc<Business>, u64),
}

impl Source {
    async fn new(server: &mut Server) -> anyhow::Result<Self> {
        let Server::Barid(target) = server else { return Ok(Self::Floor) };
        let Target::Sandbox(sandbox) = target else {
            bail!("this scenario needs a cluster of its own; remove --nodes");
        };
        let dispatcher = Dispatcher::connect(sandbox.dispatchers_address().await?).await?;
        Ok(Self::Dispatcher(Box::new(dispatcher)))
    }

    async fn business(server: &Server) -> anyhow::Result<Self> {
        let Server::Barid(target) = server else { bail!("the floor has no Kafka") };
        Ok(Self::Business(Business::open(&target.plan(PAYLOAD_BYTES, 0)?).await?, 0))
    }

    async fn broadcast(&mut self, server: &mut Server, count: u32) -> anyhow::Result<()> {
        match (self, server) {
            (Self::Floor, Server::Floor(floor)) => floor.broadcast(count, PAYLOAD_BYTES).await,
            (Self::Dispatcher(dispatcher), _) => dispatcher.broadcast(count, PAYLOAD_BYTES).await,
            (Self::Business(business, next), _) => {
                let first = *next;
                *next += u64::from(count);
                business.broadcast(first..*next).await
            }
            (Self::Floor, Server::Barid(_)) => bail!("the source belongs to another server"),
        }
    }
}

/// Waits until the agents count `total` deliveries. Agents close a session that does not receive each
/// message once and in order.
async fn delivered(agents: &mut Agents, total: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let seen = agents.report().await?;
        ensure!(seen.closed == 0, "{} sessions closed: {}", seen.closed, seen.why_closed);
        if seen.delivered >= total {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{} deliveries, expected {total}", seen.delivered);
        sleep(REPORT_INTERVAL).await;
    }
}

/// A dispatcher for one node.
struct Dispatcher {
    stream: NodeStream,
    seq: u64,
}

impl Dispatcher {
    async fn connect(node: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { stream: NodeStream::connect(node).await?, seq: 0 })
    }

    /// Sends one batch to everyone.
    async fn broadcast(&mut self, count: u32, payload_bytes: u32) -> anyhow::Result<()> {
        let entries = (0..count).map(|_| self.next(payload_bytes)).collect();
        self.stream.fan_out(barid_testkit::token::APP, "", entries).await
    }

    fn next(&mut self, payload_bytes: u32) -> Bytes {
        self.seq += 1;
        let payload = Bytes::from(vec![b'x'; payload_bytes as usize]);
        audience_entry(self.seq, &format!("fanout-{}", self.seq), payload, |_| ())
    }
}
