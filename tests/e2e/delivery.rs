//! From a record to a device.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_core::{DeviceId, ReceiptSet, UserId};
use barid_testkit::device::{Device, Incoming, PATIENCE};
use barid_testkit::{Cluster, Relay, Role, records};
use barid_wire::record::{BodyKind, Push, Recipients};
use bytes::Bytes;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::listener::Listener;

#[tokio::test(flavor = "multi_thread")]
async fn a_push_reaches_an_online_device_and_its_ack_is_told() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let order = json!({"order": 7, "lines": [1, 2.5, null, "x"]});
    let long = "barid ".repeat(5_000);
    let asked = ReceiptSet::ACCEPTED.with(ReceiptSet::SENT).with(ReceiptSet::ACKED);
    for (id, kind, payload, body) in [
        ("text", BodyKind::Text, "hello".into(), json!({"text": "hello"})),
        ("json", BodyKind::Json, order.to_string().into(), json!({"json": order})),
        ("data", BodyKind::Data, Bytes::from_static(&[0, 1, 2, 3]), json!({"data": "AAECAw=="})),
        ("long", BodyKind::Text, long.clone().into(), json!({"text": long})),
    ] {
        let record = records::text("alice", id, "");
        business.send(&Push { kind, payload, receipts: asked, ..record }).await?;
        let message = phone.message().await?;
        assert_eq!((message.id.as_str(), &message.body), (id, &body));
        phone.ack(message.seq).await?;
    }
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    let mut told = Vec::new();
    while told.len() < 12 {
        let record = receipts.next(PATIENCE).await?;
        let receipt = record.json()?;
        assert_eq!(record.key, receipt["id"].as_str().unwrap());
        assert_eq!((&receipt["app"], &receipt["user"]), (&json!("demo"), &json!("alice")));
        told.push((record.key, receipt["kind"].as_str().unwrap_or_default().to_owned()));
    }
    for id in ["text", "json", "data", "long"] {
        for kind in ["accepted", "sent", "acked"] {
            assert!(told.contains(&(id.into(), kind.into())), "{kind} of {id} not in {told:?}");
        }
    }
    phone.expect_silence(Duration::from_millis(500)).await
}

