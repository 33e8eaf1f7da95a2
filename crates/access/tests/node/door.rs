//! Attacks on the devices' port by clients that never become sessions. Each runs beside honest clients, which are
//! served throughout.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use barid_core::CloseCode;
use barid_testkit::raw::*;
use barid_testkit::{Device, token};
use barid_wire::frames::{Encoding, ServerFrame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::*;

const LIMITS: &str = "barid_access_limits_total";
const HANDSHAKES: &str = "barid_access_handshakes_total";
const JSON: &str = "Sec-WebSocket-Protocol: barid.v1.json\r\n";

/// A socket from 127.0.0.`last`.
async fn socket_from(node: &Node, last: u8) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((std::net::Ipv4Addr::new(127, 0, 0, last), 0).into())?;
    Ok(socket.connect(node.addresses["ws"]).await?)
}

/// Sends a valid handshake from 127.0.0.`last`, and returns the open socket and the answer.
async fn handshake_from(node: &Node, last: u8, user: &str) -> Result<(TcpStream, String)> {
    let mut stream = socket_from(node, last).await?;
    let path = format!("/v1/connect?token={}", token_of(user));
    let _ = stream.write_all(request(&path, JSON).as_bytes()).await;
    let answer = read_head(&mut stream).await?;
    Ok((stream, answer))
}

#[tokio::test]
async fn hazard_89_one_token_without_hello_takes_few_places() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut open = Vec::new();
    let mut refused = 0;
    for number in 0..300 {
        let (stream, answer) = handshake_from(&node, 2, "mallory").await?;
        if answer.starts_with("HTTP/1.1 101") {
            open.push(stream);
        } else {
            assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
            assert!(answer.contains("of this user") && answer.contains("Retry-After"), "{answer}");
            refused += 1;
        }
        if number % 100 == 0 {
            node.device("alice", &format!("phone{number}")).await?.close().await?;
        }
    }
    assert_eq!((open.len(), refused), (32, 268));
    assert_eq!(node.metric(LIMITS, "user_unidentified"), 268.0);
    eventually("counted", async || Ok(node.metric("barid_access_unidentified", "") == 32.0))
        .await?;
    // A place is free once its connection has gone or has said Hello.
    open.truncate(30);
    eventually("places are given back", async || Ok(node.device("mallory", "phone").await.is_ok()))
        .await?;
    for n in 0..40 {
        node.device("bob", &format!("phone{}", n % 4)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn hazard_89_many_users_of_one_address_without_hello_leave_room_for_others() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.unidentified_max = 40;
            config.limits.address_unidentified_max = 0;
            config.limits.hello_timeout_min_ms = 1_000;
        })
        .await?;
    let mut silent = Vec::new();
    for number in 0..40 {
        silent.push(handshake_from(&node, 2, &format!("m{number}")).await?.0);
    }
    // Another address gets in at once, in place of the attacker's oldest connection.
    let (_honest, answer) = handshake_from(&node, 3, "alice").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    assert_eq!(node.metric(LIMITS, "evicted"), 1.0);
    let begun = Instant::now();
    eventually("their time is short", async || {
        Ok(node.metric("barid_access_closes_total", "overloaded") >= 15.0)
    })
    .await?;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(silent);
    Ok(())
}

#[tokio::test]
async fn hazard_90_half_requests_of_two_addresses_keep_nobody_out() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut held = Vec::new();
    for last in [2, 3] {
        for _ in 0..512 {
            let mut stream = socket_from(&node, last).await?;
            let _ = stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await;
            held.push(stream);
        }
    }
    for attempt in 0..60 {
        let (_stream, answer) = handshake_from(&node, 1, &format!("u{attempt}")).await?;
        assert!(answer.starts_with("HTTP/1.1 101"), "{attempt}: {answer}");
    }
    assert_eq!(node.metric(LIMITS, "address_handshakes"), 768.0, "each had 128");
    drop(held);
    Ok(())
}

