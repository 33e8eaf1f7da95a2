//! Ten thousand devices that read one byte a second, and what others notice of them. The floor is the same
//! with ten thousand that read as they should: what is left is what slowness does.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use hdrhistogram::Histogram;

use super::{Both, Measure, Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::controller::Agents;
use crate::drive::{drive, must_be_clean};
use crate::histogram::quantile_ms;
use crate::live::say;
use crate::producer::{Business, Pace, Plan};
use crate::rpc::ConnectRequest;

/// Devices in the way, of an app of their own, and what each is sent: more than sockets hold.
const CROWD: u32 = 10_000;
const CROWD_APP: &str = "crowd";
const CROWD_RATE: u32 = 1_000;
const CROWD_PAYLOAD_BYTES: u32 = 32 << 10;
/// Others, which are measured.
const USERS: u32 = 500;
const RATE: u32 = 500;
const PAYLOAD_BYTES: u32 = 200;
const SECONDS: u64 = 40;
/// How long the crowd is given to settle before the measurement, seconds.
const PAUSE: u64 = 2;

struct Noticed {
    times_us: Histogram<u64>,
    resident_mib: f64,
    /// Sessions of the crowd that the node closed.
    closed: u64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    ensure!(!trial.options.target.is_given(), "it is measured with a cluster of its own");
    let mut server = trial.barid().await?;
    let quick = beside(trial, &mut server, false).await?;
    drop(server);
    let mut server = trial.barid().await?;
    let slow = beside(trial, &mut server, true).await?;
    say(&format!("{} of {CROWD} slow devices were closed", slow.closed))?;
    let both = Both { floor: Some(quick), barid: slow };
    let quantile = |share| move |noticed: &Noticed| quantile_ms(&noticed.times_us, share);
    Ok(vec![
        both.row("beside_slow_p50_ms", "ms", quantile(0.5)),
        both.row("beside_slow_p99_ms", "ms", quantile(0.99)),
        both.row("beside_slow_memory_mib", "MiB", |noticed| noticed.resident_mib),
        both.row("slow_closed", "", |noticed| noticed.closed as f64),
    ])
}

async fn beside(trial: &mut Trial<'_>, server: &mut Server, slow: bool) -> anyhow::Result<Noticed> {
    let way = ConnectRequest { at_once_max: 64, ..server.way().await? };
    // They are closed for being slow, which fails nobody else's run.
    let crowd = Agents::start(&[], trial.options.local_agents.into()).await?;
    trial.live.phase("connecting");
    let app = CROWD_APP.to_owned();
    crowd.connect(&ConnectRequest { count: CROWD, app, slow, ..way.clone() }).await?;
    trial.agents.connect(&ConnectRequest { count: USERS, ..way }).await?;
    trial.settle(PAUSE).await;

    let Server::Barid(target) = &*server else { anyhow::bail!("no cluster") };
    let plan = target.plan(PAYLOAD_BYTES, 0)?;
    let business = Business::open(&plan).await?;
    let noise =
        Plan { app: CROWD_APP.into(), payload_bytes: CROWD_PAYLOAD_BYTES, linger_ms: 5, ..plan };
    let noise = Business::open(&noise).await?;
    let of_crowd = Arc::new(Audit::new(CROWD, Some(CROWD_RATE)));
    crowd.expect(&of_crowd).await?;
    of_crowd.start_in(Duration::ZERO);
    let noisy = Pace::Scheduled(u64::from(CROWD_RATE) * SECONDS);
    let audit = Arc::new(Audit::new(USERS, Some(RATE)));
    let pace = Pace::Scheduled(u64::from(RATE) * SECONDS);
    trial.live.phase("pushing");
    let making = noise.produce(noisy, &of_crowd);
    let driving = drive(&trial.agents, &business, pace, &audit, SETTLE);
    let _ = tokio::try_join!(making, driving)?;
    must_be_clean(&trial.agents, &audit).await?;
    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies(if slow { "push, others slow" } else { "push" }, &times_us);
    let resident_mib = server.must_know().await?.resident_bytes as f64 / f64::from(1 << 20);
    let closed = crowd.report().await?.closed;
    trial.agents.drop_all().await?;
    Ok(Noticed { times_us, resident_mib, closed })
}
