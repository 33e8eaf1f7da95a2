//! Ten thousand devices that read one byte a second, and what others notice of them. The floor is the same
//! with ten thousand that read as they should: what is left is what slowness does.
//!
//! Whoever reads so slowly cannot answer a ping behind what its socket holds, and would be closed for it
//! (4003) before the run is over. These ask to be pinged as seldom as a device may, so that the node has to
//! hold them, with their sockets full: how many it held to the end is part of the result.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, ensure};
use barid_core::CloseCode;
use barid_runtime::exposition::Metrics;
use hdrhistogram::Histogram;

use super::trial::{Both, Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::controller::Agents;
use crate::drive::{all_open, drive, must_be_clean};
use crate::histogram::quantile_ms;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::producer::{Business, Pace, Plan};
use crate::rpc::ConnectRequest;
use crate::target::Target;

/// Devices in the way, of an app of their own, and what each is sent: with the re-sends more than sockets
/// hold, and less than the node has room for (`limits.node_queued_bytes_max`).
const CROWD: u32 = 10_000;
const CROWD_APP: &str = "crowd";
const CROWD_RATE: u32 = 500;
const CROWD_PAYLOAD_BYTES: u32 = 24 << 10;
/// The longest that a node grants (`heartbeat.interval_max_seconds`).
const CROWD_PING_INTERVAL_MS: u32 = 600_000;
/// Others, which are measured.
const USERS: u32 = 500;
const RATE: u32 = 500;
const PAYLOAD_BYTES: u32 = 200;
const SECONDS: u64 = 40;
const MIB: f64 = (1 << 20) as f64;
/// How long the crowd is given to settle before the measurement, seconds.
const PAUSE: u64 = 2;

struct Noticed {
    times_us: Histogram<u64>,
    crowd: Crowd,
}

/// What the node says of the crowd when all of the others have what was sent to them, and what the crowd does.
struct Crowd {
    resident_mib: f64,
    queued_mib: f64,
    /// Its sessions that are there still.
    held: f64,
    /// Sessions that the node closed, by code; those that left are among them.
    closed: Vec<(&'static str, f64)>,
    /// Connections of which the crowd has seen the end: a slow one does long after.
    seen_closed: u64,
}

impl Crowd {
    async fn of(server: &mut Server, crowd: &Agents) -> anyhow::Result<Self> {
        let Server::Barid(Target::Sandbox(sandbox)) = server else { bail!("no cluster") };
        let told = Metrics::parse(&sandbox.metrics().await?);
        let resident_mib = server.must_know().await?.resident_bytes as f64 / MIB;
        let codes = CloseCode::ALL.iter().map(|code| code.as_str()).chain(["device"]);
        let count = |code| told.sum_of("barid_access_closes_total", "code", code);
        Ok(Self {
            resident_mib,
            queued_mib: told.sum("barid_access_queued_bytes") / MIB,
            held: told.sum("barid_access_sessions") - f64::from(USERS),
            closed: codes.map(|code| (code, count(code))).filter(|(_, n)| *n > 0.0).collect(),
            seen_closed: crowd.report().await?.closed,
        })
    }

    /// By the node, with any code but these.
    fn closed_but(&self, codes: &[CloseCode]) -> f64 {
        let others = |name: &str| codes.iter().all(|code| code.as_str() != name);
        // Of nothing, floats sum up to -0.
        self.closed.iter().filter(|(name, _)| others(name)).fold(0.0, |sum, (_, count)| sum + count)
    }

    fn closed_with(&self, code: CloseCode) -> f64 {
        self.closed_but(&[]) - self.closed_but(&[code])
    }

    fn say(&self, what: &str) -> std::io::Result<()> {
        let closed: Vec<_> =
            self.closed.iter().map(|(code, count)| format!("{count} {code}")).collect();
        let closed = if closed.is_empty() { "none".to_owned() } else { closed.join(", ") };
        let Self { held, queued_mib, seen_closed, .. } = self;
        say(&format!(
            "{what}: {held} of {CROWD} held at the end, {queued_mib:.0} MiB waited for them; the node \
             closed {closed}; {seen_closed} have seen their end"
        ))
    }
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    ensure!(!trial.options.target.is_given(), "it is measured with a cluster of its own");
    let mut server = trial.barid().await?;
    let quick = beside(trial, &mut server, false).await?;
    quick.crowd.say("quick")?;
    drop(server);
    let mut server = trial.barid().await?;
    let slow = beside(trial, &mut server, true).await?;
    slow.crowd.say("slow")?;
    let both = Both { floor: Some(quick), barid: slow };
    let quantile = |share| move |noticed: &Noticed| quantile_ms(&noticed.times_us, share);
    let (slow, silent) = (CloseCode::SlowConsumer, CloseCode::Heartbeat);
    Ok(vec![
        both.row("beside_slow_p50_ms", "ms", quantile(0.5)),
        both.row("beside_slow_p99_ms", "ms", quantile(0.99)),
        both.row("beside_slow_memory_mib", "MiB", |noticed| noticed.crowd.resident_mib),
        both.row("slow_queued_mib", "MiB", |noticed| noticed.crowd.queued_mib),
        both.row("slow_held", "", |noticed| noticed.crowd.held)
            .against(Goal::AtLeast(CROWD.into())),
        both.row("slow_closed_4002", "", |noticed| noticed.crowd.closed_with(slow)),
        both.row("slow_closed_4003", "", |noticed| noticed.crowd.closed_with(silent)),
        both.row("slow_closed_other", "", |noticed| noticed.crowd.closed_but(&[slow, silent])),
    ])
}

async fn beside(trial: &mut Trial<'_>, server: &mut Server, slow: bool) -> anyhow::Result<Noticed> {
    let way = ConnectRequest { at_once_max: 64, ..server.way().await? };
    // Some may be closed for being slow, which fails nobody else's run.
    let crowd = Agents::start(&[], trial.options.local_agents.into()).await?;
    trial.live.phase("connecting");
    let (app, ping_interval_ms) = (CROWD_APP.to_owned(), CROWD_PING_INTERVAL_MS);
    crowd
        .connect(&ConnectRequest { count: CROWD, app, slow, ping_interval_ms, ..way.clone() })
        .await?;
    trial.agents.connect(&ConnectRequest { count: USERS, ..way }).await?;
    trial.settle(PAUSE).await;

    let Server::Barid(target) = &*server else { anyhow::bail!("no cluster") };
    let plan = target.plan(PAYLOAD_BYTES, 0)?;
    let business = Business::open(&plan).await?;
    let noise =
        Plan { app: CROWD_APP.into(), payload_bytes: CROWD_PAYLOAD_BYTES, linger_ms: 5, ..plan };
    let noise = Business::open(&noise).await?;
    let audit_of_crowd = Arc::new(Audit::new(CROWD, Some(CROWD_RATE)));
    crowd.expect(&audit_of_crowd).await?;
    audit_of_crowd.start_in(Duration::ZERO);
    let noisy = Pace::Scheduled(u64::from(CROWD_RATE) * SECONDS);
    let audit = Arc::new(Audit::new(USERS, Some(RATE)));
    let pace = Pace::Scheduled(u64::from(RATE) * SECONDS);
    trial.live.phase("pushing");
    let making = noise.produce(noisy, &audit_of_crowd);
    let driving = drive(&trial.agents, &business, pace, &audit, SETTLE, all_open);
    let _ = tokio::try_join!(making, driving)?;
    must_be_clean(&trial.agents, &audit).await?;
    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies(if slow { "push, others slow" } else { "push" }, &times_us);
    let of_crowd = Crowd::of(server, &crowd).await?;
    trial.agents.drop_all().await?;
    Ok(Noticed { times_us, crowd: of_crowd })
}
