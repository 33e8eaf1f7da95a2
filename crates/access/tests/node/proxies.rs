//! Behind balancers: the client's own address is what limits and logs go by, and only balancers are
//! believed about it.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use barid_testkit::raw::*;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};

use crate::support::*;

const HANDSHAKES: &str = "barid_access_handshakes_total";
const LIMITS: &str = "barid_access_limits_total";

/// 127.0.0.10 is the balancer.
const BALANCER: u8 = 10;
const STRANGER: u8 = 11;

async fn socket_from(node: &Node, last: u8) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into())?;
    Ok(socket.connect(node.addresses["ws"]).await?)
}

/// Sends `before` in front of a valid handshake with these headers, and returns the answer.
async fn handshake(
    node: &Node,
    from: u8,
    before: &[u8],
    headers: &str,
) -> Result<(TcpStream, String)> {
    let mut stream = socket_from(node, from).await?;
    let path = format!("/v1/connect?token={}", token_of("alice"));
    let protocol = format!("Sec-WebSocket-Protocol: barid.v1.json\r\n{headers}");
    let bytes = [before, request(&path, &protocol).as_bytes()].concat();
    // In two pieces: a header may come with a part of the request, or in parts itself.
    let middle = bytes.len().min(before.len() / 2 + 9);
    let _ = stream.write_all(&bytes[..middle]).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let _ = stream.write_all(&bytes[middle..]).await;
    let answer = read_head(&mut stream).await?;
    Ok((stream, answer))
}

fn v1(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 198.51.100.1 4711 443\r\n").into()
}

fn v2(client: [u8; 4]) -> Vec<u8> {
    let head = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";
    [&head[..], &client, &[198, 51, 100, 1, 0x12, 0x67, 1, 0xbb]].concat()
}

async fn node(world: &World, protocol: bool, forwarded_for: bool) -> Result<Node> {
    let change = |config: &mut barid_access::Config| {
        config.proxy.trusted = vec![format!("127.0.0.{BALANCER}")];
        config.proxy.protocol = protocol;
        config.proxy.forwarded_for = forwarded_for;
        config.limits.address_connections_max = 1;
    };
    world.node_with(change).await
}

#[tokio::test]
async fn a_balancer_that_speaks_the_proxy_protocol_names_its_clients() -> Result<()> {
    let world = World::new().await?;
    let node = node(&world, true, false).await?;
    let mut open = Vec::new();
    // Each client has one connection, whichever version speaks for it.
    for (before, status) in [
        (v1("192.0.2.1"), 101),
        (v2([192, 0, 2, 1]), 429),
        (v2([192, 0, 2, 2]), 101),
        (v1("192.0.2.2"), 429),
        // Clients without an address do not share the balancer's, nor do its own health checks.
        (b"PROXY UNKNOWN\r\n".to_vec(), 101),
        (b"PROXY UNKNOWN\r\n".to_vec(), 101),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec(), 101),
    ] {
        let (stream, answer) = handshake(&node, BALANCER, &before, "").await?;
        let shown = before.escape_ascii();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{shown}: {answer}");
        open.push(stream);
    }
    assert_eq!(node.metric(LIMITS, "address_connections"), 2.0);
    assert_eq!(node.metric(LIMITS, "client_unknown"), 2.0);
    // Others have no say in it.
    let (_, answer) = handshake(&node, STRANGER, &v1("192.0.2.9"), "").await?;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let (_direct, answer) = handshake(&node, STRANGER, b"", "").await?;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    drop(open);
    eventually("the places are given back", async || {
        let (_, answer) = handshake(&node, BALANCER, &v1("192.0.2.1"), "").await?;
        Ok(answer.starts_with("HTTP/1.1 101 "))
    })
    .await
}

