//! Drives a running cluster: records at a fixed rate, to devices that use the Rust SDK and therefore
//! reconnect after an outage.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_client::{Client, Event, Message, Token};
use clap::{Args, value_parser};
use jsonwebtoken::EncodingKey;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::audit::{Audit, Outcome, Start};
use crate::histogram::quantile_ms;
use crate::producer::{Business, Pace, Plan, user};
use crate::token::sign;

/// Handshakes under way at once while the devices connect.
const HANDSHAKES_MAX: u32 = 64;
/// How long one group of handshakes may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

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
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u32).range(1..=15_000))]
    users: u32,
    /// Records per second.
    #[arg(long, default_value_t = 1000, value_parser = value_parser!(u32).range(1..=200_000))]
    rate: u32,
    /// Seconds to produce.
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Payload size in bytes.
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// Seconds to wait for the last deliveries.
    #[arg(long, default_value_t = 30, value_parser = value_parser!(u64).range(0..=86_400))]
    settle_seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
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

/// Returns false unless every record was delivered exactly once and in order.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let total = u64::from(options.rate) * options.seconds;
    let audit = Arc::new(Audit::new(options.users, Some(options.rate)));
    audit.expect(total);
    let clients = connect(options, &audit).await?;
    let plan = Plan {
        brokers: options.brokers.clone(),
        topic: options.topic.clone(),
        app: options.app.clone(),
        payload_bytes: options.payload_bytes,
        linger_ms: 0,
    };
    let business = Business::open(&plan).await?;

    let started = Instant::now();
    audit.start(Start::after(Duration::ZERO));
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

    let mut closing: JoinSet<_> = clients.into_iter().map(Client::shutdown).collect();
    while closing.join_next().await.is_some() {}
    Ok(totals.outcome().is_clean())
}

/// Connects one SDK client for each user and waits until all of them were welcomed.
async fn connect(options: &Options, audit: &Arc<Audit>) -> anyhow::Result<Vec<Client>> {
    let secret = std::fs::read(&options.secret_file)
        .with_context(|| format!("reading {}", options.secret_file.display()))?;
    let key = EncodingKey::from_secret(secret.trim_ascii_end());
    let life = Duration::from_secs(options.seconds + options.settle_seconds + 3600);
    let (welcomed, mut welcomes) = mpsc::channel(options.users as usize);
    let mut clients = Vec::new();
    for number in 0..options.users {
        let (key_id, user) = (options.key_id.clone(), user(number.into()));
        let token = sign(&key, key_id, &options.app, &user, life)?;
        let url = &options.url[number as usize % options.url.len()];
        let (audit, welcomed) = (Arc::clone(audit), welcomed.clone());
        let client = Client::builder(url)
            .device("load")
            .platform("loadtest")
            .token(move || {
                let token = Token::new(token.clone());
                async move { Ok(token) }
            })
            .on_event(move |event| {
                if let Event::Connected { .. } = event {
                    // The channel is full only when all clients have connected; reconnects do not count.
                    let _ = welcomed.try_send(());
                }
            })
            .start(move |message: Message| {
                audit.shown(number, &message.id);
                async { Ok(()) }
            })?;
        clients.push(client);
        if (number + 1) % HANDSHAKES_MAX == 0 || number + 1 == options.users {
            let group = clients.len() - (number / HANDSHAKES_MAX * HANDSHAKES_MAX) as usize;
            for _ in 0..group {
                if tokio::time::timeout(CONNECT_TIMEOUT, welcomes.recv()).await.is_err() {
                    bail!("no Welcome within {CONNECT_TIMEOUT:?} from {url}");
                }
            }
        }
    }
    Ok(clients)
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
        writeln!(out, "{}; {} of other runs", self.outcome, self.foreign)?;
        writeln!(
            out,
            "latency p50 {:.2} ms   p90 {:.2} ms   p99 {:.2} ms   max {:.2} ms",
            self.latency_p50_ms, self.latency_p90_ms, self.latency_p99_ms, self.latency_max_ms
        )
    }
}