#[tokio::test]
async fn hazard_90_an_honest_client_gets_the_place_of_a_greedy_network() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.handshakes_max = 32;
            config.limits.address_handshakes_max = 0;
            config.limits.network_handshakes_max = 0;
            config.limits.first_byte_timeout_ms = 1_000;
        })
        .await?;
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let address = node.addresses["ws"];
    // Both take each place that is free, again and again.
    let attacks = [2_u8, 3].map(|last| {
        let mut stopped = stopped.clone();
        tokio::spawn(async move {
            let mut held = std::collections::VecDeque::new();
            while !*stopped.borrow_and_update() {
                let socket = TcpSocket::new_v4().unwrap();
                socket.bind((std::net::Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
                if let Ok(mut stream) = socket.connect(address).await {
                    let _ = stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await;
                    held.push_back(stream);
                }
                if held.len() > 200 {
                    held.pop_front();
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut in_at_once = 0;
    for attempt in 0..100 {
        let (_stream, answer) = handshake_from(&node, 1, &format!("u{attempt}")).await?;
        in_at_once += usize::from(answer.starts_with("HTTP/1.1 101"));
    }
    assert!(in_at_once >= 98, "{in_at_once} of 100");
    assert!(node.metric(LIMITS, "evicted") > 0.0);
    assert!(node.metric(LIMITS, "handshakes") > 0.0, "the attackers were refused");
    stop.send_replace(true);
    stopped.mark_unchanged();
    for attack in attacks {
        attack.await?;
    }
    Ok(())
}

#[tokio::test]
async fn hazard_90_half_requests_of_more_addresses_than_places_keep_nobody_out() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.handshakes_max = 32).await?;
    let address = node.addresses["ws"];
    // No address holds more than an honest client, and all places are taken all the time.
    let attack = tokio::spawn(async move {
        let mut held = std::collections::VecDeque::new();
        for last in (1..=200_u8).cycle() {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((std::net::Ipv4Addr::new(127, 0, 1, last), 0).into()).unwrap();
            if let Ok(mut stream) = socket.connect(address).await {
                let _ = stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await;
                held.push_back(stream);
            }
            if held.len() > 200 {
                held.pop_front();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    eventually("all places are taken", async || Ok(node.metric(LIMITS, "evicted") > 0.0)).await?;
    for attempt in 0..50 {
        let (_stream, answer) = handshake_from(&node, 1, &format!("u{attempt}")).await?;
        assert!(answer.starts_with("HTTP/1.1 101"), "{attempt}: {answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    attack.abort();
    Ok(())
}

#[tokio::test]
async fn hazard_90_a_client_behind_the_address_of_an_attacker_gets_in_later() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.address_handshakes_max = 4;
            config.limits.first_byte_timeout_ms = 500;
        })
        .await?;
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = socket_from(&node, 2).await?;
        stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await?;
        held.push(stream);
    }
    eventually("the attacker's oldest one goes", async || {
        Ok(handshake_from(&node, 2, "alice").await?.1.starts_with("HTTP/1.1 101"))
    })
    .await?;
    let mut answer = String::new();
    held[0].read_to_string(&mut answer).await?;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert_eq!(node.metric(HANDSHAKES, "evicted"), 1.0);
    Ok(())
}

#[tokio::test]
async fn hazard_90_the_first_byte_has_less_time_than_the_request() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.first_byte_timeout_ms = 300).await?;
    let begun = Instant::now();
    let mut silent = TcpStream::connect(node.addresses["ws"]).await?;
    let mut slow = TcpStream::connect(node.addresses["ws"]).await?;
    slow.write_all(b"GET").await?;
    let answer = read_head(&mut silent).await?;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    // The request still has its time.
    let path = format!("/v1/connect?token={}", token_of("alice"));
    slow.write_all(&request(&path, JSON).as_bytes()[3..]).await?;
    let answer = read_head(&mut slow).await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    let mut phone = Device::connect(&node.url(), &token_of("bob"), "phone").await?;
    phone.expect_silence(Duration::from_millis(500)).await?;
    Ok(())
}

/// Sends `attack` again and again until the node closes the connection. Returns the close, and the bytes that were sent.
async fn flood(raw: Raw, attack: Vec<u8>) -> Result<(Ended, usize)> {
    let (raw, mut writer) = raw.with_writer()?;
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let writing = tokio::spawn(async move {
        while writer.write_all(&attack).await.is_ok() {
            counted.fetch_add(attack.len(), Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let ended = raw.ended().await;
    writing.abort();
    Ok((ended?, sent.load(Ordering::SeqCst)))
}

/// A connection, after Welcome if `hello`. Each has a device of its own.
async fn opened(node: &Node, hello: bool) -> Result<Raw> {
    static DEVICES: AtomicUsize = AtomicUsize::new(0);
    let mut raw = Raw::open(node.addresses["ws"], Encoding::Json, &token_of("mallory")).await?;
    if hello {
        let device = DEVICES.fetch_add(1, Ordering::SeqCst);
        raw.send(&frame(TEXT, format!(r#"{{"hello":{{"device":"d{device}"}}}}"#))).await;
        raw.welcomed().await?;
    }
    Ok(raw)
}

/// Runs attacks, each with a text of the close, while bob receives a push between any two of them.
async fn attack(
    world: &World,
    node: &Node,
    attacks: Vec<(&str, Raw, Vec<u8>, u16, &str)>,
) -> Result<()> {
    let mut bob = node.device("bob", "phone").await?;
    let mut dispatcher = node.dispatcher().await?;
    for (name, raw, bytes, code, label) in attacks {
        let before = node.metric(LIMITS, label);
        let (ended, sent) = flood(raw, bytes).await?;
        assert_eq!(ended.code, code, "{name}: {ended:?}");
        assert!(sent < 2 << 20, "{name}: {sent} bytes were read");
        assert_eq!(node.metric(LIMITS, label), before + 1.0, "{name}");
        let (entry, _) = world.accept("bob", name).await?;
        dispatcher.push(world, "bob", entry).await?;
        assert_eq!(bob.receive(1).await?, [name]);
    }
    Ok(())
}

/// Empty fragments, and a pong, after which a device counts as alive.
fn empty_fragments() -> Vec<u8> {
    [frame(CONTINUATION - LAST, "").repeat(600), frame(PONG, "")].concat()
}

#[tokio::test]
async fn hazard_91_control_frames_and_empty_fragments_count_as_they_arrive() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.fragments_max = 1 << 20).await?;
    let mut attacks = Vec::new();
    for hello in [false, true] {
        let (name, other) = match hello {
            false => ("fragments before hello", "pings before hello"),
            true => ("fragments", "pings"),
        };
        let mut begun = opened(&node, hello).await?;
        begun.send(&frame(TEXT - LAST, "")).await;
        attacks.push((name, begun, empty_fragments(), 4504, "upstream_frames"));
        let pings = frame(PING, [b'x'; 9]).repeat(100);
        attacks.push((other, opened(&node, hello).await?, pings, 4504, "upstream_frames"));
    }
    attack(&world, &node, attacks).await
}

#[tokio::test]
async fn hazard_91_bytes_count_before_their_frame_is_complete() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.frame_bytes_max = 16_000;
            config.limits.upstream_bytes_per_second = 10_000;
            config.limits.upstream_burst_seconds = 2;
        })
        .await?;
    let padded = frame(TEXT, format!(r#"{{"pong":{{}}{}}}"#, " ".repeat(15_000)));
    let mut half = opened(&node, true).await?;
    half.send(&padded).await;
    half.send(&padded[..9_000]).await;
    let ended = half.ended().await?;
    assert_eq!((ended.code, ended.text.contains("limit of bytes")), (4504, true), "{ended:?}");
    assert_eq!(node.metric(LIMITS, "upstream_bytes"), 1.0);
    let pings = frame(PING, [b'x'; 125]).repeat(10);
    let attacks = vec![("pings", opened(&node, false).await?, pings, 4504, "upstream_bytes")];
    attack(&world, &node, attacks).await
}

#[tokio::test]
async fn hazard_91_a_message_has_so_many_fragments() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut attacks = Vec::new();
    for (hello, name) in [(false, "before hello"), (true, "after welcome")] {
        let mut begun = opened(&node, hello).await?;
        begun.send(&frame(TEXT - LAST, "")).await;
        attacks.push((name, begun, empty_fragments(), 4501, "fragments"));
    }
    attack(&world, &node, attacks).await?;
    // As many as are allowed are a message.
    let mut raw = opened(&node, false).await?;
    let hello = r#"{"hello":{"device":"phone"}}"#;
    raw.send(&frame(TEXT - LAST, "")).await;
    raw.send(&frame(CONTINUATION - LAST, "").repeat(254)).await;
    raw.send(&frame(CONTINUATION, hello)).await;
    raw.welcomed().await
}

/// How a page's handshake ends: a status, or frames and a close code.
async fn page(node: &Node, token: &str, query: &str, headers: &str) -> Result<(String, Ended)> {
    let mut stream = TcpStream::connect(node.addresses["ws"]).await?;
    let protocols = format!("Sec-WebSocket-Protocol: barid.v1.json, bearer.{token}\r\n");
    let path = format!("/v1/connect{query}");
    stream.write_all(request(&path, &format!("{protocols}{headers}")).as_bytes()).await?;
    let answer = read_head(&mut stream).await?;
    Ok((answer, Raw::upgraded(stream, Encoding::Json).ended().await?))
}

#[tokio::test]
async fn hazard_92_a_page_that_asks_for_it_is_refused_with_a_close_code() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.auth.origins = vec!["https://app.example.com".into()];
            config.limits.app_connections_max = 1;
        })
        .await?;
    let ours = "Origin: https://app.example.com\r\n";
    let shop = token::token("shop", "carol", Duration::from_secs(3600));
    let _carol = Device::connect(&node.url(), &shop, "phone").await?;
    let expired = token::token(APP, "alice", Duration::ZERO);
    let good = token_of("alice");
    for (token, headers, status, code, text) in [
        ("a.b.c", ours, "401", 4500, "not a valid token"),
        (&expired, ours, "401", 4004, "expired"),
        (&good, "Origin: https://evil.example.com\r\n", "403", 4505, "origin"),
        (&shop, ours, "429", 4005, "the app has too many"),
    ] {
        let (answer, ended) = page(&node, token, "?refuse=close", headers).await?;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        assert_eq!(ended.code, code, "{ended:?}");
        assert!(ended.text.contains(text), "{ended:?}");
        // Without the parameter it is a status, as before.
        let (answer, _) = page(&node, token, "?refuse=no", headers).await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        let word = CloseCode::from_code(code).unwrap().as_str();
        assert_eq!(node.metric("barid_access_closes_total", word), 1.0, "{word}");
    }
    assert_eq!(node.metric(HANDSHAKES, "unauthorized"), 4.0);
    // When to come back is in a frame before the close.
    let mut stream = TcpStream::connect(node.addresses["ws"]).await?;
    let asked =
        request("/v1/connect?refuse=close", &format!("{JSON}Authorization: Bearer {shop}\r\n"));
    stream.write_all(asked.as_bytes()).await?;
    read_head(&mut stream).await?;
    let mut raw = Raw::upgraded(stream, Encoding::Json);
    let (_, ServerFrame::GoAway(go_away)) = raw.next().await? else { panic!("no goAway") };
    assert_eq!(go_away.why, "overloaded");
    assert!((2_000..=4_000).contains(&go_away.reconnect_after_ms), "{go_away:?}");
    // A handshake that is none cannot be upgraded.
    let bad = request("/v1/connect?refuse=close", "").replace("Version: 13", "Version: 8");
    let answer = http(node.addresses["ws"], bad.as_bytes()).await?;
    assert!(answer.starts_with("HTTP/1.1 426 "), "{answer}");
    eventually("nothing is held", async || {
        Ok(node.metric("barid_access_unidentified", "") == 0.0
            && node.metric("barid_access_connections", "") == 1.0)
    })
    .await
}

#[tokio::test]
async fn hazard_92_refusals_by_close_are_bounded_as_connections_without_hello() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.unidentified_max = 4;
            config.limits.close_timeout_ms = 1_000;
        })
        .await?;
    let mut held = Vec::new();
    let mut answers = Vec::new();
    for _ in 0..8 {
        let mut stream = socket_from(&node, 2).await?;
        stream.write_all(request("/v1/connect?refuse=close&token=x", JSON).as_bytes()).await?;
        answers.push(read_head(&mut stream).await?);
        held.push(stream);
    }
    let upgraded = answers.iter().filter(|answer| answer.starts_with("HTTP/1.1 101")).count();
    let refused = answers.iter().filter(|answer| answer.starts_with("HTTP/1.1 401")).count();
    assert_eq!((upgraded, refused), (2, 6), "half of the places, so that nobody is evicted");
    eventually("the places are free", async || Ok(node.device("alice", "phone").await.is_ok()))
        .await
}

#[tokio::test]
async fn a_page_may_ask_for_the_nodes_with_a_header() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| config.auth.origins = vec!["https://app.example.com".into()])
        .await?;
    let ask = async |method: &str, path: &str, headers: &str| {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
        http(node.addresses["ws"], request.as_bytes()).await
    };
    let ours = "Origin: https://app.example.com\r\n";
    let allowed = "Access-Control-Allow-Origin: https://app.example.com\r\n";
    let preflight = format!(
        "{ours}Access-Control-Request-Method: GET\r\nAccess-Control-Request-Headers: authorization\r\n"
    );
    let answer = ask("OPTIONS", "/v1/nodes", &preflight).await?;
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    for line in [
        allowed,
        "Access-Control-Allow-Methods: GET\r\n",
        "Access-Control-Allow-Headers: Authorization\r\n",
    ] {
        assert!(answer.contains(line), "{answer}");
    }
    assert!(answer.ends_with("\r\n\r\n") && !answer.contains("Content-"), "no body: {answer}");
    assert_eq!(node.metric(HANDSHAKES, "preflight"), 1.0);
    let good = format!("{ours}Authorization: Bearer {}\r\n", token_of("alice"));
    let answer = ask("GET", "/v1/nodes", &good).await?;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(allowed), "{answer}");
    // A page can read why it is refused; one of another origin cannot.
    let answer = ask("GET", "/v1/nodes", ours).await?;
    assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains(allowed), "{answer}");
    let theirs = preflight.replace("app.", "evil.");
    let answer = ask("OPTIONS", "/v1/nodes", &theirs).await?;
    assert!(answer.starts_with("HTTP/1.1 403 ") && !answer.contains("Allow-Origin"), "{answer}");
    for path in ["/v1/connect", "/"] {
        let answer = ask("OPTIONS", path, ours).await?;
        let status = if path == "/" { "404" } else { "405" };
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    Ok(())
}

