//! Kafka to device at a fixed rate: how long it takes.

use std::sync::Arc;

use super::{Goal, Measure, Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::drive::{drive, must_be_clean};
use crate::histogram::quantile_ms;
use crate::kafka_hop;
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;

/// One device each.
const USERS: u32 = 1_000;
/// Messages a second.
const RATE: u32 = 1_000;
const PAYLOAD_BYTES: u32 = 200;
const WARM_UP_SECONDS: u64 = 10;
const SECONDS: u64 = 30;
/// Of the floor: Kafka's hop with nothing behind it.
const FLOOR_SECONDS: u64 = 10;

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let mut server = trial.barid().await?;
    let way = server.way().await?;
    let connect = ConnectRequest { count: USERS, at_once_max: 64, ack_delay_ms: 0, ..way };
    let Server::Barid(target) = &mut server else { anyhow::bail!("no cluster") };
    let plan = target.plan(PAYLOAD_BYTES, 0)?;
    let business = Business::open(&plan).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    for (phase, seconds) in [("warming up", WARM_UP_SECONDS), ("pushing", SECONDS)] {
        trial.live.phase(phase);
        let audit = Arc::new(Audit::new(USERS, Some(RATE)));
        let pace = Pace::Scheduled(u64::from(RATE) * seconds);
        drive(&trial.agents, &business, pace, &audit, SETTLE).await?;
        must_be_clean(&trial.agents, &audit).await?;
    }
    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies("push", &times_us);
    trial.agents.drop_all().await?;
    trial.live.phase("Kafka alone");
    let mut floor = None;
    if let Some((plan, partitions)) = target.unconsumed(&plan).await? {
        let times_us = kafka_hop::measure(&plan, partitions, USERS, RATE, FLOOR_SECONDS).await?;
        trial.live.floor_latencies("push", &times_us);
        floor = Some(times_us);
    }
    let row = |name, share, most| {
        let floor = floor.as_ref().map(|times_us| quantile_ms(times_us, share));
        let barid = quantile_ms(&times_us, share);
        Measure::new(name, "ms", floor, barid).against(Goal::AtMost(most))
    };
    Ok(vec![row("latency_p50_ms", 0.5, 1.5), row("latency_p99_ms", 0.99, 6.0)])
}
