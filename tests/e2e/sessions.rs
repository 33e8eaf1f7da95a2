//! Tokens, replaced sessions, and closes.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::device::{Device, Incoming, PATIENCE};
use barid_testkit::token::{sign, token};
use barid_testkit::{Cluster, Role};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_without_a_valid_token_is_refused() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let url = cluster.url(0).await?;
    let claims = json!({"app": "demo", "sub": "alice", "exp": 4_000_000_000_u64});
    for bad in [
        "nonsense".to_owned(),
        sign(&claims, "another secret that nobody gave the node"),
        token("demo", "alice", Duration::ZERO),
        sign(&json!({"sub": "alice", "exp": 4_000_000_000_u64}), barid_testkit::token::SECRET),
    ] {
        let refused = Device::open(&url, &bad).await.expect_err("refused").to_string();
        assert!(refused.contains("401"), "{refused}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_closes_its_session_unless_refreshed() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let url = cluster.url(0).await?;
    let short = || token("demo", "alice", Duration::from_secs(3));
    let mut forgetful = Device::connect(&url, &short(), "forgetful").await?;
    let mut careful = Device::connect(&url, &short(), "careful").await?;
    careful.send(&json!({"refresh": {"token": cluster.token("alice")}})).await?;
    assert_eq!(forgetful.closed(Duration::from_secs(6)).await?, 4004);
    careful.expect_silence(Duration::from_secs(2)).await?;
    cluster.business()?.send_text("alice", "m", "still here").await?;
    assert_eq!(careful.receive(1).await?, ["m"]);
    let other = cluster.token("mallory");
    careful.send(&json!({"refresh": {"token": other}})).await?;
    assert_eq!(careful.closed(PATIENCE).await?, 4500);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_session_of_a_device_replaces_the_older_one() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let business = cluster.business()?;
    let mut first = cluster.device_at(0, "alice", "phone").await?;
    let mut same_node = cluster.device_at(0, "alice", "phone").await?;
    assert_eq!(first.closed(PATIENCE).await?, 4502);
    let mut other_node = cluster.device_at(1, "alice", "phone").await?;
    business.send_text("alice", "m1", "to the newest").await?;
    assert_eq!(other_node.receive(1).await?, ["m1"]);
    assert_eq!(same_node.closed(PATIENCE).await?, 4502);
    // The end of the old sessions did not affect the new one.
    business.send_text("alice", "m2", "still to the newest").await?;
    assert_eq!(other_node.receive(1).await?, ["m2"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_comes_late_does_not_replace_a_newer_one() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let (here, there) = (cluster.url(0).await?, cluster.url(1).await?);
    let token = cluster.token("alice");
    let hello = |attempt: u64| json!({"device": "phone", "attempt": attempt});
    let (mut newer, _) = Device::connect_with(&here, &token, hello(20)).await?;
    let late = Device::connect_with(&there, &token, hello(10)).await;
    assert!(late.is_err(), "the late attempt was welcomed");
    cluster.business()?.send_text("alice", "m", "").await?;
    assert_eq!(newer.receive(1).await?, ["m"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_out_of_place_close_the_connection_with_the_reason() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let (url, token) = (cluster.url(0).await?, cluster.token("alice"));
    for frame in [
        json!({"ack": {"seq": 1}}),
        json!({"hello": {"device": 7}}),
        json!({"hello": {"device": ""}}),
        json!({"dance": {}}),
        json!(17),
    ] {
        let mut device = Device::open(&url, &token).await?;
        device.send(&frame).await?;
        match device.next(PATIENCE).await? {
            Incoming::Other(kind, error) => {
                assert_eq!((kind.as_str(), &error["code"]), ("error", &json!(4501)), "{frame}");
                assert!(error["text"].as_str().is_some_and(|t| !t.is_empty()), "{error}");
                assert_eq!(device.closed(PATIENCE).await?, 4501, "{frame}");
            }
            Incoming::Closed(code, reason) => {
                assert_eq!(code, 4501, "{frame}: {reason}");
                assert!(!reason.is_empty());
            }
            other => panic!("{frame} was answered with {other:?}"),
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn absurd_acks_are_clamped_and_cost_nobody_a_message() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let mut tablet = cluster.device("alice", "tablet").await?;
    phone.ack(1_000_000_000).await?;
    business.send_text("alice", "m1", "").await?;
    assert_eq!(tablet.receive(1).await?, ["m1"]);
    assert_eq!(phone.receive(1).await?, ["m1"]);
    business.send_text("alice", "m2", "").await?;
    assert_eq!(phone.receive(1).await?, ["m2"]);
    assert_eq!(tablet.receive(1).await?, ["m2"]);
    Ok(())
}
