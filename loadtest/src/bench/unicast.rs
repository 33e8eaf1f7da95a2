//! Kafka to device, with acknowledgements, as fast as possible; and the CPU time of each process per message.

use std::sync::Arc;
use std::time::Duration;

use barid_runtime::exposition::Metrics;

use super::trial::{Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::drive::{drive, must_be_clean};
use crate::measure::{Goal, Measure};
use crate::process;
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;
use crate::sandbox::ByRole;
use crate::table::Table;

/// Default of `--push-seconds`.
const SECONDS: u64 = 20;
/// How long the last acknowledgements may take.
const ACKED_LIMIT: Duration = Duration::from_secs(10);

/// Hops on which messages share batches: the counters of messages and batches, and the value of `script`.
const BATCHES: [(&str, &str, &str, Option<&str>); 4] = [
    ("accept call", "barid_purger_accept_messages_sum", "barid_purger_accept_messages_count", None),
    (
        "purger to dispatcher",
        "barid_purger_mesh_links_items_total",
        "barid_purger_mesh_links_batches_total",
        None,
    ),
    (
        "dispatcher to node",
        "barid_dispatcher_node_links_items_total",
        "barid_dispatcher_node_links_batches_total",
        None,
    ),
    ("ack call", "barid_mailbox_batch_items_sum", "barid_mailbox_batch_items_count", Some("ack")),
];

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let options = trial.options.push.clone();
    let (users, window) = (options.push_users, options.push_window);
    let mut server = trial.barid().await?;
    let connect =
        ConnectRequest { count: users, at_once_max: 64, ..server.connect_request().await? };
    let Server::Barid(target) = &mut server else { anyhow::bail!("no cluster") };
    let plan = target.plan(options.push_bytes, options.push_linger_ms)?;
    let business = Business::open(&plan).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.attach(target).await?;
    let (mut acked_per_s, mut tables) = (0.0, Vec::new());
    for (phase, seconds) in options.phases(options.push_seconds.unwrap_or(SECONDS)) {
        let metrics = target.metrics().await?;
        let spent = target.by_role(&trial.agents, process::cpu_s)?;
        trial.live.phase(phase);
        let audit = Arc::new(Audit::new(users, None));
        let pace = Pace::Window { window, time: Duration::from_secs(seconds) };
        let records = drive(&trial.agents, &business, pace, &audit, SETTLE).await?;
        target.all_acknowledged(ACKED_LIMIT).await?;
        let seconds = audit.elapsed().as_secs_f64();
        let spent = spent.zip(target.by_role(&trial.agents, process::cpu_s)?);
        let metrics = metrics.zip(target.metrics().await?);
        must_be_clean(&trial.agents, &audit).await?;
        acked_per_s = records as f64 / seconds;
        let processes = spent.map(|(before, after)| processes(&before, &after, records));
        let batches = metrics.map(|(before, after)| batches(&before, &after));
        tables = processes.into_iter().chain(batches).collect();
    }
    tables.into_iter().for_each(|table| trial.live.table(table));
    trial.agents.drop_all().await?;
    let row = Measure::new("unicast_acked_per_s", "1/s", None, acked_per_s);
    Ok(vec![row.against(Goal::AtLeast(50_000.0))])
}

/// CPU time of each process per message, largest first.
fn processes(before: &ByRole, after: &ByRole, records: u64) -> Table {
    let each = after.iter().map(|(name, spent)| {
        let spent = spent - before.get(name).copied().unwrap_or_default();
        (name.as_str(), spent * 1e6 / records.max(1) as f64)
    });
    let mut each: Vec<_> = each.collect();
    each.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all = each.iter().map(|(_, us)| us).sum();
    let mut table = Table::new("process", &["us_a_message"]);
    each.into_iter().chain([("all", all)]).for_each(|(name, us)| table.row(name, [Some(us)]));
    table
}

/// Messages per batch, by hop.
fn batches(before: &str, after: &str) -> Table {
    let (before, after) = (Metrics::parse(before), Metrics::parse(after));
    let mut table = Table::new("batch", &["messages"]);
    for (hop, items, batches, script) in BATCHES {
        let sum = |metrics: &Metrics, name| match script {
            Some(script) => metrics.sum_of(name, "script", script),
            None => metrics.sum(name),
        };
        let grown = |name| sum(&after, name) - sum(&before, name);
        table.row(hop, [Some(grown(items) / grown(batches).max(1.0))]);
    }
    table
}
