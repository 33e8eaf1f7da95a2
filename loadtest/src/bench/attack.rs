//! Honest handshakes beside attacks on the devices' port. In each round honest clients connect at a steady rate from
//! addresses of their own: quiet, then while an attacker attacks the barest listener, then while it attacks the node in
//! the same way. The difference of the last two is what the node lets the attacker take; the rest is the attacker's own
//! CPU time, and the kernel's. After the rounds of `half`, more and more half requests are sent until honest clients
//! fail.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use barid_runtime::exposition::Metrics;
use barid_testkit::process::Process;
use barid_testkit::{certificates, http};
use hdrhistogram::Histogram;
use jsonwebtoken::EncodingKey;
use tokio::time::{Instant, sleep};

use super::options::AttackOptions;
use super::trial::{Server, Trial};
use crate::agent::CONNECT_TIMEOUT;
use crate::attacker::{Kind, Outcome};
use crate::controller::{Connected, spawn};
use crate::histogram::quantile_ms;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::process;
use crate::rpc::ConnectRequest;
use crate::sandbox::Access;
use crate::table::Table;
use crate::target::Target;
use crate::token::sign;

/// Honest handshakes per second.
const HONEST_RATE: u32 = 100;
/// Honest handshakes before the first round, at most.
const WARM_UP: u32 = 500;
/// An attack begins at least so long before honest clients are measured beside it.
const RAMP_MIN_SECONDS: u64 = 2;
/// It begins at most so long before them.
const RAMP_MAX_SECONDS: u64 = 10;
/// An attacker ends by itself so long after the last honest client has timed out.
const SPARE_SECONDS: u64 = 30;
const SETTLE_SECONDS: u64 = 2;
const SAMPLE: Duration = Duration::from_millis(200);
const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
const MIB: f64 = (1 << 20) as f64;
/// Goal: the p99 of honest handshakes beside an attack, over the quiet one.
const RATIO_MAX: f64 = 2.0;
/// A round whose attacker made a smaller share of its pace does not count.
const PACE_MIN: f64 = 0.95;
/// Users whose tokens the attacker has: each may have 32 connections without Hello (`limits.user_unidentified_max`).
const USERS: u32 = 1_000;

/// An attack at a fixed pace.
#[derive(Debug, Clone, Copy)]
struct Attack {
    kind: Kind,
    addresses: u16,
    /// Connections begun per second.
    rate: u32,
    /// Connections held at once.
    hold: u32,
}

const ATTACKS: [Attack; 7] = [
    Attack { kind: Kind::Half, addresses: 1_000, rate: 2_000, hold: 10_000 },
    Attack { kind: Kind::Drip, addresses: 1_000, rate: 2_000, hold: 10_000 },
    Attack { kind: Kind::Silent, addresses: 64, rate: 1_500, hold: 10_000 },
    Attack { kind: Kind::Flood, addresses: 8, rate: 50, hold: 200 },
    Attack { kind: Kind::Tokens, addresses: 20, rate: 1_000, hold: 1_000 },
    Attack { kind: Kind::HalfTls, addresses: 1_000, rate: 400, hold: 4_000 },
    Attack { kind: Kind::ClientHello, addresses: 1_000, rate: 2_000, hold: 10_000 },
];

impl Attack {
    fn changed(self, options: &AttackOptions) -> Self {
        let part = |of: u32| (of * options.attack_percent / 100).max(1);
        let addresses = options.attack_addresses.unwrap_or(self.addresses);
        Self { rate: part(self.rate), hold: part(self.hold), addresses, ..self }
    }

    /// `half` with another number of networks and rate. Each connection is held for 2 s.
    fn of_sweep(networks: u16, rate: u32) -> Self {
        Self { kind: Kind::Half, addresses: networks, rate, hold: 2 * rate }
    }

    /// Until its connections are all held.
    fn ramp_seconds(self) -> u64 {
        u64::from(self.hold / self.rate).clamp(RAMP_MIN_SECONDS, RAMP_MAX_SECONDS)
    }
}

