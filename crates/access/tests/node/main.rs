//! A whole access node on a real Redis: devices on one side, a dispatcher's stream on the other.

mod acceptors;
mod bad_frames;
mod bad_handshakes;
mod bad_tokens;
mod balance;
mod door;
mod fanout;
mod heartbeats;
mod isolation;
mod kick;
mod leases;
mod limits;
mod proxies;
mod revocations;
mod slow;
mod support;
mod tls;

use std::time::Duration;

use anyhow::Result;
use barid_runtime::Stopped;
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::{Device, token};
use barid_wire::envelope::set_payload;
use serde_json::json;
use support::*;
use tokio::net::TcpStream;

#[tokio::test]
async fn a_push_to_an_online_device_is_written_and_its_ack_moves_the_cursor() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let (entry, online) = world.accept("alice", "order-1").await?;
    assert!(online);
    assert!(dispatcher.push(&world, "alice", entry).await?.gone.is_empty());
    let message = phone.message().await?;
    assert_eq!((message.seq, message.id.as_str()), (1, "order-1"));
    assert_eq!(message.body, json!({ "text": "text of order-1" }));
    phone.ack(1).await?;
    world.cursor_becomes("alice", "phone", 1).await?;
    assert_eq!(world.inspect("alice").await?.timer_due_ms, None);
    assert_eq!(node.metric("barid_access_delivered_total", "fast"), 1.0);
    Ok(())
}

#[tokio::test]
async fn sessions_are_counted_by_what_they_name_and_timed_by_how_they_end() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.metric_names_max = 1).await?;
    let sessions = |platform| node.metric("barid_access_platform_sessions", platform);
    let token = token_of("alice");
    let mut open = Vec::new();
    for (device, platform) in [("a", "ios"), ("b", "ios"), ("c", "web"), ("d", "")] {
        let sdk = if device == "d" { "barid-go/1.2.0" } else { "barid-rust/0.1.0" };
        let hello = json!({ "device": device, "platform": platform, "sdk": sdk });
        open.push(Device::connect_with(&node.url(), &token, hello).await?.0);
    }
    assert_eq!(["ios", "other", "none"].map(sessions), [2.0, 1.0, 1.0]);
    let sdks = |sdk| node.metric("barid_access_sdk_sessions", sdk);
    assert_eq!(["barid-rust/0.1.0", "other", "none"].map(sdks), [3.0, 1.0, 0.0]);
    assert_eq!(node.metric("barid_access_app_sessions", APP), 4.0);
    assert!(node.metric("barid_access_app_bytes_out_total", APP) > 4.0 * 20.0, "four Welcomes");
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    for device in open {
        device.close().await?;
    }
    eventually("they have ended", async || {
        Ok(["ios", "other", "none"].map(sessions) == [0.0; 3]
            && node.metric("barid_access_session_seconds", "device") >= 4.0)
    })
    .await
}

#[tokio::test]
async fn a_burst_of_acks_reaches_redis_as_few() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let begun = std::time::Instant::now();
    for n in 1..=40 {
        let (entry, _) = world.accept("alice", &format!("m{n}")).await?;
        dispatcher.push(&world, "alice", entry).await?;
        phone.receive(1).await?;
    }
    world.cursor_becomes("alice", "phone", 40).await?;
    // One at once, and then one in 100 ms.
    let most = 2.0 + begun.elapsed().as_secs_f64() * 10.0;
    let acks = node.metric("barid_mailbox_batch_items", "ack");
    assert!(acks <= most, "{acks} acks for 40 messages in {:?}", begun.elapsed());
    Ok(())
}

#[tokio::test]
async fn what_came_while_it_was_away_is_delivered_first_and_in_order() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    for n in 1..=300 {
        world.accept("alice", &format!("m{n}")).await?;
    }
    let mut phone = node.device("alice", "phone").await?;
    let ids = phone.receive(300).await?;
    assert_eq!(ids, (1..=300).map(|n| format!("m{n}")).collect::<Vec<_>>());
    world.cursor_becomes("alice", "phone", 300).await?;
    phone.close().await?;
    world.routes_become("alice", 0).await?;
    world.accept("alice", "m301").await?;
    let mut phone = node.device("alice", "phone").await?;
    assert_eq!(phone.receive(1).await?, ["m301"], "from where it stopped");
    Ok(())
}

