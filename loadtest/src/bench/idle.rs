//! Memory of an access node: a session that idles, after a broadcast, after everybody has gone.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tokio::time::{Instant, sleep};

use super::trial::{Both, Server, Trial};
use crate::audit::Audit;
use crate::controller::Agents;
use crate::drive::{all_open, drive, must_be_clean};
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;

/// Messages to each session, and bytes of each.
const BROADCAST: u32 = 100;
const PAYLOAD_BYTES: u32 = 100;
/// Of Barid's: so many in a row to each session, which are accepted and delivered together.
const BURST: u32 = 10;
/// Handshakes under way at once.
const AT_ONCE_MAX: u32 = 256;
/// Messages between Kafka and the devices at once.
const WINDOW: u64 = 20_000;
/// How long a broadcast may take.
const BROADCAST_LIMIT: Duration = Duration::from_secs(900);
const MIB: f64 = 1024.0 * 1024.0;

/// What a server weighs.
struct Weight {
    idle_bytes: f64,
    after_broadcast_bytes: f64,
    /// CPU time of a session that is pinged and answers, in a minute, µs.
    heartbeat_us: f64,
    /// After all sessions have gone, over the process before there were any.
    after_close_ratio: f64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Weight> = trial.both(weigh).await?;
    let row = |name, unit, of: fn(&Weight) -> f64, most| {
        both.row(name, unit, of).against(Goal::AtMost(most))
    };
    Ok(vec![
        row("idle_bytes_per_session", "B", |w| w.idle_bytes, 2.5 * 1024.0),
        row("after_broadcast_bytes_per_session", "B", |w| w.after_broadcast_bytes, 3.0 * 1024.0),
        row("after_close_ratio", "", |w| w.after_close_ratio, 1.2),
        // The floor sends no heartbeats.
        Measure::new("heartbeat_cpu_us_per_minute", "us", None, both.barid.heartbeat_us),
    ])
}

async fn weigh(trial: &mut Trial<'_>, server: &mut Server) -> anyhow::Result<Weight> {
    let options = trial.options;
    let way = server.way().await?;
    trial.settle(options.settle_seconds).await;
    let empty = server.must_know().await?.resident_bytes as f64;
    say(&format!("empty: {:.1} MiB", empty / MIB))?;
    let (count, rate, at_once_max) = (options.sessions, options.rate, AT_ONCE_MAX);
    trial.agents.expect(&Audit::new(count, None)).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&ConnectRequest { count, rate, at_once_max, ..way }).await?;
    trial.settle(options.settle_seconds).await;
    let each = |now: u64| (now as f64 - empty) / f64::from(count);
    let idle_bytes = each(server.must_know().await?.resident_bytes);
    say(&format!("{count} sessions: {idle_bytes:.0} bytes each"))?;
    let begun = Instant::now();
    trial.live.phase("broadcasting");
    broadcast(count, &trial.agents, server).await?;
    say(&format!("broadcast in {:.0} s", begun.elapsed().as_secs_f64()))?;
    let calm = server.must_know().await?.cpu_s;
    let begun = Instant::now();
    trial.settle(options.idle_seconds).await;
    let minutes = begun.elapsed().as_secs_f64() / 60.0;
    let idled_us = (server.must_know().await?.cpu_s - calm) * 1e6;
    let heartbeat_us = idled_us / minutes / f64::from(count);
    let seen = trial.agents.report().await?;
    ensure!(seen.connected == count, "{} of {count} left: {}", seen.connected, seen.why_closed);
    let after_broadcast_bytes = each(server.must_know().await?.resident_bytes);
    say(&format!("after the broadcast: {after_broadcast_bytes:.0} bytes each"))?;
    trial.live.phase("closing");
    trial.agents.drop_all().await?;
    trial.settle(options.idle_seconds / 2).await;
    let after_close_ratio = server.must_know().await?.resident_bytes as f64 / empty;
    Ok(Weight { idle_bytes, after_broadcast_bytes, heartbeat_us, after_close_ratio })
}

/// To every session: the floor by itself, Barid through Kafka and all roles, acknowledged.
async fn broadcast(count: u32, agents: &Agents, server: &mut Server) -> anyhow::Result<()> {
    let total = u64::from(count) * u64::from(BROADCAST);
    match server {
        Server::Floor(floor) => {
            floor.broadcast(BROADCAST, PAYLOAD_BYTES).await?;
            let begun = Instant::now();
            while agents.report().await?.frames < total {
                ensure!(begun.elapsed() < BROADCAST_LIMIT, "the floor's broadcast does not end");
                sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        }
        Server::Barid(target) => {
            let audit = Arc::new(Audit::new(count, None).in_bursts_of(BURST));
            let business = Business::open(&target.plan(PAYLOAD_BYTES, 5)?).await?;
            let pace = Pace::Counted { window: WINDOW, total, limit: BROADCAST_LIMIT };
            let settle = Duration::from_secs(60);
            let (records, _) = drive(agents, &business, pace, &audit, settle, all_open).await?;
            ensure!(records == total, "{records} of {total} within the limit");
            let seen = must_be_clean(agents, &audit).await?;
            say(&format!("{}; re-sent though shown: {}", seen.outcome(total), seen.resent))?;
            target.all_acknowledged(Duration::from_secs(60)).await
        }
    }
}
