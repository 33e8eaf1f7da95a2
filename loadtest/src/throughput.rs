//! How many messages a second go from Kafka to devices and back as acknowledgements, with
//! everything on this machine, and the CPU time that each process takes for one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use crate::audit::Audit;
use crate::fleet::Fleet;
use crate::producer::{Business, Pace};
use crate::sandbox::Sandbox;

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
struct Report {
    users: u32,
    payload_bytes: u32,
    produced: u64,
    shown: u64,
    lost: u64,
    passed_over: u64,
    repeats: u64,
    seconds: f64,
    acked_per_s: f64,
    /// Microseconds of CPU time for each message, by process, dearest first.
    cpu_us: Vec<(String, f64)>,
    /// Messages of one batch, by hop: what is shared shares its cost.
    batches: Vec<(&'static str, f64)>,
}

/// Hops on which messages travel together: what counts the messages, and what the batches.
const BATCHES: [(&str, &str, &str); 4] = [
    ("accept call", "barid_purger_accept_messages_sum", "barid_purger_accept_messages_count"),
    (
        "purger to dispatcher",
        "barid_purger_mesh_links_items_total",
        "barid_purger_mesh_links_batches_total",
    ),
    (
        "dispatcher to node",
        "barid_dispatcher_node_links_items_total",
        "barid_dispatcher_node_links_batches_total",
    ),
    (
        "ack call",
        "barid_mailbox_batch_items_sum{script=\"ack\"}",
        "barid_mailbox_batch_items_count{script=\"ack\"}",
    ),
];

/// Measures and prints; `false` if something was not delivered once and in order.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let mut sandbox = Sandbox::start().await?;
    let plan = sandbox.plan(options.payload_bytes, options.linger_ms);
    let business = Business::open(&plan).await?;
    let address = [sandbox.address().await?];
    let ack_delay = Duration::from_millis(options.ack_delay_ms);
    if options.warmup_seconds > 0 {
        let audit = Arc::new(Audit::new(options.users, None));
        let _fleet = Fleet::connect(&address, Sandbox::token, ack_delay, &audit).await?;
        audit.start();
        let time = Duration::from_secs(options.warmup_seconds);
        let pace = Pace::Window { window: options.window, time };
        audit.expect(business.produce(pace, &audit).await?.records);
        audit.all_settled(Duration::from_secs(30)).await;
        sandbox.all_acknowledged(ACKED_LIMIT).await?;
    }
    attach(&sandbox, options).await?;

    let audit = Arc::new(Audit::new(options.users, None));
    let mut fleet = Fleet::connect(&address, Sandbox::token, ack_delay, &audit).await?;
    let metrics_before = sandbox.metrics().await?;
    let before = sandbox.cpu_times()?;
    let started = Instant::now();
    audit.start();
    let time = Duration::from_secs(options.seconds);
    let pace = Pace::Window { window: options.window, time };
    let made = business.produce(pace, &audit).await?;
    let produced = made.records;
    audit.expect(produced);
    audit.all_settled(Duration::from_secs(30)).await;
    sandbox.all_acknowledged(ACKED_LIMIT).await?;
    let seconds = started.elapsed().as_secs_f64();
    let after = sandbox.cpu_times()?;
    fleet.check()?;
    let metrics = sandbox.metrics().await?;
    let grown = |name| sum(&metrics, name) - sum(&metrics_before, name);
    let batches = BATCHES
        .iter()
        .map(|(hop, items, batches)| (*hop, grown(items) / grown(batches).max(1.0)))
        .collect();

    let totals = audit.totals();
    let mut cpu_us: Vec<_> = after
        .iter()
        .map(|(name, after)| {
            let spent = after - before.get(name).copied().unwrap_or_default();
            (name.clone(), spent)
        })
        .chain([("business".to_owned(), made.cpu_s)])
        .map(|(name, spent)| (name, spent * 1e6 / produced.max(1) as f64))
        .collect();
    cpu_us.sort_by(|a, b| b.1.total_cmp(&a.1));
    let report = Report {
        users: options.users,
        payload_bytes: options.payload_bytes,
        produced,
        shown: totals.shown,
        lost: totals.lost(),
        passed_over: totals.passed_over,
        repeats: totals.repeats,
        seconds,
        acked_per_s: produced as f64 / seconds,
        cpu_us,
        batches,
    };
    print(&report, options.json)?;
    Ok(totals.is_clean())
}

/// All samples of a series, added up.
fn sum(metrics: &str, series: &str) -> f64 {
    let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse::<f64>().ok();
    metrics.lines().filter_map(value).sum()
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
    writeln!(
        out,
        "{} messages of {} bytes to {} devices in {:.1} s: lost {}, out of order {}, repeated {}",
        report.shown,
        report.payload_bytes,
        report.users,
        report.seconds,
        report.lost,
        report.passed_over,
        report.repeats
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
