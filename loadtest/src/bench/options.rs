//! The options of `bench` and `soak`, and the scenarios.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, value_parser};

use crate::attacker::Kind;
use crate::target::ClusterOptions;

/// Default of `--out`.
pub const OUT: &str = "target/bench/bench.json";
/// Default of `--report`.
pub const REPORT: &str = "report";

#[derive(Debug, Args)]
pub struct Options {
    /// Comma-separated scenarios (default: all except audience, scale, slow, tls, attack and soak).
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<Scenario>,
    /// Running agents, host:port; without any, --local-agents are started.
    #[arg(long, value_delimiter = ',')]
    pub agents: Vec<String>,
    /// Number of agents to start on this machine.
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u8).range(1..=64))]
    pub local_agents: u8,
    /// Access nodes of `scale`. A process that may open 20,000 files holds some 19,000 sessions.
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u16).range(1..=256))]
    pub access_nodes: u16,
    /// IP address that the floor listens on; agents must be able to reach it.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub floor_address: IpAddr,
    /// Do not measure the floor.
    #[arg(long)]
    pub no_floor: bool,
    /// Sessions of `idle`, `fanout`, `audience` and `scale`.
    #[arg(long, default_value_t = 19_000, value_parser = value_parser!(u32).range(1..=10_000_000))]
    pub sessions: u32,
    /// Sessions begun per second in `idle`, `fanout`, `audience` and `scale`.
    #[arg(long, default_value_t = 2_000, value_parser = value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Seconds that sessions are idle before their memory is measured again.
    #[arg(long, default_value_t = 60, value_parser = value_parser!(u64).range(0..=86_400))]
    pub idle_seconds: u64,
    /// Seconds that a process gets to settle before its memory is measured.
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u64).range(0..=86_400))]
    pub settle_seconds: u64,
    /// Time limit of a scenario in seconds; a scenario that takes longer has failed.
    #[arg(long, default_value_t = 600, value_parser = value_parser!(u64).range(0..=86_400))]
    pub limit_seconds: u64,
    /// Repetitions of each scenario. The median counts; the report has all of them.
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..=100))]
    pub repeat: u32,
    /// File for the list of measures.
    #[arg(long, default_value = OUT)]
    pub out: PathBuf,
    /// Name of the report beside that file: NAME.json and NAME.html.
    #[arg(long, default_value = REPORT, value_name = "NAME")]
    pub report: String,
    /// Whether the roles of the cluster speak mutual TLS (default: in `idle`, `handshake` and `attack`). Never in
    /// `fanout` and `audience`, where the tool acts as the dispatcher.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub internal_tls: Option<bool>,
    #[command(flatten)]
    pub attack: AttackOptions,
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
    /// Memory of sessions: idle, after a broadcast, after they have ended.
    Idle,
    /// CPU time and duration of handshakes.
    Handshake,
    /// All devices drop and reconnect at once.
    Storm,
    /// Some sessions leave and return all the time.
    Churn,
    /// Messages to every session of a node, in bursts and at a steady rate.
    Fanout,
    /// The same through Kafka and the mailbox of everyone, beside fan-out alone.
    Audience,
    /// Kafka to device as fast as possible.
    Unicast,
    /// Kafka to device at a fixed rate.
    Latency,
    /// Latency and memory with many sessions on several access nodes.
    Scale,
    /// Latency beside 10,000 devices that hardly read.
    Slow,
    /// Memory and handshakes over TLS.
    Tls,
    /// Latency of honest handshakes beside attacks on the devices' port.
    Attack,
    /// All deliveries and the growth of memory over a long time.
    Soak,
}

impl Scenario {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it runs when `--only` is absent; these take 15 minutes.
    pub fn is_default(self) -> bool {
        !matches!(
            self,
            Self::Audience | Self::Scale | Self::Slow | Self::Tls | Self::Attack | Self::Soak
        )
    }

    /// Whether its cluster has `internal_tls` unless an option says otherwise.
    pub fn has_internal_tls(self, asked: Option<bool>) -> bool {
        let is_default = matches!(self, Self::Idle | Self::Handshake | Self::Attack);
        !matches!(self, Self::Fanout | Self::Audience) && asked.unwrap_or(is_default)
    }
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Latency, unicast and scale")]
pub struct PushOptions {
    /// Users, one device each (`scale`: --sessions).
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub push_users: u32,
    /// Payload size in bytes.
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(1..=65_536))]
    pub push_bytes: u32,
    /// Measured seconds (default: 30 for `latency`, 20 for `unicast`, 60 for `scale`).
    #[arg(long, value_parser = value_parser!(u64).range(1..=86_400))]
    pub push_seconds: Option<u64>,
    /// Seconds of warm-up at the same rate.
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u64).range(0..=86_400))]
    pub push_warmup_seconds: u64,
    /// Messages per second in `latency` and `scale`.
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u32).range(1..=200_000))]
    pub push_rate: u32,
    /// Messages between Kafka and the devices in `unicast`, at most.
    #[arg(long, default_value_t = 20_000, value_parser = value_parser!(u64).range(1..=10_000_000))]
    pub push_window: u64,
    /// Time that the producer of `unicast` and `scale` waits to fill a batch, ms; counts as latency.
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(0..=60_000))]
    pub push_linger_ms: u32,
    /// Print the process ids and wait this many seconds before measuring, to attach a profiler.
    #[arg(long, default_value_t = 0, value_parser = value_parser!(u64).range(0..=86_400))]
    pub attach_seconds: u64,
}

