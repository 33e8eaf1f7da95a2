//! Each limit: who is over it is told so with a code and is counted, who is not is not touched, and what
//! was taken is given back.

use std::time::{Duration, Instant};

use anyhow::Result;
use barid_core::Secret;
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::raw::*;
use barid_testkit::{Device, token};
use barid_wire::frames::Encoding;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::*;

const LIMITS: &str = "barid_access_limits_total";
const HANDSHAKES: &str = "barid_access_handshakes_total";
const CLOSES: &str = "barid_access_closes_total";
const JSON: &str = "Sec-WebSocket-Protocol: barid.v1.json\r\n";

/// A socket from one of this machine's addresses 127.0.0.x.
async fn socket_from(node: &Node, last: u8) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((std::net::Ipv4Addr::new(127, 0, 0, last), 0).into())?;
    Ok(socket.connect(node.addresses["ws"]).await?)
}

/// Sends a valid handshake from 127.0.0.`last`, and returns the open socket and the answer.
async fn handshake_from(node: &Node, last: u8, headers: &str) -> Result<(TcpStream, String)> {
    let mut stream = socket_from(node, last).await?;
    let path = format!("/v1/connect?token={}", token_of("alice"));
    let _ = stream.write_all(request(&path, &format!("{JSON}{headers}")).as_bytes()).await;
    let answer = read_head(&mut stream).await?;
    Ok((stream, answer))
}

/// The seconds of `Retry-After`.
fn retry_after(answer: &str) -> Option<u64> {
    let line = answer.lines().find_map(|line| line.strip_prefix("Retry-After: "))?;
    line.trim().parse().ok()
}

#[track_caller]
fn assert_refused(answer: &str, status: u16, text: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    assert!(body.contains(text), "{answer}");
    assert!(retry_after(answer).is_some_and(|seconds| (1..=60).contains(&seconds)), "{answer}");
}

#[tokio::test]
async fn handshakes_above_the_rate_of_the_node_get_503_and_later_ones_are_welcome() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.handshakes_per_second = 2;
            config.limits.handshakes_burst_seconds = 2;
        })
        .await?;
    let begun = Instant::now();
    let mut open = Vec::new();
    let mut refused = 0;
    for n in 0..12 {
        // Regardless of the user.
        let (stream, answer) = handshake_from(&node, 1 + n, "").await?;
        if answer.starts_with("HTTP/1.1 101") {
            open.push(stream);
        } else {
            assert_refused(&answer, 503, "too many handshakes a second");
            refused += 1;
        }
    }
    let most = 4 + (begun.elapsed().as_secs_f64() * 2.0).ceil() as usize;
    assert!((4..=most).contains(&open.len()), "{} of at most {most}", open.len());
    assert_eq!(node.metric(LIMITS, "handshake_rate"), f64::from(refused));
    assert_eq!(node.metric(HANDSHAKES, "overloaded"), f64::from(refused));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (_, answer) = handshake_from(&node, 1, "").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn an_address_has_so_many_connections_and_others_have_theirs() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.address_connections_max = 3).await?;
    let mut open = Vec::new();
    for _ in 0..3 {
        let (stream, answer) = handshake_from(&node, 2, "").await?;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        open.push(stream);
    }
    let (_, answer) = handshake_from(&node, 2, "").await?;
    assert_refused(&answer, 429, "too many connections");
    assert_eq!(node.metric(LIMITS, "address_connections"), 1.0);
    assert_eq!(node.metric(HANDSHAKES, "limited"), 1.0);
    let (_, answer) = handshake_from(&node, 3, "").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "another address: {answer}");
    open.pop();
    eventually("the place is given back", async || {
        Ok(handshake_from(&node, 2, "").await?.1.starts_with("HTTP/1.1 101"))
    })
    .await?;
    // Nothing is remembered of addresses that are gone.
    drop(open);
    eventually("no address is remembered", async || {
        Ok(node.metric("barid_access_addresses", "") == 0.0)
    })
    .await
}

