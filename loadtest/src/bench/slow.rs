//! The effect of 10,000 devices that read one byte per second on other devices. The floor is the same with
//! 10,000 devices that read everything, so the difference is the effect of slowness.
//!
//! A device that reads so slowly does not answer pings, because they wait behind other data, and would be
//! closed with 4003 during the run. These devices ask for the longest ping interval, so that the node has to
//! hold them with full sockets. How many it held to the end is part of the result.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use barid_core::CloseCode;
use barid_runtime::exposition::Metrics;
use hdrhistogram::Histogram;

use super::trial::{Both, Server, Trial};
use crate::audit::{Audit, SETTLE, Start};
use crate::controller::Agents;
use crate::drive::{drive, must_be_clean};
use crate::histogram::quantile_ms;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::producer::{Business, Pace, Plan};
use crate::rpc::ConnectRequest;
use crate::target::Target;

/// Slow devices, with an app of their own. With re-sends, their messages exceed what sockets hold, and stay
/// below `limits.node_queued_bytes_max`.
const CROWD: u32 = 10_000;
const CROWD_APP: &str = "crowd";
const CROWD_RATE: u32 = 500;
const CROWD_PAYLOAD_BYTES: u32 = 24 << 10;
/// `heartbeat.interval_max_seconds`, the longest interval that a node grants.
const CROWD_PING_INTERVAL_MS: u32 = 600_000;
/// Devices that are measured.
const USERS: u32 = 500;
const RATE: u32 = 500;
const PAYLOAD_BYTES: u32 = 200;
const SECONDS: u64 = 40;
const MIB: f64 = (1 << 20) as f64;
const PAUSE_SECONDS: u64 = 2;

struct Effect {
    times_us: Histogram<u64>,
    crowd: Crowd,
}

/// The crowd's state when the measured devices have all their messages, by the node's metrics.
struct Crowd {
    resident_mib: f64,
    queued_mib: f64,
    /// Sessions that are open.
    held: f64,
    /// Sessions that ended, by close code.
    closed: Vec<(&'static str, f64)>,
    /// Connections whose end the crowd has seen; a slow device sees it late.
    seen_closed: u64,
}

impl Crowd {
    async fn read(server: &mut Server, crowd: &Agents) -> anyhow::Result<Self> {
        let Server::Barid(Target::Sandbox(sandbox)) = server else { bail!("no cluster") };
        let metrics = Metrics::parse(&sandbox.metrics().await?);
        let resident_mib = server.known_usage().await?.resident_bytes as f64 / MIB;
        let codes = CloseCode::ALL.iter().map(|code| code.as_str()).chain(["device"]);
        let count = |code| metrics.sum_of("barid_access_closes_total", "code", code);
        Ok(Self {
            resident_mib,
            queued_mib: metrics.sum("barid_access_queued_bytes") / MIB,
            held: metrics.sum("barid_access_sessions") - f64::from(USERS),
            closed: codes.map(|code| (code, count(code))).filter(|(_, n)| *n > 0.0).collect(),
            seen_closed: crowd.report().await?.closed,
        })
    }

    /// Sessions closed with any code but these.
    fn closed_but(&self, codes: &[CloseCode]) -> f64 {
        let others = |name: &str| codes.iter().all(|code| code.as_str() != name);
        // The sum of no floats is -0.
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
            "{what}: {held} of {CROWD} held at the end, {queued_mib:.0} MiB queued for them; the node \
             closed {closed}; {seen_closed} devices have seen it"
        ))
    }
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    trial.needs_own_cluster()?;
    let mut server = trial.barid().await?;
    let quick = beside(trial, &mut server, false).await?;
    quick.crowd.say("quick")?;
    drop(server);
    let mut server = trial.barid().await?;
    let slow = beside(trial, &mut server, true).await?;
    slow.crowd.say("slow")?;
    let both = Both { floor: Some(quick), barid: slow };
    let quantile = |share| move |effect: &Effect| quantile_ms(&effect.times_us, share);
    let (slow, silent) = (CloseCode::SlowConsumer, CloseCode::Heartbeat);
    Ok(vec![
        both.row("beside_slow_p50_ms", "ms", quantile(0.5)),
        both.row("beside_slow_p99_ms", "ms", quantile(0.99)),
        both.row("beside_slow_memory_mib", "MiB", |effect| effect.crowd.resident_mib),
        both.row("slow_queued_mib", "MiB", |effect| effect.crowd.queued_mib),
        both.row("slow_held", "", |effect| effect.crowd.held).against(Goal::AtLeast(CROWD.into())),
        both.row("slow_closed_4002", "", |effect| effect.crowd.closed_with(slow)),
        both.row("slow_closed_4003", "", |effect| effect.crowd.closed_with(silent)),
        both.row("slow_closed_other", "", |effect| effect.crowd.closed_but(&[slow, silent])),
    ])
}

async fn beside(trial: &mut Trial<'_>, server: &mut Server, slow: bool) -> anyhow::Result<Effect> {
    let connect = ConnectRequest { at_once_max: 64, ..server.connect_request().await? };
    // Agents of its own: slow devices that are closed do not fail the measured run.
    let crowd = Agents::start(&[], trial.options.local_agents.into()).await?;
    trial.live.phase("connecting");
    let (app, ping_interval_ms) = (CROWD_APP.to_owned(), CROWD_PING_INTERVAL_MS);
    crowd
        .connect(&ConnectRequest { count: CROWD, app, slow, ping_interval_ms, ..connect.clone() })
        .await?;
    trial.agents.connect(&ConnectRequest { count: USERS, ..connect }).await?;
    trial.settle(PAUSE_SECONDS).await;

    let Server::Barid(target) = &*server else { anyhow::bail!("no cluster") };
    let plan = target.plan(PAYLOAD_BYTES, 0)?;
    let business = Business::open(&plan).await?;
    let noise =
        Plan { app: CROWD_APP.into(), payload_bytes: CROWD_PAYLOAD_BYTES, linger_ms: 5, ..plan };
    let noise = Business::open(&noise).await?;
    let audit_of_crowd = Arc::new(Audit::new(CROWD, Some(CROWD_RATE)));
    let start = Start::after(Duration::ZERO);
    crowd.expect(&audit_of_crowd, Some(start)).await?;
    audit_of_crowd.start(start);
    let noisy = Pace::Scheduled(u64::from(CROWD_RATE) * SECONDS);
    let audit = Arc::new(Audit::new(USERS, Some(RATE)));
    let pace = Pace::Scheduled(u64::from(RATE) * SECONDS);
    trial.live.phase("pushing");
    let making = noise.produce(noisy, &audit_of_crowd);
    let driving = drive(&trial.agents, &business, pace, &audit, SETTLE);
    let _ = tokio::try_join!(making, driving)?;
    must_be_clean(&trial.agents, &audit).await?;
    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies(if slow { "push beside slow devices" } else { "push" }, &times_us);
    let of_crowd = Crowd::read(server, &crowd).await?;
    trial.agents.drop_all().await?;
    Ok(Effect { times_us, crowd: of_crowd })
}
