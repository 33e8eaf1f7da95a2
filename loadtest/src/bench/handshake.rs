//! What a handshake costs the access node: WebSocket, JWT, route, mailbox, welcome.

use super::{Goal, Measure, access_pid, settle, way};
use crate::controller::{Agents, Connected, Floor};
use crate::cpu;
use crate::histogram::quantile_ms;
use crate::rpc::ConnectRequest;
use crate::sandbox::Sandbox;

/// Handshakes that are counted, and before those some that warm up.
const COUNT: u32 = 10_000;
const WARM_UP: u32 = 2_000;
/// Under way at once: as many as keep the server busy.
const AT_ONCE_MAX: u32 = 64;

struct Cost {
    /// By the CPU time of the server's process.
    per_s_per_core: f64,
    connected: Connected,
}

impl Cost {
    fn per_s(&self) -> f64 {
        f64::from(self.connected.connected) / self.connected.elapsed.as_secs_f64()
    }
}

pub async fn measure(agents: &mut Agents) -> anyhow::Result<Vec<Measure>> {
    let floor = Floor::start().await?;
    let bare = cost(agents, floor.pid(), floor.way()).await?;
    drop(floor);
    let mut sandbox = Sandbox::start().await?;
    let way = way(&mut sandbox).await?;
    let barid = cost(agents, access_pid(&sandbox)?, way).await?;
    let row =
        |name, unit, of: fn(&Cost) -> f64| Measure::new(name, unit, Some(of(&bare)), of(&barid));
    let p99 = |cost: &Cost| quantile_ms(&cost.connected.took_us, 0.99);
    Ok(vec![
        row("handshakes_per_s_per_core", "1/s", |c| c.per_s_per_core)
            .against(Goal::AtLeast(5_000.0)),
        row("handshakes_per_s", "1/s", Cost::per_s),
        row("handshake_p99_ms", "ms", p99),
    ])
}

async fn cost(agents: &mut Agents, pid: u32, way: ConnectRequest) -> anyhow::Result<Cost> {
    let connect = |count| ConnectRequest { count, at_once_max: AT_ONCE_MAX, ..way.clone() };
    agents.connect(&connect(WARM_UP)).await?;
    agents.drop_all().await?;
    settle(3).await;
    let before = cpu::of_process(pid)?;
    let connected = agents.connect(&connect(COUNT)).await?;
    settle(1).await;
    let spent = cpu::of_process(pid)? - before;
    agents.drop_all().await?;
    Ok(Cost { per_s_per_core: f64::from(COUNT) / spent.max(0.01), connected })
}
