//! What Barid is measured by, beside the floor and the goal: one table, one JSON file.

mod churn;
mod handshake;
mod idle;
mod storm;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use barid_testkit::token;
use clap::{Args, Parser, ValueEnum};
use serde::Serialize;

use crate::controller::Agents;
use crate::rpc::ConnectRequest;
use crate::sandbox::Sandbox;
use crate::{latency, throughput};

/// What is measured, and with what.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these, with commas between.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Scenario>,
    /// Agents that run already, host:port; without any, some are started here.
    #[arg(long, value_delimiter = ',')]
    agents: Vec<String>,
    /// How many are started here.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    local_agents: u8,
    /// Sessions of `idle`.
    #[arg(long, default_value_t = 19_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    sessions: u32,
    /// Sessions begun a second in `idle`.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// How long sessions idle before they are weighed again, seconds.
    #[arg(long, default_value_t = 60)]
    idle_seconds: u64,
    /// How long a process that has just started, or changed, is given before it is weighed, seconds.
    #[arg(long, default_value_t = 10)]
    settle_seconds: u64,
    /// Where the result goes.
    #[arg(long, default_value = "target/bench/bench.json")]
    out: PathBuf,
}

/// In the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Memory of idle sessions, after a broadcast, and after they have gone.
    Idle,
    /// What a handshake costs: JWT, route, mailbox.
    Handshake,
    /// Everybody drops and returns at once.
    Storm,
    /// Some come and go all the time.
    Churn,
    /// Kafka to device and back, as many as go.
    Unicast,
    /// Kafka to device at a fixed rate.
    Latency,
}

/// What would be good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// One row. Field names are stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measure {
    measure: &'static str,
    unit: &'static str,
    /// What the barest program takes, measured in the same run; for latencies Kafka's hop alone;
    /// absent: there is none.
    floor: Option<f64>,
    barid: f64,
    /// Barid's over the floor's; absent: there is no floor, or it is zero.
    ratio: Option<f64>,
    goal: Option<f64>,
    /// Absent: there is no goal.
    met: Option<bool>,
}

impl Measure {
    /// A row without a goal.
    pub fn new(measure: &'static str, unit: &'static str, floor: Option<f64>, barid: f64) -> Self {
        let ratio = floor.filter(|floor| *floor != 0.0).map(|floor| barid / floor);
        Self { measure, unit, floor, barid, ratio, goal: None, met: None }
    }

    /// Held against a goal.
    #[must_use]
    pub fn against(self, goal: Goal) -> Self {
        let (value, met) = match goal {
            Goal::AtMost(value) => (value, self.barid <= value),
            Goal::AtLeast(value) => (value, self.barid >= value),
        };
        Self { goal: Some(value), met: Some(met), ..self }
    }
}

/// Measures everything, prints the table, writes the file; `false`: something could not be measured.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let all = Scenario::value_variants();
    let only = |scenario: &&Scenario| options.only.is_empty() || options.only.contains(scenario);
    let (mut measures, mut complete) = (Vec::new(), true);
    for scenario in all.iter().filter(only) {
        say(&format!("{scenario:?} ..."))?;
        match scenario.measure(options).await {
            Ok(rows) => {
                say(&table(&rows))?;
                measures.extend(rows);
            }
            Err(error) => {
                complete = false;
                say(&format!("{scenario:?} failed: {error:#}"))?;
            }
        }
    }
    if let Some(directory) = options.out.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let json = serde_json::to_string_pretty(&measures)?;
    std::fs::write(&options.out, json + "\n")
        .with_context(|| format!("writing {}", options.out.display()))?;
    writeln!(std::io::stdout().lock(), "{}", table(&measures))?;
    Ok(complete)
}

impl Scenario {
    async fn measure(self, options: &Options) -> anyhow::Result<Vec<Measure>> {
        let agents = Agents::start(&options.agents, options.local_agents.into());
        match self {
            Self::Idle => idle::measure(options, &mut agents.await?).await,
            Self::Handshake => handshake::measure(&mut agents.await?).await,
            Self::Storm => storm::measure(&mut agents.await?).await,
            Self::Churn => churn::measure(&mut agents.await?).await,
            Self::Unicast => unicast().await,
            Self::Latency => latencies().await,
        }
    }
}

