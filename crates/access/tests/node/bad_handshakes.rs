//! Handshakes that are none: each gets a status and a reason, and is counted.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::Device;
use barid_testkit::device::PATIENCE;
use barid_testkit::raw::*;
use futures::FutureExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::*;

const JSON: &str = "Sec-WebSocket-Protocol: barid.v1.json\r\n";

/// Bytes sent, status, a part of the reason, label of the counter.
type Bad = (Vec<u8>, u16, &'static str, &'static str);

fn table(token: &str) -> Vec<Bad> {
    let path = format!("/v1/connect?token={token}");
    let good = request(&path, JSON);
    let plain = |text: &str| text.as_bytes().to_vec();
    let without = |header: &str| {
        let lines = good.split_inclusive("\r\n");
        lines.filter(|line| !line.starts_with(header)).collect::<String>().into_bytes()
    };
    let with = |headers: &str| request(&path, &format!("{JSON}{headers}")).into_bytes();
    let instead = |old: &str, new: &str| good.replace(old, new).into_bytes();
    let many: String = (0..200).map(|n| format!("X-{n}: y\r\n")).collect();
    let tls = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 200]].concat();
    vec![
        (request("/", JSON).into(), 404, "/v1/connect", "not_found"),
        (request("/v1/connect/", JSON).into(), 404, "/v1/connect", "not_found"),
        (request("/v1/%63onnect", JSON).into(), 404, "/v1/connect", "not_found"),
        (instead("GET", "POST"), 405, "with GET", "method"),
        (instead("GET", "CONNECT"), 405, "with GET", "method"),
        (instead("GET", "get"), 400, "not an HTTP request", "bad_request"),
        (instead("HTTP/1.1", "HTTP/1.0"), 505, "HTTP/1.1", "version"),
        (instead("HTTP/1.1", "HTTP/9.9"), 400, "version", "bad_request"),
        (instead("HTTP/1.1", ""), 400, "", "bad_request"),
        (plain("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505, "not HTTP/2", "version"),
        (tls, 400, "plain HTTP", "bad_request"),
        (plain("nonsense\r\n\r\n"), 400, "not an HTTP request", "bad_request"),
        (plain("NONSENSE\r\n\r\n"), 400, "", "bad_request"),
        (vec![0; 64], 400, "not an HTTP request", "bad_request"),
        (vec![0xff; 64], 400, "not an HTTP request", "bad_request"),
        (without("Upgrade"), 426, "Upgrade: websocket", "upgrade"),
        (without("Connection"), 426, "Connection: upgrade", "upgrade"),
        (without("Sec-WebSocket-Version"), 426, "Version: 13", "upgrade"),
        (instead("Version: 13", "Version: 8"), 426, "Version: 13", "upgrade"),
        (without("Sec-WebSocket-Key"), 400, "Sec-WebSocket-Key", "bad_request"),
        (instead("dGhlIHNhbXBsZSBub25jZQ==", "short"), 400, "Sec-WebSocket-Key", "bad_request"),
        (without("Sec-WebSocket-Protocol"), 400, "barid.v1.json", "subprotocol"),
        (instead("barid.v1.json", "barid.v9.json"), 400, "barid.v1.json", "subprotocol"),
        (instead("barid.v1.json", "BARID.V1.JSON"), 400, "barid.v1.json", "subprotocol"),
        (with("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"), 400, "repeated", "bad_request"),
        (with("Host: y\r\n"), 400, "host is repeated", "bad_request"),
        (without("Host"), 400, "host is missing", "bad_request"),
        (instead("Host: x", "Host: x/y"), 400, "host is missing or malformed", "bad_request"),
        (plain("GET / HTTP/1.1\r\n\r\n"), 400, "host is missing", "bad_request"),
        (
            with("Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
            400,
            "authorization is repeated",
            "bad_request",
        ),
        (with("Content-Length: 5\r\n"), 400, "no body", "bad_request"),
        (with("Content-Length: 0\r\nContent-Length: 5\r\n"), 400, "no body", "bad_request"),
        (request(&format!("{path}&token=x"), JSON).into(), 400, "token is repeated", "bad_request"),
        (with("Sec-WebSocket-Version: 13\r\n"), 400, "version is repeated", "bad_request"),
        (with("Origin: a\r\nOrigin: b\r\n"), 400, "origin is repeated", "bad_request"),
        (with("Transfer-Encoding: chunked\r\n"), 400, "no body", "bad_request"),
        (with("X\0Y: z\r\n"), 400, "header name", "bad_request"),
        (with("X: a\0b\r\n"), 400, "header value", "bad_request"),
        (with("no colon\r\n"), 400, "", "bad_request"),
        (with(" folded: x\r\n"), 400, "", "bad_request"),
        (instead("/v1/connect?", "/v1/connect\0?"), 400, "", "bad_request"),
        (with(&many), 431, "too many headers", "headers"),
        (with(&format!("X: {}\r\n", "x".repeat(20_000))), 431, "16384 bytes", "headers"),
        (format!("GET /{}", "x".repeat(20_000)).into(), 431, "16384 bytes", "headers"),
        (request("/v1/connect", JSON).into(), 401, "no token", "unauthorized"),
        (
            request("/v1/connect", &format!("{JSON}Authorization: Basic YTpi\r\n")).into(),
            401,
            "no token",
            "unauthorized",
        ),
    ]
}

#[tokio::test]
async fn bad_handshakes_get_a_status_and_a_reason_and_harm_no_session() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let address = node.addresses["ws"];
    let mut healthy = node.device("bob", "phone").await?;
    let mut counted = std::collections::BTreeMap::new();
    let token = token_of("alice");
    for (bytes, status, text, label) in table(&token) {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
        let answer = http(address, &bytes).await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{shown}\n{answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        assert!(!body.trim().is_empty() && body.contains(text), "{shown}\n{answer}");
        assert!(!answer.contains(&token), "a token is never sent back");
        // hazard 52
        let kind = "\r\nContent-Type: text/plain; charset=utf-8\r\n";
        assert_eq!(head.matches(kind).count(), 1, "{shown}\n{answer}");
        for (of, beside) in [
            (401, "WWW-Authenticate: Bearer"),
            (405, "Allow: GET"),
            (426, "Sec-WebSocket-Version: 13"),
        ] {
            assert_eq!(head.contains(beside), status == of, "{answer}");
        }
        let count = counted.entry(label).or_insert(0.0);
        *count += 1.0;
        assert_eq!(node.metric("barid_access_handshakes_total", label), *count, "{shown}");
    }
    assert_eq!(node.metric("barid_access_handshakes_total", "accepted"), 1.0);
    let (entry, _) = world.accept("bob", "m1").await?;
    node.dispatcher().await?.push(&world, "bob", entry).await?;
    assert_eq!(healthy.receive(1).await?, ["m1"]);
    Ok(())
}

#[tokio::test]
async fn handshakes_with_a_token_in_any_of_three_places_are_welcome() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let token = token_of("alice");
    let bearer = format!("Authorization: bearer {token}\r\n");
    for (request, protocol) in [
        (request(&format!("/v1/connect?x=1&token={token}"), JSON), "barid.v1.json"),
        (
            request(
                "/v1/connect",
                &format!("{bearer}Sec-WebSocket-Protocol: x, barid.v1.proto\r\n"),
            ),
            "barid.v1.proto",
        ),
        (
            request(
                "/v1/connect",
                &format!("Sec-WebSocket-Protocol: barid.v1.json, bearer.{token}\r\n"),
            ),
            "barid.v1.json",
        ),
    ] {
        let answer = http(node.addresses["ws"], request.as_bytes()).await?;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        assert!(answer.to_lowercase().contains(&format!("protocol: {protocol}\r\n")), "{answer}");
        assert!(!answer.contains(&token), "a token is never sent back");
    }
    Ok(())
}

#[tokio::test]
async fn hazard_57_fields_that_may_be_repeated_are_joined_before_they_are_read() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let bearer = format!("Authorization: Bearer {}\r\n", token_of("alice"));
    let good = request("/v1/connect", &format!("{JSON}{bearer}"));
    let instead = |old: &str, new: &str| good.replacen(old, new, 1);
    for request in [
        instead("Connection: Upgrade\r\n", "Connection: keep-alive\r\nConnection: Upgrade\r\n"),
        instead("Connection: Upgrade\r\n", "connection: keep-alive\r\nCONNECTION: x, upgrade\r\n"),
        instead("Upgrade: websocket\r\n", "Upgrade: websocket\r\nConnection: close\r\n"),
        instead(JSON, &format!("Sec-WebSocket-Protocol: other\r\n{JSON}")),
        format!(
            "{}Sec-WebSocket-Extensions: a\r\nSec-WebSocket-Extensions: b\r\n\r\n",
            &good[..good.len() - 2]
        ),
    ] {
        let answer = http(node.addresses["ws"], request.as_bytes()).await?;
        assert!(answer.starts_with("HTTP/1.1 101"), "{request}{answer}");
    }
    Ok(())
}

