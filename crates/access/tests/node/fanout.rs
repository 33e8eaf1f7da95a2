//! Fan-out to everyone of an app, and to groups.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use barid_core::{Audience, Chain, Epoch, GroupId, Seq};
use barid_runtime::Stopped;
use barid_testkit::device::{Delivered, Incoming, PATIENCE};
use barid_testkit::raw::{BINARY, Raw, frame};
use barid_testkit::{Device, token};
use barid_wire::envelope::{Header, encode_body, set_payload};
use barid_wire::frames::{Encoding, ServerFrame, encode_client};
use barid_wire::internal::{NodeBatch, NodeFanout};
use barid_wire::v1::{self, BodyKind, Envelope, client_frame, message};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::*;

const MISSED: &str = "barid_access_fanout_missed_total";
const HELD: &str = "barid_access_fanout_held_bytes";
const SUBSCRIPTIONS: &str = "barid_access_subscriptions";
const QUIET: Duration = Duration::from_millis(300);

fn entry_with(seq: u64, id: &str, change: impl FnOnce(&mut Envelope)) -> Bytes {
    entry_at(1_000_000, seq, id, change)
}

fn entry_at(accepted_at_us: u64, seq: u64, id: &str, change: impl FnOnce(&mut Envelope)) -> Bytes {
    let (epoch, chain) = (Epoch(7), Chain(0));
    let header = Header { epoch, seq: Seq(seq), prev_chain: chain, chain, accepted_at_us };
    let mut envelope = Envelope { id: id.into(), ..Default::default() };
    set_payload(&mut envelope, format!("text of {id}").into(), 128, 3);
    change(&mut envelope);
    [&header.encode()[..], &encode_body(envelope)].concat().into()
}

fn entry(seq: u64) -> Bytes {
    entry_with(seq, &format!("m{seq}"), |_| ())
}

/// 60,000 bytes.
fn large(seq: u64) -> Bytes {
    entry_with(seq, &format!("m{seq}"), |envelope| {
        set_payload(envelope, "x".repeat(60_000).into(), usize::MAX, 3);
    })
}

fn token_for(app: &str, user: &str, groups: &Value) -> String {
    let claims = json!({ "app": app, "sub": user, "exp": 4_000_000_000_u64, "groups": groups });
    token::sign(&claims, token::SECRET)
}

/// Connects a user whose token lists these groups.
async fn member(node: &Node, user: &str, groups: &[&str]) -> Result<Device> {
    Device::connect(&node.url(), &token_for(APP, user, &json!(groups)), "phone").await
}

/// Sends a Subscribe or Unsubscribe and returns the answer.
async fn asked(device: &mut Device, kind: &str, group: &str) -> Result<(String, Value)> {
    device.send(&json!({ kind: { "group": group } })).await?;
    match device.next(PATIENCE).await? {
        Incoming::Other(kind, fields) => Ok((kind, fields)),
        other => anyhow::bail!("no answer to {kind}, but {other:?}"),
    }
}

async fn subscribe(device: &mut Device, group: &str) -> Result<()> {
    let answer = asked(device, "subscribe", group).await?;
    ensure!(answer.0 == "subscribed" && answer.1["group"] == group, "{answer:?}");
    Ok(())
}

/// A device is told of another history, also that of a mailbox which did not exist, before its messages.
async fn next_message(device: &mut Device) -> Result<Delivered> {
    loop {
        match device.next(PATIENCE).await? {
            Incoming::Message(message) => return Ok(message),
            Incoming::Other(kind, _) if kind == "subscribed" => {}
            other => anyhow::bail!("{other:?} instead of a message"),
        }
    }
}

async fn hears(device: &mut Device, mailbox: &str, seqs: &[u64]) -> Result<()> {
    for seq in seqs {
        let Delivered { mailbox: of, seq: at, id, body, .. } = next_message(device).await?;
        ensure!((&*of, at, id) == (mailbox, *seq, format!("m{seq}")), "{of} {at} {seq}");
        ensure!(body == json!({ "text": format!("text of m{seq}") }), "{body}");
    }
    Ok(())
}

