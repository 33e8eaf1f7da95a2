//! Operators close sessions: whom they name, at their pace, and they learn how many.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use barid_testkit::device::PATIENCE;
use barid_testkit::{Device, token};
use barid_wire::internal::access_admin_client::AccessAdminClient;
use barid_wire::internal::{KickProgress, KickRequest};
use tonic::Code;
use tonic::transport::Channel;

use crate::support::*;

const CLOSES: &str = "barid_access_closes_total";

async fn operator(node: &Node) -> Result<AccessAdminClient<Channel>> {
    Ok(AccessAdminClient::connect(format!("http://{}", node.addresses["grpc"])).await?)
}

/// Everything that the node tells of an order.
async fn kick(node: &Node, order: KickRequest) -> Result<Vec<KickProgress>> {
    let mut stream = operator(node).await?.kick(order).await?.into_inner();
    let mut told = Vec::new();
    while let Some(progress) = stream.message().await? {
        told.push(progress);
    }
    Ok(told)
}

fn order(app: &str, user: &str, device: &str) -> KickRequest {
    let (app, user, device) = (app.into(), user.into(), device.into());
    KickRequest { app, user, device, ..Default::default() }
}

#[tokio::test]
async fn a_device_a_user_an_app_or_everyone_is_closed_with_4503_and_counted() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut phone = node.device("alice", "phone").await?;
    let mut tablet = node.device("alice", "tablet").await?;
    let mut bob = node.device("bob", "phone").await?;
    let shop = token::token("shop", "alice", Duration::from_secs(3600));
    let mut theirs = Device::connect(&node.url(), &shop, "phone").await?;
    let last = |told: Vec<KickProgress>| told.last().copied().context("an answer");

    let done = last(kick(&node, order(APP, "alice", "phone")).await?)?;
    assert_eq!(done, KickProgress { matched: 1, closed: 1, done: true });
    assert_eq!(phone.closed(PATIENCE).await?, 4503);
    let nobody = last(kick(&node, order(APP, "alice", "phone")).await?)?;
    assert_eq!(nobody, KickProgress { matched: 0, closed: 0, done: true });
    assert_eq!(last(kick(&node, order(APP, "alice", "")).await?)?.closed, 1);
    assert_eq!(tablet.closed(PATIENCE).await?, 4503);
    theirs.expect_silence(Duration::from_millis(100)).await?;
    assert_eq!(last(kick(&node, order("shop", "", "")).await?)?.closed, 1);
    assert_eq!(theirs.closed(PATIENCE).await?, 4503);
    bob.expect_silence(Duration::from_millis(100)).await?;
    let everyone = KickRequest { everyone: true, ..Default::default() };
    assert_eq!(last(kick(&node, everyone).await?)?.closed, 1);
    assert_eq!(bob.closed(PATIENCE).await?, 4503);
    assert_eq!(node.metric(CLOSES, "kicked"), 4.0);
    // The routes are gone, and nobody is locked out: a token stays good.
    world.routes_become("alice", 0).await?;
    world.routes_become("bob", 0).await?;
    node.device("alice", "phone").await.map(drop)
}

#[tokio::test]
async fn many_are_closed_at_the_pace_that_was_asked_for() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut devices = Vec::new();
    for n in 0..60 {
        devices.push(node.device(&format!("user{n}"), "phone").await?);
    }
    let late = node.device("late", "phone").await?;
    late.close().await?;
    world.routes_become("late", 0).await?;
    let begun = Instant::now();
    let reason = "maintenance of your app".to_owned();
    let told = kick(&node, KickRequest { per_second: 30, reason, ..order(APP, "", "") }).await?;
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1900), "60 at 30 a second in {took:?}");
    assert_eq!(told.last(), Some(&KickProgress { matched: 60, closed: 60, done: true }));
    // It was told meanwhile, and the count only grows.
    assert!(told.len() >= 2 && told.is_sorted_by_key(|progress| progress.closed), "{told:?}");
    assert!(told[0].closed >= 10 && told[0].closed <= 50 && !told[0].done, "{told:?}");
    for device in &mut devices {
        assert_eq!(device.closed(PATIENCE).await?, 4503);
    }
    Ok(())
}

#[tokio::test]
async fn an_order_ends_with_whoever_gave_it() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut devices = Vec::new();
    for n in 0..20 {
        devices.push(node.device(&format!("user{n}"), "phone").await?);
    }
    let mut operator = operator(&node).await?;
    let slow = KickRequest { per_second: 1, everyone: true, ..Default::default() };
    let stream = operator.kick(slow).await?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    drop(stream);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let closed = node.metric(CLOSES, "kicked");
    assert!((1.0..=4.0).contains(&closed), "{closed}");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(node.metric(CLOSES, "kicked"), closed);
    Ok(())
}

#[tokio::test]
async fn orders_that_name_nobody_are_refused() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut alice = node.device("alice", "phone").await?;
    let long = KickRequest { reason: "x".repeat(257), ..order(APP, "alice", "") };
    for bad in [KickRequest::default(), order("", "alice", ""), order(APP, "", "phone"), long] {
        let mut operator = operator(&node).await?;
        let status = operator.kick(bad.clone()).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{bad:?}");
    }
    alice.expect_silence(Duration::from_millis(100)).await
}
