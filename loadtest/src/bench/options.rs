//! The options of the bench, and the scenarios that they name.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::target::ClusterOptions;

/// Where the list of measures goes, unless another place is named.
pub const OUT: &str = "target/bench/bench.json";
/// What the report is called, unless it is given a name.
pub const REPORT: &str = "report";

/// What is measured, and with what.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these, with commas between; without, all but `slow` and `tls`.
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<Scenario>,
    /// Agents that run already, host:port; without any, some are started here.
    #[arg(long, value_delimiter = ',')]
    pub agents: Vec<String>,
    /// How many are started here.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub local_agents: u8,
    /// Where the floor listens: an address of this machine that agents elsewhere reach.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub floor_address: IpAddr,
    /// Measure no floor.
    #[arg(long)]
    pub no_floor: bool,
    /// Sessions of `idle` and `fanout`.
    #[arg(long, default_value_t = 19_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub sessions: u32,
    /// Sessions begun a second in `idle`.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// How long sessions idle before they are weighed again, seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub idle_seconds: u64,
    /// How long a process that has just started, or changed, is given before it is weighed, seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub settle_seconds: u64,
    /// How long one scenario may take, seconds; then it has failed, and the next one begins.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub limit_seconds: u64,
    /// How often each scenario is run; the middle run counts, and the report has all of them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repeat: u32,
    /// Where the list of measures goes.
    #[arg(long, default_value = OUT)]
    pub out: PathBuf,
    /// What the report is called that is written beside it: NAME.json, and NAME.html for people.
    #[arg(long, default_value = REPORT, value_name = "NAME")]
    pub report: String,
    #[command(flatten)]
    pub push: PushOptions,
    #[command(flatten)]
    pub soak: SoakOptions,
    #[command(flatten)]
    pub target: ClusterOptions,
}

/// In the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
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

impl Scenario {
    /// As on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it is measured where none is named: all of those take a quarter of an hour.
    pub fn is_usual(self) -> bool {
        !matches!(self, Self::Slow | Self::Tls | Self::Soak)
    }
}

/// How it is pushed.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Latency and unicast")]
pub struct PushOptions {
    /// Users, one device each.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub push_users: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub push_bytes: u32,
    /// How long is measured, seconds; without, 30 for `latency` and 20 for `unicast`.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub push_seconds: Option<u64>,
    /// How long the cluster works before that, seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub push_warmup_seconds: u64,
    /// Messages a second of `latency`.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    pub push_rate: u32,
    /// Messages of `unicast` between Kafka and the devices at once.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub push_window: u64,
    /// How long records of `unicast` wait in the business's producer for others of their batch, ms.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub push_linger_ms: u32,
    /// Says the process ids, and waits so many seconds before it measures, for who wants to attach a
    /// profiler.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub attach_seconds: u64,
}

impl PushOptions {
    /// What is done for how long: with warming up, unless that is left out.
    pub fn phases(&self, seconds: u64) -> Vec<(&'static str, u64)> {
        let phases = [("warming up", self.push_warmup_seconds), ("pushing", seconds)];
        phases.into_iter().filter(|(_, seconds)| *seconds > 0).collect()
    }
}

/// How it is soaked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Soak")]
pub struct SoakOptions {
    /// How long messages flow: 0.1 to 100,000.
    #[arg(long, default_value_t = 10.0, value_parser = minutes)]
    pub minutes: f64,
    /// Sessions at any time, one user each.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub soak_sessions: u32,
    /// Messages a second, for all users in turn.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    pub soak_rate: u32,
    /// Sessions a second that drop and return; what comes meanwhile waits for them.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub soak_churn: u32,
    /// By how much memory, files and tasks may grow over the last half, as a share.
    #[arg(long, default_value_t = 0.05, value_parser = share)]
    pub growth_max: f64,
}

impl SoakOptions {
    /// How long all of it may take: starting, connecting and the last deliveries included.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds()) + 600)
    }

    /// How long messages flow.
    pub fn seconds(&self) -> u32 {
        (self.minutes * 60.0) as u32
    }
}

/// A share, up to ten times as much.
fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| "not a number")?;
    if (0.0..=10.0).contains(&share) { Ok(share) } else { Err("must be 0 to 10".into()) }
}

fn minutes(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "must be a number")?;
    if (0.1..=100_000.0).contains(&value) {
        return Ok(value);
    }
    Err("must be 0.1 to 100,000".into())
}