/// Sends a handshake with a bad token from 127.0.0.`last`. Returns the answer; empty if there was none.
async fn bad_token(node: &Node, last: u8) -> Result<String> {
    let mut stream = socket_from(node, last).await?;
    let _ = stream.write_all(request("/v1/connect?token=x", JSON).as_bytes()).await;
    read_head(&mut stream).await
}

#[tokio::test]
async fn hazard_93_an_address_that_is_refused_again_and_again_is_blocked() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.address_refusals_max = 20).await?;
    let blocked = || node.metric("barid_access_blocked_addresses", "");
    let mut answered = 0;
    while bad_token(&node, 2).await?.starts_with("HTTP/1.1 401 ") {
        answered += 1;
        assert!(answered < 30, "still answered");
    }
    assert!(answered > 20, "{answered}");
    // Others are served, and the address itself after a second.
    let (_alice, answer) = handshake_from(&node, 3, "alice").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let (_bob, answer) = handshake_from(&node, 2, "bob").await?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    // Next time for ten seconds.
    let begun = Instant::now();
    while !bad_token(&node, 2).await?.is_empty() {}
    eventually("an operator sees it", async || Ok(blocked() == 1.0)).await?;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(bad_token(&node, 2).await?, "");
    let before = node.metric(LIMITS, "blocked");
    for _ in 0..500 {
        bad_token(&node, 2).await?;
    }
    assert_eq!(node.metric(LIMITS, "blocked"), before + 500.0);
    assert_eq!(node.metric(HANDSHAKES, "blocked"), before + 500.0);
    eventually("it is over", async || {
        Ok(handshake_from(&node, 2, "carol").await?.1.starts_with("HTTP/1.1 101"))
    })
    .await?;
    assert!(begun.elapsed() >= Duration::from_secs(10), "{:?}", begun.elapsed());
    Ok(())
}

