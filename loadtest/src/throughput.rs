//! How many messages a second go from Kafka to devices and back as acknowledgements, with
//! everything on this machine, and the CPU time that each process takes for one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_runtime::exposition::Metrics;
use clap::Args;
use serde::Serialize;

use crate::audit::{Audit, Outcome, SETTLE, Totals};
use crate::fleet::Fleet;
use crate::producer::{Business, Pace, Produced};
use crate::sandbox::{CpuTimes, Sandbox};

/// How long the last acknowledgements may take.
const ACKED_LIMIT: Duration = Duration::from_secs(10);

/// How it is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Users, one device each.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=15_000))]
    users: u32,
    /// How long is produced, seconds.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How long the cluster works before that, seconds.
    #[arg(long, default_value_t = 10)]
    warmup_seconds: u64,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// Messages between Kafka and the devices at once.
    #[arg(long, default_value_t = 20_000)]
    window: u64,
    /// How long records wait in the business's producer for others of their batch, ms.
    #[arg(long, default_value_t = 5)]
    linger_ms: u32,
    /// A device acknowledges at once, but not more often than this, ms.
    #[arg(long, default_value_t = 100)]
    ack_delay_ms: u64,
    /// Prints the process ids, and waits so many seconds before it measures, for who wants to
    /// attach a profiler.
    #[arg(long, default_value_t = 0)]
    attach_seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
pub struct Report {
    users: u32,
    payload_bytes: u32,
    produced: u64,
    #[serde(flatten)]
    pub outcome: Outcome,
    seconds: f64,
    pub acked_per_s: f64,
    /// Microseconds of CPU time for each message, by process, dearest first.
    cpu_us: Vec<(String, f64)>,
    /// Messages of one batch, by hop: what is shared shares its cost.
    batches: Vec<(&'static str, f64)>,
}

/// Hops on which messages travel together: what counts the messages, what the batches, of which script.
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

/// Measures and prints; `false` if something was not delivered once and in order.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let report = measure(options).await?;
    print(&report, options.json)?;
    Ok(report.outcome.is_clean())
}

/// Measures.
///
/// # Errors
/// The cluster does not come up, or a device was closed.
pub async fn measure(options: &Options) -> anyhow::Result<Report> {
    let mut sandbox = Sandbox::start().await?;
    let plan = sandbox.plan(options.payload_bytes, options.linger_ms);
    let business = Business::open(&plan).await?;
    if options.warmup_seconds > 0 {
        let time = Duration::from_secs(options.warmup_seconds);
        drive(options, &mut sandbox, &business, time).await?;
    }
    attach(&sandbox, options).await?;
    let time = Duration::from_secs(options.seconds);
    let Driven { made, totals, seconds, cpu_s, batches } =
        drive(options, &mut sandbox, &business, time).await?;

    let produced = made.records;
    let each = cpu_s.into_iter().chain([("business".to_owned(), made.cpu_s)]);
    let mut cpu_us: Vec<_> =
        each.map(|(name, spent)| (name, spent * 1e6 / produced.max(1) as f64)).collect();
    cpu_us.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(Report {
        users: options.users,
        payload_bytes: options.payload_bytes,
        produced,
        outcome: totals.outcome(),
        seconds,
        acked_per_s: produced as f64 / seconds,
        cpu_us,
        batches,
    })
}

/// What came of [`drive`].
struct Driven {
    made: Produced,
    totals: Totals,
    /// From the first record until everything was acknowledged.
    seconds: f64,
    /// CPU seconds meanwhile.
    cpu_s: CpuTimes,
    /// See [`Report`].
    batches: Vec<(&'static str, f64)>,
}

/// Connects the devices, produces for `time`, and waits until everything is acknowledged.
async fn drive(
    options: &Options,
    sandbox: &mut Sandbox,
    business: &Arc<Business>,
    time: Duration,
) -> anyhow::Result<Driven> {
    let audit = Arc::new(Audit::new(options.users, None));
    let ack_delay = Duration::from_millis(options.ack_delay_ms);
    let address = [sandbox.address().await?];
    let mut fleet = Fleet::connect(&address, Sandbox::token, ack_delay, &audit).await?;
    let metrics_before = Metrics::parse(&sandbox.metrics().await?);
    let before = sandbox.cpu_times()?;
    let started = Instant::now();
    audit.start();
    let made = business.produce(Pace::Window { window: options.window, time }, &audit).await?;
    audit.expect(made.records);
    audit.all_settled(SETTLE).await;
    sandbox.all_acknowledged(ACKED_LIMIT).await?;
    let seconds = started.elapsed().as_secs_f64();
    let mut cpu_s = sandbox.cpu_times()?;
    for (name, spent) in &mut cpu_s {
        *spent -= before.get(name).copied().unwrap_or_default();
    }
    fleet.check()?;
    let metrics = Metrics::parse(&sandbox.metrics().await?);
    let batches = BATCHES.iter().map(|(hop, items, batches, script)| {
        let sum = |metrics: &Metrics, name| match script {
            Some(script) => metrics.sum_of(name, "script", script),
            None => metrics.sum(name),
        };
        let grown = |name| sum(&metrics, name) - sum(&metrics_before, name);
        (*hop, grown(items) / grown(batches).max(1.0))
    });
    let batches = batches.collect();
    Ok(Driven { made, totals: audit.totals(), seconds, cpu_s, batches })
}

/// Names the processes and waits.
async fn attach(sandbox: &Sandbox, options: &Options) -> std::io::Result<()> {
    use std::io::Write as _;
    if options.attach_seconds > 0 {
        writeln!(std::io::stderr().lock(), "{:?}", sandbox.pids())?;
        tokio::time::sleep(Duration::from_secs(options.attach_seconds)).await;
    }
    Ok(())
}

fn print(report: &Report, json: bool) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    if json {
        return writeln!(out, "{}", serde_json::to_string(report)?);
    }
    let Report { users, payload_bytes, outcome, seconds, .. } = report;
    writeln!(
        out,
        "messages of {payload_bytes} bytes to {users} devices in {seconds:.1} s; {outcome}"
    )?;
    writeln!(out, "produced, delivered and acknowledged: {:.0} a second\n", report.acked_per_s)?;
    writeln!(out, "{:<14}{:>16}", "process", "CPU us a message")?;
    for (name, us) in &report.cpu_us {
        writeln!(out, "{name:<14}{us:>16.2}")?;
    }
    let total: f64 = report.cpu_us.iter().map(|(_, us)| us).sum();
    writeln!(out, "{:<14}{total:>16.2}\n", "all")?;
    writeln!(out, "{:<22}{:>8}", "batch", "messages")?;
    report.batches.iter().try_for_each(|(hop, size)| writeln!(out, "{hop:<22}{size:>8.1}"))
}
