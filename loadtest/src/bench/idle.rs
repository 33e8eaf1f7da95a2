//! Memory of an access node: idle sessions, after a broadcast, and after all sessions have ended.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tokio::time::{Instant, sleep};

use super::trial::{Both, Server, Trial};
use crate::audit::Audit;
use crate::controller::Agents;
use crate::drive::{drive, must_be_clean};
use crate::live::say;
use crate::measure::{Goal, Measure};
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;

/// Messages to each session.
const BROADCAST: u32 = 100;
const PAYLOAD_BYTES: u32 = 100;
/// Consecutive messages to one session, which Barid accepts and delivers together.
const BURST: u32 = 10;
const HANDSHAKES_MAX: u32 = 256;
/// A refused client retries with full jitter up to this time, ms: handshakes are not measured here.
const RETRY_MAX_MS: u32 = 2_000;
/// Messages between Kafka and the devices, at most.
const WINDOW: u64 = 20_000;
const BROADCAST_LIMIT: Duration = Duration::from_secs(900);
const MIB: f64 = 1024.0 * 1024.0;

struct Memory {
    idle_bytes: f64,
    after_broadcast_bytes: f64,
    /// CPU time per session and minute for pings and pongs, µs.
    heartbeat_us: f64,
    /// After all sessions have ended, relative to the process before the first one.
    after_close_ratio: f64,
}

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let both: Both<Memory> = trial.both(memory).await?;
    let row = |name, unit, value: fn(&Memory) -> f64, most| {
        both.row(name, unit, value).against(Goal::AtMost(most))
    };
    Ok(vec![
        row("idle_bytes_per_session", "B", |m| m.idle_bytes, 2.5 * 1024.0),
        row("after_broadcast_bytes_per_session", "B", |m| m.after_broadcast_bytes, 3.0 * 1024.0),
        row("after_close_ratio", "", |m| m.after_close_ratio, 1.2),
        // The floor sends no pings.
        Measure::new("heartbeat_cpu_us_per_minute", "us", None, both.barid.heartbeat_us),
    ])
}

async fn memory(trial: &mut Trial<'_>, server: &mut Server) -> anyhow::Result<Memory> {
    let options = trial.options;
    let connect = server.connect_request().await?;
    trial.settle(options.settle_seconds).await;
    let empty = server.known_usage().await?.resident_bytes as f64;
    say(&format!("empty: {:.1} MiB", empty / MIB))?;
    let count = options.sessions;
    let connect = ConnectRequest {
        count,
        rate: options.rate,
        at_once_max: HANDSHAKES_MAX,
        retry_max_ms: RETRY_MAX_MS,
        ..connect
    };
    trial.agents.expect(&Audit::new(count, None), None).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    trial.settle(options.settle_seconds).await;
    let per_session = |now: u64| (now as f64 - empty) / f64::from(count);
    let idle_bytes = per_session(server.known_usage().await?.resident_bytes);
    say(&format!("{count} sessions: {idle_bytes:.0} bytes each"))?;
    let started = Instant::now();
    trial.live.phase("broadcasting");
    broadcast(count, &trial.agents, server).await?;
    say(&format!("broadcast in {:.0} s", started.elapsed().as_secs_f64()))?;
    let before_s = server.known_usage().await?.cpu_s;
    let started = Instant::now();
    trial.settle(options.idle_seconds).await;
    let minutes = started.elapsed().as_secs_f64() / 60.0;
    let spent_us = (server.known_usage().await?.cpu_s - before_s) * 1e6;
    let heartbeat_us = spent_us / minutes / f64::from(count);
    let seen = trial.agents.report().await?;
    ensure!(seen.connected == count, "{} of {count} left: {}", seen.connected, seen.why_closed);
    let after_broadcast_bytes = per_session(server.known_usage().await?.resident_bytes);
    say(&format!("after the broadcast: {after_broadcast_bytes:.0} bytes each"))?;
    trial.live.phase("closing");
    trial.agents.drop_all().await?;
    trial.settle(options.idle_seconds / 2).await;
    let after_close_ratio = server.known_usage().await?.resident_bytes as f64 / empty;
    Ok(Memory { idle_bytes, after_broadcast_bytes, heartbeat_us, after_close_ratio })
}

/// Sends to every session: the floor directly, Barid through Kafka and all roles, acknowledged.
async fn broadcast(count: u32, agents: &Agents, server: &mut Server) -> anyhow::Result<()> {
    let total = u64::from(count) * u64::from(BROADCAST);
    match server {
        Server::Floor(floor) => {
            let end = agents.report().await?.delivered + total;
            floor.broadcast(BROADCAST, PAYLOAD_BYTES).await?;
            let started = Instant::now();
            while agents.report().await?.delivered < end {
                ensure!(started.elapsed() < BROADCAST_LIMIT, "the floor's broadcast does not end");
                sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        }
        Server::Barid(target) => {
            let audit = Arc::new(Audit::new(count, None).in_bursts_of(BURST));
            let business = Business::open(&target.plan(PAYLOAD_BYTES, 5)?).await?;
            let pace = Pace::Counted { window: WINDOW, total, limit: BROADCAST_LIMIT };
            let settle = Duration::from_secs(60);
            let records = drive(agents, &business, pace, &audit, settle).await?;
            ensure!(records == total, "{records} of {total} records in {BROADCAST_LIMIT:?}");
            let seen = must_be_clean(agents, &audit).await?;
            say(&format!("{}, {} re-sent", seen.outcome(total), seen.resent))?;
            target.all_acknowledged(Duration::from_secs(60)).await
        }
    }
}
