//! Kafka to device at a fixed rate: how long it takes, and where the time goes.

use std::sync::Arc;

use hdrhistogram::Histogram;

use super::trial::{Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::drive::{all_open, drive, must_be_clean};
use crate::histogram::{mean_ms, quantile_ms};
use crate::hops;
use crate::kafka_hop;
use crate::measure::{Goal, Measure};
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;
use crate::table::Table;

/// How long is measured, unless it is said.
const SECONDS: u64 = 30;
/// Of the floor, Kafka's hop with nothing behind it, at most.
const FLOOR_SECONDS: u64 = 10;

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let options = trial.options.push.clone();
    let (users, rate) = (options.push_users, options.push_rate);
    let seconds = options.push_seconds.unwrap_or(SECONDS);
    let mut server = trial.barid().await?;
    let way = server.way().await?;
    let connect = ConnectRequest { count: users, at_once_max: 64, ack_delay_ms: 0, ..way };
    let Server::Barid(target) = &mut server else { anyhow::bail!("no cluster") };
    let plan = target.plan(options.push_bytes, 0)?;
    let business = Business::open(&plan).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.attach(target).await?;
    let mut before = None;
    for (phase, seconds) in options.phases(seconds) {
        before = target.metrics().await?;
        trial.live.phase(phase);
        let audit = Arc::new(Audit::new(users, Some(rate)));
        let pace = Pace::Scheduled(u64::from(rate) * seconds);
        drive(&trial.agents, &business, pace, &audit, SETTLE, all_open).await?;
        must_be_clean(&trial.agents, &audit).await?;
    }
    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies("push", &times_us);
    if let Some((before, after)) = before.zip(target.metrics().await?) {
        trial.live.table(hops::table(&before, &after, mean_ms(&times_us)));
    }
    trial.agents.drop_all().await?;
    trial.live.phase("Kafka alone");
    let mut floor = None;
    if let Some((plan, partitions)) = target.unconsumed(&plan).await? {
        let seconds = seconds.min(FLOOR_SECONDS);
        let times_us = kafka_hop::measure(&plan, partitions, users, rate, seconds).await?;
        trial.live.floor_latencies("push", &times_us);
        floor = Some(times_us);
    }
    trial.live.table(distributions(&times_us, floor.as_ref()));
    let row = |name, share, most| {
        let floor = floor.as_ref().map(|times_us| quantile_ms(times_us, share));
        let barid = quantile_ms(&times_us, share);
        Measure::new(name, "ms", floor, barid).against(Goal::AtMost(most))
    };
    Ok(vec![row("latency_p50_ms", 0.5, 1.5), row("latency_p99_ms", 0.99, 6.0)])
}

fn distributions(barid: &Histogram<u64>, floor: Option<&Histogram<u64>>) -> Table {
    let columns = ["mean_ms", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"];
    let mut table = Table::new("produce to device", &columns);
    for (name, times_us) in [("barid", Some(barid)), ("floor: Kafka alone", floor)] {
        let Some(times_us) = times_us else { continue };
        let quantiles = [0.5, 0.9, 0.99, 0.999, 1.0].map(|share| quantile_ms(times_us, share));
        table.row(name, [mean_ms(times_us)].into_iter().chain(quantiles).map(Some));
    }
    table
}