#[tokio::test]
async fn everyone_of_an_app_and_nobody_else_hears_what_is_for_everyone() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut devices = Vec::new();
    for (user, device) in [("alice", "phone"), ("alice", "tablet"), ("bob", "phone")] {
        devices.push(node.device(user, device).await?);
    }
    let other = token_for("other", "alice", &Value::Null);
    let mut stranger = Device::connect(&node.url(), &other, "phone").await?;
    eventually("listed", async || Ok(node.metric("barid_access_audiences", "") == 2.0)).await?;
    dispatcher.fan_out(APP, "", (1..=3).map(entry).collect()).await?;
    dispatcher.fan_out(APP, "", vec![entry(4)]).await?;
    for device in &mut devices {
        hears(device, "everyone", &[1, 2, 3, 4]).await?;
        device.expect_silence(QUIET).await?;
    }
    stranger.expect_silence(QUIET).await?;
    dispatcher.fan_out("other", "", vec![entry(1)]).await?;
    hears(&mut stranger, "everyone", &[1]).await?;
    devices[0].expect_silence(QUIET).await?;
    // A later member receives later messages only; a device that has gone is not a member.
    devices.remove(0).close().await?;
    let mut late = node.device("carol", "phone").await?;
    dispatcher.fan_out(APP, "", vec![entry(5)]).await?;
    for device in devices.iter_mut().chain([&mut late]) {
        hears(device, "everyone", &[5]).await?;
    }
    dispatcher.fan_out("nobody", "", vec![entry(1)]).await?;
    assert_eq!(node.metric("barid_access_fanouts_total", "nobody"), 1.0);
    assert_eq!(node.metric("barid_access_fanouts_total", "told"), 6.0);
    let delivered = node.metric("barid_access_delivered_total", "fanout");
    assert_eq!((delivered, node.metric(MISSED, "")), (3.0 * 4.0 + 1.0 + 3.0, 0.0));
    Ok(())
}

#[tokio::test]
async fn a_users_own_messages_and_everyones_go_their_own_ways() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    for n in 1..=50 {
        let (own, _) = world.accept("alice", &format!("own{n}")).await?;
        dispatcher.push(&world, "alice", own).await?;
        dispatcher.fan_out(APP, "", vec![entry(n)]).await?;
    }
    let (mut own, mut everyones) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let message = phone.message().await?;
        match &*message.mailbox {
            "" => own.push(message.seq),
            _ => everyones.push(message.seq),
        }
    }
    let all: Vec<_> = (1..=50).collect();
    assert_eq!((&own, &everyones), (&all, &all));
    phone.ack(50).await?;
    world.cursor_becomes("alice", "phone", 50).await
}

#[tokio::test]
async fn one_delivery_in_sixteen_is_on_the_hops_from_its_dispatcher_and_its_producer() -> Result<()>
{
    const SECOND: u64 = 1_000_000;
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut devices = [node.device("alice", "phone").await?, node.device("bob", "phone").await?];
    let begun = Instant::now();
    for seq in 1..=32 {
        // Of a dispatcher that does not say when, half of them.
        let dispatched_after_us = (seq <= 16).then_some(SECOND as u32 / 2);
        let now_us = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64;
        let envelope = entry_at(now_us - SECOND * 3 / 2, seq, &format!("m{seq}"), |envelope| {
            envelope.produced_at_ms = now_us / 1000 - 2_000;
        });
        let fanout = NodeFanout {
            app: APP.into(),
            mailbox: "everyone".into(),
            envelope,
            dispatched_after_us,
        };
        dispatcher.batch(NodeBatch { fanouts: vec![fanout], ..Default::default() }).await?;
        for device in &mut devices {
            hears(device, "everyone", &[seq]).await?;
        }
    }
    // A second for two deliveries, two seconds for four; and what it really took, which is little.
    let took = begun.elapsed().as_secs_f64();
    for (hop, least) in [("fanout_dispatched_written", 2.0), ("fanout_produced_written", 8.0)] {
        let sum = node.metric("barid_hop_seconds", hop);
        assert!((least - 0.1..least + 0.1 + took).contains(&sum), "{hop}: {sum} s");
    }
    assert_eq!(node.metric("barid_hop_seconds", "dispatched_written"), 0.0);
    Ok(())
}

