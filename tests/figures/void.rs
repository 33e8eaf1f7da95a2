//! The load that sessions of a killed node put on Redis, in a whole cluster.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use barid_testkit::{Cluster, Role, alone, raw};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Sessions of the killed node, each with an unacknowledged message, and of the other node.
const KILLED: usize = 5_000;
const STAYING: usize = 500;
/// How long the idle cluster is measured, and how long the cluster with a killed node: long enough for each timer
/// of its users to fire once. `BARID_VOID_WINDOWS` is the number of further windows.
const QUIET: Duration = Duration::from_secs(8);
const WINDOW: Duration = Duration::from_secs(30);
/// The largest CPU time of Redis with a killed node, relative to the idle cluster. Measured: 1.5 to 1.6 in the first
/// window, 1.3 to 1.4 in later ones, on an idle machine and beside three busy loops.
const CPU_MAX: f64 = 2.0;
/// The largest number of timers claimed in a window, relative to the users with a timer. Measured: 1.0.
const ROUNDS_MAX: f64 = 1.3;
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "the figures are of interest")]
async fn hazard_29_a_killed_nodes_sessions_cost_redis_about_what_the_quiet_cluster_does()
-> Result<()> {
    let _alone = alone().await;
    let windows = std::env::var("BARID_VOID_WINDOWS").map_or(Ok(1), |text| text.parse())?;
    let mut cluster = defaults().start().await?;
    let business = cluster.business()?;
    let mut devices = Vec::new();
    for (node, users) in [(0, KILLED..KILLED + STAYING), (1, 0..KILLED)] {
        let address = cluster.node(Role::Access, node).address("ws").await?;
        let tokens: Vec<_> = users.map(|user| cluster.token(&format!("u{user}"))).collect();
        devices.push(raw::sessions(address, tokens).await?);
    }
    sleep(Duration::from_secs(1)).await;
    let quiet = window(&mut cluster, QUIET).await?;
    println!("quiet {quiet:?}");
    cluster.kill(Role::Access, 1)?;
    let mut said = JoinSet::new();
    for user in 0..KILLED {
        let business = business.clone();
        said.spawn(async move { business.send_text(&format!("u{user}"), "m", "").await });
    }
    while let Some(taken) = said.join_next().await {
        taken??;
    }
    let begun = Instant::now();
    while lives(&cluster).await? || behind(&cluster).await? < KILLED {
        ensure!(begun.elapsed() < PATIENCE, "{} users are behind", behind(&cluster).await?);
        sleep(Duration::from_millis(250)).await;
    }
    for _ in 0..windows {
        let used = window(&mut cluster, WINDOW).await?;
        println!("void {used:?}");
        ensure!(used.fired > 0.0, "no timer was claimed");
        ensure!(used.cpu < CPU_MAX * quiet.cpu, "{used:?}, {quiet:?} in the idle cluster");
        let rounds = used.fired * WINDOW.as_secs_f64() / KILLED as f64;
        ensure!(rounds < ROUNDS_MAX, "{rounds} rounds a user");
    }
    Ok(())
}

/// Two of each role, with the default times, except that devices are not pinged: they are only sockets.
fn defaults() -> barid_testkit::cluster::Builder {
    let times = Cluster::builder()
        .pairs()
        .set("redis.retry_base_ms", 2_000)
        .set("redis.retry_max_ms", 60_000);
    // All devices are new, and connect at once.
    let times = times.set_of(Role::Access, "limits.app_new_users_per_second", 0).set_of(
        Role::Access,
        "heartbeat.interval_seconds",
        3_600,
    );
    let roles = [Role::Purger, Role::Dispatcher, Role::Delayer];
    roles.into_iter().fold(times, |all, role| all.set_of(role, "nodes_refresh_ms", 500))
}

/// Whether the killed node has its lease.
async fn lives(cluster: &Cluster) -> Result<bool> {
    Ok(cluster.redis.query::<i64>(&["EXISTS", "barid:node:access-1"]).await? == 1)
}

/// Users with a retry timer.
async fn behind(cluster: &Cluster) -> Result<usize> {
    let script = "local users = 0
        for s = 0, 63 do users = users + redis.call('ZCARD', '{' .. s .. '}:t') end
        return users";
    cluster.redis.query(&["EVAL", script, "0"]).await
}

/// Load per second.
#[derive(Debug)]
struct Used {
    /// CPU time of Redis, ms.
    cpu: f64,
    /// Users whose timer a delayer claimed.
    fired: f64,
}

async fn window(cluster: &mut Cluster, time: Duration) -> Result<Used> {
    let before = (cpu_seconds(cluster).await?, fired(cluster).await?);
    sleep(time).await;
    let after = (cpu_seconds(cluster).await?, fired(cluster).await?);
    let seconds = time.as_secs_f64();
    Ok(Used { cpu: 1000.0 * (after.0 - before.0) / seconds, fired: (after.1 - before.1) / seconds })
}

async fn cpu_seconds(cluster: &Cluster) -> Result<f64> {
    let info = cluster.redis.info("cpu").await?;
    let of = |name: &str| -> Result<f64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.context("used CPU time")?.trim().parse()?)
    };
    Ok(of("used_cpu_user")? + of("used_cpu_sys")?)
}

async fn fired(cluster: &mut Cluster) -> Result<f64> {
    let mut fired = 0.0;
    for number in 0..2 {
        let delayer = cluster.node(Role::Delayer, number);
        fired += delayer.metric("barid_delayer_fired_total").await?;
    }
    Ok(fired)
}
