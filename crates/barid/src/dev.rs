//! `barid dev`: a whole cluster in this process, and a demonstration that uses it as users do.

mod cluster;
mod demo;
mod port;
mod redis_server;
mod relay;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_bus::{EmbeddedKafka, KafkaConfig, ensure_topics};
use barid_core::Secret;
use barid_mailbox::RedisConfig;
use barid_runtime::{LogConfig, Probe, SecretUrl, Unfit, telemetry};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::authority;
use crate::output::{Coded, Output, Tone};
use crate::state::{self, DevState};
use crate::values::{Key, broker_list, check_redis, random_name, secret_in, temporary_dir};
use cluster::Cluster;
use port::Port;
use redis_server::RedisServer;
use relay::Relay;

/// The port for devices, unless `--port` is given or it is in use.
const PORT: u16 = 7080;
/// The port of the in-process broker, unless `--kafka-port` is given or it is in use.
const KAFKA_PORT: u16 = 9092;
/// The port of the private Redis, unless `--redis-port` is given or it is in use. Not Redis's own, where another one may
/// be expected.
const REDIS_PORT: u16 = 7379;
/// Time within which a given Kafka or Redis has to answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// The id of the key that signs this cluster's tokens.
const KEY_ID: &str = "dev";
/// Consumer group on a Kafka of the user, which may serve another cluster as well.
const GROUP: &str = "barid-dev";
/// Partitions of the push topics on the in-process broker.
const PARTITIONS: u16 = 4;
/// Validity of the roles' certificates.
const TLS_VALID: time::Duration = time::Duration::days(365);

/// Warnings, except those about streams and leases that end because the process ends; and the hops of `send --trace`.
const LOG: &str = "warn,barid::trace=info,fred=error,barid_mesh::link=error,\
                   barid_mailbox::routes=error,barid_mailbox::nodes=error";

/// Options of `barid dev`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The other commands find the running cluster by a file in the user's runtime directory. To run \
                        a second one, set BARID_DEV_STATE to another file for both."
)]
pub struct Args {
    /// Use this Kafka instead of the in-process broker
    #[arg(long, value_name = "HOST:PORT", env = "BARID_BROKERS")]
    pub kafka: Option<String>,
    /// Use this Redis instead of a private redis-server
    #[arg(long, value_name = "URL", env = "BARID_REDIS", hide_env_values = true)]
    pub redis: Option<String>,
    /// Port for devices [default: 7080, or a free port]
    #[arg(long)]
    pub port: Option<u16>,
    /// Port of the in-process broker [default: 9092, or a free port]
    #[arg(long, value_name = "PORT", conflicts_with = "kafka")]
    pub kafka_port: Option<u16>,
    /// Port of the private redis-server [default: 7379, or a free port]
    #[arg(long, value_name = "PORT", conflicts_with = "redis")]
    pub redis_port: Option<u16>,
    /// File with the secret that signs tokens [default: barid/dev.secret in ~/.local/state, created once]
    #[arg(long, value_name = "FILE", env = "BARID_SECRET_FILE")]
    pub secret_file: Option<PathBuf>,
    /// Run the demonstration and exit; the exit code is 0 if it succeeds
    #[arg(long)]
    pub once: bool,
    /// Log level: error, warn, info, debug, or directives such as barid_access=debug [default: warnings]
    #[arg(long, value_name = "LEVEL", value_parser = level)]
    pub log: Option<String>,
}

fn level(text: &str) -> Result<String, String> {
    // clap adds the option's name.
    let reason = |error: String| error.trim_start_matches("log.level: ").to_owned();
    telemetry::check_level(text).map(|()| text.to_owned()).map_err(reason)
}

/// Kafka and Redis.
struct Ground {
    kafka: KafkaConfig,
    redis: RedisConfig,
    // Ends when this value is dropped.
    _broker: Option<(EmbeddedKafka, Relay)>,
}

#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    url: &'a str,
    brokers: &'a str,
    redis: &'a str,
    admin: &'a [String],
    elapsed_ms: u64,
}