#[tokio::test]
async fn protobuf_devices_get_the_same_compressed_if_they_accept_it() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut sockets = Vec::new();
    for (device, accepts_zstd) in [("old", false), ("new", true)] {
        let mut socket =
            Raw::open(node.addresses["ws"], Encoding::Proto, &token_of("alice")).await?;
        let hello = v1::Hello { device: device.into(), accepts_zstd, ..Default::default() };
        let hello = encode_client(Encoding::Proto, &client_frame::Kind::Hello(hello));
        socket.send(&frame(BINARY, hello)).await;
        socket.welcomed().await?;
        sockets.push(socket);
    }
    let long = "the same again, ".repeat(200);
    let packed = entry_with(1, "m1", |e| set_payload(e, long.clone().into(), 128, 3));
    dispatcher.fan_out(APP, "", vec![packed, entry(2)]).await?;
    for (socket, accepts_zstd) in sockets.iter_mut().zip([false, true]) {
        let (_, ServerFrame::Deliver(deliver)) = socket.next().await? else {
            panic!("no delivery")
        };
        assert_eq!((&*deliver.mailbox, deliver.messages.len()), ("everyone", 2), "in one frame");
        let zstd = matches!(deliver.messages[0].body, Some(message::Body::ZstdText(_)));
        assert_eq!(zstd, accepts_zstd);
        let text = message::Body::Text("text of m2".into());
        assert_eq!(deliver.messages[1].body, Some(text));
    }
    Ok(())
}

#[tokio::test]
async fn what_is_no_message_reaches_nobody_and_harms_nobody() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    let no_json = entry_with(2, "m2", |envelope| {
        envelope.set_kind(BodyKind::Json);
        envelope.payload = Bytes::from_static(b"{");
    });
    let no_text = entry_with(3, "m3", |envelope| envelope.payload = Bytes::from_static(b"\xff"));
    let late = entry_with(4, "m4", |envelope| envelope.ttl_ms = 1);
    let junk = Bytes::from_static(b"junk");
    let bad = vec![entry(1), no_json, no_text, late, junk, entry(5)];
    dispatcher.fan_out(APP, "", bad).await?;
    dispatcher.fan_out("no:app", "", vec![entry(6)]).await?;
    dispatcher.fan_out(APP, "a\nb", vec![entry(6)]).await?;
    hears(&mut phone, "everyone", &[1, 5]).await?;
    phone.expect_silence(QUIET).await?;
    assert_eq!(node.metric("barid_access_fanouts_total", "expired"), 1.0);
    Ok(())
}

#[tokio::test]
async fn a_device_that_does_not_read_misses_and_the_others_do_not() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.fanout_seconds = 2).await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut slow = node.device("alice", "phone").await?;
    let mut other = node.device("bob", "phone").await?;
    // More than the kernel's buffers and the log together.
    for n in 1..=300 {
        dispatcher.fan_out(APP, "", vec![large(n)]).await?;
        assert_eq!(other.message().await?.seq, n);
        assert!(node.metric(HELD, "") < 3e6, "{} bytes are held", node.metric(HELD, ""));
    }
    assert!(node.metric("barid_access_queued_bytes", "") < 100_000.0, "a run, and no more");
    eventually("nothing is held", async || Ok(node.metric(HELD, "") == 0.0)).await?;
    // It stays, and reads whole messages in order. Those that it missed lie between what it was sent in
    // part and what comes now, or in several gaps: the kernel compacts a full receive buffer when it
    // likes and then takes a little more. Its own messages are not among what it missed.
    let (own, _) = world.accept("alice", "own").await?;
    dispatcher.push(&world, "alice", own).await?;
    let mut heard = Vec::new();
    while heard.last().is_none_or(|(mailbox, _)| mailbox == "everyone") {
        let message = slow.message().await?;
        heard.push((message.mailbox, message.seq));
    }
    assert_eq!(heard.pop(), Some((String::new(), 1)));
    let seqs: Vec<u64> = heard.into_iter().map(|(_, seq)| seq).collect();
    assert_eq!(seqs.first(), Some(&1));
    assert!(seqs.is_sorted_by(|a, b| a < b), "out of order or repeated: {seqs:?}");
    assert!(seqs.len() < 300, "it missed nothing");
    dispatcher.fan_out(APP, "", vec![large(301)]).await?;
    assert_eq!(slow.message().await?.seq, 301);
    assert_eq!(node.metric(MISSED, ""), (300 - seqs.len()) as f64);
    assert_eq!(node.metric("barid_access_closes_total", ""), 0.0);
    Ok(())
}

