//! Against a running cluster: records at a fixed rate, devices that are the Rust SDK.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::audit::{Audit, Outcome};
use crate::clients;
use crate::histogram::quantile_ms;
use crate::producer::{Business, Pace, Plan};

/// What is driven, and how.
#[derive(Debug, Args)]
pub struct Options {
    /// Kafka brokers.
    #[arg(long, default_value = "127.0.0.1:9092")]
    brokers: String,
    /// Topic to produce to.
    #[arg(long, default_value = "barid.push")]
    topic: String,
    /// Access nodes; users are spread over them.
    #[arg(long, default_value = "ws://127.0.0.1:7080", value_delimiter = ',')]
    pub url: Vec<String>,
    /// File with the HS256 secret that signs the users' tokens.
    #[arg(long)]
    pub secret_file: PathBuf,
    /// Key id of that secret.
    #[arg(long)]
    pub key_id: Option<String>,
    /// App of the users.
    #[arg(long, default_value = "loadtest")]
    pub app: String,
    /// Users, one device each.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=15_000))]
    pub users: u32,
    /// Records a second.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    rate: u32,
    /// How long to produce.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// How long to wait for the last deliveries.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub settle_seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable: programs compare runs by them.
#[derive(Debug, Serialize)]
struct Report {
    users: u32,
    rate_per_s: u32,
    payload_bytes: u32,
    produced: u64,
    produced_in_s: f64,
    #[serde(flatten)]
    outcome: Outcome,
    foreign: u64,
    latency_p50_ms: f64,
    latency_p90_ms: f64,
    latency_p99_ms: f64,
    latency_max_ms: f64,
}

/// Drives and prints; `false` if something was not delivered once and in order.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let total = u64::from(options.rate) * options.seconds;
    let audit = Arc::new(Audit::new(options.users, Some(options.rate)));
    audit.expect(total);
    let clients = clients::connect(options, &audit).await?;
    let plan = Plan {
        brokers: options.brokers.clone(),
        topic: options.topic.clone(),
        app: options.app.clone(),
        payload_bytes: options.payload_bytes,
        linger_ms: 0,
    };
    let business = Business::open(&plan).await?;

    let started = Instant::now();
    audit.start();
    business.produce(Pace::Scheduled(total), &audit).await?;
    let produced_in = started.elapsed();
    audit.all_settled(Duration::from_secs(options.settle_seconds)).await;
    let (totals, latencies) = (audit.totals(), audit.latencies_us());
    let report = Report {
        users: options.users,
        rate_per_s: options.rate,
        payload_bytes: options.payload_bytes,
        produced: totals.total,
        produced_in_s: produced_in.as_secs_f64(),
        outcome: totals.outcome(),
        foreign: totals.foreign,
        latency_p50_ms: quantile_ms(&latencies, 0.5),
        latency_p90_ms: quantile_ms(&latencies, 0.9),
        latency_p99_ms: quantile_ms(&latencies, 0.99),
        latency_max_ms: quantile_ms(&latencies, 1.0),
    };
    report.print(options.json)?;

    let mut closing: JoinSet<_> = clients.into_iter().map(barid_client::Client::shutdown).collect();
    while closing.join_next().await.is_some() {}
    Ok(totals.outcome().is_clean())
}

impl Report {
    fn print(&self, json: bool) -> std::io::Result<()> {
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        if json {
            return writeln!(out, "{}", serde_json::to_string(self)?);
        }
        writeln!(
            out,
            "produced {} records of {} bytes in {:.1} s to {} users",
            self.produced, self.payload_bytes, self.produced_in_s, self.users
        )?;
        writeln!(out, "{}; of other runs {}", self.outcome, self.foreign)?;
        writeln!(
            out,
            "latency p50 {:.2} ms   p90 {:.2} ms   p99 {:.2} ms   max {:.2} ms",
            self.latency_p50_ms, self.latency_p90_ms, self.latency_p99_ms, self.latency_max_ms
        )
    }
}