/// Runs until a signal; with `--once`, until the end of the demonstration.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    // Errors of stdout (a closed pipe, a full disk) must not end the cluster.
    let out = out.lenient();
    if let Some(other) = DevState::running()? {
        bail!(
            "`barid dev` is already running (process {}, {}); stop it, or set BARID_DEV_STATE to another file",
            other.pid,
            other.url
        );
    }
    let level = args.log.as_deref().unwrap_or(LOG).to_owned();
    telemetry::init_brief(&LogConfig { level, ..Default::default() });
    let exit = run_cluster(args, out).await;
    // Before an error is printed as well: the last lines may explain it.
    telemetry::flush();
    exit
}

async fn run_cluster(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let began = Instant::now();
    // What the user may have to change is found before anything starts.
    let given = Given::of(&args)?;
    DevState::check()?;
    let key = Key { secret: secret(&args)?, id: Some(KEY_ID.into()) };
    heading(out)?;
    let (ground, mut server) = tokio::select! {
        ground = ground(&args, given, out) => ground?,
        () = signals.next() => return Ok(ExitCode::FAILURE),
    };
    let listen = listen(&Port::new("--port", args.port, PORT), out)?;
    let tls = temporary_dir("barid-dev-tls-")?;
    authority::issue(tls.path(), TLS_VALID)?;
    let mut cluster = Cluster::start(&ground.kafka, &ground.redis, &key, tls.path(), listen)?;
    let result = tokio::select! {
        result = work(&args, &ground, &mut cluster, &key, tls.path(), began, out) => result,
        () = signals.next() => Ok(()),
        why = died(&mut server) => Err(why),
    };
    if !args.once && !out.is_json() && result.is_ok() {
        out.line("")?;
    }
    let stopped = tokio::select! {
        stopped = cluster.stop(out) => stopped,
        () = signals.next() => bail!("stopped at the second signal, before everything was finished"),
    };
    result?;
    stopped
}

/// Waits for the cluster, runs the demonstration, and waits for a role to end.
async fn work(
    args: &Args,
    ground: &Ground,
    cluster: &mut Cluster,
    key: &Key,
    tls: &Path,
    began: Instant,
    out: Output,
) -> anyhow::Result<()> {
    let access = cluster.ready().await?;
    let state = DevState {
        pid: std::process::id(),
        brokers: ground.kafka.brokers.join(","),
        in_process_kafka: args.kafka.is_none(),
        redis: ground.redis.url.expose().to_owned(),
        url: format!("ws://{access}"),
        admin: cluster.admins().iter().map(ToString::to_string).collect(),
        tls: tls.into(),
        key_id: KEY_ID.into(),
        secret: key.secret.expose().to_owned(),
    };
    let _published = state.publish()?;
    let elapsed_ms = began.elapsed().as_millis() as u64;
    let ready = Ready {
        event: "ready",
        url: &state.url,
        brokers: &state.brokers,
        redis: &ground.redis.url.to_string(),
        admin: &state.admin,
        elapsed_ms,
    };
    out.either(&ready, || {
        let note = format!("all four roles ready after {elapsed_ms} ms");
        fact(out, "access", &state.url, &note)
    })?;
    if !out.is_json() {
        let ports = cluster.admin_ports();
        let moved = ports.iter().any(|admin| admin.port != admin.usual);
        let ports: Vec<String> =
            ports.iter().map(|admin| format!("{} {}", admin.role, admin.port)).collect();
        let note = if moved {
            out.paint(Tone::Faint, "  the usual ones are in use")
        } else {
            String::new()
        };
        out.line(format_args!("  {:<7} {}{note}", "admin", ports.join(", ")))?;
    }
    let shown = demo::run(&ground.kafka, &ground.redis, &state.url, key, out).await;
    if args.once {
        return shown;
    }
    if let Err(error) = shown {
        out.note(format_args!("the demonstration failed: {error:#}"));
    }
    invite(&state, out)?;
    cluster.failed().await
}

