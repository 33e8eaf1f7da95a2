//! What Barid is measured by, beside the floor and the goal: one table, one list, one report.

mod churn;
mod fanout;
mod handshake;
mod idle;
mod latency;
mod push;
mod slow;
mod soak;
mod storm;
mod tls;
mod trial;
mod unicast;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use crate::live::{Recorded, say};
use crate::measure::{Goal, Measure, table};
use crate::report::{self, Repeated, Report};
use crate::target::ClusterOptions;
use push::PushOptions;
use soak::SoakOptions;
use trial::{Both, Server, Trial};

const OUT: &str = "target/bench/bench.json";
const REPORT: &str = "report";

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
    /// Sessions of `idle` and `fanout`.
    #[arg(long, default_value_t = 19_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    sessions: u32,
    /// Sessions begun a second in `idle`.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// How long sessions idle before they are weighed again, seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    idle_seconds: u64,
    /// How long a process that has just started, or changed, is given before it is weighed, seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    settle_seconds: u64,
    /// How long one scenario may take, seconds; then it has failed, and the next one begins.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    limit_seconds: u64,
    /// How often each scenario is run; the middle run counts, and the report has all of them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Where the list of measures goes.
    #[arg(long, default_value = OUT)]
    out: PathBuf,
    /// What the report is called that is written beside it: NAME.json, and NAME.html for people.
    #[arg(long, default_value = REPORT, value_name = "NAME")]
    report: String,
    #[command(flatten)]
    push: PushOptions,
    #[command(flatten)]
    soak: SoakOptions,
    #[command(flatten)]
    target: ClusterOptions,
}

/// The bench with one scenario, which takes long.
#[derive(Debug, Args)]
pub struct SoakCommand {
    #[command(flatten)]
    options: Options,
}

/// Soaks, and prints a verdict; `false`: something was lost, or grew.
pub async fn soak(SoakCommand { options }: SoakCommand) -> anyhow::Result<bool> {
    let is_default = options.out == Path::new(OUT);
    let out = if is_default { options.out.with_file_name("soak.json") } else { options.out };
    let report = if options.report == REPORT { "soak-report".to_owned() } else { options.report };
    let options = Options { only: vec![Scenario::Soak], out, report, ..options };
    let report = bench(&options).await?;
    let scenarios = report.scenarios.iter().filter_map(|scenario| scenario.failed.clone());
    let grown = report.measures.iter().filter(|row| row.measure.met == Some(false));
    let wrong: Vec<_> = scenarios.chain(grown.map(|row| row.measure.measure.clone())).collect();
    let verdict = match wrong.is_empty() {
        true => "soaked: everything was shown once and in order, and nothing grew".to_owned(),
        false => format!("soaked, and found wanting: {}", wrong.join("; ")),
    };
    writeln!(std::io::stdout().lock(), "\n{verdict}")?;
    Ok(wrong.is_empty())
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
    /// One message to every session of a node, in bursts and at a steady rate.
    Fanout,
    /// Kafka to device and back, as many as go.
    Unicast,
    /// Kafka to device at a fixed rate.
    Latency,
    /// The same beside ten thousand devices that hardly read.
    Slow,
    /// Memory and handshakes of sessions over TLS.
    Tls,
    /// All of it for a long time; only if it is asked for.
    Soak,
}

/// Measures everything, prints the table, writes the files; `false`: something could not be measured.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let report = bench(options).await?;
    Ok(report.scenarios.iter().all(|scenario| scenario.failed.is_none()))
}

async fn bench(options: &Options) -> anyhow::Result<Report> {
    let (begun, mut report, mut rows) = (Instant::now(), Report::begin(), Vec::new());
    let all = Scenario::value_variants();
    let only = |scenario: &&Scenario| match options.only.is_empty() {
        true => scenario.is_usual(),
        false => options.only.contains(scenario),
    };
    for (scenario, repetition) in all
        .iter()
        .filter(only)
        .flat_map(|scenario| (1..=options.repeat).map(move |number| (*scenario, number)))
    {
        say(&format!("{} ...", scenario.name()))?;
        let started = Instant::now();
        let (measured, recorded) = scenario.measure(options).await;
        let failed = match measured {
            Ok(measured) => {
                say(&table(&measured))?;
                rows.extend(measured);
                None
            }
            Err(error) => {
                say(&format!("{} failed: {error:#}", scenario.name()))?;
                Some(format!("{error:#}"))
            }
        };
        let (scenario, seconds) = (scenario.name(), started.elapsed().as_secs_f64());
        let done = report::Scenario { scenario, repetition, seconds, failed, recorded };
        report.scenarios.push(done);
        report.measures = Repeated::of(&rows);
        report.seconds = begun.elapsed().as_secs_f64();
        // What was measured stays, whatever becomes of the rest.
        write(options, &report)?;
    }
    let measures: Vec<_> = report.measures.iter().map(|row| row.measure.clone()).collect();
    let mut out = std::io::stdout().lock();
    for scenario in &report.scenarios {
        for table in &scenario.recorded.tables {
            writeln!(out, "{}\n{table}\n", scenario.scenario)?;
        }
    }
    writeln!(out, "{}", table(&measures))?;
    Ok(report)
}

/// The list of measures, and the report beside it.
fn write(options: &Options, report: &Report) -> anyhow::Result<()> {
    let directory = options.out.parent().unwrap_or(Path::new(""));
    std::fs::create_dir_all(directory)?;
    let measures: Vec<_> = report.measures.iter().map(|row| &row.measure).collect();
    let json = serde_json::to_string_pretty(&measures)?;
    std::fs::write(&options.out, json + "\n")
        .with_context(|| format!("writing {}", options.out.display()))?;
    report.write(directory, &options.report)
}

impl Scenario {
    /// As on the command line.
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it is measured where none is named: all of those take a quarter of an hour.
    fn is_usual(self) -> bool {
        !matches!(self, Self::Slow | Self::Tls | Self::Soak)
    }

    /// What was measured, and what was seen meanwhile.
    async fn measure(self, options: &Options) -> (anyhow::Result<Vec<Measure>>, Recorded) {
        let mut trial = match Trial::start(options, &self.name()).await {
            Ok(trial) => trial,
            Err(error) => return (Err(error), Recorded::default()),
        };
        let limit = match self {
            Self::Soak => options.soak.limit(),
            _ => Duration::from_secs(options.limit_seconds),
        };
        let rows = match tokio::time::timeout(limit, self.rows(&mut trial)).await {
            Ok(rows) => rows,
            Err(_) => Err(anyhow::anyhow!("not done within {limit:?}")),
        };
        (rows, trial.live.recorded())
    }

    async fn rows(self, trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
        match self {
            Self::Idle => idle::measure(trial).await,
            Self::Handshake => handshake::measure(trial).await,
            Self::Storm => storm::measure(trial).await,
            Self::Churn => churn::measure(trial).await,
            Self::Fanout => fanout::measure(trial).await,
            Self::Unicast => unicast::measure(trial).await,
            Self::Latency => latency::measure(trial).await,
            Self::Slow => slow::measure(trial).await,
            Self::Tls => tls::measure(trial).await,
            Self::Soak => soak::measure(trial).await,
        }
    }
}
