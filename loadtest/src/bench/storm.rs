//! Everybody drops and returns at once, as after a network's failure.

use super::{Measure, access_pid, settle, way};
use crate::controller::{Agents, Connected, Floor};
use crate::cpu;
use crate::histogram::quantile_ms;
use crate::rpc::ConnectRequest;
use crate::sandbox::Sandbox;

/// Half of what a process may hold: the old ones are still there when the new ones come.
const COUNT: u32 = 9_000;
/// A client that is refused comes again with full jitter up to this, ms.
const RETRY_MAX_MS: u32 = 1_000;

struct Storm {
    returned: Connected,
    /// CPU time of the server, µs for each that returned.
    cpu_us: f64,
}

pub async fn measure(agents: &mut Agents) -> anyhow::Result<Vec<Measure>> {
    let floor = Floor::start().await?;
    let bare = storm(agents, floor.pid(), floor.way()).await?;
    drop(floor);
    let mut sandbox = Sandbox::start().await?;
    let way = way(&mut sandbox).await?;
    let barid = storm(agents, access_pid(&sandbox)?, way).await?;
    let row =
        |name, unit, of: fn(&Storm) -> f64| Measure::new(name, unit, Some(of(&bare)), of(&barid));
    Ok(vec![
        row("storm_all_back_s", "s", |s| s.returned.elapsed.as_secs_f64()),
        row("storm_return_p50_ms", "ms", |s| quantile_ms(&s.returned.took_us, 0.5)),
        row("storm_return_p99_ms", "ms", |s| quantile_ms(&s.returned.took_us, 0.99)),
        row("storm_refused", "", |s| s.returned.retried as f64),
        row("storm_cpu_us", "us", |s| s.cpu_us),
    ])
}

async fn storm(agents: &mut Agents, pid: u32, way: ConnectRequest) -> anyhow::Result<Storm> {
    let calm = ConnectRequest { count: COUNT, at_once_max: 64, ..way };
    agents.connect(&calm).await?;
    settle(3).await;
    let before = cpu::of_process(pid)?;
    agents.drop_all().await?;
    let all = ConnectRequest { at_once_max: COUNT, retry_max_ms: RETRY_MAX_MS, ..calm };
    let returned = agents.connect(&all).await?;
    settle(1).await;
    let cpu_us = (cpu::of_process(pid)? - before) * 1e6 / f64::from(COUNT);
    agents.drop_all().await?;
    Ok(Storm { returned, cpu_us })
}