fn heading(out: Output) -> anyhow::Result<()> {
    if !out.is_json() {
        let title = out.paint(Tone::Strong, "Barid");
        out.line(format_args!(
            "{title} {}, a whole cluster in one process",
            env!("CARGO_PKG_VERSION")
        ))?;
    }
    Ok(())
}

/// A line about the cluster.
fn fact(out: Output, name: &str, value: &str, note: &str) -> String {
    format!("  {name:<7} {value:<26} {}", out.paint(Tone::Faint, note))
}

/// Kafka and Redis of the user.
struct Given {
    brokers: Option<Vec<String>>,
    redis: Option<RedisConfig>,
}

impl Given {
    fn of(args: &Args) -> anyhow::Result<Self> {
        let brokers = args.kafka.as_deref().map(|brokers| broker_list("--kafka", brokers));
        let redis = args.redis.as_ref().map(|url| {
            let config = RedisConfig { url: SecretUrl::new(url), ..Default::default() };
            check_redis(&config).map(|()| config)
        });
        Ok(Self { brokers: brokers.transpose()?, redis: redis.transpose()? })
    }
}

/// Connects to Redis and Kafka, or starts them.
async fn ground(
    args: &Args,
    given: Given,
    out: Output,
) -> anyhow::Result<(Ground, Option<RedisServer>)> {
    let (redis, server) = redis(args, given.redis, out).await?;
    let (kafka, broker) = kafka(args, given.brokers, out).await?;
    Ok((Ground { kafka, redis, _broker: broker }, server))
}

async fn redis(
    args: &Args,
    given: Option<RedisConfig>,
    out: Output,
) -> anyhow::Result<(RedisConfig, Option<RedisServer>)> {
    let mut redis = RedisConfig::default();
    let (server, note) = match given {
        Some(given) => {
            redis = given;
            let remedy = "start it, or omit --redis to use a private one";
            check("Redis", barid_mailbox::probe(&redis, PROBE_TIMEOUT).await, remedy)?;
            (None, "yours".into())
        }
        None => {
            let port = Port::new("--redis-port", args.redis_port, REDIS_PORT);
            let server = RedisServer::start(&port).await?;
            port.tell(server.port(), out);
            redis.url = SecretUrl::new(server.url());
            let note = format!("private redis-server {}, in memory", server.version());
            (Some(server), note)
        }
    };
    if !out.is_json() {
        out.line(fact(out, "redis", &redis.url.to_string(), &note))?;
    }
    Ok((redis, server))
}

async fn kafka(
    args: &Args,
    given: Option<Vec<String>>,
    out: Output,
) -> anyhow::Result<(KafkaConfig, Option<(EmbeddedKafka, Relay)>)> {
    let mut kafka = KafkaConfig { partitions: PARTITIONS, ..Default::default() };
    let (broker, note) = match given {
        Some(brokers) => {
            kafka.brokers = brokers;
            kafka.group = GROUP.into();
            let creates = KafkaConfig { create_topics: true, ..kafka.clone() };
            let probe = barid_bus::probe(&creates, kafka.topics.all(), PROBE_TIMEOUT).await;
            check("Kafka", vec![probe], "start it, or omit --kafka to use the in-process broker")?;
            ensure_topics(&kafka, Duration::from_secs(10)).await.with_context(|| {
                format!("cannot create Barid's topics in Kafka at {}", kafka.brokers.join(","))
            })?;
            (None, "yours; consumer group barid-dev")
        }
        None => {
            let broker =
                EmbeddedKafka::start(&mut kafka).context("cannot start the in-process broker")?;
            let port = Port::new("--kafka-port", args.kafka_port, KAFKA_PORT);
            let relay = relay(&port, broker.brokers()).await?;
            port.tell(relay.address().port(), out);
            broker.advertise(relay.address().port());
            kafka.brokers = vec![relay.address().to_string()];
            (Some((broker, relay)), "in-process broker, for any Kafka client")
        }
    };
    if !out.is_json() {
        out.line(fact(out, "kafka", &kafka.brokers.join(","), note))?;
    }
    Ok((kafka, broker))
}