/// Honest handshakes of one phase.
#[derive(Debug, Clone)]
struct Honest {
    /// One that failed counts as [`CONNECT_TIMEOUT`], however soon it was refused.
    took_us: Histogram<u64>,
    failed: u32,
    why_failed: String,
}

impl From<Connected> for Honest {
    fn from(connected: Connected) -> Self {
        let Connected { mut took_us, failed, why_failed, .. } = connected;
        let limit_us = u64::try_from(CONNECT_TIMEOUT.as_micros()).unwrap_or(u64::MAX);
        took_us.saturating_record_n(limit_us, failed.into());
        Self { took_us, failed, why_failed }
    }
}

impl Honest {
    fn p99_ms(&self) -> f64 {
        quantile_ms(&self.took_us, 0.99)
    }
}

impl fmt::Display for Honest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99] = [0.5, 0.99].map(|share| quantile_ms(&self.took_us, share));
        write!(f, "p50 {p50:.2} ms, p99 {p99:.2} ms, {} failed", self.failed)
    }
}

/// Honest handshakes beside an attack.
struct Beside {
    honest: Honest,
    outcome: Outcome,
    /// Share of its rate that the attacker made.
    pace: f64,
    /// Cores that the attacker used while honest clients connected.
    attacker_cores: f64,
    /// Cores that the access node used.
    node_cores: f64,
    /// The access node's largest resident memory.
    resident_bytes: u64,
    /// What the node counted meanwhile.
    counted: BTreeMap<String, f64>,
}

struct Round {
    quiet: Honest,
    bare: Beside,
    node: Beside,
}

impl Round {
    fn pace(&self) -> f64 {
        self.bare.pace.min(self.node.pace)
    }
}

/// All rounds of an attack.
struct Rounds {
    attack: Attack,
    /// Resident memory of the access node before the first one.
    empty_bytes: u64,
    rounds: Vec<Round>,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    trial.needs_own_cluster()?;
    let options = &trial.options.attack;
    let chosen = ATTACKS
        .into_iter()
        .filter(|attack| options.attacks.is_empty() || options.attacks.contains(&attack.kind));
    let (over_tls, plain): (Vec<_>, Vec<_>) =
        chosen.map(|attack| attack.changed(options)).partition(|attack| attack.kind.is_over_tls());
    let (mut all, mut steps) = (Vec::new(), Vec::new());
    for (attacks, tls) in [(plain, false), (over_tls, true)] {
        if attacks.is_empty() {
            continue;
        }
        let access = Access { tls, handshakes_max: options.attack_places, ..trial.access() };
        let mut server = trial.barid_with(access).await?;
        let mut stage = Stage::new(trial, &mut server, tls).await?;
        all.extend(stage.rounds(trial, &attacks).await?);
        if attacks.iter().any(|attack| attack.kind == Kind::Half) && !options.no_sweep {
            steps = stage.sweep(trial).await?;
        }
    }
    show(trial, &all, &steps);
    let rows = all.iter().flat_map(|of| measures(of.attack, &of.rounds));
    Ok(rows.chain(failing(&steps)).collect())
}

fn show(trial: &Trial<'_>, all: &[Rounds], steps: &[Step]) {
    let mut cost = Table::new("attack", &COSTS);
    let mut clients = Table::new("honest clients", &HONEST);
    let mut refused = Table::new("counted by the node", &["a round"]);
    for Rounds { attack, empty_bytes, rounds } in all {
        cost.row(&attack.kind.name(), costs(rounds, *empty_bytes).map(Some));
        clients.row(&attack.kind.name(), honest(rounds).map(Some));
        for (what, count) in mean_counts(rounds) {
            refused.row(&format!("{}: {what}", attack.kind.name()), [Some(count)]);
        }
    }
    trial.live.table(cost);
    trial.live.table(clients);
    trial.live.table(refused);
    if !steps.is_empty() {
        let mut sweep = Table::new("networks, half requests", &STEP);
        for step in steps {
            let Attack { addresses, rate, .. } = step.attack;
            sweep.row(&format!("{addresses}, {rate}/s"), step.figures().map(Some));
        }
        trial.live.table(sweep);
    }
}