#[tokio::test]
async fn a_node_whose_logs_are_full_takes_nothing_more() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.node_fanout_bytes_max = 150_000;
            config.limits.fanout_bytes_max = 150_000;
            config.limits.fanout_seconds = 1;
        })
        .await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut phone = node.device("alice", "phone").await?;
    eventually("listed", async || Ok(node.metric("barid_access_audiences", "") == 1.0)).await?;
    dispatcher.fan_out(APP, "", (1..=9).map(large).collect()).await?;
    assert_eq!(phone.message().await?.seq, 1);
    let refused = node.metric("barid_access_fanouts_total", "no_room");
    assert!(refused > 5.0, "{refused} refused");
    assert_eq!(node.metric(MISSED, ""), refused);
    eventually("there is room again", async || Ok(node.metric(HELD, "") == 0.0)).await?;
    dispatcher.fan_out(APP, "", vec![large(10)]).await?;
    eventually("it comes", async || Ok(true)).await?;
    while phone.message().await?.seq != 10 {}
    Ok(())
}

#[tokio::test]
async fn who_has_subscribed_to_a_group_hears_it_until_it_unsubscribes() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut alice = member(&node, "alice", &["eng", "ops"]).await?;
    let mut bob = member(&node, "bob", &["eng", "ops"]).await?;
    subscribe(&mut alice, "eng").await?;
    subscribe(&mut alice, "ops").await?;
    subscribe(&mut bob, "ops").await?;
    subscribe(&mut bob, "ops").await?;
    assert_eq!(node.metric(SUBSCRIPTIONS, ""), 3.0);
    dispatcher.fan_out(APP, "eng", vec![entry(1)]).await?;
    hears(&mut alice, "eng", &[1]).await?;
    dispatcher.fan_out(APP, "ops", vec![entry(1), entry(2)]).await?;
    hears(&mut alice, "ops", &[1, 2]).await?;
    hears(&mut bob, "ops", &[1, 2]).await?;
    let gone = ("unsubscribed".to_owned(), json!({ "group": "ops" }));
    assert_eq!(asked(&mut alice, "unsubscribe", "ops").await?, gone);
    assert_eq!(asked(&mut alice, "unsubscribe", "ops").await?, gone, "and again");
    dispatcher.fan_out(APP, "ops", vec![entry(3)]).await?;
    dispatcher.fan_out(APP, "", vec![entry(1)]).await?;
    hears(&mut alice, "everyone", &[1]).await?;
    hears(&mut bob, "ops", &[3]).await?;
    hears(&mut bob, "everyone", &[1]).await?;
    alice.expect_silence(QUIET).await?;
    // The end of a session ends its subscriptions; they are its own to renew.
    drop(bob);
    eventually("bob's are gone", async || Ok(node.metric(SUBSCRIPTIONS, "") == 1.0)).await?;
    dispatcher.fan_out(APP, "ops", vec![entry(5)]).await?;
    assert_eq!(node.metric("barid_access_fanouts_total", "nobody"), 1.0);
    let mut bob = member(&node, "bob", &["ops"]).await?;
    dispatcher.fan_out(APP, "ops", vec![entry(6)]).await?;
    bob.expect_silence(QUIET).await?;
    subscribe(&mut bob, "ops").await?;
    // Its mailbox in Redis is empty, because the test is the dispatcher: it begins.
    dispatcher.fan_out(APP, "ops", vec![entry(1)]).await?;
    hears(&mut bob, "ops", &[1]).await?;
    drop((alice, bob));
    assert_eq!(node.stop(Duration::from_secs(5)).await?, Stopped::Clean);
    Ok(())
}

