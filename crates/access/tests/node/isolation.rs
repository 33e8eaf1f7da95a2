//! Apps share nodes, Redis and Kafka, and nothing else; nor do users whose names look alike.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::device::PATIENCE;
use barid_testkit::{Device, token};
use barid_wire::internal::NodePush;
use serde_json::{Value, json};

use crate::support::*;

const QUIET: Duration = Duration::from_millis(200);

fn token_in(app: &str, user: &str) -> String {
    token::token(app, user, Duration::from_secs(3600))
}

#[tokio::test]
async fn apps_with_the_same_user_share_nothing() -> Result<()> {
    // One shard: nothing but names keeps them apart.
    let world = World::with_shards(1).await?;
    let node = world.node_with(|config| config.redis.shards = 1).await?;
    let mut dispatcher = node.dispatcher().await?;
    let hello = |attempt: u64| json!({ "device": "phone", "attempt": attempt });
    let connect = async |app: &str, hello: Value| {
        Device::connect_with(&node.url(), &token_in(app, "alice"), hello).await
    };
    let (mut ours, welcome) = connect("demo", hello(7)).await?;
    // A later attempt of the same device, of another app: it replaces nothing.
    let (mut theirs, other) = connect("shop", hello(8)).await?;
    let epoch = |welcome: &Value| welcome["positions"][0]["epoch"].clone();
    assert_ne!(epoch(&welcome), epoch(&other));
    for id in ["m1", "m2"] {
        let (entry, _) = world.accept_for(&user_of("demo", "alice"), id, |_| ()).await?;
        dispatcher.push_to(&world, &user_of("demo", "alice"), entry).await?;
        assert_eq!(ours.message().await?.id, id);
    }
    // A message that was not sent to this session is not acknowledged by it.
    theirs.ack(2).await?;
    theirs.expect_silence(QUIET).await?;
    world.cursor_becomes("alice", "phone", 0).await?;
    assert_eq!(world.inspect("alice").await?.entries.len(), 2);
    ours.ack(2).await?;
    world.cursor_becomes("alice", "phone", 2).await?;

    // A push that names the other app's connection reaches nobody.
    let route = world.inspect("alice").await?.routes.remove(0);
    let (entry, _) = world.accept_for(&user_of("shop", "alice"), "s1", |_| ()).await?;
    let push = NodePush {
        app: "shop".into(),
        user: "alice".into(),
        envelope: entry,
        connections: vec![route.session.connection.0],
        dispatched_after_us: None,
    };
    let reply = dispatcher.send(route.session.incarnation.0, vec![push], vec![]).await?;
    assert_eq!(reply.gone.len(), 1);
    ours.expect_silence(QUIET).await?;

    // Positions of the other app's mailbox open nothing, and hide nothing.
    theirs.close().await?;
    let mut stolen = welcome["positions"][0].clone();
    stolen["seq"] = 2.into();
    let (mut theirs, _) =
        connect("shop", json!({ "device": "phone", "attempt": 9, "positions": [stolen] })).await?;
    let first = theirs.message().await?;
    assert_eq!((first.seq, &*first.id), (1, "s1"));
    theirs.expect_silence(QUIET).await?;

    // Nor does a token of the other app, for the same user.
    theirs.send(&json!({ "refresh": { "token": token_in("demo", "alice") } })).await?;
    assert_eq!(theirs.closed(PATIENCE).await?, 4500);
    ours.expect_silence(QUIET).await
}

#[tokio::test]
async fn apps_and_users_that_look_alike_share_nothing() -> Result<()> {
    // One shard: nothing but names keeps them apart.
    let world = World::with_shards(1).await?;
    let node = world.node_with(|config| config.redis.shards = 1).await?;
    let mut dispatcher = node.dispatcher().await?;
    let names = [
        ("demo", "alice"),
        ("Demo", "alice"),
        ("demo.", "alice"),
        ("demo", "Alice"),
        ("demo", "alice "),
        ("demo", " alice"),
        ("demo", "аlice"), // a Cyrillic а
        ("demo", "alice\u{200b}"),
        ("demo", "u:alice"),
        ("demo", "alice:phone"),
        ("demo", "demo:alice"),
        ("demo", "{0}:h:u:demo:alice"),
        ("demo", "*"),
        ("demo", "é"),
        ("demo", "e\u{301}"), // the same to the eye
    ];
    let mut devices = Vec::new();
    for (app, user) in names {
        let device = Device::connect(&node.url(), &token_in(app, user), "phone").await;
        devices.push(device.map_err(|error| error.context(format!("{app}/{user}")))?);
    }
    for (index, (app, user)) in names.iter().enumerate() {
        let (user, id) = (user_of(app, user), format!("m{index}"));
        let (entry, online) = world.accept_for(&user, &id, |_| ()).await?;
        assert!(online);
        assert!(dispatcher.push_to(&world, &user, entry).await?.gone.is_empty());
    }
    for (index, device) in devices.iter_mut().enumerate() {
        assert_eq!(device.receive(1).await?, [format!("m{index}")], "{:?}", names[index]);
    }
    for device in &mut devices {
        device.expect_silence(Duration::from_millis(20)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn hazard_131_a_batch_above_the_bound_ends_its_stream_with_the_reason() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let large = NodePush { envelope: vec![0; 9 << 20].into(), ..Default::default() };
    let told = dispatcher.send(0, vec![large], vec![]).await.unwrap_err().to_string();
    assert!(told.contains("decoded message length too large"), "{told}");
    node.dispatcher().await?.send(0, vec![], vec![]).await?;
    Ok(())
}