#[tokio::test]
async fn an_address_that_connects_too_often_waits_and_is_told_how_long() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.address_handshakes_per_second = 1;
            config.limits.handshakes_burst_seconds = 3;
        })
        .await?;
    let mut refused = None;
    for _ in 0..8 {
        // Bad tokens count as well.
        let mut stream = socket_from(&node, 4).await?;
        let _ = stream.write_all(request("/v1/connect", JSON).as_bytes()).await;
        let answer = read_head(&mut stream).await?;
        if answer.starts_with("HTTP/1.1 429") {
            refused = Some(answer);
            break;
        }
        assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    }
    let refused = refused.unwrap_or_default();
    assert_refused(&refused, 429, "connects too often");
    assert_eq!(node.metric(LIMITS, "address_rate"), 1.0);
    assert!(handshake_from(&node, 5, "").await?.1.starts_with("HTTP/1.1 101"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (_, answer) = handshake_from(&node, 4, "").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn slow_handshakes_of_one_address_leave_room_for_those_of_others() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.handshakes_max = 8;
            config.limits.address_handshakes_max = 4;
            config.limits.handshake_timeout_ms = 2000;
        })
        .await?;
    // As many as there are places, each with half a request.
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut stream = socket_from(&node, 6).await?;
        stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await?;
        slow.push(stream);
    }
    eventually("four are turned away", async || {
        Ok(node.metric(LIMITS, "address_handshakes") == 4.0)
    })
    .await?;
    let (_, answer) = handshake_from(&node, 7, "").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    let mut answers = Vec::new();
    for stream in &mut slow {
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        answers.push(String::from_utf8_lossy(&head[9..]).into_owned());
    }
    answers.sort();
    assert_eq!(answers, ["408", "408", "408", "408", "429", "429", "429", "429"]);
    drop(slow);
    eventually("the places are given back", async || {
        Ok(handshake_from(&node, 6, "").await?.1.starts_with("HTTP/1.1 101"))
    })
    .await
}

#[tokio::test]
async fn who_cannot_even_be_told_is_hung_up_on() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.connections_max = 1;
            config.limits.handshakes_max = 2;
            config.limits.close_timeout_ms = 15_000;
        })
        .await?;
    let _only = node.device("alice", "phone").await?;
    let mut sockets = Vec::new();
    for _ in 0..20 {
        sockets.push(TcpStream::connect(node.addresses["ws"]).await?);
    }
    eventually("18 are hung up on", async || Ok(node.metric(LIMITS, "turned_away") == 18.0))
        .await?;
    assert_eq!(node.metric(LIMITS, "connections"), 20.0);
    assert_eq!(node.metric(HANDSHAKES, "overloaded"), 20.0);
    let mut told = 0;
    for mut socket in sockets {
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        told += usize::from(answer.starts_with(b"HTTP/1.1 503"));
    }
    assert_eq!(told, 2);
    Ok(())
}

#[tokio::test]
async fn a_user_has_so_many_devices_here_and_may_always_come_back_with_one() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.user_connections_max = 2).await?;
    let mut phone = node.device("alice", "phone").await?;
    let mut tablet = node.device("alice", "tablet").await?;
    let mut third = Device::open(&node.url(), &token_of("alice")).await?;
    third.send(&json!({ "hello": { "device": "watch" } })).await?;
    assert_eq!(third.closed(PATIENCE).await?, 4504);
    assert_eq!(node.metric(LIMITS, "user_connections"), 1.0);
    assert_eq!(node.metric(CLOSES, "limit"), 1.0);
    let _bob = node.device("bob", "watch").await?;
    // A device whose old connection is not known to be dead replaces it.
    let again = node.device("alice", "phone").await?;
    assert_eq!(phone.closed(PATIENCE).await?, 4502);
    // The refused ones used no tokens.
    let (entry, _) = world.accept("alice", "m1").await?;
    node.dispatcher().await?.push(&world, "alice", entry).await?;
    assert_eq!(tablet.receive(1).await?, ["m1"]);
    again.close().await?;
    world.routes_become("alice", 1).await?;
    let _watch = node.device("alice", "watch").await?;
    Ok(())
}

#[tokio::test]
async fn hazard_81_a_refused_hello_far_ahead_enters_once() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.user_connections_max = 1).await?;
    let _phone = node.device("alice", "phone").await?;
    let mut tablet = Device::open(&node.url(), &token_of("alice")).await?;
    let hello = json!({ "device": "tablet", "attempt": (1_u64 << 53) - 1 });
    tablet.send(&json!({ "hello": hello })).await?;
    assert_eq!(tablet.closed(PATIENCE).await?, 4504);
    assert_eq!(node.metric(LIMITS, "attempt_ahead"), 1.0);
    assert_eq!(node.metric(LIMITS, "user_connections"), 1.0);
    Ok(())
}

