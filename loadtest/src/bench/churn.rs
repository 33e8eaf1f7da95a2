//! Some sessions come and go all the time, the number of them does not change: memory may not either.

use anyhow::ensure;

use super::{Goal, Measure, access_pid, settle, way};
use crate::audit::Audit;
use crate::controller::{Agents, Connected, Floor};
use crate::cpu::resident_bytes;
use crate::histogram::quantile_ms;
use crate::rpc::ConnectRequest;
use crate::sandbox::Sandbox;

/// Sessions at any time.
const COUNT: u32 = 5_000;
/// Of which so many a second go and come back.
const RATE: u32 = 400;
/// What comes first finds memory that was never used: it is not counted. Seconds.
const WARM_UP_SECONDS: u32 = 15;
const SECONDS: u32 = 60;

struct Churn {
    memory_ratio: f64,
    returned: Connected,
}

pub async fn measure(agents: &mut Agents) -> anyhow::Result<Vec<Measure>> {
    let floor = Floor::start().await?;
    let bare = churn(agents, floor.pid(), floor.way()).await?;
    drop(floor);
    let mut sandbox = Sandbox::start().await?;
    let way = way(&mut sandbox).await?;
    let barid = churn(agents, access_pid(&sandbox)?, way).await?;
    let row =
        |name, unit, of: fn(&Churn) -> f64| Measure::new(name, unit, Some(of(&bare)), of(&barid));
    Ok(vec![
        row("churn_memory_ratio", "", |c| c.memory_ratio).against(Goal::AtMost(1.1)),
        row("churn_return_p99_ms", "ms", |c| quantile_ms(&c.returned.took_us, 0.99)),
    ])
}

async fn churn(agents: &mut Agents, pid: u32, way: ConnectRequest) -> anyhow::Result<Churn> {
    let connect = ConnectRequest { count: COUNT, at_once_max: 64, ..way };
    agents.expect(&Audit::new(COUNT, None)).await?;
    agents.connect(&connect).await?;
    agents.churn(&connect, RATE, WARM_UP_SECONDS).await?;
    settle(5).await;
    let before = resident_bytes(pid)? as f64;
    let returned = agents.churn(&connect, RATE, SECONDS).await?;
    settle(5).await;
    let memory_ratio = resident_bytes(pid)? as f64 / before;
    let seen = agents.report().await?;
    ensure!(seen.connected == COUNT, "{} of {COUNT}: {}", seen.connected, seen.why_closed);
    agents.drop_all().await?;
    Ok(Churn { memory_ratio, returned })
}