#[tokio::test]
async fn a_group_that_the_token_does_not_list_is_refused_and_the_connection_stays() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut alice = member(&node, "alice", &["eng", "*"]).await?;
    let mut bob = node.device("bob", "phone").await?;
    for (name, group) in [("alice", "ops"), ("alice", "Eng"), ("bob", "eng")] {
        let device = if name == "alice" { &mut alice } else { &mut bob };
        let (kind, fields) = asked(device, "subscribe", group).await?;
        assert_eq!((kind.as_str(), &fields["group"]), ("unsubscribed", &json!(group)));
        assert_eq!(fields["code"], 4500);
        assert!(fields["text"].as_str().is_some_and(|text| text.contains("does not list")));
        dispatcher.fan_out(APP, group, vec![entry(1)]).await?;
        device.expect_silence(QUIET).await?;
    }
    assert_eq!(node.metric("barid_access_subscriptions_refused_total", ""), 3.0);
    subscribe(&mut alice, "eng").await?;
    for (user, group) in [("carol", "everyone"), ("dave", ""), ("erin", "a\nb")] {
        let mut device = member(&node, user, &["eng"]).await?;
        device.send(&json!({ "subscribe": { "group": group } })).await?;
        assert_eq!(device.closed(PATIENCE).await?, 4501, "{group:?}");
    }
    let groups = json!(["everyone"]);
    let refused = Device::open(&node.url(), &token_for(APP, "alice", &groups)).await.unwrap_err();
    assert!(format!("{refused:?}").contains("401"), "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn a_subscription_too_many_is_refused_with_4504_and_the_others_stay() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.subscriptions_max = 2).await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut alice = member(&node, "alice", &["a", "b", "c"]).await?;
    subscribe(&mut alice, "a").await?;
    subscribe(&mut alice, "b").await?;
    subscribe(&mut alice, "a").await?;
    let (kind, fields) = asked(&mut alice, "subscribe", "c").await?;
    assert_eq!((kind.as_str(), &fields["code"]), ("unsubscribed", &json!(4504)));
    assert_eq!(node.metric("barid_access_limits_total", "subscriptions"), 1.0);
    for group in ["c", "b", "a"] {
        dispatcher.fan_out(APP, group, vec![entry(1)]).await?;
    }
    let mut heard =
        [next_message(&mut alice).await?.mailbox, next_message(&mut alice).await?.mailbox];
    heard.sort();
    assert_eq!(heard, ["a", "b"]);
    alice.expect_silence(QUIET).await?;
    asked(&mut alice, "unsubscribe", "a").await?;
    subscribe(&mut alice, "c").await
}

#[tokio::test]
async fn a_new_token_ends_the_subscriptions_that_it_does_not_list() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut alice = member(&node, "alice", &["eng", "ops"]).await?;
    subscribe(&mut alice, "eng").await?;
    subscribe(&mut alice, "ops").await?;
    let token = token_for(APP, "alice", &json!(["ops", "new"]));
    alice.send(&json!({ "refresh": { "token": token } })).await?;
    let Incoming::Other(kind, fields) = alice.next(PATIENCE).await? else { panic!("not told") };
    let told = (kind.as_str(), &fields["group"], &fields["code"]);
    assert_eq!(told, ("unsubscribed", &json!("eng"), &json!(4500)));
    dispatcher.fan_out(APP, "eng", vec![entry(1)]).await?;
    dispatcher.fan_out(APP, "ops", vec![entry(1)]).await?;
    hears(&mut alice, "ops", &[1]).await?;
    alice.expect_silence(QUIET).await?;
    subscribe(&mut alice, "new").await
}

#[tokio::test]
async fn hazard_09_a_user_a_group_and_an_app_of_one_name_are_three() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut user = node.device("eng", "phone").await?;
    let mut of_group = member(&node, "alice", &["eng"]).await?;
    let token = token_for("other", "bob", &json!(["eng"]));
    let mut of_other = Device::connect(&node.url(), &token, "phone").await?;
    subscribe(&mut of_group, "eng").await?;
    subscribe(&mut of_other, "eng").await?;
    dispatcher.fan_out(APP, "eng", vec![entry(1)]).await?;
    let (own, _) = world.accept("eng", "m1").await?;
    dispatcher.push(&world, "eng", own).await?;
    dispatcher.fan_out("other", "eng", vec![entry(1)]).await?;
    hears(&mut user, "", &[1]).await?;
    hears(&mut of_group, "eng", &[1]).await?;
    hears(&mut of_other, "eng", &[1]).await?;
    for device in [&mut user, &mut of_group, &mut of_other] {
        device.expect_silence(QUIET).await?;
    }
    Ok(())
}