/// Options as they are when none is given.
#[derive(Parser)]
struct Defaults<T: Args> {
    #[command(flatten)]
    options: T,
}

fn defaults<T: Args>() -> T {
    Defaults::parse_from(["defaults"]).options
}

async fn unicast() -> anyhow::Result<Vec<Measure>> {
    let report = throughput::measure(&defaults()).await?;
    anyhow::ensure!(report.outcome.is_clean(), "{}", report.outcome);
    let acked = Measure::new("unicast_acked_per_s", "1/s", None, report.acked_per_s);
    Ok(vec![acked.against(Goal::AtLeast(50_000.0))])
}

async fn latencies() -> anyhow::Result<Vec<Measure>> {
    let report = latency::measure(&defaults()).await?;
    anyhow::ensure!(report.outcome.is_clean(), "{}", report.outcome);
    Ok(vec![
        Measure::new("latency_p50_ms", "ms", Some(report.kafka_p50_ms), report.p50_ms)
            .against(Goal::AtMost(1.5)),
        Measure::new("latency_p99_ms", "ms", Some(report.kafka_p99_ms), report.p99_ms)
            .against(Goal::AtMost(6.0)),
    ])
}

/// How agents connect to a cluster.
async fn way(sandbox: &mut Sandbox) -> anyhow::Result<ConnectRequest> {
    Ok(ConnectRequest {
        nodes: vec![sandbox.address().await?.to_string()],
        app: barid_testkit::cluster::APP.into(),
        secret: token::SECRET.into(),
        key_id: token::KEY_ID.into(),
        ack_delay_ms: 100,
        ..Default::default()
    })
}

/// The process id of an access node.
fn access_pid(sandbox: &Sandbox) -> anyhow::Result<u32> {
    sandbox.pids().get("access").copied().context("no access node")
}

async fn settle(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// Progress, apart from the result.
fn say(line: &str) -> std::io::Result<()> {
    writeln!(std::io::stderr().lock(), "{line}")
}

fn table(measures: &[Measure]) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), shown);
    let head = ["measure", "unit", "floor", "barid", "ratio", "goal", ""].map(str::to_owned);
    let rows = measures.iter().map(|row| {
        let met = row.met.map_or("", |met| if met { "met" } else { "missed" });
        [
            row.measure.to_owned(),
            row.unit.to_owned(),
            number(row.floor),
            number(Some(row.barid)),
            number(row.ratio),
            number(row.goal),
            met.to_owned(),
        ]
    });
    let line = |[measure, unit, floor, barid, ratio, goal, met]: [String; 7]| {
        let line =
            format!("{measure:<34}{unit:<8}{floor:>10}{barid:>10}{ratio:>8}{goal:>10}  {met}");
        line.trim_end().to_owned()
    };
    std::iter::once(head).chain(rows).map(line).collect::<Vec<_>>().join("\n")
}

/// Three digits, or all before the point.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_how_far_from_floor_and_goal_it_is() {
        let row = Measure::new("idle_bytes_per_session", "B", Some(2000.0), 2500.0);
        assert_eq!(row.clone().against(Goal::AtMost(2560.0)).met, Some(true));
        assert_eq!(row.clone().against(Goal::AtMost(2400.0)).met, Some(false));
        assert_eq!(row.clone().against(Goal::AtLeast(2560.0)).met, Some(false));
        let json = serde_json::to_value(row.against(Goal::AtMost(2560.0))).unwrap();
        let wanted = serde_json::json!({
            "measure": "idle_bytes_per_session", "unit": "B", "floor": 2000.0, "barid": 2500.0,
            "ratio": 1.25, "goal": 2560.0, "met": true,
        });
        assert_eq!(json, wanted);
        let lines = table(&[Measure::new("x", "ms", None, 1.234)]);
        assert!(lines.lines().nth(1).is_some_and(|line| line.contains("1.23")), "{lines}");
    }
}