#[tokio::test]
async fn slow_handshakes_and_silence_before_hello_end() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.handshake_timeout_ms = 1000;
            config.limits.hello_timeout_ms = 300;
            config.limits.handshakes_max = 1;
        })
        .await?;
    let mut slow = TcpStream::connect(node.addresses["ws"]).await?;
    // One byte now and then: the time is for the whole of it.
    let trickle = async {
        for byte in request("/v1/connect", JSON).bytes() {
            if slow.write_all(&[byte]).await.is_err() || slow_answered(&slow) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let others = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        http(node.addresses["ws"], b"GET / HTTP/1.1\r\n\r\n").await
    };
    let ((), answer) = tokio::join!(trickle, others);
    let answer = answer?;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("Retry-After"), "{answer}");
    let mut answer = vec![0; 500];
    let read = slow.read(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("in time"), "{answer}");
    assert_eq!(node.metric("barid_access_handshakes_total", "timeout"), 1.0);
    drop(slow);
    eventually("the next one has room", async || {
        let mute = Device::open(&node.url(), &token_of("alice")).await;
        Ok(mute?.closed(PATIENCE).await? == 4003)
    })
    .await
}

fn slow_answered(stream: &TcpStream) -> bool {
    stream.peek(&mut [0]).now_or_never().is_some_and(|peeked| peeked.is_ok_and(|bytes| bytes > 0))
}
