//! `barid dev`: a whole cluster in this process, and a demonstration that uses it as users do.

mod cluster;
mod demo;
mod redis_server;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_bus::{EmbeddedKafka, KafkaConfig, ensure_topics};
use barid_core::Secret;
use barid_mailbox::RedisConfig;
use barid_runtime::{LogConfig, SecretUrl, telemetry};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::authority;
use crate::output::{Output, Tone};
use crate::state::DevState;
use crate::values::{Key, random_name};
use cluster::Cluster;
use redis_server::RedisServer;

/// The port for devices, unless `--port` is given or it is in use.
const PORT: u16 = 7080;
/// The id of the key that signs this cluster's tokens.
const KEY_ID: &str = "dev";
/// Partitions of the push topics on the in-process broker.
const PARTITIONS: u16 = 4;
/// Validity of the roles' certificates.
const TLS_VALID: time::Duration = time::Duration::days(365);

/// Warnings, except those about streams and leases that end because the process ends.
const LOG: &str = "warn,fred=error,barid_mesh::link=error,barid_mailbox::routes=error,\
                   barid_mailbox::nodes=error";

/// Options of `barid dev`.
#[derive(Debug, clap::Args)]
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
    _broker: Option<EmbeddedKafka>,
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
    telemetry::init(&LogConfig { level, ..Default::default() });
    let exit = run_cluster(args, out).await;
    // Before an error is printed as well: the last lines may explain it.
    telemetry::flush();
    exit
}

async fn run_cluster(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let began = Instant::now();
    heading(out)?;
    let (ground, mut server) = tokio::select! {
        ground = ground(&args, out) => ground?,
        () = signals.next() => return Ok(ExitCode::FAILURE),
    };
    let key = Key {
        secret: Secret::new(random_name("") + &random_name("") + &random_name("")),
        id: Some(KEY_ID.into()),
    };
    let listen = listen(args.port)?;
    let tls = tempfile::Builder::new().prefix("barid-dev-tls-").tempdir()?;
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
        let ports = cluster.admin_ports().into_iter();
        let ports: Vec<String> = ports.map(|(role, port)| format!("{role} {port}")).collect();
        out.line(format_args!("  {:<7} {}", "admin", ports.join(", ")))?;
    }
    demo::run(&ground.kafka, &ground.redis, &state.url, key, out).await?;
    if args.once {
        return Ok(());
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

/// Connects to Redis and Kafka, or starts them.
async fn ground(args: &Args, out: Output) -> anyhow::Result<(Ground, Option<RedisServer>)> {
    let mut redis = RedisConfig::default();
    let server = match &args.redis {
        Some(url) => {
            redis.url = SecretUrl::new(url);
            None
        }
        None => Some(RedisServer::start().await?),
    };
    let note = match &server {
        Some(server) => {
            redis.url = SecretUrl::new(server.url());
            format!("private redis-server {}, in memory", server.version())
        }
        None => "yours".into(),
    };
    if !out.is_json() {
        out.line(fact(out, "redis", &redis.url.to_string(), &note))?;
    }
    let mut kafka = KafkaConfig { partitions: PARTITIONS, ..Default::default() };
    let broker = match &args.kafka {
        Some(brokers) => {
            kafka.brokers = brokers.split(',').map(|b| b.trim().to_owned()).collect();
            ensure_topics(&kafka, Duration::from_secs(10))
                .await
                .with_context(|| format!("cannot create Barid's topics in Kafka at {brokers}"))?;
            None
        }
        None => {
            Some(EmbeddedKafka::start(&mut kafka).context("cannot start the in-process broker")?)
        }
    };
    let note = match &broker {
        Some(_) => "in-process broker, for any Kafka client",
        None => "yours",
    };
    if !out.is_json() {
        out.line(fact(out, "kafka", &kafka.brokers.join(","), note))?;
    }
    Ok((Ground { kafka, redis, _broker: broker }, server))
}

/// The port that was given, or the default port, or a free one.
fn listen(port: Option<u16>) -> anyhow::Result<SocketAddr> {
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let is_free = |port| TcpListener::bind(at(port)).is_ok();
    match port {
        Some(port) if port != 0 && !is_free(port) => {
            bail!("port {port} is in use; give another port, or omit --port")
        }
        Some(port) => Ok(at(port)),
        None => Ok(at(if is_free(PORT) { PORT } else { 0 })),
    }
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
    let record = r#"{"id":"k-1","app":"demo","to":{"user":"alice"},"text":"hello from kcat"}"#;
    out.line(format_args!("  echo '{record}' | kcat -P -b {} -t barid.push", state.brokers))?;
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