#[tokio::test]
async fn a_header_that_is_none_ends_the_connection_and_is_counted() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.proxy.trusted = vec!["127.0.0.0/8".into()];
            config.proxy.protocol = true;
            config.limits.handshake_timeout_ms = 500;
        })
        .await?;
    let mut long = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    long.extend(5000_u16.to_be_bytes());
    for (n, bytes) in [
        b"GET /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"PROXY TCP4 192.0.2.1\r\n".to_vec(),
        [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat(),
        long,
    ]
    .into_iter()
    .enumerate()
    {
        let answer = http(node.addresses["ws"], &bytes).await?;
        assert_eq!(answer, "", "{}", bytes.escape_ascii());
        assert_eq!(node.metric(HANDSHAKES, "proxy"), (n + 1) as f64);
    }
    // Nor does half a header hold a place for long; there is nobody to answer.
    let answer = http(node.addresses["ws"], b"PROXY TCP4 192.0").await?;
    assert_eq!(answer, "");
    assert_eq!(node.metric(HANDSHAKES, "timeout"), 1.0);
    Ok(())
}

#[tokio::test]
async fn forwarded_for_is_believed_of_balancers_only() -> Result<()> {
    let world = World::new().await?;
    let node = node(&world, false, true).await?;
    let mut open = Vec::new();
    for (from, headers, status) in [
        (BALANCER, "X-Forwarded-For: 192.0.2.1\r\n", 101),
        // Addresses invented by a client precede the one that the balancer saw.
        (BALANCER, "X-Forwarded-For: 1.2.3.4, 192.0.2.1\r\n", 429),
        (BALANCER, "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 192.0.2.1:99\r\n", 429),
        (BALANCER, "X-Forwarded-For: 192.0.2.2, 127.0.0.10\r\n", 101),
        // A client that is its own balancer.
        (STRANGER, "X-Forwarded-For: 192.0.2.50\r\n", 101),
        (STRANGER, "X-Forwarded-For: 192.0.2.51\r\n", 429),
    ] {
        let (stream, answer) = handshake(&node, from, b"", headers).await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{headers}: {answer}");
        open.push(stream);
    }
    Ok(())
}

#[tokio::test]
async fn hazard_146_a_balancer_that_names_nobody_lets_nobody_escape_the_limits() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.proxy.trusted = vec![format!("127.0.0.{BALANCER}")];
            config.proxy.forwarded_for = true;
            config.limits.address_refusals_max = 5;
        })
        .await?;
    for headers in ["", "X-Forwarded-For: junk\r\n", "X-Forwarded-For: 192.0.2.7, unknown\r\n"] {
        let (_, answer) = handshake(&node, BALANCER, b"", headers).await?;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{headers}: {answer}");
    }
    assert_eq!(node.metric(HANDSHAKES, "proxy"), 3.0);
    let ask = async |bytes: &[u8]| {
        let mut stream = socket_from(&node, BALANCER).await?;
        stream.write_all(bytes).await?;
        read_head(&mut stream).await
    };
    let health = ask(request("/", "").as_bytes()).await?;
    assert!(health.starts_with("HTTP/1.1 404 "), "a balancer's own check: {health}");
    // Many balancers append to the line of the client, whose bytes may be no text.
    let (before, after) =
        ("Sec-WebSocket-Protocol: barid.v1.json\r\nX-Forwarded-For: ", ", 192.0.2.7");
    let good = request("/v1/connect?token=x", &format!("{before}{after}\r\n"));
    let at = good.find(after).unwrap_or_default();
    let bytes = [&good.as_bytes()[..at], b"\xff", &good.as_bytes()[at..]].concat();
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(ask(&bytes).await?);
    }
    assert!(answers[0].starts_with("HTTP/1.1 401 "), "{}", answers[0]);
    assert!(answers.iter().any(|answer| answer.contains("refused too often")), "{}", answers[19]);
    Ok(())
}

#[tokio::test]
async fn behind_two_balancers_the_client_is_found() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.proxy.trusted = vec![format!("127.0.0.{BALANCER}"), "10.0.0.0/8".into()];
            config.proxy.protocol = true;
            config.proxy.forwarded_for = true;
            config.limits.address_connections_max = 1;
        })
        .await?;
    let inner = "X-Forwarded-For: 192.0.2.1\r\n";
    let (_one, answer) = handshake(&node, BALANCER, &v1("10.0.0.7"), inner).await?;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let (_two, answer) = handshake(&node, BALANCER, &v1("10.0.0.8"), inner).await?;
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    // A client that the outer one names is believed as little as any.
    let (_three, answer) = handshake(&node, BALANCER, &v1("192.0.2.77"), inner).await?;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    Ok(())
}