/// Accepts a message for an audience into its mailbox. Returns the entry.
async fn accept(world: &World, audience: &Audience, id: &str) -> Result<Bytes> {
    let (entry, nodes) = world.accept_for_audience(audience, id).await?;
    ensure!(nodes.len() == 1, "{nodes:?}");
    Ok(entry)
}

#[tokio::test]
async fn hazard_162_messages_that_are_lost_on_the_way_are_read_from_the_mailbox() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut alice = member(&node, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    let mut entries = Vec::new();
    for n in 1..=9 {
        entries.push(accept(&world, &eng, &format!("m{n}")).await?);
    }
    let read = "barid_access_audience_reads_total";
    // Overtaken: nothing is read.
    dispatcher.fan_out(APP, "eng", vec![entries[1].clone()]).await?;
    dispatcher.fan_out(APP, "eng", vec![entries[0].clone(), entries[0].clone()]).await?;
    hears(&mut alice, "eng", &[1, 2]).await?;
    alice.expect_silence(Duration::from_millis(200)).await?;
    assert_eq!(node.metric(read, ""), 0.0);
    // 3 to 7 are lost, and 8 says so. 9 is lost as well, and the page has it.
    dispatcher.fan_out(APP, "eng", vec![entries[7].clone()]).await?;
    hears(&mut alice, "eng", &[3, 4, 5, 6, 7, 8, 9]).await?;
    dispatcher.fan_out(APP, "eng", entries).await?;
    alice.expect_silence(QUIET).await?;
    let reads = node.metric(read, "");
    assert!((1.0..=2.0).contains(&reads), "{reads} readings");
    Ok(())
}

#[tokio::test]
async fn hazard_164_a_new_connection_to_redis_shows_what_was_lost_last() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut alice = member(&node, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    accept(&world, &eng, "m1").await?;
    alice.expect_silence(QUIET).await?;
    world.redis.query::<i64>(&["CLIENT", "KILL", "TYPE", "normal"]).await?;
    let begun = Instant::now();
    hears(&mut alice, "eng", &[1]).await?;
    assert!(begun.elapsed() < Duration::from_secs(3), "by the journal? {:?}", begun.elapsed());
    Ok(())
}

/// Connects a member whose Hello names a position in a mailbox.
async fn returning(node: &Node, user: &str, position: &Value) -> Result<Device> {
    let hello = json!({ "device": "phone", "positions": [position] });
    let token = token_for(APP, user, &json!(["eng"]));
    Ok(Device::connect_with(&node.url(), &token, hello).await?.0)
}

/// Subscribes, and returns the position from which messages are delivered, with the mailbox's name.
async fn subscribed_at(device: &mut Device, group: &str) -> Result<Value> {
    let (kind, mut fields) = asked(device, "subscribe", group).await?;
    ensure!(kind == "subscribed", "{kind} {fields}");
    fields["position"]["mailbox"] = group.into();
    Ok(fields["position"].take())
}