/// One rate of the sweep.
struct Step {
    attack: Attack,
    beside: Beside,
}

/// Figures of a step.
const STEP: [&str; 6] =
    ["made/s", "handshakes", "failed", "node p50 ms", "node p99 ms", "evicted/s"];

impl Step {
    fn figures(&self) -> [f64; STEP.len()] {
        let Beside { honest, outcome, counted, .. } = &self.beside;
        let evicted = counted.get("limits=evicted").copied().unwrap_or_default();
        [
            outcome.per_second(),
            honest.took_us.len() as f64,
            honest.failed.into(),
            quantile_ms(&honest.took_us, 0.5),
            honest.p99_ms(),
            evicted / outcome.seconds,
        ]
    }
}

/// The lowest rate of half requests at which honest clients failed, by the number of networks.
fn failing(steps: &[Step]) -> Vec<Measure> {
    let failed = steps.iter().filter(|step| step.beside.honest.failed > 0);
    let row = |step: &Step| {
        let name = format!("attack_half_of_{}_networks_fails_at", step.attack.addresses);
        Measure::new(&name, "1/s", None, step.beside.outcome.per_second())
    };
    failed.map(row).collect()
}

/// Figures of an attack: the median of the rounds, of memory the maximum.
const COSTS: [&str; 8] = [
    "attempts/s",
    "held",
    "upgraded",
    "sent MiB/s",
    "its cores",
    "node's cores",
    "node MiB",
    "of it more",
];

fn costs(rounds: &[Round], empty_bytes: u64) -> [f64; COSTS.len()] {
    let of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let resident = rounds.iter().map(|round| round.node.resident_bytes).max().unwrap_or_default();
    [
        of(&|r| r.node.outcome.per_second()),
        of(&|r| r.node.outcome.open_max as f64),
        of(&|r| r.node.outcome.upgraded_max as f64),
        of(&|r| r.node.outcome.sent_bytes as f64 / MIB / r.node.outcome.seconds),
        of(&|r| r.node.attacker_cores),
        of(&|r| r.node.node_cores),
        resident as f64 / MIB,
        resident.saturating_sub(empty_bytes) as f64 / MIB,
    ]
}

/// Times of honest handshakes: the median of the rounds. Counts are of all rounds.
const HONEST: [&str; 9] = [
    "rounds",
    "quiet p50 ms",
    "quiet p99 ms",
    "bare p50 ms",
    "bare p99 ms",
    "node p50 ms",
    "node p99 ms",
    "handshakes",
    "failed",
];

fn honest(rounds: &[Round]) -> [f64; HONEST.len()] {
    let of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let ms = |honest: fn(&Round) -> &Honest, share| of(&|r| quantile_ms(&honest(r).took_us, share));
    let [quiet, bare, node]: [fn(&Round) -> &Honest; 3] =
        [|r| &r.quiet, |r| &r.bare.honest, |r| &r.node.honest];
    [
        rounds.len() as f64,
        ms(quiet, 0.5),
        ms(quiet, 0.99),
        ms(bare, 0.5),
        ms(bare, 0.99),
        ms(node, 0.5),
        ms(node, 0.99),
        rounds.iter().map(|r| r.node.honest.took_us.len() as f64).sum(),
        rounds.iter().map(|r| f64::from(r.node.honest.failed)).sum(),
    ]
}

