//! Honest handshakes beside attacks on the devices' port. In each round honest clients connect at a steady rate from
//! addresses of their own: quiet, then while an attacker attacks the barest listener, then while it attacks the node in
//! the same way. The difference of the last two is what the node lets the attacker take; the rest is the attacker's own
//! CPU time, and the kernel's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use barid_runtime::exposition::Metrics;
use barid_testkit::http;
use barid_testkit::process::Process;
use hdrhistogram::Histogram;
use jsonwebtoken::EncodingKey;
use tokio::time::{Instant, sleep};

use super::options::AttackOptions;
use super::trial::{Server, Trial};
use crate::attacker::{Kind, Outcome, TOKEN};
use crate::controller::spawn;
use crate::histogram::quantile_ms;
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::process;
use crate::rpc::ConnectRequest;
use crate::table::Table;
use crate::target::Target;
use crate::token::sign;

/// Honest handshakes per second.
const HONEST_RATE: u32 = 100;
/// Honest handshakes before the first round, at most.
const WARM_UP: u32 = 500;
/// An attack begins at least so long before honest clients are measured beside it.
const RAMP_MIN_SECONDS: u64 = 2;
const SETTLE_SECONDS: u64 = 2;
const SAMPLE: Duration = Duration::from_millis(200);
const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
const MIB: f64 = (1 << 20) as f64;
/// Goal: the p99 of honest handshakes beside an attack, over the quiet one.
const RATIO_MAX: f64 = 2.0;

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

const ATTACKS: [Attack; 5] = [
    Attack { kind: Kind::Half, addresses: 1_000, rate: 2_000, hold: 10_000 },
    Attack { kind: Kind::Drip, addresses: 1_000, rate: 2_000, hold: 10_000 },
    Attack { kind: Kind::Silent, addresses: 64, rate: 500, hold: 2_000 },
    Attack { kind: Kind::Flood, addresses: 8, rate: 20, hold: 100 },
    Attack { kind: Kind::Tokens, addresses: 20, rate: 1_000, hold: 1_000 },
];

impl Attack {
    fn changed(self, options: &AttackOptions) -> Self {
        let part = |of: u32| (of * options.attack_percent / 100).max(1);
        let addresses = options.attack_addresses.unwrap_or(self.addresses);
        Self { rate: part(self.rate), hold: part(self.hold), addresses, ..self }
    }

    /// Until its connections are all held, but not longer than honest clients are measured.
    fn ramp_seconds(self, options: &AttackOptions) -> u64 {
        let longest = u64::from(options.attack_seconds).max(RAMP_MIN_SECONDS);
        u64::from(self.hold / self.rate).clamp(RAMP_MIN_SECONDS, longest)
    }
}

/// Honest handshakes of one phase.
#[derive(Debug, Clone)]
struct Honest {
    took_us: Histogram<u64>,
    failed: u32,
    why_failed: String,
}

impl Honest {
    fn p99_ms(&self) -> f64 {
        quantile_ms(&self.took_us, 0.99)
    }
}

/// Honest handshakes beside an attack.
struct Beside {
    honest: Honest,
    outcome: Outcome,
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

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    trial.needs_own_cluster()?;
    let options = &trial.options.attack;
    let mut server = trial.barid().await?;
    let mut stage = Stage::new(trial, &mut server).await?;
    let phase = HONEST_RATE * options.attack_seconds;
    stage.honest(trial, "warming up", WARM_UP.min(phase)).await?;
    let empty = process::resident_bytes(stage.pid)?;
    let chosen = ATTACKS
        .into_iter()
        .filter(|attack| options.attacks.is_empty() || options.attacks.contains(&attack.kind));
    let attacks: Vec<_> = chosen.map(|attack| attack.changed(options)).collect();
    let mut rounds: Vec<Vec<Round>> = attacks.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.attack_rounds {
        for (attack, rounds) in attacks.iter().zip(&mut rounds) {
            rounds.push(stage.round(trial, *attack).await?);
        }
    }
    let mut rows = Vec::new();
    let mut cost = Table::new("attack", &COSTS);
    let mut clients = Table::new("honest clients", &HONEST);
    let mut refused = Table::new("counted by the node", &["a round"]);
    for (attack, rounds) in attacks.iter().zip(&rounds) {
        rows.extend(measures(*attack, rounds));
        cost.row(&attack.kind.name(), costs(*attack, rounds, empty).map(Some));
        clients.row(&attack.kind.name(), honest(rounds).map(Some));
        for (what, count) in mean_counts(rounds) {
            refused.row(&format!("{}: {what}", attack.kind.name()), [Some(count)]);
        }
    }
    trial.live.table(cost);
    trial.live.table(clients);
    trial.live.table(refused);
    Ok(rows)
}

/// Figures of an attack: the median of the rounds, of memory the maximum.
const COSTS: [&str; 7] =
    ["attempts/s", "held", "sent MiB/s", "its cores", "node's cores", "node MiB", "of it more"];

fn costs(attack: Attack, rounds: &[Round], empty: u64) -> [f64; COSTS.len()] {
    let of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let resident = rounds.iter().map(|round| round.node.resident_bytes).max().unwrap_or_default();
    let seconds = |r: &Round| r.node.outcome.attempts as f64 / f64::from(attack.rate);
    [
        f64::from(attack.rate),
        of(&|r| r.node.outcome.open_max as f64),
        of(&|r| r.node.outcome.sent_bytes as f64 / MIB / seconds(r)),
        of(&|r| r.node.attacker_cores),
        of(&|r| r.node.node_cores),
        resident as f64 / MIB,
        resident.saturating_sub(empty) as f64 / MIB,
    ]
}

