//! Heartbeats: at the pace that a device asks for, within the node's bounds, and not for ever for a
//! device that does nothing else.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use barid_testkit::Device;
use barid_testkit::device::{Incoming, PATIENCE};
use serde_json::{Value, json};

use crate::support::*;

/// A device that wants to see pings, this often.
async fn pinged(node: &Node, device: &str, interval_ms: u64) -> Result<(Device, Value)> {
    let hello = json!({ "device": device, "visiblePings": true, "pingIntervalMs": interval_ms });
    Device::connect_with(&node.url(), &token_of("alice"), hello).await
}

async fn expect_ping(device: &mut Device) -> Result<()> {
    match device.next(PATIENCE).await? {
        Incoming::Other(kind, _) if kind == "ping" => Ok(()),
        other => anyhow::bail!("{other:?} instead of a ping"),
    }
}

#[tokio::test]
async fn a_device_is_pinged_as_often_as_it_asks_within_bounds() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.heartbeat.interval_seconds = 30;
            config.heartbeat.interval_min_seconds = 2;
            config.heartbeat.interval_max_seconds = 60;
        })
        .await?;
    for (asked, given) in [(0, 30_000), (1, 2_000), (2_500, 3_000), (60_000, 60_000)] {
        let (_, welcome) = pinged(&node, "phone", asked).await?;
        assert_eq!(welcome["pingIntervalMs"], given, "asked for {asked}");
    }
    let (_, welcome) = pinged(&node, "phone", u32::MAX.into()).await?;
    assert_eq!(welcome["pingIntervalMs"], 60_000);
    let (mut eager, _) = pinged(&node, "eager", 2_000).await?;
    let (mut calm, _) = pinged(&node, "calm", 0).await?;
    for _ in 0..2 {
        let begun = Instant::now();
        expect_ping(&mut eager).await?;
        assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
        eager.send(&json!({ "pong": {} })).await?;
    }
    calm.expect_silence(Duration::from_millis(100)).await
}

/// Pushes to a user's device that has been connected since `begun`, until `time` after that. It acknowledges each message.
/// `longest` becomes the longest time between the beginning of a push and the acknowledgement of the one after it.
async fn work(
    world: &World,
    node: &Node,
    (user, busy): (&str, &mut Device),
    (begun, time): (Instant, Duration),
    longest: &mut Duration,
) -> Result<()> {
    let mut dispatcher = node.dispatcher().await?;
    let mut before = begun;
    for n in 0.. {
        let now = Instant::now();
        if now - begun > time {
            break;
        }
        let id = format!("m{n}");
        let worked = async {
            let (entry, _) = world.accept(user, &id).await?;
            dispatcher.push(world, user, entry).await?;
            assert_eq!(busy.receive(1).await?, [id.as_str()]);
            tokio::time::sleep(Duration::from_millis(600)).await;
            anyhow::Ok(())
        };
        let worked = worked.await;
        *longest = before.elapsed().max(*longest);
        worked?;
        before = now;
    }
    Ok(())
}

/// How long a device stays that only answers pings, and the code of its close.
async fn only_pongs(mut idle: Device) -> Result<(u16, Duration)> {
    let begun = Instant::now();
    loop {
        match idle.next(PATIENCE).await? {
            Incoming::Other(kind, _) if kind == "ping" => {
                idle.send(&json!({ "pong": {} })).await?;
            }
            Incoming::Closed(code, _) => return Ok((code, begun.elapsed())),
            _ => (),
        }
    }
}

/// One device only answers pings and another one works, with an idle limit of so many seconds. Returns whether that
/// shows anything: not if the machine stood still for so long that the working device counted as idle.
async fn is_closed_when_idle(world: &World, idle_seconds: u32) -> Result<bool> {
    let node = world
        .node_with(|config| {
            config.heartbeat.interval_seconds = 1;
            config.heartbeat.interval_min_seconds = 1;
            config.heartbeat.timeout_seconds = 60;
            config.heartbeat.idle_seconds = idle_seconds;
        })
        .await?;
    let limit = Duration::from_secs(idle_seconds.into());
    let (idle, _) = pinged(&node, "idle", 0).await?;
    let time = (Instant::now(), limit + Duration::from_secs(3));
    // Another one each time: its mailbox has no messages yet.
    let user = format!("bob{idle_seconds}");
    let mut busy = node.device(&user, "busy").await?;
    let mut longest = Duration::ZERO;
    let working = work(world, &node, (&user, &mut busy), time, &mut longest);
    let both = async { tokio::join!(only_pongs(idle), working) };
    let (idled, worked) = tokio::time::timeout(3 * limit + PATIENCE, both).await?;
    // The node's clock has whole seconds, and may be one behind.
    if longest + Duration::from_millis(1_500) > limit {
        return Ok(false);
    }
    worked.with_context(|| format!("it worked, with pauses of at most {longest:?}"))?;
    let (code, after) = idled?;
    assert_eq!(code, 4003);
    assert!(after > limit / 2, "{after:?}");
    assert_eq!(node.metric("barid_access_limits_total", "idle"), 1.0);
    assert_eq!(node.metric("barid_access_closes_total", "heartbeat"), 1.0, "the busy one is here");
    Ok(true)
}

#[tokio::test]
async fn a_session_without_anything_but_heartbeats_is_closed_if_that_is_configured() -> Result<()> {
    let world = World::new().await?;
    // On a machine that stands still for seconds, only a longer limit tells work from silence.
    for idle_seconds in [4, 12, 36] {
        if is_closed_when_idle(&world, idle_seconds).await? {
            return Ok(());
        }
    }
    anyhow::bail!("the machine stood still for half a minute")
}

#[test]
fn bounds_of_intervals_that_exclude_each_other_refuse_to_start() {
    use barid_access::Access;
    use barid_runtime::Role as _;
    let mut config = barid_access::Config::default();
    config.auth.keys = vec![barid_access::config::KeyConfig {
        secret: barid_core::Secret::new(barid_testkit::token::SECRET),
        ..Default::default()
    }];
    config.heartbeat.interval_min_seconds = 601;
    let error = Access::check(&config).unwrap_err();
    assert!(error.starts_with("heartbeat.interval_min_seconds must be at most"), "{error}");
}