#[tokio::test]
async fn a_lost_push_is_read_when_the_next_one_leaves_a_gap() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    world.accept("alice", "lost").await?;
    let (entry, _) = world.accept("alice", "next").await?;
    dispatcher.push(&world, "alice", entry).await?;
    assert_eq!(phone.receive(2).await?, ["lost", "next"]);
    assert_eq!(node.metric("barid_access_syncs_total", "gap"), 1.0);
    Ok(())
}

#[tokio::test]
async fn devices_of_a_user_have_cursors_of_their_own() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let mut tablet = node.device("alice", "tablet").await?;
    let (both, _) = world.accept("alice", "both").await?;
    dispatcher.push(&world, "alice", both).await?;
    let (one, _) = world.accept_with("alice", "one", |e| e.device = "tablet".into()).await?;
    dispatcher.push(&world, "alice", one).await?;
    assert_eq!(phone.receive(1).await?, ["both"]);
    let Incoming::Skip(skip) = phone.next(PATIENCE).await? else { panic!("no skip") };
    assert_eq!((&skip["to"], &skip["why"]), (&json!(2), &json!("otherDevice")));
    world.cursor_becomes("alice", "phone", 2).await?;
    assert_eq!(tablet.message().await?.id, "both");
    world.cursor_becomes("alice", "tablet", 0).await?;
    assert_eq!(tablet.message().await?.id, "one");
    tablet.ack(2).await?;
    world.cursor_becomes("alice", "tablet", 2).await
}

#[tokio::test]
async fn a_newer_connection_of_a_device_replaces_the_older() -> Result<()> {
    let world = World::new().await?;
    let (node, other) = (world.node().await?, world.node().await?);
    let hello = |attempt: u64| json!({ "device": "phone", "attempt": attempt });
    let token = token_of("alice");
    let (mut first, _) = Device::connect_with(&node.url(), &token, hello(1)).await?;
    let (mut second, _) = Device::connect_with(&node.url(), &token, hello(2)).await?;
    assert_eq!(first.closed(PATIENCE).await?, 4502, "on the same node");
    let (mut third, _) = Device::connect_with(&other.url(), &token, hello(3)).await?;
    assert_eq!(second.closed(PATIENCE).await?, 4502, "on another node");
    // The old sessions' ends leave the new one's route alone.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let routes = world.inspect("alice").await?.routes;
    assert_eq!((routes.len(), routes[0].attempt.0), (1, 3));
    // A late Hello of an older attempt is refused, and does no harm.
    let mut late = Device::open(&node.url(), &token).await?;
    late.send(&json!({ "hello": hello(2) })).await?;
    assert_eq!(late.closed(PATIENCE).await?, 4005);
    let (entry, _) = world.accept("alice", "m1").await?;
    other.dispatcher().await?.push(&world, "alice", entry).await?;
    assert_eq!(third.receive(1).await?, ["m1"]);
    Ok(())
}

#[tokio::test]
async fn a_token_that_expires_closes_the_connection_unless_it_is_refreshed() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let short = || token::token(APP, "alice", Duration::from_secs(3));
    let mut phone = Device::connect(&node.url(), &short(), "phone").await?;
    let mut tablet = Device::connect(&node.url(), &short(), "tablet").await?;
    tablet.send(&json!({ "refresh": { "token": token_of("alice") } })).await?;
    assert_eq!(phone.closed(PATIENCE).await?, 4004);
    tablet.expect_silence(Duration::from_secs(1)).await?;
    tablet.send(&json!({ "refresh": { "token": token_of("bob") } })).await?;
    assert_eq!(tablet.closed(PATIENCE).await?, 4500, "somebody else's");
    let mut watch = node.device("alice", "watch").await?;
    watch.send(&json!({ "refresh": { "token": "junk" } })).await?;
    assert_eq!(watch.closed(PATIENCE).await?, 4500);
    Ok(())
}

