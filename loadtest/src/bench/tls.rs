//! Memory and handshakes over TLS. The floor is the same node without TLS.

use barid_testkit::certificates;

use super::trial::{Both, Server, Trial};
use crate::measure::Measure;
use crate::rpc::ConnectRequest;
use crate::sandbox::Access;

const SESSIONS: u32 = 8_000;
const HANDSHAKES_MAX: u32 = 64;

struct Cost {
    bytes: f64,
    per_s_per_core: f64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    trial.needs_own_cluster()?;
    let mut plain = trial.barid().await?;
    let without = cost(trial, &mut plain, "").await?;
    drop(plain);
    let mut server = trial.barid_with(Access { tls: true, ..trial.access() }).await?;
    let with = cost(trial, &mut server, certificates::ONE.pem).await?;
    let both = Both { floor: Some(without), barid: with };
    Ok(vec![
        both.row("tls_idle_bytes_per_session", "B", |cost| cost.bytes),
        both.row("tls_handshakes_per_s_per_core", "1/s", |cost| cost.per_s_per_core),
    ])
}

async fn cost(trial: &mut Trial<'_>, server: &mut Server, roots: &str) -> anyhow::Result<Cost> {
    let connect = ConnectRequest {
        count: SESSIONS,
        at_once_max: HANDSHAKES_MAX,
        roots: roots.to_owned(),
        ..server.connect_request().await?
    };
    trial.settle(5).await;
    let empty = server.known_usage().await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.settle(10).await;
    let full = server.known_usage().await?;
    trial.agents.drop_all().await?;
    let bytes = full.resident_bytes.saturating_sub(empty.resident_bytes) as f64;
    let spent_s = (full.cpu_s - empty.cpu_s).max(0.01);
    let sessions = f64::from(SESSIONS);
    Ok(Cost { bytes: bytes / sessions, per_s_per_core: sessions / spent_s })
}
