//! What TLS adds to a session's memory and to a handshake. The floor is the same node without it.

use barid_testkit::certificates;

use super::trial::{Both, Server, Trial};
use crate::measure::Measure;
use crate::rpc::ConnectRequest;

/// Sessions.
const COUNT: u32 = 8_000;
/// Handshakes under way at once.
const AT_ONCE_MAX: u32 = 64;

struct Cost {
    bytes: f64,
    per_s_per_core: f64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let mut plain = trial.barid().await?;
    let without = cost(trial, &mut plain, "").await?;
    drop(plain);
    let mut server = trial.barid_over_tls().await?;
    let with = cost(trial, &mut server, certificates::ONE.pem).await?;
    let both = Both { floor: Some(without), barid: with };
    Ok(vec![
        both.row("tls_idle_bytes_per_session", "B", |cost| cost.bytes),
        both.row("tls_handshakes_per_s_per_core", "1/s", |cost| cost.per_s_per_core),
    ])
}

async fn cost(trial: &mut Trial<'_>, server: &mut Server, roots: &str) -> anyhow::Result<Cost> {
    let roots = roots.to_owned();
    let way =
        ConnectRequest { count: COUNT, at_once_max: AT_ONCE_MAX, roots, ..server.way().await? };
    trial.settle(5).await;
    let empty = server.must_know().await?;
    trial.live.phase("connecting");
    trial.agents.connect(&way).await?;
    trial.settle(10).await;
    let full = server.must_know().await?;
    trial.agents.drop_all().await?;
    let bytes = full.resident_bytes.saturating_sub(empty.resident_bytes) as f64;
    let spent = (full.cpu_s - empty.cpu_s).max(0.01);
    Ok(Cost { bytes: bytes / f64::from(COUNT), per_s_per_core: f64::from(COUNT) / spent })
}