#[tokio::test]
async fn hazard_15_five_resends_without_an_answer_close_with_4001_and_the_message_stays()
-> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let (entry, _) = world.accept("alice", "m1").await?;
    dispatcher.push(&world, "alice", entry).await?;
    assert_eq!(phone.message().await?.seq, 1);
    for resend in 1..=5 {
        assert!(dispatcher.resend(&world, "alice").await?.gone.is_empty());
        assert_eq!(phone.message().await?.seq, 1, "re-send {resend}");
    }
    dispatcher.resend(&world, "alice").await?;
    assert_eq!(phone.closed(PATIENCE).await?, 4001);
    world.routes_become("alice", 0).await?;
    let mut phone = node.device("alice", "phone").await?;
    assert_eq!(phone.receive(1).await?, ["m1"]);
    Ok(())
}

#[tokio::test]
async fn whoever_is_not_here_is_gone_and_loses_the_route() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let route = world.inspect("alice").await?.routes.remove(0);
    let (entry, _) = world.accept("alice", "m1").await?;
    let push = |connection| barid_wire::internal::NodePush {
        app: APP.into(),
        user: "alice".into(),
        envelope: entry.clone(),
        connections: vec![connection],
        dispatched_after_us: None,
    };
    let here = route.session.connection.0;
    let incarnation = route.session.incarnation.0;
    let reply = dispatcher.send(incarnation + 1, vec![push(here)], vec![]).await?;
    assert_eq!(reply.gone.len(), 1, "another incarnation of the node");
    phone.expect_silence(Duration::from_millis(200)).await?;
    let reply = dispatcher.send(incarnation, vec![push(here), push(here + 7)], vec![]).await?;
    assert_eq!(reply.gone.iter().map(|gone| gone.connection).collect::<Vec<_>>(), [here + 7]);
    assert_eq!(phone.message().await?.id, "m1");

    // A route that outlived its session.
    let ghost = barid_mailbox::ConnectRequest {
        user: user_key("bob"),
        device: barid_core::DeviceId::new("phone")?,
        session: barid_core::SessionRef {
            connection: barid_core::ConnectionId(here + 100),
            ..route.session
        },
        attempt: barid_core::Attempt(1),
        platform: "".into(),
        position: None,
    };
    world.mailbox.connect(ghost).await?;
    let (entry, online) = world.accept("bob", "m1").await?;
    assert!(online);
    assert_eq!(dispatcher.push(&world, "bob", entry).await?.gone.len(), 1);
    world.routes_become("bob", 0).await
}

#[tokio::test]
async fn a_device_that_does_not_read_is_closed_with_4002_and_harms_nobody() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let slow = node.device("alice", "phone").await?;
    let mut other = node.device("bob", "phone").await?;
    let noise: Vec<u8> =
        (0..60_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for n in 0..250 {
        let (entry, _) = world
            .accept_with("alice", &format!("m{n}"), |e| {
                e.set_kind(barid_wire::v1::BodyKind::Data);
                set_payload(e, noise.clone().into(), usize::MAX, 3);
            })
            .await?;
        dispatcher.push(&world, "alice", entry).await?;
        if node.metric("barid_access_closes_total", "slow_consumer") > 0.0 {
            break;
        }
    }
    eventually("closed", async || {
        Ok(node.metric("barid_access_closes_total", "slow_consumer") == 1.0)
    })
    .await?;
    world.routes_become("alice", 0).await?;
    assert_eq!(node.metric("barid_access_queued_bytes", ""), 0.0);
    let (entry, _) = world.accept("bob", "m1").await?;
    dispatcher.push(&world, "bob", entry).await?;
    assert_eq!(other.receive(1).await?, ["m1"]);
    drop(slow);
    Ok(())
}

#[tokio::test]
async fn a_device_from_which_nothing_is_heard_is_closed_with_4003() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.heartbeat.interval_seconds = 1;
            config.heartbeat.timeout_seconds = 1;
        })
        .await?;
    let visible = json!({ "device": "tablet", "visiblePings": true });
    let (mut tablet, _) = Device::connect_with(&node.url(), &token_of("bob"), visible).await?;
    // This one answers WebSocket pings only while it is read.
    let mut phone = node.device("alice", "phone").await?;
    let dead = node.device("alice", "dead").await?;
    let phone = tokio::spawn(async move { phone.expect_silence(Duration::from_secs(5)).await });
    let Incoming::Other(kind, _) = tablet.next(PATIENCE).await? else { panic!("no ping") };
    assert_eq!(kind, "ping");
    tablet.send(&json!({ "pong": {} })).await?;
    assert_eq!(tablet.closed(PATIENCE).await?, 4003, "the second ping was not answered");
    phone.await??;
    eventually("dead closed", async || {
        Ok(node.metric("barid_access_closes_total", "heartbeat") == 2.0)
    })
    .await?;
    drop(dead);
    Ok(())
}

