//! How long a message takes from produce to device at a fixed rate, and where the time goes.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::audit::{Audit, Outcome, SETTLE};
use crate::fleet::Fleet;
use crate::histogram::{self, quantile_ms};
use crate::hops::{self, Passed};
use crate::kafka_hop;
use crate::producer::{Business, Pace};
use crate::sandbox::{PARTITIONS, Sandbox};

/// How it is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Users, one device each.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=15_000))]
    users: u32,
    /// Records a second.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    rate: u32,
    /// How long is measured, seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How long the cluster works before that, seconds.
    #[arg(long, default_value_t = 10)]
    warmup_seconds: u64,
    /// How long the floor of Kafka's hop is measured, seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    floor_seconds: u64,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
pub struct Report {
    users: u32,
    rate_per_s: u32,
    payload_bytes: u32,
    #[serde(flatten)]
    pub outcome: Outcome,
    mean_ms: f64,
    pub p50_ms: f64,
    p90_ms: f64,
    pub p99_ms: f64,
    p999_ms: f64,
    max_ms: f64,
    hops: Vec<Passed>,
    /// What is left: from the node's write until the application has it.
    written_shown_mean_ms: f64,
    /// The floor of the first hop: Kafka with nothing behind it, right after.
    pub kafka_p50_ms: f64,
    pub kafka_p99_ms: f64,
}

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
    let plan = sandbox.plan(options.payload_bytes, 0);
    let business = Business::open(&plan).await?;
    let address = [sandbox.address().await?];

    let fleet_of = async |seconds: u64| {
        let total = u64::from(options.rate) * seconds;
        let audit = Arc::new(Audit::new(options.users, Some(options.rate)));
        audit.expect(total);
        let fleet = Fleet::connect(&address, Sandbox::token, Duration::ZERO, &audit).await?;
        Ok::<_, anyhow::Error>((audit, fleet, total))
    };
    if options.warmup_seconds > 0 {
        let (audit, _fleet, total) = fleet_of(options.warmup_seconds).await?;
        audit.start();
        business.produce(Pace::Scheduled(total), &audit).await?;
        audit.all_settled(SETTLE).await;
    }
    let (audit, mut fleet, total) = fleet_of(options.seconds).await?;
    let before = sandbox.metrics().await?;
    audit.start();
    business.produce(Pace::Scheduled(total), &audit).await?;
    audit.all_settled(SETTLE).await;
    fleet.check()?;
    let latencies = audit.latencies_us();
    let mean_ms = histogram::mean_ms(&latencies);
    let hops = hops::between(&before, &sandbox.metrics().await?, mean_ms);
    let unconsumed = sandbox.unconsumed(&plan).await?;
    let Options { users, rate, floor_seconds, .. } = *options;
    let floor = kafka_hop::measure(&unconsumed, PARTITIONS, users, rate, floor_seconds).await?;
    Ok(Report {
        users: options.users,
        rate_per_s: options.rate,
        payload_bytes: options.payload_bytes,
        outcome: audit.totals().outcome(),
        mean_ms,
        p50_ms: quantile_ms(&latencies, 0.5),
        p90_ms: quantile_ms(&latencies, 0.9),
        p99_ms: quantile_ms(&latencies, 0.99),
        p999_ms: quantile_ms(&latencies, 0.999),
        max_ms: quantile_ms(&latencies, 1.0),
        written_shown_mean_ms: mean_ms - hops.iter().map(|hop| hop.mean_ms).sum::<f64>(),
        hops,
        kafka_p50_ms: quantile_ms(&floor, 0.5),
        kafka_p99_ms: quantile_ms(&floor, 0.99),
    })
}

fn print(report: &Report, json: bool) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    if json {
        return writeln!(out, "{}", serde_json::to_string(report)?);
    }
    let Report { users, rate_per_s, payload_bytes, outcome, .. } = report;
    writeln!(
        out,
        "{rate_per_s} messages of {payload_bytes} bytes a second to {users} devices; {outcome}"
    )?;
    writeln!(
        out,
        "produce to device: p50 {:.2} ms   p90 {:.2} ms   p99 {:.2} ms   p99.9 {:.2} ms   max {:.1} ms\n",
        report.p50_ms, report.p90_ms, report.p99_ms, report.p999_ms, report.max_ms
    )?;
    writeln!(out, "{:<24}{:>10}{:>10}{:>10}{:>8}", "hop", "mean ms", "p50 ms", "p99 ms", "share")?;
    for hop in &report.hops {
        writeln!(
            out,
            "{:<24}{:>10.3}{:>10.2}{:>10.2}{:>7.0}%",
            hop.name,
            hop.mean_ms,
            hop.p50_ms,
            hop.p99_ms,
            hop.share * 100.0
        )?;
    }
    let (name, rest) = ("written_shown", report.written_shown_mean_ms);
    let share = rest / report.mean_ms * 100.0;
    writeln!(out, "{name:<24}{rest:>10.3}{:>10}{:>10}{share:>7.0}%", "", "")?;
    writeln!(out, "{:<24}{:>10.3}\n", "produced_shown", report.mean_ms)?;
    writeln!(
        out,
        "floor, Kafka with nothing behind it: p50 {:.2} ms   p99 {:.2} ms",
        report.kafka_p50_ms, report.kafka_p99_ms
    )
}