/// Closes a connection, and waits until its last acknowledgement is stored: before that, the device's next session is
/// sent the message again, which clients drop.
async fn leave(cluster: &mut Cluster, device: Device) -> Result<()> {
    let sessions = "barid_access_sessions";
    let left = cluster.node(Role::Access, 0).metric(sessions).await? - 1.0;
    device.close().await?;
    let deadline = Instant::now() + PATIENCE;
    while cluster.node(Role::Access, 0).metric(sessions).await? > left {
        ensure!(Instant::now() < deadline, "the session is still there");
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_while_a_device_was_away_is_delivered_before_anything_newer() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    business.send_text("alice", "first", "1").await?;
    assert_eq!(phone.receive(1).await?, ["first"]);
    leave(&mut cluster, phone).await?;
    for id in ["away-1", "away-2", "away-3"] {
        business.send_text("alice", id, "offline").await?;
    }
    let mut phone = cluster.device("alice", "phone").await?;
    business.send_text("alice", "newer", "online").await?;
    assert_eq!(phone.receive(4).await?, ["away-1", "away-2", "away-3", "newer"]);
    phone.expect_silence(Duration::from_millis(300)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_was_never_there_finds_the_messages_on_the_first_visit() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    for id in ["a", "b"] {
        business.send_text("new", id, "welcome").await?;
    }
    // The messages may not be accepted yet.
    let mut phone = cluster.device("new", "phone").await?;
    assert_eq!(phone.receive(2).await?, ["a", "b"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_devices_of_a_user_have_their_own_cursors() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let mut tablet = cluster.device("alice", "tablet").await?;
    business.send_text("alice", "both", "").await?;
    assert_eq!(phone.receive(1).await?, ["both"]);
    assert_eq!(tablet.receive(1).await?, ["both"]);
    leave(&mut cluster, tablet).await?;
    business.send_text("alice", "phone-now", "tablet later").await?;
    assert_eq!(phone.receive(1).await?, ["phone-now"]);
    // Messages acknowledged by the phone still wait for the tablet.
    let mut tablet = cluster.device("alice", "tablet").await?;
    assert_eq!(tablet.receive(1).await?, ["phone-now"]);
    let tablet_only =
        Recipients::User { user: UserId::new("alice")?, device: Some(DeviceId::new("tablet")?) };
    let record = records::text("alice", "tablet-only", "t");
    business.send(&Push { to: tablet_only, ..record }).await?;
    business.send_text("alice", "after", "").await?;
    assert_eq!(tablet.receive(2).await?, ["tablet-only", "after"]);
    assert_eq!(phone.receive(1).await?, ["after"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_reconnects_in_mid_stream_goes_on_where_it_stopped() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let feed = tokio::spawn(async move {
        for number in 0..200 {
            business.send_text("alice", &format!("m{number}"), "stream").await?;
        }
        anyhow::Ok(())
    });
    let mut acknowledged = 0;
    let mut seen = Vec::new();
    while seen.len() < 200 {
        let mut phone = cluster.device("alice", "phone").await?;
        // Each connection acknowledges some and receives three more that it never acknowledges.
        let enough = seen.len() + 37.min(200 - seen.len());
        while seen.len() < enough {
            let message = phone.message().await?;
            if message.seq <= acknowledged {
                continue; // sent before the last acknowledgement arrived: handled before
            }
            assert_eq!(message.seq, acknowledged + 1, "resumed behind the last acknowledged one");
            seen.push(message.id);
            acknowledged = message.seq;
            phone.ack(message.seq).await?;
        }
        for _ in 0..3.min(200 - seen.len()) {
            phone.message().await?;
        }
        phone.close().await?;
    }
    feed.await??;
    let wanted: Vec<String> = (0..200).map(|n| format!("m{n}")).collect();
    assert_eq!(seen, wanted);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_shows_everything_once_over_a_network_that_breaks() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let address = cluster.node(barid_testkit::Role::Access, 0).address("ws").await?;
    let relay = Relay::to(address).await?;
    let listener = Listener::start(&format!("ws://{}", relay.address()), "alice", "phone")?;
    listener.connected().await?;
    for number in 0..150 {
        business.send_text("alice", &format!("m{number}"), "through the storm").await?;
        if number % 30 == 29 {
            relay.cut();
        }
    }
    listener.count(150).await?;
    let wanted: Vec<String> = (0..150).map(|n| format!("m{n}")).collect();
    assert_eq!(listener.ids(), wanted);
    assert!(listener.connections() > 1);
    listener.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_record_reaches_several_users_and_names_do_not_mix() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let users = ["eng", "b:c", "c", "u:eng", "ünïcødé ☂", "{17}"];
    let mut devices = Vec::new();
    for user in users {
        devices.push(cluster.device(user, "d").await?);
    }
    let all = Recipients::Users(users.into_iter().map(UserId::new).collect::<Result<_, _>>()?);
    business.send(&Push { to: all, ..records::text("eng", "all", "to each") }).await?;
    for user in users {
        business.send_text(user, &format!("for {user}"), "one").await?;
    }
    for (user, device) in users.iter().zip(&mut devices) {
        // The two have different keys and partitions, so their order is not promised.
        let ids: BTreeSet<String> = device.receive(2).await?.into_iter().collect();
        assert_eq!(ids, BTreeSet::from(["all".to_owned(), format!("for {user}")]));
        // Nothing for another user. What waited for two seconds in the socket may have been sent again.
        while let Ok(Incoming::Message(message)) = device.next(Duration::from_millis(50)).await {
            ensure!(ids.contains(&message.id), "{message:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_comes_again_is_shown_once() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let twice = Push { receipts: ReceiptSet::DUPLICATE, ..records::text("alice", "twice", "once") };
    for _ in 0..3 {
        business.send(&twice).await?;
    }
    business.send_text("alice", "after", "").await?;
    assert_eq!(phone.receive(2).await?, ["twice", "after"]);
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    for _ in 0..2 {
        assert_eq!(receipts.next(PATIENCE).await?.json()?["kind"], "duplicate");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_are_kept_and_told_and_harm_nobody() -> Result<()> {
    // One partition: the valid records are behind the invalid ones.
    let mut cluster = Cluster::builder().partitions(1).start().await?;
    let business = cluster.business()?;
    let push = cluster.topics().push.clone();
    let mut phone = cluster.device("alice", "phone").await?;
    let bad: [&[u8]; 7] = [
        b"",
        b"not a record",
        b"{\"id\":",
        b"{\"id\":\"x1\",\"app\":\"demo\",\"to\":{\"user\":\"alice\"}}",
        b"{\"id\":\"x2\",\"app\":\"de:mo\",\"to\":{\"user\":\"alice\"},\"text\":\"a\"}",
        b"{\"id\":\"x3\",\"app\":\"demo\",\"to\":{\"user\":\"alice\"},\"text\":\"a\",\"colour\":1}",
        b"\xff\xfe\x00\x01",
    ];
    for (number, bytes) in bad.iter().enumerate() {
        business.produce(&push, "alice", bytes).await?;
        business.send_text("alice", &format!("good-{number}"), "between").await?;
    }
    let ids = phone.receive(bad.len()).await?;
    assert_eq!(ids, (0..bad.len()).map(|n| format!("good-{n}")).collect::<Vec<_>>());

    let dead = cluster.reader(&cluster.topics().dead)?;
    // Dead letters may be in any order.
    let mut missing = BTreeSet::from(bad);
    while !missing.is_empty() {
        let record = dead.next(PATIENCE).await?;
        assert!(missing.remove(record.value.as_slice()), "{record:?}");
        assert_eq!((record.key.as_str(), &record.headers["barid-topic"]), ("alice", &push));
        for header in ["barid-code", "barid-partition", "barid-offset"] {
            assert!(record.headers.contains_key(header), "{header} in {:?}", record.headers);
        }
        let names_the_key = record.headers["barid-reason"].contains("colour");
        assert_eq!(names_the_key, record.value == bad[5], "{record:?}");
    }
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    // Receipts name the records whose id could be decoded.
    let mut missing = BTreeSet::from(["x1", "x2", "x3"]);
    while !missing.is_empty() {
        let receipt = receipts.next(PATIENCE).await?.json()?;
        assert_eq!(receipt["kind"], "refused");
        assert!(receipt["reason"].as_str().is_some_and(|r| !r.is_empty()), "{receipt}");
        missing.remove(receipt["id"].as_str().unwrap_or_default());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_does_not_delay_what_is_urgent() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let (high, bulk) = (cluster.topics().high.clone(), cluster.topics().bulk.clone());
    let mut urgent = cluster.device("urgent", "d").await?;
    let mut flood = Vec::new();
    for number in 0..4_000 {
        let (user, id) = (format!("c{}", number % 400), format!("b{number}"));
        let record = records::text(&user, &id, "campaign");
        let (business, bulk) = (business.clone(), bulk.clone());
        flood.push(tokio::spawn(async move { business.send_to(&bulk, &record).await }));
    }
    for number in 0..10 {
        let id = format!("h{number}");
        business.send_to(&high, &records::text("urgent", &id, "now")).await?;
        let start = Instant::now();
        assert_eq!(urgent.receive(1).await?, [id]);
        assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
    }
    for task in flood {
        task.await??;
    }
    // Bulk messages arrive as well.
    let mut last = cluster.device("c399", "d").await?;
    let ids: BTreeSet<String> = last.receive(10).await?.into_iter().collect();
    assert_eq!(ids, (0..10).map(|n| format!("b{}", n * 400 + 399)).collect());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expired_while_a_device_was_away_is_skipped_and_said() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let short = records::text("alice", "short", "now or never");
    business.send(&Push { ttl_ms: 1_000, ..short }).await?;
    business.send_text("alice", "lasting", "").await?;
    sleep(Duration::from_millis(2_500)).await;
    let mut phone = Device::open(&cluster.url(0).await?, &cluster.token("alice")).await?;
    phone.send(&json!({"hello": {"device": "phone"}})).await?;
    let mut skipped = None;
    loop {
        match phone.next(PATIENCE).await? {
            Incoming::Skip(skip) => skipped = Some(skip),
            Incoming::Message(message) => {
                assert_eq!((message.seq, message.id.as_str()), (2, "lasting"));
                break;
            }
            Incoming::Welcome(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let skip = skipped.expect("a skip before the message");
    assert_eq!((&skip["to"], &skip["why"]), (&json!(1), &json!("expired")));
    Ok(())
}
