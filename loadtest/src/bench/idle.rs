//! Memory of an access node: a session that idles, after a broadcast, after everybody has gone.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tokio::time::{Instant, sleep};

use super::{Goal, Measure, Options, access_pid, say, settle, way};
use crate::audit::Audit;
use crate::controller::{Agents, Floor};
use crate::cpu::resident_bytes;
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;
use crate::sandbox::Sandbox;

/// Messages to each session, and bytes of each.
const BROADCAST: u32 = 100;
const PAYLOAD_BYTES: u32 = 100;
/// Handshakes under way at once.
const AT_ONCE_MAX: u32 = 256;
/// Messages between Kafka and the devices at once.
const WINDOW: u64 = 20_000;
/// How long a broadcast may take.
const BROADCAST_LIMIT: Duration = Duration::from_secs(900);
/// How often the terminal is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);
const MIB: f64 = 1024.0 * 1024.0;

/// What a server weighs.
struct Weight {
    idle_bytes: f64,
    after_broadcast_bytes: f64,
    /// After all sessions have gone, over the process before there were any.
    after_close_ratio: f64,
}

pub async fn measure(options: &Options, agents: &mut Agents) -> anyhow::Result<Vec<Measure>> {
    let floor = floor(options, agents).await?;
    let barid = barid(options, agents).await?;
    let row = |name, unit, of: fn(&Weight) -> f64, most| {
        Measure::new(name, unit, Some(of(&floor)), of(&barid)).against(Goal::AtMost(most))
    };
    Ok(vec![
        row("idle_bytes_per_session", "B", |w| w.idle_bytes, 2.5 * 1024.0),
        row("after_broadcast_bytes_per_session", "B", |w| w.after_broadcast_bytes, 3.0 * 1024.0),
        row("after_close_ratio", "", |w| w.after_close_ratio, 1.2),
    ])
}

async fn floor(options: &Options, agents: &mut Agents) -> anyhow::Result<Weight> {
    let mut floor = Floor::start().await?;
    let (pid, way) = (floor.pid(), floor.way());
    weigh(options, agents, pid, way, async |agents| {
        floor.broadcast(BROADCAST, PAYLOAD_BYTES).await?;
        let total = u64::from(options.sessions) * u64::from(BROADCAST);
        let begun = Instant::now();
        while agents.report().await?.frames < total {
            ensure!(begun.elapsed() < BROADCAST_LIMIT, "the floor's broadcast does not end");
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    })
    .await
}

async fn barid(options: &Options, agents: &mut Agents) -> anyhow::Result<Weight> {
    let mut sandbox = Sandbox::start().await?;
    let (pid, way) = (access_pid(&sandbox)?, way(&mut sandbox).await?);
    weigh(options, agents, pid, way, async |agents| broadcast(options, &sandbox, agents).await)
        .await
}

/// Through Kafka and all roles, acknowledged.
async fn broadcast(
    options: &Options,
    sandbox: &Sandbox,
    agents: &mut Agents,
) -> anyhow::Result<()> {
    let audit = Arc::new(Audit::new(options.sessions, None));
    let total = audit.users() * u64::from(BROADCAST);
    audit.expect(total);
    agents.expect(&audit).await?;
    let business = Business::open(&sandbox.plan(PAYLOAD_BYTES, 5)).await?;
    audit.start();
    let pace = Pace::Counted { window: WINDOW, total, limit: BROADCAST_LIMIT };
    let producing = business.produce(pace, &audit);
    let watching = async {
        let mut told = Instant::now();
        loop {
            let seen = agents.report().await?;
            let settled = seen.shown + seen.passed_over;
            audit.settled_elsewhere(settled);
            ensure!(seen.closed == 0, "{} sessions were closed: {}", seen.closed, seen.why_closed);
            if settled >= total {
                return Ok(seen);
            }
            ensure!(audit.elapsed() < BROADCAST_LIMIT, "{} of {total}", seen.outcome(total));
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                say(&format!("{settled} of {total} delivered"))?;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let (_, seen) = tokio::try_join!(producing, watching)?;
    let outcome = seen.outcome(total);
    ensure!(outcome.is_clean(), "{outcome}");
    say(&format!("{outcome}; re-sent though shown: {}", seen.resent))?;
    sandbox.all_acknowledged(Duration::from_secs(60)).await
}

async fn weigh(
    options: &Options,
    agents: &mut Agents,
    pid: u32,
    way: ConnectRequest,
    broadcast: impl AsyncFnOnce(&mut Agents) -> anyhow::Result<()>,
) -> anyhow::Result<Weight> {
    settle(options.settle_seconds).await;
    let empty = resident_bytes(pid)? as f64;
    say(&format!("empty: {:.1} MiB", empty / MIB))?;
    let (count, rate, at_once_max) = (options.sessions, options.rate, AT_ONCE_MAX);
    agents.expect(&Audit::new(count, None)).await?;
    agents.connect(&ConnectRequest { count, rate, at_once_max, ..way }).await?;
    settle(options.settle_seconds).await;
    let each = |now: u64| (now as f64 - empty) / f64::from(count);
    let idle_bytes = each(resident_bytes(pid)?);
    say(&format!("{count} sessions: {idle_bytes:.0} bytes each"))?;
    let begun = Instant::now();
    broadcast(agents).await?;
    say(&format!("broadcast in {:.0} s", begun.elapsed().as_secs_f64()))?;
    settle(options.idle_seconds).await;
    let seen = agents.report().await?;
    ensure!(seen.connected == count, "{} of {count} left: {}", seen.connected, seen.why_closed);
    let after_broadcast_bytes = each(resident_bytes(pid)?);
    say(&format!("after the broadcast: {after_broadcast_bytes:.0} bytes each"))?;
    agents.drop_all().await?;
    settle(options.idle_seconds / 2).await;
    let after_close_ratio = resident_bytes(pid)? as f64 / empty;
    Ok(Weight { idle_bytes, after_broadcast_bytes, after_close_ratio })
}
