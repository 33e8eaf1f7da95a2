//! Runs scenarios: prints a table of measures, and writes it as JSON and as a report.

mod attack;
mod churn;
mod fanout;
mod handshake;
mod idle;
mod latency;
mod options;
mod scale;
mod slow;
mod soak;
mod storm;
mod tls;
mod trial;
mod unicast;

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum as _};

use crate::live::{Recorded, say};
use crate::measure::{Measure, table};
use crate::report::{self, Repeated, Report};

pub use self::options::Options;
use self::options::{OUT, REPORT, Scenario};
use self::trial::Trial;

/// `bench --only soak`, with a verdict.
#[derive(Debug, Args)]
pub struct SoakCommand {
    #[command(flatten)]
    options: Options,
}

/// Returns false if a message was lost or something grew.
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
        true => "passed: every message arrived once and in order, and nothing grew".to_owned(),
        false => format!("failed: {}", wrong.join("; ")),
    };
    writeln!(std::io::stdout().lock(), "\n{verdict}")?;
    Ok(wrong.is_empty())
}

/// Returns false if a scenario failed.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let report = bench(options).await?;
    Ok(report.scenarios.iter().all(|scenario| scenario.failed.is_none()))
}

async fn bench(options: &Options) -> anyhow::Result<Report> {
    let (started, mut report, mut rows) = (Instant::now(), Report::begin(), Vec::new());
    let all = Scenario::value_variants();
    let only = |scenario: &&Scenario| match options.only.is_empty() {
        true => scenario.is_default(),
        false => options.only.contains(scenario),
    };
    for (scenario, repetition) in all
        .iter()
        .filter(only)
        .flat_map(|scenario| (1..=options.repeat).map(move |number| (*scenario, number)))
    {
        say(&format!("{} ...", scenario.name()))?;
        let scenario_started = Instant::now();
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
        let (scenario, seconds) = (scenario.name(), scenario_started.elapsed().as_secs_f64());
        let done = report::Scenario { scenario, repetition, seconds, failed, recorded };
        report.scenarios.push(done);
        report.measures = Repeated::of(&rows);
        report.seconds = started.elapsed().as_secs_f64();
        // Written after each scenario: a later failure loses nothing.
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

/// Writes the list of measures, and the report beside it.
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
    /// The measures, and what was recorded for the report.
    async fn measure(self, options: &Options) -> (anyhow::Result<Vec<Measure>>, Recorded) {
        let mut trial = match Trial::start(options, self).await {
            Ok(trial) => trial,
            Err(error) => return (Err(error), Recorded::default()),
        };
        let limit = match self {
            Self::Soak => options.soak.limit(),
            Self::Attack => options.attack.limit(),
            _ => Duration::from_secs(options.limit_seconds),
        };
        let rows = match tokio::time::timeout(limit, self.rows(&mut trial)).await {
            Ok(rows) => rows,
            Err(_) => Err(anyhow::anyhow!("time limit of {limit:?} exceeded")),
        };
        (rows, trial.live.finish().await)
    }

    async fn rows(self, trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
        match self {
            Self::Idle => idle::measure(trial).await,
            Self::Handshake => handshake::measure(trial).await,
            Self::Storm => storm::measure(trial).await,
            Self::Churn => churn::measure(trial).await,
            Self::Fanout => fanout::measure(trial).await,
            Self::Audience => fanout::stored(trial).await,
            Self::Unicast => unicast::measure(trial).await,
            Self::Latency => latency::measure(trial).await,
            Self::Scale => scale::measure(trial).await,
            Self::Slow => slow::measure(trial).await,
            Self::Tls => tls::measure(trial).await,
            Self::Attack => attack::measure(trial).await,
            Self::Soak => soak::measure(trial).await,
        }
    }
}