impl PushOptions {
    /// The warm-up, unless it is 0 s long, and the measured phase; with their seconds.
    pub fn phases(&self, seconds: u64) -> Vec<(&'static str, u64)> {
        let phases = [("warming up", self.push_warmup_seconds), ("pushing", seconds)];
        phases.into_iter().filter(|(_, seconds)| *seconds > 0).collect()
    }
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Attack")]
pub struct AttackOptions {
    /// Comma-separated attacks (default: all).
    #[arg(long, value_delimiter = ',')]
    pub attacks: Vec<Kind>,
    /// Rounds; the median of their ratios counts.
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u32).range(1..=15))]
    pub attack_rounds: u32,
    /// Seconds that honest clients connect in each of a round's three phases.
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u32).range(1..=600))]
    pub attack_seconds: u32,
    /// Connections of the attacker, per second and held, relative to the full attack.
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u32).range(1..=150))]
    pub attack_percent: u32,
    /// Addresses of the attacker (default: 8 to 1,000, by attack).
    #[arg(long, value_parser = value_parser!(u16).range(1..=10_000))]
    pub attack_addresses: Option<u16>,
    /// Places of the node for unfinished handshakes (default: that of `limits.handshakes_max`).
    #[arg(long, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub attack_places: Option<u32>,
    /// Do not search, after `half`, the rate at which honest clients fail.
    #[arg(long)]
    pub no_sweep: bool,
    /// Numbers of attacking networks in that search.
    #[arg(long, value_delimiter = ',', default_value = "100,400,2000")]
    #[arg(value_parser = value_parser!(u16).range(1..=10_000))]
    pub sweep_networks: Vec<u16>,
    /// Its rates, ascending: half requests begun per second.
    #[arg(long, value_delimiter = ',', default_value = "2000,3000,4000,5000,6000,8000")]
    #[arg(value_parser = value_parser!(u32).range(1..=9_000))]
    pub sweep_rates: Vec<u32>,
}

impl AttackOptions {
    /// Time limit of the scenario: a phase ends at the latest when the last handshake of an honest client times out.
    pub fn limit(&self) -> Duration {
        let phases = u64::from(self.attack_rounds) * 3 * Kind::value_variants().len() as u64;
        let steps = (self.sweep_networks.len() * self.sweep_rates.len()) as u64;
        Duration::from_secs((phases + steps) * (u64::from(self.attack_seconds) + 50) + 300)
    }
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Soak")]
pub struct SoakOptions {
    /// Duration: 0.1 to 100,000.
    #[arg(long, default_value_t = 10.0, value_parser = minutes)]
    pub minutes: f64,
    /// Sessions, one user each.
    #[arg(long, default_value_t = 5_000, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub soak_sessions: u32,
    /// Messages per second, to all users in turn.
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u32).range(1..=200_000))]
    pub soak_rate: u32,
    /// Sessions per second that drop and return.
    #[arg(long, default_value_t = 50, value_parser = value_parser!(u32).range(0..=100_000))]
    pub soak_churn: u32,
    /// Maximum growth of memory, files and tasks over the second half: 0.05 is 5 %.
    #[arg(long, default_value_t = 0.05, value_parser = growth)]
    pub growth_max: f64,
}

impl SoakOptions {
    /// Time limit of the scenario, including its start and the last deliveries.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds()) + 600)
    }

    /// How long messages flow.
    pub fn seconds(&self) -> u32 {
        (self.minutes * 60.0) as u32
    }
}

fn growth(text: &str) -> Result<f64, String> {
    let growth: f64 = text.parse().map_err(|_| "not a number")?;
    if (0.0..=10.0).contains(&growth) { Ok(growth) } else { Err("must be 0 to 10".into()) }
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number")?;
    let is_valid = (0.1..=100_000.0).contains(&minutes);
    if is_valid { Ok(minutes) } else { Err("must be 0.1 to 100,000".into()) }
}
