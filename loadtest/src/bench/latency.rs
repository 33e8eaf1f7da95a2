//! Kafka to device at a fixed rate: the latency, and each hop's share of it.

use std::sync::Arc;

use hdrhistogram::Histogram;

use super::trial::{Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::drive::{drive, must_be_clean};
use crate::histogram::{mean_ms, quantile_ms};
use crate::hops;
use crate::kafka_hop;
use crate::measure::{Goal, Measure};
use crate::process;
use crate::producer::{Business, Pace, Plan};
use crate::rpc::ConnectRequest;
use crate::sandbox::ByRole;
use crate::table::Table;
use crate::target::Target;

/// Default of `--push-seconds`.
const SECONDS: u64 = 30;
/// How long the floor, Kafka's hop alone, is measured at most.
const FLOOR_SECONDS: u64 = 10;

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let options = trial.options.push.clone();
    let users = options.push_users;
    let seconds = options.push_seconds.unwrap_or(SECONDS);
    let mut server = trial.barid().await?;
    let request = server.connect_request().await?;
    let connect = ConnectRequest { count: users, at_once_max: 64, ack_delay_ms: 0, ..request };
    let Server::Barid(target) = &mut server else { anyhow::bail!("no cluster") };
    let plan = target.plan(options.push_bytes, 0)?;
    let business = Business::open(&plan).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.attach(target).await?;
    let Pushed { times_us, .. } = push(trial, target, &business, users, seconds).await?;
    trial.agents.drop_all().await?;
    let floor = floor(trial, target, &plan, seconds).await?;
    trial.live.table(distributions(&times_us, floor.as_ref()));
    let row = |name, share, most| {
        let floor = floor.as_ref().map(|times_us| quantile_ms(times_us, share));
        let barid = quantile_ms(&times_us, share);
        Measure::new(name, "ms", floor, barid).against(Goal::AtMost(most))
    };
    Ok(vec![row("latency_p50_ms", 0.5, 1.5), row("latency_p99_ms", 0.99, 6.0)])
}

pub struct Pushed {
    pub times_us: Histogram<u64>,
    /// Cores that each role kept busy; unknown for a running cluster.
    pub cores: Option<ByRole>,
}

/// Produces `--push-rate` messages per second after the warm-up, checks the deliveries, and keeps latencies
/// and hops for the report.
pub async fn push(
    trial: &Trial<'_>,
    target: &mut Target,
    business: &Arc<Business>,
    users: u32,
    seconds: u64,
) -> anyhow::Result<Pushed> {
    let options = &trial.options.push;
    let rate = options.push_rate;
    let (mut before, mut cores) = (None, None);
    for (phase, seconds) in options.phases(seconds) {
        before = target.metrics().await?;
        trial.live.phase(phase);
        let meter = Meter::start(target, trial)?;
        let audit = Arc::new(Audit::new(users, Some(rate)));
        let pace = Pace::Scheduled(u64::from(rate) * seconds);
        drive(&trial.agents, business, pace, &audit, SETTLE).await?;
        cores = meter.cores(target, trial)?;
        must_be_clean(&trial.agents, &audit).await?;
    }
    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies("push", &times_us);
    if let Some((before, after)) = before.zip(target.metrics().await?) {
        trial.live.table(hops::table(&before, &after, mean_ms(&times_us)));
    }
    Ok(Pushed { times_us, cores })
}

/// CPU time between two moments.
pub struct Meter {
    started: std::time::Instant,
    before: Option<ByRole>,
}

impl Meter {
    pub fn start(target: &Target, trial: &Trial<'_>) -> anyhow::Result<Self> {
        let before = target.by_role(&trial.agents, process::cpu_s)?;
        Ok(Self { started: std::time::Instant::now(), before })
    }

    /// Cores that each role kept busy.
    pub fn cores(self, target: &Target, trial: &Trial<'_>) -> anyhow::Result<Option<ByRole>> {
        let seconds = self.started.elapsed().as_secs_f64();
        let after = target.by_role(&trial.agents, process::cpu_s)?;
        let cores = |(before, after): (ByRole, ByRole)| {
            let before_s = |name: &String| before.get(name).copied().unwrap_or_default();
            after.iter().map(|(name, s)| (name.clone(), (s - before_s(name)) / seconds)).collect()
        };
        Ok(self.before.zip(after).map(cores))
    }
}

/// Kafka's hop alone; `None` for a running cluster.
async fn floor(
    trial: &Trial<'_>,
    target: &mut Target,
    plan: &Plan,
    seconds: u64,
) -> anyhow::Result<Option<Histogram<u64>>> {
    let options = &trial.options.push;
    trial.live.phase("Kafka alone");
    let Some((plan, partitions)) = target.unconsumed(plan).await? else { return Ok(None) };
    let (users, rate, seconds) =
        (options.push_users, options.push_rate, seconds.min(FLOOR_SECONDS));
    let times_us = kafka_hop::measure(&plan, partitions, users, rate, seconds).await?;
    trial.live.floor_latencies("push", &times_us);
    Ok(Some(times_us))
}

pub fn distributions(barid: &Histogram<u64>, floor: Option<&Histogram<u64>>) -> Table {
    let columns = ["mean_ms", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"];
    let mut table = Table::new("produce to device", &columns);
    for (name, times_us) in [("barid", Some(barid)), ("floor: Kafka alone", floor)] {
        let Some(times_us) = times_us else { continue };
        let quantiles = [0.5, 0.9, 0.99, 0.999, 1.0].map(|share| quantile_ms(times_us, share));
        table.row(name, [mean_ms(times_us)].into_iter().chain(quantiles).map(Some));
    }
    table
}
