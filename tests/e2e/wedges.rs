//! Readiness fails when a role cannot work, with the reason, and recovers. Each test stops a process that the role
//! depends on, or holds its connections.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use barid_testkit::device::PATIENCE;
use barid_testkit::process::Process;
use barid_testkit::{Cluster, Redis, Relay, Role, http, ports, token};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// `admin.stalled_after_seconds` of the roles.
const STALLED_SECONDS: i64 = 2;

/// Waits until `/readyz` fails with each of these reasons (the beginnings of their lines).
async fn fails(admin: SocketAddr, reasons: &[&str]) -> Result<()> {
    let mut missing = reasons.to_vec();
    let begun = Instant::now();
    while !missing.is_empty() {
        let (status, body) = http::get(admin, "/readyz").await?;
        missing.retain(|reason| status == 200 || !body.lines().any(|l| l.starts_with(reason)));
        ensure!(begun.elapsed() < PATIENCE, "{missing:?} not in {status}: {body}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Liveness does not fail: a restart would not help.
    let (status, body) = http::get(admin, "/healthz").await?;
    ensure!(status == 200, "{status}: {body}");
    Ok(())
}

async fn recovers(admin: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    loop {
        let (status, body) = http::get(admin, "/readyz").await?;
        if status == 200 {
            return Ok(());
        }
        ensure!(begun.elapsed() < 2 * PATIENCE, "{status}: {body}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purger_whose_kafka_is_silent_is_not_ready() -> Result<()> {
    let mut cluster = Cluster::builder()
        .own_kafka()
        .set("admin.stalled_after_seconds", STALLED_SECONDS)
        .set_of(Role::Purger, "topic_refresh_ms", 500)
        .start()
        .await?;
    let admin = cluster.node(Role::Purger, 0).address("admin").await?;
    cluster.kafka()?.pause()?;
    fails(admin, &["kafka: "]).await?;
    cluster.kafka()?.resume()?;
    recovers(admin).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_role_whose_redis_is_silent_says_what_stands_still() -> Result<()> {
    let mut cluster = Cluster::builder()
        .set("admin.stalled_after_seconds", STALLED_SECONDS)
        .set_of(Role::Dispatcher, "lease_ttl_ms", 2_000)
        .set_of(Role::Access, "lease_ttl_ms", 2_000)
        .start()
        .await?;
    let business = cluster.business()?;
    let mut admins = Vec::new();
    for role in Role::ALL {
        admins.push(cluster.node(role, 0).address("admin").await?);
    }
    cluster.redis.stop()?;
    business.send_text("alice", "m", "while Redis holds still").await?;
    let [purger, dispatcher, delayer, access] = admins[..] else { bail!("four roles") };
    let stalled = "records: no record finished of those in flight for ";
    fails(purger, &["redis: ", stalled]).await?;
    fails(dispatcher, &["redis: ", "tracking: ", "lease: "]).await?;
    fails(delayer, &["redis: "]).await?;
    fails(access, &["redis: ", "lease: "]).await?;
    cluster.redis.cont()?;
    for admin in admins {
        recovers(admin).await?;
    }
    let mut phone = cluster.device("alice", "phone").await?;
    ensure!(phone.receive(1).await? == ["m"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayer_whose_dispatcher_is_silent_is_not_ready() -> Result<()> {
    let mut cluster = Cluster::builder()
        .set("admin.stalled_after_seconds", STALLED_SECONDS)
        .set_of(Role::Delayer, "mesh.link.keepalive_interval_ms", 300)
        .set_of(Role::Delayer, "mesh.link.keepalive_timeout_ms", 300)
        .start()
        .await?;
    let admin = cluster.node(Role::Delayer, 0).address("admin").await?;
    cluster.node(Role::Dispatcher, 0).process()?.stop()?;
    fails(admin, &["dispatchers: no dispatcher can be reached"]).await?;
    cluster.node(Role::Dispatcher, 0).process()?.cont()?;
    recovers(admin).await
}

/// A role without a cluster.
struct Alone {
    process: Process,
    admin: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Alone {
    async fn start(role: Role, redis: SocketAddr, more: &str) -> Result<Self> {
        Self::start_with(role, redis, more, "").await
    }

    /// `redis_more`: further keys under `redis`.
    async fn start_with(
        role: Role,
        redis: SocketAddr,
        more: &str,
        redis_more: &str,
    ) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::free_port()));
        let text = format!(
            "{more}\nlease_ttl_ms = 2000\nlisten = '127.0.0.1:0'\n\
             [admin]\nlisten = '{admin}'\nstalled_after_seconds = {STALLED_SECONDS}\n\
             [redis]\nurl = 'redis://{redis}'\n{redis_more}\n"
        );
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text)?;
        let log = dir.path().join("log");
        let process = Process::spawn(role.name(), role.binary()?, &log, |command| {
            command.arg("--config").arg(&path);
        })?;
        let mut alone = Self { process, admin, _dir: dir };
        alone.up().await?;
        Ok(alone)
    }

    async fn up(&mut self) -> Result<()> {
        let begun = Instant::now();
        while !matches!(http::get(self.admin, "/readyz").await, Ok((200, _))) {
            self.process.must_run()?;
            ensure!(begun.elapsed() < PATIENCE, "not up:\n{}", self.process.tail(30));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn address(redis: &Redis) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, redis.port()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_that_is_told_no_changes_of_routes_is_not_ready() -> Result<()> {
    let redis = Redis::start().await?;
    let relay = Relay::to(address(&redis)).await?;
    let dispatcher = Alone::start(Role::Dispatcher, relay.address(), "").await?;
    relay.hold();
    fails(dispatcher.admin, &["tracking: ", "lease: "]).await?;
    relay.release();
    recovers(dispatcher.admin).await
}

/// Redis does not answer the dispatcher, and the dispatcher waits longer than `stalled_after_seconds`.
#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_that_answers_no_batch_is_not_ready() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let relay = Relay::to(address(&cluster.redis)).await?;
    let patient = "l1 = { load_timeout_ms = 60000 }";
    let dispatcher = Alone::start_with(
        Role::Dispatcher,
        relay.address(),
        patient,
        "response_timeout_ms = 60000",
    )
    .await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    // The other dispatcher is the only one left.
    cluster.drain(Role::Dispatcher, 0).await?;
    relay.hold();
    business.send_text("alice", "m", "its route is asked for in vain").await?;
    fails(dispatcher.admin, &["batches: no answer to a batch that waits for "]).await?;
    relay.release();
    recovers(dispatcher.admin).await?;
    ensure!(phone.receive(1).await? == ["m"]);
    Ok(())
}

/// The required settings of an access node.
fn access() -> String {
    let key = format!("id = '{}', secret = '{}'", token::KEY_ID, token::SECRET);
    format!(
        "grpc_listen = '127.0.0.1:0'\nreceipts = false\nrevocations = false\nauth = {{ keys = [{{ {key} }}] }}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_node_that_cannot_accept_devices_is_not_ready() -> Result<()> {
    let redis = Redis::start().await?;
    let ready = tempfile::NamedTempFile::new()?;
    let more = format!("ready_file = '{}'\n{}", ready.path().display(), access());
    let node = Alone::start(Role::Access, address(&redis), &more).await?;
    let listeners: serde_json::Value = serde_json::from_slice(&std::fs::read(ready.path())?)?;
    let devices = listeners["ws"].as_str().context("no ws")?.to_owned();
    // The admin endpoint cannot accept either, so this connection is opened before.
    let mut admin = TcpStream::connect(node.admin).await?;
    ask(&mut admin).await?;
    let pid = node.process.pid();
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    limit_files(pid, files)?;
    let mut waiting = Vec::new();
    let begun = Instant::now();
    let told = loop {
        waiting.push(TcpStream::connect(&devices).await?);
        let answer = ask(&mut admin).await?;
        if answer.contains("listener: ") {
            break answer;
        }
        ensure!(begun.elapsed() < PATIENCE, "{answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    ensure!(told.contains("listener: cannot accept: Too many open files"), "{told}");
    limit_files(pid, 1_000)?;
    recovers(node.admin).await
}

fn limit_files(pid: u32, files: usize) -> Result<()> {
    let mut command = Command::new("prlimit");
    command.arg(format!("--pid={pid}")).arg(format!("--nofile={files}:"));
    ensure!(command.status().context("prlimit (util-linux)")?.success());
    Ok(())
}

/// GET `/readyz` on an open connection.
async fn ask(admin: &mut TcpStream) -> Result<String> {
    admin.write_all(b"GET /readyz HTTP/1.1\r\nHost: it\r\n\r\n").await?;
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(PATIENCE, admin.read(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer[..read]).into_owned())
}
