//! Some sessions leave and return all the time, and their number stays the same: memory may not grow.

use anyhow::ensure;

use super::trial::{Both, Server, Trial};
use crate::audit::Audit;
use crate::controller::Connected;
use crate::histogram::quantile_ms;
use crate::measure::{Goal, Measure};
use crate::rpc::ConnectRequest;

const SESSIONS: u32 = 5_000;
/// Sessions per second that leave and return.
const RATE: u32 = 400;
/// The first sessions use memory that was never touched before; they are not counted.
const WARM_UP_SECONDS: u32 = 15;
const SECONDS: u32 = 45;

struct Churn {
    memory_ratio: Option<f64>,
    returned: Connected,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Churn> = trial.both(churn).await?;
    let memory = both.row_if("churn_memory_ratio", "", |c| c.memory_ratio);
    let p99 = both.row("churn_return_p99_ms", "ms", |c| quantile_ms(&c.returned.took_us, 0.99));
    Ok(memory.map(|row| row.against(Goal::AtMost(1.1))).into_iter().chain([p99]).collect())
}

async fn churn(trial: &mut Trial<'_>, server: &mut Server) -> anyhow::Result<Churn> {
    let connect =
        ConnectRequest { count: SESSIONS, at_once_max: 64, ..server.connect_request().await? };
    trial.agents.expect(&Audit::new(SESSIONS, None), None).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.live.phase("warming up");
    trial.agents.churn(&connect, RATE, WARM_UP_SECONDS).await?;
    trial.settle(5).await;
    let before = server.usage().await?;
    trial.live.phase("churning");
    let returned = trial.agents.churn(&connect, RATE, SECONDS).await?;
    trial.live.latencies("return", &returned.took_us);
    trial.settle(5).await;
    let both = before.zip(server.usage().await?);
    let memory_ratio = both.map(|(b, a)| a.resident_bytes as f64 / b.resident_bytes as f64);
    let seen = trial.agents.report().await?;
    ensure!(seen.connected == SESSIONS, "{} of {SESSIONS}: {}", seen.connected, seen.why_closed);
    trial.agents.drop_all().await?;
    Ok(Churn { memory_ratio, returned })
}
