//! Which nodes devices are sent to, and devices that are let go.

use std::time::Duration;

use anyhow::{Context as _, Result};
use barid_testkit::Device;
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::raw::*;
use serde_json::{Value, json};

use crate::support::*;

fn get(path: &str, headers: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").into()
}

async fn nodes(node: &Node, query: &str, headers: &str) -> Result<Value> {
    let path = format!("/v1/nodes?token={}{query}", token_of("alice"));
    let answer = http(node.addresses["ws"], &get(&path, headers)).await?;
    anyhow::ensure!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    anyhow::ensure!(answer.contains("\r\nContent-Type: application/json\r\n"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").context("a body")?;
    Ok(serde_json::from_str(body)?)
}

/// A node whose load is known to others soon.
async fn known(world: &World, name: &str, zone: &str) -> Result<Node> {
    world
        .node_with(|config| {
            config.node = name.into();
            config.zone = zone.into();
            config.lease_ttl_ms = 3_000;
            config.balance.shed_above = 1.2;
            config.balance.shed_slack = 3;
            config.balance.sheds_per_second = 10;
            config.auth.origins = vec!["https://app.example.com".into()];
        })
        .await
}

#[tokio::test]
async fn any_node_names_the_least_loaded_of_a_zone() -> Result<()> {
    let world = World::new().await?;
    let one = known(&world, "one", "east").await?;
    let two = known(&world, "two", "east").await?;
    let _far = known(&world, "far", "west side").await?;
    let _phone = one.device("alice", "phone").await?;
    let order = async |query: &str| {
        let shown = nodes(&two, query, "").await?;
        let names = shown["nodes"].as_array().context("nodes")?.iter();
        anyhow::Ok(names.filter_map(|n| n["node"].as_str().map(str::to_owned)).collect::<Vec<_>>())
    };
    eventually("loads are known", async || Ok(order("").await? == ["two", "one", "far"])).await?;
    assert_eq!(order("&zone=west%20side").await?, ["far", "two", "one"]);
    let shown = nodes(&two, "", "").await?;
    let expected = json!({ "node": "one", "url": one.url(), "zone": "east", "load": 1 });
    assert_eq!((&shown["nodes"][1], &shown["zone"]), (&expected, &json!("east")));
    // The address returned is the one where devices connect.
    let url = shown["nodes"][0]["url"].as_str().context("a url")?;
    let _tablet = Device::connect(url, &token_of("alice"), "tablet").await?;

    // Pages that may connect may ask, nobody without a token may, and it is counted.
    let path = format!("/v1/nodes?token={}", token_of("alice"));
    for (path, headers, status, with) in [
        (&*path, "Origin: https://app.example.com\r\n", 200, "Access-Control-Allow-Origin: https:"),
        (&*path, "Origin: https://evil.net\r\n", 403, "origin"),
        ("/v1/nodes", "", 401, "no token"),
        ("/v1/nodes?token=x", "", 401, ""),
        ("/v1/nodes/", "", 404, ""),
    ] {
        let answer = http(two.addresses["ws"], &get(path, headers)).await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains(with), "{answer}");
    }
    assert!(two.metric("barid_access_handshakes_total", "nodes") >= 3.0);
    // A node that drains is not named.
    one.stop(Duration::from_secs(3)).await?;
    eventually("it is not named", async || Ok(order("").await? == ["two", "far"])).await
}

#[tokio::test]
async fn a_node_far_above_the_mean_lets_devices_go_down_to_it() -> Result<()> {
    let world = World::new().await?;
    let full = known(&world, "full", "").await?;
    let mut devices = Vec::new();
    for n in 0..30 {
        devices.push(full.device(&format!("user{n}"), "phone").await?);
    }
    // Alone there is nowhere to go.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(full.metric("barid_access_shed_total", ""), 0.0);
    let _empty = known(&world, "empty", "").await?;
    eventually("half of them are told", async || {
        Ok(full.metric("barid_access_shed_total", "") == 15.0)
    })
    .await?;
    eventually("and go", async || Ok(full.metric("barid_access_sessions", "") == 15.0)).await?;
    // It waits until they are counted elsewhere.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(full.metric("barid_access_shed_total", ""), 15.0);
    assert_eq!(full.metric("barid_access_closes_total", "draining"), 15.0);
    let mut told = 0;
    for device in &mut devices {
        if let Ok(Incoming::Other(kind, away)) = device.next(Duration::from_millis(50)).await {
            assert_eq!((kind.as_str(), &away["why"]), ("goAway", &json!("balance")));
            assert_eq!(device.closed(PATIENCE).await?, 4000);
            told += 1;
        }
    }
    assert_eq!(told, 15);
    Ok(())
}

#[test]
fn a_share_of_the_mean_refuses_to_start() {
    use barid_access::Access;
    use barid_runtime::Role as _;
    let mut config = barid_access::Config::default();
    config.auth.keys = vec![barid_access::config::KeyConfig {
        secret: barid_core::Secret::new(barid_testkit::token::SECRET),
        ..Default::default()
    }];
    config.balance.shed_above = 0.5;
    let told = "balance.shed_above: 0.5 is out of range; write 1.01 to 1000, or 0 (never)";
    assert_eq!(Access::check(&config), Err(told.into()));
    config.balance.shed_above = 1.5;
    config.advertise_url = "http://x".into();
    let error = Access::check(&config).unwrap_err();
    let told = "advertise_url: \"http://x\" is not a URL for devices; write wss://";
    assert!(error.starts_with(told), "{error}");
}