#[tokio::test]
async fn draining_tells_devices_to_go_and_leaves_nothing_behind() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut devices = Vec::new();
    for n in 0..5 {
        devices.push(node.device(&format!("user{n}"), "phone").await?);
    }
    let (entry, _) = world.accept("user0", "m1").await?;
    dispatcher.push(&world, "user0", entry).await?;
    assert_eq!(devices[0].message().await?.id, "m1");
    let address = node.addresses["ws"];
    let stopping = tokio::spawn(node.stop(Duration::from_secs(6)));
    for (n, mut device) in devices.into_iter().enumerate() {
        let Incoming::Other(kind, away) = device.next(PATIENCE).await? else { panic!("no goAway") };
        assert_eq!((kind.as_str(), &away["why"]), ("goAway", &json!("draining")));
        assert!(away["reconnectAfterMs"].as_u64().is_some_and(|ms| ms <= 1000));
        if n == 0 {
            device.ack(1).await?;
        }
        assert_eq!(device.closed(PATIENCE).await?, 4000);
    }
    assert_eq!(stopping.await??, Stopped::Clean);
    assert!(TcpStream::connect(address).await.is_err());
    for n in 0..5 {
        assert!(world.inspect(&format!("user{n}")).await?.routes.is_empty());
    }
    world.cursor_becomes("user0", "phone", 1).await?;
    let leases: Vec<String> = world.redis.query(&["KEYS", "barid:node:*"]).await?;
    assert!(leases.is_empty(), "{leases:?}");
    Ok(())
}

#[tokio::test]
async fn a_short_drain_cuts_off_only_who_still_owes_something() -> Result<()> {
    let mut world = World::new().await?;
    let node = world.node().await?;
    let _mute = node.device("alice", "phone").await?;
    assert_eq!(node.stop(Duration::from_secs(2)).await?, Stopped::Clean);
    assert!(world.inspect("alice").await?.routes.is_empty());

    let node = world.node().await?;
    let _mute = node.device("alice", "phone").await?;
    world.redis.stop()?;
    let cut = Stopped::Cut { what: "sessions".into(), count: 1 };
    assert_eq!(node.stop(Duration::from_secs(2)).await?, cut, "its route cannot be removed");
    Ok(())
}

#[tokio::test]
async fn a_protobuf_device_gets_compressed_bodies_if_it_accepts_them() -> Result<()> {
    use barid_testkit::raw::{BINARY, Raw, frame};
    use barid_wire::frames::{ClientFrame, Encoding, ServerFrame, body, encode_client};
    use barid_wire::v1;

    let world = World::new().await?;
    let node = world.node().await?;
    let text = "the same again, ".repeat(200);
    world.accept_with("alice", "m1", |e| set_payload(e, text.clone().into(), 128, 3)).await?;
    for (device, accepts_zstd) in [("old", false), ("new", true)] {
        let token = token_of("alice");
        let mut socket = Raw::open(node.addresses["ws"], Encoding::Proto, &token).await?;
        let hello = v1::Hello { device: device.into(), accepts_zstd, ..Default::default() };
        let hello = encode_client(Encoding::Proto, &ClientFrame::Hello(hello));
        socket.send(&frame(BINARY, hello)).await;
        socket.welcomed().await?;
        let (bytes, ServerFrame::Deliver(deliver)) = socket.next().await? else {
            panic!("no message")
        };
        assert_eq!(bytes < text.len() / 10, accepts_zstd);
        let got = body(deliver.messages[0].clone(), 1 << 20)?;
        assert_eq!(got, barid_wire::frames::Body::Text(text.clone()));
    }
    Ok(())
}

#[tokio::test]
async fn connections_beyond_the_limit_are_turned_away_with_503() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.connections_max = 1).await?;
    let phone = node.device("alice", "phone").await?;
    let refused = node.device("bob", "phone").await.unwrap_err();
    assert!(format!("{refused:?}").contains("503"), "{refused:?}");
    phone.close().await?;
    eventually("room again", async || Ok(node.device("bob", "phone").await.is_ok())).await
}

