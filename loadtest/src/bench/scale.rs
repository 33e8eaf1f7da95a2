//! Many sessions on several access nodes, and messages to all of them at a fixed rate.

use super::latency::{Meter, Pushed, distributions, push};
use super::trial::{Server, Trial};
use crate::histogram::quantile_ms;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::process;
use crate::producer::Business;
use crate::rpc::ConnectRequest;
use crate::sandbox::{Access, ByRole};
use crate::table::Table;
use crate::target::Target;

/// Default of `--push-seconds`.
const SECONDS: u64 = 60;
/// How long the sessions are idle before messages flow, at least.
const IDLE_SECONDS: u64 = 10;
const HANDSHAKES_MAX: u32 = 256;
/// A refused client retries with full jitter up to this time, ms.
const RETRY_MAX_MS: u32 = 2_000;
const MIB: f64 = 1024.0 * 1024.0;

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let options = trial.options;
    let access = Access { nodes: options.access_nodes.into(), ..trial.access() };
    let mut server = trial.barid_with(access).await?;
    let connect = ConnectRequest {
        count: options.sessions,
        rate: options.rate,
        at_once_max: HANDSHAKES_MAX,
        retry_max_ms: RETRY_MAX_MS,
        ..server.connect_request().await?
    };
    let Server::Barid(target) = &mut server else { anyhow::bail!("no cluster") };
    trial.live.phase("connecting");
    let connected = trial.agents.connect(&connect).await?;
    trial.live.latencies("connect", &connected.took_us);
    say(&format!("{} sessions, {} retries", connected.connected, connected.retried))?;
    trial.attach(target).await?;

    let meter = Meter::start(target, trial)?;
    trial.settle(options.push.push_warmup_seconds.max(IDLE_SECONDS)).await;
    let idle_cores = meter.cores(target, trial)?;
    let idle_mib = resident_mib(target, trial)?;
    let plan = target.plan(options.push.push_bytes, options.push.push_linger_ms)?;
    let business = Business::open(&plan).await?;
    let seconds = options.push.push_seconds.unwrap_or(SECONDS);
    let Pushed { times_us, cores } =
        push(trial, target, &business, options.sessions, seconds).await?;
    let end_mib = resident_mib(target, trial)?;
    let columns = [
        ("idle_mib", idle_mib),
        ("end_mib", end_mib),
        ("idle_cores", idle_cores),
        ("pushing_cores", cores),
    ];
    trial.live.table(processes(columns));
    trial.live.table(distributions(&times_us, None));
    trial.agents.drop_all().await?;
    let row = |name, unit, value| Measure::new(name, unit, None, value);
    let push_ms = |share| quantile_ms(&times_us, share);
    Ok(vec![
        row("scale_connected_s", "s", connected.elapsed.as_secs_f64()),
        row("scale_connect_p99_ms", "ms", quantile_ms(&connected.took_us, 0.99)),
        row("scale_refused", "", connected.retried as f64),
        row("scale_push_p50_ms", "ms", push_ms(0.5)),
        row("scale_push_p99_ms", "ms", push_ms(0.99)).against(Goal::AtMost(100.0)),
    ])
}

fn resident_mib(target: &Target, trial: &Trial<'_>) -> anyhow::Result<Option<ByRole>> {
    target.by_role(&trial.agents, |pid| Ok(process::resident_bytes(pid)? as f64 / MIB))
}

/// Figures by role; empty for a running cluster.
fn processes(columns: [(&str, Option<ByRole>); 4]) -> Table {
    let mut table = Table::new("process", &columns.each_ref().map(|(name, _)| *name));
    let [(_, known), ..] = &columns;
    for role in known.iter().flat_map(ByRole::keys) {
        let value = |figures: &Option<ByRole>| figures.as_ref()?.get(role).copied();
        table.row(role, columns.each_ref().map(|(_, figures)| value(figures)));
    }
    table
}