#[tokio::test]
async fn hazard_143_each_kind_of_malformed_request_blocks_its_address() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.address_refusals_max = 2).await?;
    let good = request("/v1/connect?token=x", JSON);
    let long = good.replace("Host: x", &format!("Host: x\r\nX: {}", "x".repeat(20_000)));
    for (last, (status, bytes)) in (20..).zip([
        (400, good.replace("Host: x\r\n", "")),
        (401, good.clone()),
        (404, request("/", JSON)),
        (405, good.replace("GET", "POST")),
        (426, good.replace("Version: 13", "Version: 8")),
        (431, long),
        (505, good.replace("HTTP/1.1", "HTTP/1.0")),
        (505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
    ]) {
        let mut answers = 0;
        loop {
            let mut stream = socket_from(&node, last).await?;
            let _ = stream.write_all(bytes.as_bytes()).await;
            let answer = read_head(&mut stream).await?;
            if answer.is_empty() {
                break;
            }
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            answers += 1;
            assert!(answers < 10, "{status} is never counted");
        }
        assert!(answers > 2, "{status}: blocked after {answers}");
    }
    Ok(())
}

#[tokio::test]
async fn hazard_93_violations_before_hello_count_and_a_balancer_is_never_blocked() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.address_refusals_max = 10;
            config.proxy.trusted = vec!["127.0.0.10".into()];
            config.proxy.protocol = true;
        })
        .await?;
    for _ in 0..30 {
        let Ok((stream, _)) = handshake_from(&node, 2, "mallory").await else { break };
        let mut raw = Raw::upgraded(stream, Encoding::Json);
        raw.send(&frame(TEXT, r#"{"ack":{"seq":1}}"#)).await;
        raw.ended().await?;
    }
    let (_, answer) = handshake_from(&node, 2, "mallory").await?;
    assert_eq!(answer, "", "blocked");
    // A client behind the balancer is blocked by its own address, the balancer is not.
    let through = async |client: &str| {
        let mut stream = socket_from(&node, 10).await?;
        let header = format!("PROXY TCP4 {client} 198.51.100.1 4711 443\r\n");
        let bytes = header + &request("/v1/connect?token=x", JSON);
        let _ = stream.write_all(bytes.as_bytes()).await;
        read_head(&mut stream).await
    };
    for _ in 0..40 {
        through("192.0.2.1").await?;
    }
    assert_eq!(through("192.0.2.1").await?, "", "blocked");
    assert!(through("192.0.2.2").await?.starts_with("HTTP/1.1 401 "));
    for _ in 0..40 {
        // The balancer speaks for itself.
        let mut stream = socket_from(&node, 10).await?;
        let bytes = format!("PROXY UNKNOWN\r\n{}", request("/v1/connect?token=x", JSON));
        let _ = stream.write_all(bytes.as_bytes()).await;
        assert!(read_head(&mut stream).await?.starts_with("HTTP/1.1 401 "));
    }
    Ok(())
}

#[tokio::test]
async fn hazard_95_without_a_key_set_a_node_is_not_ready_and_asks_to_come_back() -> Result<()> {
    let world = World::new().await?;
    let set = tempfile::NamedTempFile::new()?;
    let node = world
        .node_with(|config| {
            config.auth.jwks = vec![barid_access::config::JwksConfig {
                file: Some(set.path().into()),
                refresh_min_seconds: 0,
                ..Default::default()
            }];
            config.limits.address_refusals_max = 5;
        })
        .await?;
    let not_ready = || node.context.health.not_ready();
    eventually("it says so", async || {
        Ok(not_ready().iter().any(|(name, why)| *name == "keys" && why.contains("was not read")))
    })
    .await?;
    // Somebody else's key: the set may hold it. It costs the address nothing.
    let foreign = "eyJhbGciOiJFZERTQSIsImtpZCI6ImsifQ.e30.c2ln";
    for _ in 0..20 {
        let bytes = request(&format!("/v1/connect?token={foreign}"), JSON);
        let answer = http(node.addresses["ws"], bytes.as_bytes()).await?;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After"), "{answer}");
    }
    assert_eq!(node.metric(HANDSHAKES, "no_keys"), 20.0);
    let (_, ended) = page(&node, foreign, "?refuse=close", "").await?;
    assert_eq!(ended.code, 4005, "{ended:?}");
    // Tokens of configured keys are good all along.
    let _alice = node.device("alice", "phone").await?;
    std::fs::write(set.path(), r#"{"keys":[]}"#)?;
    eventually("it is ready", async || Ok(not_ready().is_empty())).await?;
    let bytes = request(&format!("/v1/connect?token={foreign}"), JSON);
    let answer = http(node.addresses["ws"], bytes.as_bytes()).await?;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    Ok(())
}

#[tokio::test]
async fn hazard_102_half_requests_of_an_attacker_do_not_put_off_his_block() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.address_refusals_max = 20).await?;
    let mut half = Vec::new();
    for _ in 0..100 {
        let mut stream = socket_from(&node, 2).await?;
        stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await?;
        half.push(stream);
    }
    // Those that are upgraded and say no Hello do not, either.
    for _ in 0..20 {
        half.push(handshake_from(&node, 2, "mallory").await?.0);
    }
    let mut answered = 0;
    while bad_token(&node, 2).await?.starts_with("HTTP/1.1 401 ") {
        answered += 1;
        assert!(answered < 30, "still answered");
    }
    // An address with sessions has as many refusals more.
    let mut sessions = Vec::new();
    for n in 0..20 {
        let mut raw =
            Raw::upgraded(handshake_from(&node, 3, &format!("u{n}")).await?.0, Encoding::Json);
        raw.send(&frame(TEXT, r#"{"hello":{"device":"phone"}}"#)).await;
        raw.welcomed().await?;
        sessions.push(raw);
    }
    let mut answered = 0;
    while bad_token(&node, 3).await?.starts_with("HTTP/1.1 401 ") {
        answered += 1;
    }
    assert!((40..50).contains(&answered), "{answered}");
    Ok(())
}

#[tokio::test]
async fn hazard_141_half_requests_that_displace_each_other_are_not_blocked() -> Result<()> {
    let world = World::new().await?;
    let mut held = Vec::new();
    // A carrier's phones that all return at once do the same, in the share of their address or of the node.
    for of_address in [true, false] {
        let node = world
            .node_with(|config| {
                match of_address {
                    true => config.limits.address_handshakes_max = 1,
                    false => config.limits.handshakes_max = 1,
                }
                config.limits.first_byte_timeout_ms = 1_000;
                config.limits.address_refusals_max = 1;
            })
            .await?;
        for displaced in 0..4 {
            let mut stream = socket_from(&node, 2).await?;
            stream.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await?;
            held.push(stream);
            eventually("the one before was displaced", async || {
                Ok(node.metric(HANDSHAKES, "evicted") == f64::from(displaced))
            })
            .await?;
            tokio::time::sleep(Duration::from_millis(1_100)).await;
        }
        assert_eq!(node.metric(HANDSHAKES, "blocked"), 0.0);
    }
    Ok(())
}

#[tokio::test]
async fn hazard_108_a_whole_request_that_waits_for_keys_and_gives_way_may_come_back() -> Result<()>
{
    let world = World::new().await?;
    // It accepts connections and never answers.
    let keys = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/keys", keys.local_addr()?);
    let node = world
        .node_with(|config| {
            config.auth.jwks = vec![barid_access::config::JwksConfig {
                url: barid_runtime::SecretUrl::new(url),
                insecure_http: true,
                refresh_min_seconds: 0,
                timeout_ms: 4_000,
                ..Default::default()
            }];
            config.limits.handshakes_max = 1;
            config.limits.first_byte_timeout_ms = 100;
            config.limits.address_refusals_max = 1;
        })
        .await?;
    let foreign = "eyJhbGciOiJFZERTQSIsImtpZCI6ImsifQ.e30.c2ln";
    for _ in 0..3 {
        let mut waiting = socket_from(&node, 2).await?;
        let bytes = request(&format!("/v1/connect?token={foreign}"), JSON);
        waiting.write_all(bytes.as_bytes()).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (_alice, welcome) = handshake_from(&node, 3, "alice").await?;
        assert!(welcome.starts_with("HTTP/1.1 101"), "{welcome}");
        let answer = read_head(&mut waiting).await?;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After"), "{answer}");
    }
    assert_eq!((node.metric(LIMITS, "evicted"), node.metric(HANDSHAKES, "evicted")), (3.0, 3.0));
    // A page that asks for close codes gets one.
    let waiting = page(&node, foreign, "?refuse=close", "");
    let newcomer = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        handshake_from(&node, 3, "alice").await
    };
    let (refused, newcomer) = tokio::join!(waiting, newcomer);
    let ((head, ended), (_, welcome)) = (refused?, newcomer?);
    assert!(head.starts_with("HTTP/1.1 101") && welcome.starts_with("HTTP/1.1 101"), "{head}");
    assert_eq!(ended.code, 4005, "{ended:?}");
    assert!(ended.text.contains("other clients wait"), "{ended:?}");
    assert_eq!((node.metric(LIMITS, "evicted"), node.metric(HANDSHAKES, "evicted")), (4.0, 4.0));
    Ok(())
}
