//! Produces to a running cluster at a fixed rate and checks what its devices are shown.

mod audit;
mod devices;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use barid_bus::{KafkaConfig, Producer};
use bytes::Bytes;
use clap::Parser;
use tokio::task::JoinSet;

use audit::Audit;
use report::Report;

/// Drive a Barid cluster: Kafka to device and back, checked.
#[derive(Debug, Parser)]
#[command(name = "barid-loadtest", version)]
struct Arguments {
    /// Kafka brokers.
    #[arg(long, default_value = "127.0.0.1:9092", value_delimiter = ',')]
    brokers: Vec<String>,
    /// Topic to produce to.
    #[arg(long, default_value = "barid.push")]
    topic: String,
    /// Access nodes; users are spread over them.
    #[arg(long, default_value = "ws://127.0.0.1:7080", value_delimiter = ',')]
    url: Vec<String>,
    /// File with the HS256 secret that signs the users' tokens.
    #[arg(long)]
    secret_file: PathBuf,
    /// Key id of that secret.
    #[arg(long)]
    key_id: Option<String>,
    /// App of the users.
    #[arg(long, default_value = "loadtest")]
    app: String,
    /// Users, one device each.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=15_000))]
    users: u32,
    /// Records a second.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    rate: u32,
    /// How long to produce.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// How long to wait for the last deliveries.
    #[arg(long, default_value_t = 30)]
    settle_seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let total = u64::from(arguments.rate) * arguments.seconds;
    let audit = Arc::new(Audit::new(arguments.users, arguments.rate, total));
    let clients = devices::connect(&arguments, &audit).await?;

    let started = Instant::now();
    audit.start();
    produce(&arguments, &audit, total).await?;
    let produced_in = started.elapsed();
    audit.settled(Duration::from_secs(arguments.settle_seconds)).await;
    let report = Report::new(&arguments, &audit, produced_in);
    report.print(arguments.json)?;

    let mut closing: JoinSet<_> = clients.into_iter().map(barid_client::Client::shutdown).collect();
    while closing.join_next().await.is_some() {}
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Record `n` is for user `n % users` and due at `n / rate` seconds.
async fn produce(arguments: &Arguments, audit: &Audit, total: u64) -> anyhow::Result<()> {
    let config = KafkaConfig { brokers: arguments.brokers.clone(), ..KafkaConfig::default() };
    let producer = Producer::new(&config)?;
    // In front of every id, so that a second run against the same mailboxes has no duplicates.
    let run = std::process::id();
    let text = "x".repeat(arguments.payload_bytes as usize);
    let mut sending = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    let mut next = 0;
    while next < total {
        ticks.tick().await;
        let due = (audit.elapsed().as_secs_f64() * f64::from(arguments.rate)) as u64;
        while next < due.min(total) {
            let user = devices::user(next % u64::from(arguments.users));
            let record = serde_json::json!({
                "id": format!("{run}-{next}"), "app": arguments.app, "to": {"user": user},
                "text": text,
            });
            let (producer, topic) = (producer.clone(), arguments.topic.clone());
            let value = Bytes::from(serde_json::to_vec(&record)?);
            sending.spawn(async move { producer.send(&topic, user.as_bytes(), value, &[]).await });
            next += 1;
        }
        while let Some(sent) = sending.try_join_next() {
            sent?.context("producing")?;
        }
    }
    while let Some(sent) = sending.join_next().await {
        sent?.context("producing")?;
    }
    Ok(())
}
