//! The cost of a handshake for the access node: WebSocket, JWT, route, mailbox, welcome.

use super::trial::{Both, Server, Trial};
use crate::controller::Connected;
use crate::histogram::quantile_ms;
use crate::measure::{Goal, Measure};
use crate::rpc::ConnectRequest;

const HANDSHAKES: u32 = 10_000;
const WARM_UP: u32 = 2_000;
/// Handshakes under way at once: enough to keep the server busy.
const AT_ONCE_MAX: u32 = 64;

struct Cost {
    /// Handshakes per second of the server's CPU time, if known.
    per_s_per_core: Option<f64>,
    connected: Connected,
}

impl Cost {
    fn per_s(&self) -> f64 {
        f64::from(self.connected.connected) / self.connected.elapsed.as_secs_f64()
    }
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Cost> = trial.both(cost).await?;
    let per_core = both.row_if("handshakes_per_s_per_core", "1/s", |cost| cost.per_s_per_core);
    let p99 = |cost: &Cost| quantile_ms(&cost.connected.took_us, 0.99);
    let rows =
        [both.row("handshakes_per_s", "1/s", Cost::per_s), both.row("handshake_p99_ms", "ms", p99)];
    Ok(per_core.map(|row| row.against(Goal::AtLeast(5_000.0))).into_iter().chain(rows).collect())
}

async fn cost(trial: &mut Trial<'_>, server: &mut Server) -> anyhow::Result<Cost> {
    let request = server.connect_request().await?;
    let connect = |count| ConnectRequest { count, at_once_max: AT_ONCE_MAX, ..request.clone() };
    trial.live.phase("warming up");
    trial.agents.connect(&connect(WARM_UP)).await?;
    trial.agents.drop_all().await?;
    trial.settle(3).await;
    let before = server.usage().await?;
    trial.live.phase("connecting");
    let connected = trial.agents.connect(&connect(HANDSHAKES)).await?;
    trial.live.latencies("handshake", &connected.took_us);
    trial.settle(1).await;
    let after = server.usage().await?;
    trial.agents.drop_all().await?;
    let spent_s = before.zip(after).map(|(before, after)| (after.cpu_s - before.cpu_s).max(0.01));
    let per_s_per_core = spent_s.map(|spent_s| f64::from(HANDSHAKES) / spent_s);
    Ok(Cost { per_s_per_core, connected })
}