#[tokio::test]
async fn hazard_165_a_member_that_returns_gets_what_it_missed_from_where_it_stood() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    let mut alice = member(&node, "alice", &["eng"]).await?;
    let start = subscribed_at(&mut alice, "eng").await?;
    assert_eq!((&start["epoch"], &start["seq"]), (&json!(0), &json!(0)), "no mailbox yet");
    for n in 1..=3 {
        let entry = accept(&world, &eng, &format!("m{n}")).await?;
        dispatcher.fan_out(APP, "eng", vec![entry]).await?;
    }
    hears(&mut alice, "eng", &[1, 2, 3]).await?;
    let at = subscribed_at(&mut alice, "eng").await?;
    assert_eq!(at["seq"], 3);
    alice.close().await?;
    // Away: more than a page.
    let mut entries = Vec::new();
    for n in 4..=150 {
        entries.push(world.accept_for_audience(&eng, &format!("m{n}")).await?.0);
    }
    let mut alice = returning(&node, "alice", &at).await?;
    assert_eq!(subscribed_at(&mut alice, "eng").await?, at);
    // The default bound of a group is 100 entries: what was evicted is missed.
    hears(&mut alice, "eng", &(51..=150).collect::<Vec<_>>()).await?;
    // Live again, and nothing twice, although records of before arrive late.
    dispatcher.fan_out(APP, "eng", entries.split_off(entries.len() - 20)).await?;
    let entry = accept(&world, &eng, "m151").await?;
    dispatcher.fan_out(APP, "eng", vec![entry]).await?;
    hears(&mut alice, "eng", &[151]).await?;
    alice.expect_silence(QUIET).await?;
    // A position at the end, one without a chain, and none.
    let here = subscribed_at(&mut alice, "eng").await?;
    let mut before = here.clone();
    before["seq"] = 149.into();
    before.as_object_mut().context("a position")?.remove("chain");
    for (user, position, missed) in
        [("bob", here.clone(), vec![]), ("carol", before, vec![150, 151])]
    {
        let mut device = returning(&node, user, &position).await?;
        subscribed_at(&mut device, "eng").await?;
        hears(&mut device, "eng", &missed).await?;
        device.expect_silence(QUIET).await?;
    }
    // Another history: all that is kept, and the device is told.
    let mut other = here;
    other["chain"] = (other["chain"].as_u64().context("a chain")? ^ 1).into();
    let mut dave = returning(&node, "dave", &other).await?;
    assert_eq!(subscribed_at(&mut dave, "eng").await?, other);
    let Incoming::Other(kind, told) = dave.next(PATIENCE).await? else {
        anyhow::bail!("not told of its reset")
    };
    assert_eq!((&*kind, &told["position"]["seq"]), ("subscribed", &json!(51)));
    hears(&mut dave, "eng", &(52..=151).collect::<Vec<_>>()).await
}

#[tokio::test]
async fn a_position_for_everyone_needs_no_subscription() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    for n in 1..=3 {
        world.accept_for_audience(&Audience::Everyone, &format!("m{n}")).await?;
    }
    let first = json!({ "mailbox": "everyone", "epoch": 0, "seq": 0 });
    let mut alice = returning(&node, "alice", &first).await?;
    let mut positions = Vec::new();
    for _ in 0..2 {
        let Incoming::Other(kind, told) = alice.next(PATIENCE).await? else {
            anyhow::bail!("not subscribed")
        };
        assert_eq!((&*kind, &told["group"]), ("subscribed", &json!("everyone")));
        positions.push(told["position"].clone());
    }
    assert_eq!(positions[1]["seq"], 0, "the history is another one than none");
    hears(&mut alice, "everyone", &[1, 2, 3]).await?;
    alice.expect_silence(QUIET).await
}

#[tokio::test]
async fn devices_that_return_together_share_the_pages_of_their_group() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    for n in 1..=90 {
        world.accept_for_audience(&eng, &format!("m{n}")).await?;
    }
    let first = json!({ "mailbox": "eng", "epoch": 0, "seq": 0 });
    let mut devices = Vec::new();
    for n in 0..30 {
        devices.push(returning(&node, &format!("user-{n}"), &first).await?);
    }
    for device in &mut devices {
        device.send(&json!({ "subscribe": { "group": "eng" } })).await?;
    }
    for device in &mut devices {
        for _ in 0..2 {
            ensure!(matches!(device.next(PATIENCE).await?, Incoming::Other(..)));
        }
        hears(device, "eng", &(1..=90).collect::<Vec<_>>()).await?;
    }
    let pages = "barid_access_audience_pages_total";
    let (read, shared) = (node.metric(pages, "read"), node.metric(pages, "shared"));
    assert!(read <= 8.0 && read + shared >= 60.0, "{read} read, {shared} shared");
    Ok(())
}

#[tokio::test]
async fn hazard_166_the_last_message_of_a_burst_that_was_lost_comes_within_ten_seconds()
-> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut alice = member(&node, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    for n in 1..=3 {
        let entry = accept(&world, &eng, &format!("m{n}")).await?;
        if n < 3 {
            dispatcher.fan_out(APP, "eng", vec![entry]).await?;
        }
    }
    hears(&mut alice, "eng", &[1, 2]).await?;
    let lost = Instant::now();
    hears(&mut alice, "eng", &[3]).await?;
    assert!(lost.elapsed() < Duration::from_secs(10), "{:?}", lost.elapsed());
    // A quiet group is not read again and again.
    let reads = node.metric("barid_access_audience_reads_total", "");
    alice.expect_silence(Duration::from_secs(6)).await?;
    assert_eq!(node.metric("barid_access_audience_reads_total", ""), reads);
    Ok(())
}

