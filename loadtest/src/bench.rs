//! What Barid is measured by, beside the floor and the goal: one table, one JSON file.

mod churn;
mod handshake;
mod idle;
mod latency;
mod slow;
mod storm;
mod tls;
mod trial;
mod unicast;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use crate::live::{Recorded, say};
use crate::measure::{Goal, Measure, table};
use crate::target::ClusterOptions;
use trial::{Both, Server, Trial};

/// What is measured, and with what.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these, with commas between; without, all but `slow` and `tls`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Scenario>,
    /// Agents that run already, host:port; without any, some are started here.
    #[arg(long, value_delimiter = ',')]
    agents: Vec<String>,
    /// How many are started here.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    local_agents: u8,
    /// Where the floor listens: an address of this machine that agents elsewhere reach.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    floor_address: IpAddr,
    /// Measure no floor.
    #[arg(long)]
    no_floor: bool,
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
    /// How long one scenario may take, seconds; then it has failed, and the next one begins.
    #[arg(long, default_value_t = 600)]
    limit_seconds: u64,
    /// Where the result goes.
    #[arg(long, default_value = "target/bench/bench.json")]
    out: PathBuf,
    #[command(flatten)]
    target: ClusterOptions,
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
    /// The same beside ten thousand devices that hardly read.
    Slow,
    /// Memory and handshakes of sessions over TLS.
    Tls,
}

/// Measures everything, prints the table, writes the file; `false`: something could not be measured.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let all = Scenario::value_variants();
    let only = |scenario: &&Scenario| match options.only.is_empty() {
        true => scenario.is_usual(),
        false => options.only.contains(scenario),
    };
    let (mut measures, mut complete) = (Vec::new(), true);
    for scenario in all.iter().filter(only) {
        say(&format!("{} ...", scenario.name()))?;
        match scenario.measure(options).await {
            Ok((rows, _)) => {
                say(&table(&rows))?;
                measures.extend(rows);
            }
            Err(error) => {
                complete = false;
                say(&format!("{} failed: {error:#}", scenario.name()))?;
            }
        }
        // What was measured stays, whatever becomes of the rest.
        write(options, &measures)?;
    }
    writeln!(std::io::stdout().lock(), "{}", table(&measures))?;
    Ok(complete)
}

fn write(options: &Options, measures: &[Measure]) -> anyhow::Result<()> {
    if let Some(directory) = options.out.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let json = serde_json::to_string_pretty(measures)?;
    std::fs::write(&options.out, json + "\n")
        .with_context(|| format!("writing {}", options.out.display()))
}

impl Scenario {
    /// As on the command line.
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it is measured where none is named: all of those take a quarter of an hour.
    fn is_usual(self) -> bool {
        !matches!(self, Self::Slow | Self::Tls)
    }

    async fn measure(self, options: &Options) -> anyhow::Result<(Vec<Measure>, Recorded)> {
        let mut trial = Trial::start(options, &self.name()).await?;
        let limit = Duration::from_secs(options.limit_seconds);
        let measures = tokio::time::timeout(limit, self.rows(&mut trial)).await;
        let measures = measures.with_context(|| format!("not done within {limit:?}"))??;
        Ok((measures, trial.live.recorded()))
    }

    async fn rows(self, trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
        match self {
            Self::Idle => idle::measure(trial).await,
            Self::Handshake => handshake::measure(trial).await,
            Self::Storm => storm::measure(trial).await,
            Self::Churn => churn::measure(trial).await,
            Self::Unicast => unicast::measure(trial).await,
            Self::Latency => latency::measure(trial).await,
            Self::Slow => slow::measure(trial).await,
            Self::Tls => tls::measure(trial).await,
        }
    }
}