async fn relay(port: &Port, to: String) -> anyhow::Result<Relay> {
    let mut problem = None;
    for number in port.candidates().take(2) {
        match Relay::start(number, to.clone()).await {
            Ok(relay) => return Ok(relay),
            Err(error) => problem = Some(error),
        }
    }
    bail!(Coded::config(port.remedy(problem.as_ref())))
}

/// Fails if a Kafka or Redis of the user cannot be used, before the roles would log it all the time.
fn check(what: &str, probes: Vec<Probe>, remedy: &str) -> anyhow::Result<()> {
    for Probe { name, found } in probes {
        match found {
            Ok(_) | Err(Unfit::InUse(_)) => {}
            Err(Unfit::Away(why)) => {
                bail!(Coded::away(format!("{what} does not answer ({name}): {why}; {remedy}")))
            }
            Err(Unfit::Unusable(why)) => {
                bail!(Coded::config(format!("{what} cannot be used ({name}): {why}")))
            }
        }
    }
    Ok(())
}

/// The secret of the given file, or one that stays the same over restarts.
fn secret(args: &Args) -> anyhow::Result<Secret> {
    match &args.secret_file {
        Some(file) => secret_in(file),
        None => state::kept_secret(|| random_name("") + &random_name("") + &random_name("")),
    }
}

/// The address for devices.
fn listen(port: &Port, out: Output) -> anyhow::Result<SocketAddr> {
    let mut problem = None;
    for number in port.candidates().take(2) {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, number)) {
            Ok(free) => {
                let address = free.local_addr()?;
                port.tell(address.port(), out);
                return Ok(address);
            }
            Err(error) => problem = Some(error),
        }
    }
    bail!(Coded::config(port.remedy(problem.as_ref())))
}

/// Waits until the private Redis ends, which is an error.
async fn died(server: &mut Option<RedisServer>) -> anyhow::Error {
    match server {
        Some(server) => server.died().await,
        None => std::future::pending().await,
    }
}

/// Commands for users to copy.
fn invite(state: &DevState, out: Output) -> anyhow::Result<()> {
    if out.is_json() {
        return Ok(());
    }
    let barid = own_name();
    let title = "Your turn, in other terminals (Ctrl-C here stops everything)";
    out.line(out.paint(Tone::Strong, title))?;
    out.line(format_args!("  {barid} listen --user alice"))?;
    out.line(format_args!("  {barid} send --user alice \"hello\" --wait accepted,acked"))?;
    out.line(format_args!("  {barid} top"))?;
    let note = format!("  or any Kafka client: topic barid.push of {}", state.brokers);
    out.line(out.paint(Tone::Faint, note))?;
    Ok(())
}

/// The command with which this program was started.
fn own_name() -> String {
    let own = std::env::current_exe().ok();
    let in_path = std::env::var_os("PATH").and_then(|path| {
        let own = own.as_ref()?.canonicalize().ok()?;
        let mut found = std::env::split_paths(&path).map(|dir| dir.join("barid"));
        let first: PathBuf = found.find(|file| file.is_file())?;
        (first.canonicalize().ok()? == own).then_some(())
    });
    if in_path.is_some() {
        return "barid".into();
    }
    let here = std::env::current_dir().unwrap_or_default();
    match own {
        Some(own) => own.strip_prefix(&here).unwrap_or(&own).display().to_string(),
        None => "barid".into(),
    }
}

/// SIGINT, SIGTERM, and SIGHUP unless the process was started with `nohup`.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        // A handler would replace the inherited SIG_IGN.
        let hangup = (!ignores_hangup()).then(|| signal(SignalKind::hangup())).transpose()?;
        Ok(Self { interrupt, terminate, hangup })
    }

    async fn next(&mut self) {
        let hung_up = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hung_up => {}
        }
    }
}

/// Whether this process was started with SIGHUP ignored, as `nohup` does: bit 0 of the mask.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 != 0)
}