/// The floor is the same attack on the barest listener; honest clients connect to the node in both.
fn measures(attack: Attack, rounds: &[Round]) -> [Measure; 4] {
    let name = |what: &str| format!("attack_{}_{what}", attack.kind.name().replace('-', "_"));
    let of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let ratio =
        |beside: fn(&Round) -> &Beside| of(&|r| beside(r).honest.p99_ms() / r.quiet.p99_ms());
    let (bare, node) = (of(&|r| r.bare.honest.p99_ms()), of(&|r| r.node.honest.p99_ms()));
    let failed = rounds.iter().map(|r| f64::from(r.node.honest.failed)).sum();
    [
        Measure::new(&name("p99_ms"), "ms", Some(bare), node),
        Measure::new(&name("p99_ratio"), "", Some(ratio(|r| &r.bare)), ratio(|r| &r.node))
            .against(Goal::AtMost(RATIO_MAX)),
        Measure::new(&name("failed"), "", None, failed).against(Goal::AtMost(0.0)),
        Measure::new(&name("pace"), "", None, of(&Round::pace)).against(Goal::AtLeast(PACE_MIN)),
    ]
}

/// What the node counted in a round, in the mean.
fn mean_counts(rounds: &[Round]) -> BTreeMap<String, f64> {
    let mut counts = BTreeMap::new();
    for (what, count) in rounds.iter().flat_map(|round| &round.node.counted) {
        *counts.entry(what.clone()).or_default() += count / rounds.len() as f64;
    }
    counts
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Everything that stays the same over the rounds.
struct Stage {
    connect: ConnectRequest,
    node: SocketAddr,
    admin: SocketAddr,
    pid: u32,
    bare: SocketAddr,
    /// File with the attacker's tokens.
    tokens: PathBuf,
    /// Each attack comes from addresses that the node has not seen.
    network: u8,
    dir: tempfile::TempDir,
    _hold: Process,
}

impl Stage {
    async fn new(trial: &Trial<'_>, server: &mut Server, tls: bool) -> anyhow::Result<Self> {
        ensure!(trial.options.agents.is_empty(), "the attacker has to be on the agents' machine");
        let Server::Barid(Target::Sandbox(sandbox)) = server else { anyhow::bail!("no cluster") };
        let mut connect = sandbox.connect_request().await?;
        (connect.rate, connect.at_once_max) = (HONEST_RATE, 10_000);
        if tls {
            connect.roots = certificates::ONE.pem.to_owned();
        }
        let node = connect.nodes.first().context("no access node")?.parse()?;
        let admin = sandbox.admin().await?;
        let pid = *sandbox.access_pids().first().context("no access node")?;
        let dir = tempfile::tempdir()?;
        let tokens = dir.path().join("tokens");
        std::fs::write(&tokens, attackers_tokens(&connect)?)?;
        let (hold, addresses) = spawn(&dir, "hold", &["hold"]).await?;
        let bare = *addresses.get(usize::from(tls)).context("no listener")?;
        // Honest clients have 127.0.x.y and 127.255.x.y: addresses below and above.
        Ok(Self { connect, node, admin, pid, bare, tokens, network: 1, dir, _hold: hold })
    }

    /// The rounds of these attacks whose attacker kept its pace, by turns.
    async fn rounds(
        &mut self,
        trial: &Trial<'_>,
        attacks: &[Attack],
    ) -> anyhow::Result<Vec<Rounds>> {
        let phase = HONEST_RATE * trial.options.attack.attack_seconds;
        self.honest(trial, "warming up", WARM_UP.min(phase)).await?;
        let empty_bytes = process::resident_bytes(self.pid)?;
        let mut all: Vec<_> = attacks
            .iter()
            .map(|attack| Rounds { attack: *attack, empty_bytes, rounds: Vec::new() })
            .collect();
        for _ in 0..trial.options.attack.attack_rounds {
            for Rounds { attack, rounds, .. } in &mut all {
                let round = self.round(trial, *attack).await?;
                if round.pace() >= PACE_MIN {
                    rounds.push(round);
                }
            }
        }
        for Rounds { attack, rounds, .. } in &all {
            let name = attack.kind.name();
            ensure!(!rounds.is_empty(), "{name}: no round whose attacker kept its pace");
        }
        Ok(all)
    }

    /// Attacks with more and more half requests a second, from few networks and from many, each until honest clients
    /// fail or the attacker does not keep its pace.
    async fn sweep(&mut self, trial: &Trial<'_>) -> anyhow::Result<Vec<Step>> {
        let options = &trial.options.attack;
        let count = HONEST_RATE * options.attack_seconds;
        let mut steps = Vec::new();
        for networks in &options.sweep_networks {
            for rate in &options.sweep_rates {
                let attack = Attack::of_sweep(*networks, *rate);
                let beside = self.beside(trial, attack, self.node, count).await?;
                let what = format!("{networks} networks, {rate}/s");
                say(&format!("{what}: {} {}", beside.honest, beside.honest.why_failed))?;
                if beside.pace < PACE_MIN {
                    say(&format!("{what}: the attacker made {:.0} %", 100.0 * beside.pace))?;
                    break;
                }
                let has_failed = beside.honest.failed > 0;
                steps.push(Step { attack, beside });
                if has_failed {
                    break;
                }
            }
        }
        Ok(steps)
    }

    async fn round(&mut self, trial: &Trial<'_>, attack: Attack) -> anyhow::Result<Round> {
        let count = HONEST_RATE * trial.options.attack.attack_seconds;
        let name = attack.kind.name();
        let quiet = self.honest(trial, "quiet", count).await?;
        let bare = self.beside(trial, attack, self.bare, count).await?;
        let node = self.beside(trial, attack, self.node, count).await?;
        say(&format!("{name}: quiet: {quiet}"))?;
        say(&format!("{name}: beside the bare listener: {}", bare.honest))?;
        say(&format!("{name}: beside the node: {} {}", node.honest, node.honest.why_failed))?;
        say(&format!("{name}: {:?}", node.outcome))?;
        let round = Round { quiet, bare, node };
        if round.pace() < PACE_MIN {
            let share = 100.0 * round.pace();
            say(&format!("{name}: the attacker made {share:.0} % of its pace: no round"))?;
        }
        Ok(round)
    }

    /// Honest handshakes. Their sessions end when all have begun.
    async fn honest(&self, trial: &Trial<'_>, phase: &str, count: u32) -> anyhow::Result<Honest> {
        trial.live.phase(phase);
        let request = ConnectRequest { count, ..self.connect.clone() };
        let connected = trial.agents.attempt(&request).await?;
        trial.agents.drop_all().await?;
        sleep(Duration::from_secs(SETTLE_SECONDS)).await;
        Ok(connected.into())
    }

    /// Honest handshakes while `target` is attacked.
    async fn beside(
        &mut self,
        trial: &Trial<'_>,
        attack: Attack,
        target: SocketAddr,
        count: u32,
    ) -> anyhow::Result<Beside> {
        let before = self.counts().await?;
        let ramp = attack.ramp_seconds();
        let longest = u64::from(count / HONEST_RATE) + CONNECT_TIMEOUT.as_secs();
        let seconds = ramp + longest + SPARE_SECONDS;
        let mut attacker = self.attacker(attack, target, seconds)?;
        sleep(Duration::from_secs(ramp)).await;
        let cpu = |pid| process::cpu_s(pid);
        let (begun, began) = (Instant::now(), [cpu(attacker.pid())?, cpu(self.pid)?]);
        let mut resident_bytes = 0;
        let honest = {
            let request = ConnectRequest { count, ..self.connect.clone() };
            let connecting = trial.agents.attempt(&request);
            tokio::pin!(connecting);
            trial.live.phase(&attack.kind.name());
            loop {
                tokio::select! {
                    connected = &mut connecting => break Honest::from(connected?),
                    () = sleep(SAMPLE) => {
                        resident_bytes = resident_bytes.max(process::resident_bytes(self.pid)?);
                    }
                }
            }
        };
        let lasted_s = begun.elapsed().as_secs_f64();
        attacker.must_run()?;
        let ended = [cpu(attacker.pid())?, cpu(self.pid)?];
        let [attacker_cores, node_cores] =
            [0, 1].map(|index| (ended[index] - began[index]) / lasted_s);
        let outcome = outcome(&mut attacker).await?;
        let pace = outcome.per_second() / f64::from(attack.rate);
        trial.agents.drop_all().await?;
        sleep(Duration::from_secs(SETTLE_SECONDS)).await;
        let after = self.counts().await?;
        let counted = after.into_iter().filter_map(|(what, count)| {
            let more = count - before.get(&what).copied().unwrap_or_default();
            (more > 0.0).then_some((what, more))
        });
        let counted = counted.collect();
        Ok(Beside { honest, outcome, pace, attacker_cores, node_cores, resident_bytes, counted })
    }

    /// Starts an attacker.
    fn attacker(
        &mut self,
        attack: Attack,
        target: SocketAddr,
        seconds: u64,
    ) -> anyhow::Result<Process> {
        let Attack { kind, addresses, rate, hold } = attack;
        let network = self.network;
        self.network = self.network.checked_add(1).context("127.0.0.0/8 has no more networks")?;
        let name = format!("attacker-{network}");
        let log = self.dir.path().join(&name);
        Process::spawn(&name, std::env::current_exe()?, &log, |command| {
            command.arg("attacker").args(["--kind", &kind.name()]);
            for (option, value) in [
                ("--node", target.to_string()),
                ("--network", network.to_string()),
                ("--addresses", addresses.to_string()),
                ("--rate", rate.to_string()),
                ("--hold", hold.to_string()),
                ("--seconds", seconds.to_string()),
            ] {
                command.arg(option).arg(value);
            }
            if kind.has_tokens() {
                command.arg("--tokens").arg(&self.tokens);
            }
            // One thread: at most one core.
            command.env("TOKIO_WORKER_THREADS", "1");
        })
    }

    /// What the node has refused and closed so far, by metric and label.
    async fn counts(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let metrics = Metrics::parse(&http::get(self.admin, "/metrics").await?.1);
        let mut counts = BTreeMap::new();
        for (name, label) in
            [("handshakes_total", "result"), ("limits_total", "limit"), ("closes_total", "code")]
        {
            for (value, count) in metrics.by_label(&format!("barid_access_{name}"), label) {
                let what = format!("{}={value}", name.trim_end_matches("_total"));
                counts.insert(what, count as f64);
            }
        }
        Ok(counts)
    }
}

/// Valid tokens of users of the attacker's own, one a line.
fn attackers_tokens(connect: &ConnectRequest) -> anyhow::Result<String> {
    let key = EncodingKey::from_secret(&connect.secret);
    let token = |number: u32| {
        let user = format!("mallory-{number}");
        sign(&key, Some(connect.key_id.clone()), &connect.app, &user, TOKEN_LIFE)
    };
    let tokens = (0..USERS).map(token).collect::<Result<Vec<_>, _>>()?;
    Ok(tokens.join("\n"))
}

/// Ends the attacker.
async fn outcome(attacker: &mut Process) -> anyhow::Result<Outcome> {
    attacker.term()?;
    let status = attacker.wait(Duration::from_secs(60)).await?;
    let output = attacker.output();
    ensure!(status.success(), "the attacker failed: {output}");
    let line = output.lines().last().context("the attacker says nothing")?;
    serde_json::from_str(line).with_context(|| format!("the attacker says {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram;

    #[test]
    fn handshakes_that_fail_make_the_p99_worse() {
        let honest = |failed: u32| {
            let mut took_us = histogram::new();
            took_us.record_n(2_000, u64::from(100 - failed)).unwrap();
            let why_failed = String::new();
            let (connected, retried, elapsed) = (100 - failed, 0, Duration::ZERO);
            Honest::from(Connected { connected, failed, why_failed, retried, took_us, elapsed })
        };
        assert!((1.9..=2.1).contains(&honest(1).p99_ms()));
        assert!(honest(2).p99_ms() > 29_000.0);
    }
}
