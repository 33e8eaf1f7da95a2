//! All devices drop and reconnect at once, as after a network failure.

use super::trial::{Both, Server, Trial};
use crate::controller::Connected;
use crate::histogram::quantile_ms;
use crate::measure::Measure;
use crate::rpc::ConnectRequest;

/// Half of what a process may hold: old connections are still open when the new ones arrive.
const SESSIONS: u32 = 9_000;
/// A refused client retries with full jitter up to this time, ms.
const RETRY_MAX_MS: u32 = 1_000;

struct Storm {
    returned: Connected,
    /// CPU time of the server per device, if known, µs.
    cpu_us: Option<f64>,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Storm> = trial.both(storm).await?;
    let mut rows = vec![
        both.row("storm_all_back_s", "s", |s| s.returned.elapsed.as_secs_f64()),
        both.row("storm_return_p50_ms", "ms", |s| quantile_ms(&s.returned.took_us, 0.5)),
        both.row("storm_return_p99_ms", "ms", |s| quantile_ms(&s.returned.took_us, 0.99)),
        both.row("storm_refused", "", |s| s.returned.retried as f64),
    ];
    rows.extend(both.row_if("storm_cpu_us", "us", |s| s.cpu_us));
    Ok(rows)
}

async fn storm(trial: &mut Trial<'_>, server: &mut Server) -> anyhow::Result<Storm> {
    let calm =
        ConnectRequest { count: SESSIONS, at_once_max: 64, ..server.connect_request().await? };
    trial.live.phase("connecting");
    trial.agents.connect(&calm).await?;
    trial.settle(3).await;
    let before = server.usage().await?;
    trial.live.phase("returning");
    trial.agents.drop_all().await?;
    let all = ConnectRequest { at_once_max: SESSIONS, retry_max_ms: RETRY_MAX_MS, ..calm };
    let returned = trial.agents.connect(&all).await?;
    trial.live.latencies("return", &returned.took_us);
    trial.settle(1).await;
    let spent_s =
        before.zip(server.usage().await?).map(|(before, after)| after.cpu_s - before.cpu_s);
    trial.agents.drop_all().await?;
    Ok(Storm { returned, cpu_us: spent_s.map(|spent_s| spent_s * 1e6 / f64::from(SESSIONS)) })
}