/// Keeps a copy of a user's mailbox, or brings it back: what a failover to a replica that lags does.
async fn copy_mailbox(world: &World, user: &str, from: &str, to: &str) -> Result<()> {
    let matching = |suffix: &str| format!("*:[hq]:u:demo:{user}{suffix}");
    // An empty list is no key: what was copied onto goes first.
    let old: Vec<String> = world.redis.query(&["KEYS", &matching(to)]).await?;
    for key in old {
        let _: i64 = world.redis.query(&["DEL", &key]).await?;
    }
    let keys: Vec<String> = world.redis.query(&["KEYS", &matching(from)]).await?;
    anyhow::ensure!(!keys.is_empty(), "nothing to copy");
    for key in keys {
        let copy = format!("{}{to}", key.trim_end_matches(from));
        let _: i64 = world.redis.query(&["COPY", &key, &copy]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn hazard_03_a_message_that_took_anothers_place_in_a_failover_is_shown() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    // A device that is away keeps the entries from being trimmed.
    node.device("alice", "tablet").await?.close().await?;
    world.routes_become("alice", 1).await?;
    for id in ["m1", "m2"] {
        let (entry, _) = world.accept("alice", id).await?;
        dispatcher.push(&world, "alice", entry).await?;
    }
    assert_eq!(phone.receive(2).await?, ["m1", "m2"]);
    world.cursor_becomes("alice", "phone", 2).await?;
    copy_mailbox(&world, "alice", "", ":before").await?;
    let (x, _) = world.accept("alice", "x").await?;
    dispatcher.push(&world, "alice", x).await?;
    assert_eq!(phone.receive(1).await?, ["x"]);
    world.cursor_becomes("alice", "phone", 3).await?;

    copy_mailbox(&world, "alice", ":before", "").await?;
    let (y, _) = world.accept("alice", "y").await?;
    dispatcher.push(&world, "alice", y).await?;
    let Incoming::Welcome(welcome) = phone.next(PATIENCE).await? else { panic!("no welcome") };
    assert_eq!(
        (&welcome["positions"][0]["generation"], &welcome["positions"][0]["seq"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(phone.receive(3).await?, ["m1", "m2", "y"], "the SDK drops the first two by id");
    world.cursor_becomes("alice", "phone", 3).await
}

#[tokio::test]
async fn hazard_34_an_ack_without_a_generation_trims_nothing_that_came_after_a_reset() -> Result<()>
{
    for acked_before in [true, false] {
        let world = World::new().await?;
        let node = world.node().await?;
        let mut dispatcher = node.dispatcher().await?;
        let mut phone = node.device("alice", "phone").await?;
        let (a0, _) = world.accept("alice", "a0").await?;
        dispatcher.push(&world, "alice", a0).await?;
        assert_eq!(phone.message().await?.id, "a0");
        let unnamed = |seq: u64| json!({ "ack": { "seq": seq } });
        if acked_before {
            phone.send(&unnamed(1)).await?;
            world.cursor_becomes("alice", "phone", 1).await?;
        }
        copy_mailbox(&world, "alice", "", ":before").await?;
        for id in ["a1", "a2", "a3"] {
            let (entry, _) = world.accept("alice", id).await?;
            dispatcher.push(&world, "alice", entry).await?;
            assert_eq!(phone.message().await?.id, id);
        }
        if acked_before {
            phone.send(&unnamed(3)).await?;
            world.cursor_becomes("alice", "phone", 3).await?;
        }
        // Redis goes back; b1 takes the place of a1, and the others come behind it.
        copy_mailbox(&world, "alice", ":before", "").await?;
        for id in ["b1", "a1", "a2", "a3"] {
            let (entry, _) = world.accept("alice", id).await?;
            dispatcher.push(&world, "alice", entry).await?;
        }
        // The application has handled a3, has read nothing since, and dies.
        let _ = phone.send(&unnamed(4)).await;
        let mut asked_to_wait = false;
        let code = loop {
            match phone.next(PATIENCE).await? {
                Incoming::Other(kind, fields) if kind == "goAway" => {
                    assert_eq!(fields["why"], "history_changed");
                    asked_to_wait = true;
                }
                Incoming::Closed(code, _) => break code,
                _ => {}
            }
        };
        assert!(code == 4006 && asked_to_wait, "{code} {asked_to_wait}");
        let mut phone = node.device("alice", "phone").await?;
        let mut ids = Vec::new();
        while ids.last().map(String::as_str) != Some("a3") {
            ids.extend(phone.receive(1).await?);
        }
        assert!(ids.contains(&"b1".into()), "{acked_before}: {ids:?}");
    }
    Ok(())
}

/// A Hello with an attempt; what came of it: the code, and the attempt that was told, or a session.
async fn hello_with(
    node: &Node,
    attempt: u64,
) -> Result<std::result::Result<Device, (u16, serde_json::Value)>> {
    let mut device = Device::open(&node.url(), &token_of("alice")).await?;
    device.send(&json!({ "hello": { "device": "phone", "attempt": attempt } })).await?;
    let mut told = json!(null);
    loop {
        match device.next(PATIENCE).await? {
            Incoming::Welcome(_) => return Ok(Ok(device)),
            Incoming::Other(kind, fields) if kind == "error" => told = fields["attempt"].clone(),
            Incoming::Closed(code, _) => return Ok(Err((code, told))),
            _ => {}
        }
    }
}

#[tokio::test]
async fn hazard_37_a_device_whose_clock_went_back_may_come_back_with_a_higher_attempt() -> Result<()>
{
    let world = World::new().await?;
    let node = world.node().await?;
    let now = world.inspect("alice").await?.now_ms;
    // It stands there still, half open.
    let mut old = hello_with(&node, now).await?.expect("a session");
    let refused = hello_with(&node, 5).await?.expect_err("a lower attempt");
    assert_eq!(refused, (4005, json!(now)), "it is told which one is known, and to come back");
    let next = hello_with(&node, now + 1).await?.expect("a session");
    assert_eq!(old.closed(PATIENCE).await?, 4502, "which is for who was replaced");
    // The same after it left in good order.
    next.close().await?;
    world.routes_become("alice", 0).await?;
    assert_eq!(hello_with(&node, 5).await?.expect_err("fenced"), (4005, json!(now + 1)));
    hello_with(&node, now + 2).await?.expect("a session");
    Ok(())
}

#[tokio::test]
async fn hazard_37_an_attempt_far_ahead_shuts_nobody_out() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let now = world.inspect("alice").await?.now_ms;
    for ahead in [now + 3_600_000, (1 << 53) - 1] {
        // A clean close, and back at once with the right clock.
        hello_with(&node, ahead).await?.expect("a session").close().await?;
        world.routes_become("alice", 0).await?;
        let now = world.inspect("alice").await?.now_ms;
        let mut right = hello_with(&node, now + 1).await?.expect("a session");
        tokio::time::sleep(Duration::from_millis(50)).await;
        // A stranger with the user's token takes its place, and cannot keep it.
        let mut stranger = hello_with(&node, ahead).await?.expect("a session");
        assert_eq!(right.closed(PATIENCE).await?, 4502);
        let now = world.inspect("alice").await?.now_ms;
        hello_with(&node, now + 1000).await?.expect("a session").close().await?;
        assert_eq!(stranger.closed(PATIENCE).await?, 4502);
        world.routes_become("alice", 0).await?;
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    assert_eq!(node.metric("barid_access_limits_total", "attempt_ahead"), 4.0);
    Ok(())
}

#[tokio::test]
async fn hazard_37_a_device_counts_on_although_redis_s_clock_went_back() -> Result<()> {
    let world = World::new().await?;
    // Its connect was far ahead of the present clock, because this node still allowed that.
    let before = world.node_with(|config| config.limits.attempt_ahead_ms = 3_600_000).await?;
    let node = world.node().await?;
    let known = world.inspect("alice").await?.now_ms + 1_800_000;
    let mut old = hello_with(&before, known).await?.expect("a session");
    assert_eq!(hello_with(&node, known).await?.expect_err("no higher"), (4005, json!(known)));
    // Its own clock goes on; of that no more is believed than that it comes next.
    let next = hello_with(&node, known + 1_000_000).await?.expect("a session");
    assert_eq!(old.closed(PATIENCE).await?, 4502);
    next.close().await?;
    world.routes_become("alice", 0).await?;
    assert_eq!(hello_with(&node, 5).await?.expect_err("fenced"), (4005, json!(known + 1)));
    hello_with(&node, known + 2).await?.expect("a session");
    Ok(())
}

#[tokio::test]
async fn a_fork_behind_what_was_acknowledged_ends_in_a_new_hello() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let (mut phone, welcome) =
        Device::connect_with(&node.url(), &token_of("alice"), json!({ "device": "phone" })).await?;
    let (first, _) = world.accept("alice", "m1").await?;
    dispatcher.push(&world, "alice", first).await?;
    assert_eq!(phone.receive(1).await?, ["m1"]);
    world.cursor_becomes("alice", "phone", 1).await?;
    let list: Vec<String> = world.redis.query(&["KEYS", "*:q:u:demo:alice"]).await?;
    anyhow::ensure!(list.is_empty(), "acknowledged by all: trimmed, and Redis keeps no empty list");
    copy_mailbox(&world, "alice", "", ":before").await?;
    let (x, _) = world.accept("alice", "x").await?;
    dispatcher.push(&world, "alice", x).await?;
    assert_eq!(phone.message().await?.id, "x");
    copy_mailbox(&world, "alice", ":before", "").await?;
    let (y, _) = world.accept("alice", "y").await?;
    dispatcher.push(&world, "alice", y).await?;
    assert_eq!(phone.closed(PATIENCE).await?, 4006);
    let mut position = welcome["positions"][0].clone();
    position["seq"] = 2.into();
    position["chain"] = barid_core::Chain::START.next("m1").next("x").0.into();
    let hello = json!({ "device": "phone", "positions": [position] });
    let (mut phone, _) = Device::connect_with(&node.url(), &token_of("alice"), hello).await?;
    assert_eq!(phone.receive(1).await?, ["y"], "not dropped for x's sake");
    Ok(())
}

#[tokio::test]
async fn hazard_12_a_forgotten_route_is_restored_when_the_connection_to_redis_is_new() -> Result<()>
{
    let world = World::new().await?;
    let node = world.node().await?;
    let mut phone = node.device("alice", "phone").await?;
    let routes: Vec<String> = world.redis.query(&["KEYS", "*:r:demo:alice"]).await?;
    let _: i64 = world.redis.query(&["DEL", &routes[0]]).await?;
    let (_, online) = world.accept("alice", "missed").await?;
    assert!(!online);
    let _: i64 = world.redis.query(&["CLIENT", "KILL", "TYPE", "normal"]).await?;
    world.routes_become("alice", 1).await?;
    assert_eq!(phone.receive(1).await?, ["missed"], "and what came meanwhile is read");
    Ok(())
}

#[tokio::test]
async fn hazard_18_a_mailbox_that_vanished_starts_over_under_the_session() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    for n in 1..=3 {
        let (entry, _) = world.accept("alice", &format!("old{n}")).await?;
        dispatcher.push(&world, "alice", entry).await?;
    }
    phone.receive(3).await?;
    world.cursor_becomes("alice", "phone", 3).await?;
    let keys: Vec<String> = world.redis.query(&["KEYS", "*:[hq]:u:demo:alice"]).await?;
    for key in keys {
        let _: i64 = world.redis.query(&["DEL", &key]).await?;
    }
    let (entry, _) = world.accept("alice", "new1").await?;
    dispatcher.push(&world, "alice", entry).await?;
    let Incoming::Welcome(welcome) = phone.next(PATIENCE).await? else { panic!("no welcome") };
    assert_eq!(welcome["positions"][0]["seq"], 0);
    assert_eq!(phone.receive(1).await?, ["new1"]);
    Ok(())
}

#[tokio::test]
async fn redis_away_delays_and_loses_nothing() -> Result<()> {
    let mut world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let (entry, _) = world.accept("alice", "m1").await?;
    dispatcher.push(&world, "alice", entry).await?;
    assert_eq!(phone.message().await?.seq, 1);
    world.redis.stop()?;
    phone.ack(1).await?;
    eventually("not ready", async || {
        Ok(node.context.health.not_ready().iter().any(|(name, _)| *name == "redis"))
    })
    .await?;
    world.redis.cont()?;
    world.cursor_becomes("alice", "phone", 1).await?;
    eventually("ready", async || Ok(node.context.health.not_ready().is_empty())).await
}