#[tokio::test]
async fn an_app_has_so_many_connections_and_others_have_theirs() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.app_connections_max = 2).await?;
    let one = node.device("alice", "phone").await?;
    let _two = node.device("bob", "phone").await?;
    let (_, answer) = handshake_from(&node, 1, "").await?;
    assert_refused(&answer, 429, "the app has too many connections");
    assert_eq!(node.metric(LIMITS, "app_connections"), 1.0);
    let shop = token::token("shop", "alice", Duration::from_secs(3600));
    let _theirs = Device::connect(&node.url(), &shop, "phone").await?;
    one.close().await?;
    eventually("the place is given back", async || {
        Ok(handshake_from(&node, 1, "").await?.1.starts_with("HTTP/1.1 101"))
    })
    .await
}

#[tokio::test]
async fn a_device_that_sends_too_much_is_closed_with_4504_and_harms_nobody() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.upstream_frames_per_second = 20;
            config.limits.upstream_bytes_per_second = 20_000;
            config.limits.upstream_burst_seconds = 2;
            config.limits.frame_bytes_max = 16_000;
        })
        .await?;
    let mut healthy = node.device("bob", "phone").await?;
    let open = async |hello: &str| {
        let mut raw = Raw::open(node.addresses["ws"], Encoding::Json, &token_of("alice")).await?;
        raw.send(&frame(TEXT, format!(r#"{{"hello":{{"device":"{hello}"}}}}"#))).await;
        raw.welcomed().await?;
        anyhow::Ok(raw)
    };
    // A burst within the limit is fine, and so is the same again after a while.
    let mut calm = open("calm").await?;
    for _ in 0..30 {
        calm.send(&frame(TEXT, r#"{"pong":{}}"#)).await;
    }
    // Acks, and control frames, which cost the node as much.
    for (device, bytes) in
        [("acks", frame(TEXT, r#"{"ack":{"seq":0}}"#)), ("pings", frame(PING, ""))]
    {
        let before = node.metric(LIMITS, "upstream_frames");
        let mut flood = open(device).await?;
        flood.send(&bytes.repeat(60)).await;
        let ended = flood.ended().await?;
        assert_eq!((ended.code, ended.text.contains("limit of frames")), (4504, true), "{ended:?}");
        assert_eq!(node.metric(LIMITS, "upstream_frames"), before + 1.0, "{device}");
    }
    // Few frames, many bytes.
    let mut large = open("large").await?;
    let padded = format!(r#"{{"pong":{{}}{}}}"#, " ".repeat(15_000));
    for _ in 0..4 {
        large.send(&frame(TEXT, &padded)).await;
    }
    let ended = large.ended().await?;
    assert_eq!((ended.code, ended.text.contains("limit of bytes")), (4504, true), "{ended:?}");
    assert_eq!(node.metric(LIMITS, "upstream_bytes"), 1.0);
    // One frame too large.
    let mut huge = open("huge").await?;
    huge.send(&announced(TEXT, 16_001)).await;
    assert_eq!(huge.ended().await?.code, 4501);
    assert_eq!(node.metric(LIMITS, "frame_bytes"), 1.0);

    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..15 {
        calm.send(&frame(TEXT, r#"{"pong":{}}"#)).await;
    }
    let (entry, _) = world.accept("bob", "m1").await?;
    node.dispatcher().await?.push(&world, "bob", entry).await?;
    assert_eq!(healthy.receive(1).await?, ["m1"]);
    assert_eq!(node.metric(CLOSES, "limit"), 3.0, "the calm one is still here");
    Ok(())
}

#[tokio::test]
async fn pages_of_other_origins_get_403_whatever_their_token() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| config.auth.origins = vec!["https://*.example.com".into()])
        .await?;
    for (headers, status) in [
        ("Origin: https://app.example.com\r\n", 101),
        ("", 101),
        ("Origin: https://example.com.evil.net\r\n", 403),
        ("Origin: null\r\n", 403),
        ("Origin: \u{e4}\r\n", 403),
        ("Origin: https://app.example.com\r\nOrigin: https://app.example.com\r\n", 400),
    ] {
        let (_, answer) = handshake_from(&node, 1, headers).await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{headers}{answer}");
    }
    assert_eq!(node.metric(HANDSHAKES, "forbidden"), 3.0);
    // It is not told whether the token would have been good.
    let bad = request("/v1/connect?token=x", &format!("{JSON}Origin: https://evil.net\r\n"));
    let answer = http(node.addresses["ws"], bad.as_bytes()).await?;
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("origin"), "{answer}");
    assert_eq!(node.metric("barid_access_tokens_refused_total", ""), 0.0);
    Ok(())
}

#[test]
fn limits_that_make_no_sense_refuse_to_start() {
    use barid_access::{Access, Config};
    use barid_runtime::Role as _;
    let error = |change: fn(&mut Config)| {
        let mut config = Config::default();
        config.auth.keys = vec![barid_access::config::KeyConfig {
            secret: Secret::new(token::SECRET),
            ..Default::default()
        }];
        assert_eq!(Access::check(&config), Ok(()));
        change(&mut config);
        Access::check(&config).unwrap_err()
    };
    let text = error(|config| config.limits.upstream_bytes_per_second = 1000);
    assert!(text.starts_with("limits.frame_bytes_max must be at most"), "{text}");
    let text = error(|config| config.limits.node_queued_bytes_max = 1000);
    assert_eq!(text, "limits.node_queued_bytes_max must be at least queued_bytes_max");
    let text = error(|config| config.limits.handshakes_burst_seconds = 601);
    assert_eq!(text, "limits.handshakes_burst_seconds: 601 is out of range; write 1 to 600 s");
    let text = error(|config| config.auth.origins = vec!["example.com".into()]);
    assert!(text.starts_with("auth.origins: \"example.com\" is not"), "{text}");
}

#[tokio::test]
async fn hazard_124_a_flood_of_new_users_of_one_app_leaves_room_for_all_others() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.app_new_users_per_second = 5;
            config.limits.handshakes_burst_seconds = 2;
        })
        .await?;
    let enter = async |app: &str, user: String| {
        let token = token::token(app, &user, Duration::from_secs(600));
        let hello = json!({ "device": "phone", "attempt": barid_testkit::device::next_attempt() });
        let mut device = Device::open(&node.url(), &token).await?;
        device.send(&json!({ "hello": hello })).await?;
        device.next(PATIENCE).await
    };
    let is_in = |answer: &Incoming| matches!(answer, Incoming::Welcome(_));
    for n in 0..5 {
        assert!(is_in(&enter("flood", format!("known{n}")).await?));
    }
    let begun = Instant::now();
    let (mut created, mut refused) = (0, 0);
    for n in 0..150 {
        match enter("flood", format!("new{n}")).await? {
            Incoming::Welcome(_) => created += 1,
            Incoming::Other(kind, error) => {
                assert_eq!((kind.as_str(), &error["code"]), ("error", &json!(4005)), "{error}");
                assert_eq!(error["text"], "the app has too many new users: come back later");
                refused += 1;
                let stranger = user_of("flood", &format!("new{n}"));
                assert_eq!(world.mailbox.inspect(&stranger).await?.epoch.0, 0, "it left a mailbox");
            }
            other => panic!("{other:?}"),
        }
        if n % 5 == 0 {
            // The app's own known users, again and again, and another app's new ones.
            assert!(is_in(&enter("flood", format!("known{}", n / 5 % 5)).await?), "{n}");
        }
        if n % 15 == 0 {
            assert!(is_in(&enter("other", format!("new{n}")).await?), "{n}");
        }
    }
    let most = 10.0 + 5.0 * begun.elapsed().as_secs_f64() + 1.0;
    assert!(f64::from(created) <= most && refused > 50, "{created} created, {refused} refused");
    assert_eq!(node.metric(LIMITS, "app_new_users"), f64::from(refused));
    // Later the same users are welcome.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(is_in(&enter("flood", "new149".into()).await?));
    Ok(())
}

#[tokio::test]
async fn hazard_125_known_users_take_nothing_from_the_new_ones() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.app_new_users_per_second = 1;
            config.limits.handshakes_burst_seconds = 3;
        })
        .await?;
    let _first = node.device("alice", "phone").await?;
    // A mass of reconnects, all at once.
    let entering = (0..60).map(|n| node.device("alice", ["phone", "tablet", "watch"][n % 3]));
    let entered = futures::future::join_all(entering).await;
    assert!(entered.iter().filter(|entered| entered.is_ok()).count() > 3);
    // While their connects are under way, too.
    let _paused: String = world.redis.query(&["CLIENT", "PAUSE", "1500", "ALL"]).await?;
    let known = (0..6).map(|n| node.device("alice", ["phone", "tablet", "watch"][n % 3]));
    let known = futures::future::join_all(known);
    let new = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        node.device("bob", "phone").await
    };
    let (_known, second) = tokio::join!(known, new);
    let _second = second?;
    let _third = node.device("carol", "phone").await?;
    assert_eq!(node.metric(LIMITS, "app_new_users"), 0.0);
    Ok(())
}