/// Times of honest handshakes: the median of the rounds.
const HONEST: [&str; 8] = [
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
fn measures(attack: Attack, rounds: &[Round]) -> [Measure; 3] {
    let name = |what: &str| format!("attack_{}_{what}", attack.kind.name());
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
    token: String,
    /// Each attack comes from addresses that the node has not seen.
    network: u8,
    dir: tempfile::TempDir,
    _hold: Process,
}

impl Stage {
    async fn new(trial: &Trial<'_>, server: &mut Server) -> anyhow::Result<Self> {
        let Server::Barid(Target::Sandbox(sandbox)) = server else { anyhow::bail!("no cluster") };
        let connect = sandbox.connect_request().await?;
        let connect = ConnectRequest { rate: HONEST_RATE, at_once_max: 10_000, ..connect };
        let node = connect.nodes.first().context("no access node")?.parse()?;
        let admin = sandbox.admin().await?;
        let pid = *sandbox.access_pids().first().context("no access node")?;
        let key = EncodingKey::from_secret(&connect.secret);
        let token = sign(&key, Some(connect.key_id.clone()), &connect.app, "mallory", TOKEN_LIFE)?;
        let dir = tempfile::tempdir()?;
        let (hold, addresses) = spawn(&dir, "hold", &["hold"]).await?;
        let bare = *addresses.first().context("no listener")?;
        ensure!(trial.options.agents.is_empty(), "the attacker has to be on the agents' machine");
        // The agents have 127.0.x.y.
        Ok(Self { connect, node, admin, pid, bare, token, network: 1, dir, _hold: hold })
    }

    async fn round(&mut self, trial: &Trial<'_>, attack: Attack) -> anyhow::Result<Round> {
        let count = HONEST_RATE * trial.options.attack.attack_seconds;
        let name = attack.kind.name();
        let quiet = self.honest(trial, "quiet", count).await?;
        let bare = self.beside(trial, attack, self.bare, count).await?;
        let node = self.beside(trial, attack, self.node, count).await?;
        let figures = |honest: &Honest| {
            let [p50, p99] = [0.5, 0.99].map(|share| quantile_ms(&honest.took_us, share));
            format!("p50 {p50:.2} ms, p99 {p99:.2} ms, {} failed", honest.failed)
        };
        say(&format!("{name}: quiet: {}", figures(&quiet)))?;
        say(&format!("{name}: beside the bare listener: {}", figures(&bare.honest)))?;
        say(&format!(
            "{name}: beside the node: {} {}",
            figures(&node.honest),
            node.honest.why_failed
        ))?;
        say(&format!("{name}: {:?}", node.outcome))?;
        Ok(Round { quiet, bare, node })
    }

    /// Honest handshakes. Their sessions end when all have begun.
    async fn honest(&self, trial: &Trial<'_>, phase: &str, count: u32) -> anyhow::Result<Honest> {
        trial.live.phase(phase);
        let request = ConnectRequest { count, ..self.connect.clone() };
        let connected = trial.agents.attempt(&request).await?;
        trial.agents.drop_all().await?;
        sleep(Duration::from_secs(SETTLE_SECONDS)).await;
        let (failed, why_failed) = (connected.failed, connected.why_failed);
        Ok(Honest { took_us: connected.took_us, failed, why_failed })
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
        let ramp = attack.ramp_seconds(&trial.options.attack);
        let seconds = ramp + u64::from(count / HONEST_RATE) + 1;
        let mut attacker = self.attacker(attack, target, seconds)?;
        sleep(Duration::from_secs(ramp)).await;
        attacker.must_run()?;
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
                    connected = &mut connecting => break connected?,
                    () = sleep(SAMPLE) => {
                        resident_bytes = resident_bytes.max(process::resident_bytes(self.pid)?);
                    }
                }
            }
        };
        let lasted_s = begun.elapsed().as_secs_f64();
        let ended = [cpu(attacker.pid()).unwrap_or(began[0]), cpu(self.pid)?];
        let [attacker_cores, node_cores] =
            [0, 1].map(|index| (ended[index] - began[index]) / lasted_s);
        let outcome = outcome(&mut attacker).await?;
        trial.agents.drop_all().await?;
        sleep(Duration::from_secs(SETTLE_SECONDS)).await;
        let after = self.counts().await?;
        let counted = after.into_iter().filter_map(|(what, count)| {
            let more = count - before.get(&what).copied().unwrap_or_default();
            (more > 0.0).then_some((what, more))
        });
        let honest = Honest {
            took_us: honest.took_us,
            failed: honest.failed,
            why_failed: honest.why_failed,
        };
        let counted = counted.collect();
        Ok(Beside { honest, outcome, attacker_cores, node_cores, resident_bytes, counted })
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
            // One thread: at most one core.
            command.env(TOKEN, &self.token).env("TOKIO_WORKER_THREADS", "1");
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

/// Waits for the attacker's end.
async fn outcome(attacker: &mut Process) -> anyhow::Result<Outcome> {
    let status = attacker.wait(Duration::from_secs(60)).await?;
    let output = attacker.output();
    ensure!(status.success(), "the attacker failed: {output}");
    let line = output.lines().last().context("the attacker says nothing")?;
    serde_json::from_str(line).with_context(|| format!("the attacker says {line}"))
}