#[tokio::test]
async fn hazard_167_a_device_is_told_of_another_history_before_its_messages() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    for n in 1..=3 {
        world.accept_for_audience(&eng, &format!("m{n}")).await?;
    }
    let mut alice = member(&node, "alice", &["eng"]).await?;
    let at = subscribed_at(&mut alice, "eng").await?;
    assert_eq!(at["seq"], 3);
    // Redis loses everything. The node hears of the next message from the journal, or of a record for it.
    world.redis.query::<String>(&["FLUSHALL"]).await?;
    let (first, _) = world.accept_for_audience(&eng, "m1").await?;
    dispatcher.fan_out(APP, "eng", vec![first]).await?;
    let Incoming::Other(kind, told) = alice.next(PATIENCE).await? else {
        anyhow::bail!("not told")
    };
    assert_eq!((&*kind, &told["position"]["seq"]), ("subscribed", &json!(0)));
    assert_ne!(told["position"]["epoch"], at["epoch"]);
    hears(&mut alice, "eng", &[1]).await?;
    let (second, _) = world.accept_for_audience(&eng, "m2").await?;
    dispatcher.fan_out(APP, "eng", vec![second]).await?;
    hears(&mut alice, "eng", &[2]).await?;
    alice.expect_silence(QUIET).await
}

#[tokio::test]
async fn hazard_167_also_a_device_that_returned_or_knows_no_history_is_told() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    let mut alice = member(&node, "alice", &["eng"]).await?;
    let nowhere = subscribed_at(&mut alice, "eng").await?;
    assert_eq!(nowhere["epoch"], 0);
    alice.close().await?;
    let mut known = nowhere;
    for life in ["the first", "another"] {
        let mut alice = returning(&node, "alice", &known).await?;
        assert_eq!(subscribed_at(&mut alice, "eng").await?, known, "{life}");
        alice.expect_silence(QUIET).await?; // it reads the log from its end
        world.redis.query::<String>(&["FLUSHALL"]).await?;
        let (first, _) = world.accept_for_audience(&eng, "m1").await?;
        dispatcher.fan_out(APP, "eng", vec![first]).await?;
        let Incoming::Other(kind, told) = alice.next(PATIENCE).await? else {
            anyhow::bail!("not told of {life}")
        };
        assert_eq!((&*kind, &told["position"]["seq"]), ("subscribed", &json!(0)), "{life}");
        assert_ne!(told["position"]["epoch"], known["epoch"], "{life}");
        hears(&mut alice, "eng", &[1]).await?;
        known = subscribed_at(&mut alice, "eng").await?;
        assert_eq!(known["seq"], 1);
        alice.close().await?;
    }
    Ok(())
}

#[tokio::test]
async fn hazard_168_a_member_that_the_log_leaves_behind_reads_the_mailbox() -> Result<()> {
    let world = World::new().await?;
    // Room for a few messages.
    let node = world.node_with(|config| config.limits.fanout_bytes_max = 4_096).await?;
    let mut dispatcher = node.dispatcher().await?;
    let eng = Audience::Group(GroupId::new("eng")?);
    let mut alice = member(&node, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    let (mut first, behind) = (1, "barid_access_fanout_behind_total");
    // A batch is appended at once; whether the session reads in between is up to the scheduler.
    while node.metric(behind, "") < 3.0 {
        ensure!(first < 5_000, "its log never left it behind");
        let mut entries = Vec::new();
        for n in first..first + 90 {
            entries.push(accept(&world, &eng, &format!("m{n}")).await?);
        }
        dispatcher.fan_out(APP, "eng", entries).await?;
        hears(&mut alice, "eng", &(first..first + 90).collect::<Vec<_>>()).await?;
        first += 90;
    }
    alice.expect_silence(QUIET).await?;
    assert_eq!(node.metric(MISSED, ""), 0.0);
    Ok(())
}
