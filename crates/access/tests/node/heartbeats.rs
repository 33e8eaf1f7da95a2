//! Heartbeats: at the pace that a device asks for, within the node's bounds, and not for ever for a
//! device that does nothing else.

use std::time::{Duration, Instant};

use anyhow::Result;
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

#[tokio::test]
async fn a_session_without_anything_but_heartbeats_is_closed_if_that_is_configured() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.heartbeat.interval_seconds = 1;
            config.heartbeat.interval_min_seconds = 1;
            config.heartbeat.timeout_seconds = 5;
            config.heartbeat.idle_seconds = 4;
        })
        .await?;
    let mut dispatcher = node.dispatcher().await?;
    let (mut idle, _) = pinged(&node, "idle", 0).await?;
    let mut busy = node.device("bob", "busy").await?;
    let begun = Instant::now();
    let answering = async {
        loop {
            match idle.next(PATIENCE).await? {
                Incoming::Other(kind, _) if kind == "ping" => {
                    idle.send(&json!({ "pong": {} })).await?;
                }
                Incoming::Closed(code, _) => return anyhow::Ok((code, begun.elapsed())),
                _ => (),
            }
        }
    };
    let working = async {
        for n in 0..12 {
            let id = format!("m{n}");
            let (entry, _) = world.accept("bob", &id).await?;
            dispatcher.push(&world, "bob", entry).await?;
            assert_eq!(busy.receive(1).await?, [id]);
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
        anyhow::Ok(())
    };
    let both = async { tokio::try_join!(answering, working) };
    let ((code, after), ()) = tokio::time::timeout(PATIENCE, both).await??;
    assert_eq!(code, 4003);
    assert!(after > Duration::from_secs(2), "{after:?}");
    assert_eq!(node.metric("barid_access_limits_total", "idle"), 1.0);
    assert_eq!(node.metric("barid_access_closes_total", "heartbeat"), 1.0, "the busy one is here");
    Ok(())
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
