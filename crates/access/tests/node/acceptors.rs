//! Several accept loops on one port: each has its share of the connections, and all of them are one door.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context as _, Result};
use barid_access::{Access, Config};
use barid_runtime::{Role as _, Stopped};
use barid_testkit::raw::{read_head, request};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::*;

const ACCEPTED: &str = "barid_access_accepted_total";
const LIMITS: &str = "barid_access_limits_total";
const ACCEPTORS: u32 = 4;
/// So many connections miss one of four listeners once in 10^11 times.
const ENOUGH: usize = 100;

async fn node(world: &World, change: impl FnOnce(&mut Config)) -> Result<Node> {
    let several = |config: &mut Config| {
        config.acceptors = ACCEPTORS;
        config.limits.user_unidentified_max = 0;
        change(config);
    };
    world.node_with(several).await
}

/// Connections accepted by each loop.
fn accepted(node: &Node) -> Vec<f64> {
    (0..ACCEPTORS).map(|number| node.metric(ACCEPTED, &number.to_string())).collect()
}

/// The status of a good handshake; the socket stays open with it.
async fn handshake(node: &Node) -> Result<(TcpStream, String)> {
    let mut stream = TcpStream::connect(node.addresses["ws"]).await?;
    let path = format!("/v1/connect?token={}", token_of("alice"));
    let headers = "Sec-WebSocket-Protocol: barid.v1.json\r\n";
    stream.write_all(request(&path, headers).as_bytes()).await?;
    let answer = timeout(Duration::from_secs(5), read_head(&mut stream));
    let answer = answer.await.context("nobody serves this connection")??;
    Ok((stream, answer.split(' ').nth(1).unwrap_or_default().to_owned()))
}

#[tokio::test]
async fn every_acceptor_has_its_share_and_serves_it() -> Result<()> {
    let world = World::new().await?;
    let node = node(&world, |_| ()).await?;
    let mut open = Vec::new();
    for _ in 0..ENOUGH {
        let (stream, status) = handshake(&node).await?;
        assert_eq!(status, "101");
        open.push(stream);
    }
    let each = accepted(&node);
    assert!(each.iter().all(|accepted| *accepted > 0.0), "{each:?}");
    assert_eq!(each.iter().sum::<f64>(), ENOUGH as f64);
    assert_eq!(node.metric("barid_access_connections", ""), ENOUGH as f64);
    let phone = node.device("alice", "phone").await?;
    phone.close().await
}

#[tokio::test]
async fn acceptors_share_the_limits_of_the_node() -> Result<()> {
    let world = World::new().await?;
    for (limit, most) in [("connections", 8), ("handshake_rate", 8), ("address_connections", 8)] {
        let node = node(&world, |config| match limit {
            "connections" => config.limits.connections_max = most,
            "handshake_rate" => {
                config.limits.handshakes_per_second = 1;
                config.limits.handshakes_burst_seconds = most as u64;
            }
            _ => config.limits.address_connections_max = most as u32,
        })
        .await?;
        let begun = std::time::Instant::now();
        let mut open = Vec::new();
        for _ in 0..ENOUGH {
            let (stream, status) = handshake(&node).await?;
            if status == "101" {
                open.push(stream);
            }
        }
        // One more came in each second.
        let later = match limit {
            "handshake_rate" => begun.elapsed().as_secs() as usize + 1,
            _ => 0,
        };
        assert!((most..=most + later).contains(&open.len()), "{limit}: {}", open.len());
        assert_eq!(node.metric(LIMITS, limit), (ENOUGH - open.len()) as f64, "{limit}");
        let each = accepted(&node);
        assert!(each.iter().all(|accepted| *accepted > 0.0), "{limit}: {each:?}");
    }
    Ok(())
}

#[tokio::test]
async fn handshakes_at_once_are_those_of_all_acceptors() -> Result<()> {
    let world = World::new().await?;
    let node = node(&world, |config| {
        config.limits.handshakes_max = 8;
        config.limits.handshake_timeout_ms = 60_000;
    })
    .await?;
    let mut slow = Vec::new();
    for _ in 0..ENOUGH {
        slow.push(TcpStream::connect(node.addresses["ws"]).await?);
    }
    eventually("all but eight are refused", async || {
        Ok(node.metric(LIMITS, "handshakes") == (ENOUGH - 8) as f64)
    })
    .await?;
    let each = accepted(&node);
    assert!(each.iter().all(|accepted| *accepted > 0.0), "{each:?}");
    Ok(())
}

#[tokio::test]
async fn draining_ends_all_acceptors() -> Result<()> {
    let world = World::new().await?;
    let node = node(&world, |_| ()).await?;
    let address = node.addresses["ws"];
    // Its unacknowledged messages keep the drain going.
    let mut phone = node.device("alice", "phone").await?;
    let (entry, _) = world.accept("alice", "m1").await?;
    node.dispatcher().await?.push(&world, "alice", entry).await?;
    assert_eq!(phone.message().await?.id, "m1");
    node.context.shutdown.begin(Duration::from_secs(6));
    tokio::time::sleep(Duration::from_millis(500)).await;
    for _ in 0..ENOUGH {
        let refused = TcpStream::connect(address).await.err().map(|error| error.kind());
        assert_eq!(refused, Some(ErrorKind::ConnectionRefused));
    }
    assert_eq!(node.metric("barid_access_sessions", ""), 1.0, "it is still draining");
    phone.ack(1).await?;
    assert_eq!(node.stop(Duration::from_secs(6)).await?, Stopped::Clean);
    Ok(())
}

#[tokio::test]
async fn no_second_node_gets_a_share_of_the_port() -> Result<()> {
    let world = World::new().await?;
    let node = node(&world, |_| ()).await?;
    for acceptors in [1, ACCEPTORS] {
        let mut config = config(&world.redis);
        config.listen = node.addresses["ws"];
        config.acceptors = acceptors;
        let ended = Access::run(config, barid_runtime::Context::new());
        let error = timeout(Duration::from_secs(20), ended).await?.unwrap_err().to_string();
        assert!(error.starts_with("cannot listen on listen "), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn there_are_1_to_64_acceptors() -> Result<()> {
    let world = World::new().await?;
    for (acceptors, good) in [(0, false), (1, true), (64, true), (65, false)] {
        let mut config = config(&world.redis);
        config.acceptors = acceptors;
        let wanted = format!("acceptors: {acceptors} is out of range; write 1 to 64");
        let wanted = if good { Ok(()) } else { Err(wanted) };
        assert_eq!(Access::check(&config), wanted, "{acceptors}");
    }
    Ok(())
}
