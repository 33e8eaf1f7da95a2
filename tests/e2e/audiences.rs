//! Groups and everyone: from a record to the members on several access nodes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use barid_core::{Audience, GroupId, ReceiptSet};
use barid_testkit::device::{Delivered, Device, Incoming, PATIENCE, next_attempt};
use barid_testkit::{Cluster, Role, records, token};
use barid_wire::record::Push;
use serde_json::{Value, json};

const QUIET: Duration = Duration::from_millis(500);

/// Connects a device of a user whose token lists these groups, to an access node.
async fn member(cluster: &mut Cluster, node: usize, user: &str, groups: &[&str]) -> Result<Device> {
    let claims =
        json!({ "app": token::APP, "sub": user, "exp": 4_000_000_000_u64, "groups": groups });
    let url = cluster.url(node).await?;
    let hello = json!({ "device": "phone", "attempt": next_attempt() });
    let token = token::sign(&claims, token::SECRET);
    Ok(Device::connect_with(&url, &token, hello).await?.0)
}

async fn subscribe(device: &mut Device, group: &str) -> Result<()> {
    device.send(&json!({ "subscribe": { "group": group } })).await?;
    match device.next(PATIENCE).await? {
        Incoming::Other(kind, fields) if kind == "subscribed" => {
            ensure!(fields["group"] == group, "{fields}");
            Ok(())
        }
        other => anyhow::bail!("{other:?} instead of subscribed"),
    }
}

async fn hears(device: &mut Device, mailbox: &str, ids: &[&str]) -> Result<()> {
    for id in ids {
        let Delivered { mailbox: of, id: heard, .. } = loop {
            match device.next(PATIENCE).await? {
                Incoming::Message(message) => break message,
                // Another history begins, as that of a mailbox which did not exist.
                Incoming::Other(kind, _) if kind == "subscribed" => {}
                other => anyhow::bail!("{other:?} instead of {id}"),
            }
        };
        ensure!((&*of, &*heard) == (mailbox, *id), "{heard} of {of} instead of {id}");
    }
    Ok(())
}

fn to(audience: Audience, id: &str) -> Push {
    Push { to: audience.into(), ..records::text("nobody", id, "for many") }
}

fn to_group(group: &str, id: &str) -> Push {
    to(Audience::Group(GroupId::new(group).expect("a group")), id)
}

/// Records for audiences with members on a node. A late one is read from the mailbox as well.
async fn fanouts(cluster: &mut Cluster, node: usize) -> Result<f64> {
    let metrics = cluster.node(Role::Access, node).metrics().await?;
    let sum = |result| metrics.sum_of("barid_access_fanouts_total", "result", result);
    Ok(sum("told") + sum("not_next") + sum("nobody"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_for_a_group_reaches_its_members_on_all_nodes_and_goes_to_no_other_node()
-> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 3).start().await?;
    let business = cluster.business()?;
    let mut members = Vec::new();
    for (node, user) in [(0, "alice"), (0, "bob"), (1, "carol")] {
        let mut device = member(&mut cluster, node, user, &["eng", "ops"]).await?;
        subscribe(&mut device, "eng").await?;
        members.push(device);
    }
    let mut listed_only = member(&mut cluster, 2, "dave", &["eng"]).await?;
    let asked = ReceiptSet::ACCEPTED.with(ReceiptSet::DUPLICATE);
    for id in ["g1", "g2", "g2", "g3"] {
        business.send(&Push { receipts: asked, ..to_group("eng", id) }).await?;
    }
    business.send(&to_group("ops", "unheard")).await?;
    for device in &mut members {
        hears(device, "eng", &["g1", "g2", "g3"]).await?;
        device.expect_silence(QUIET).await?;
    }
    listed_only.expect_silence(QUIET).await?;
    let mut told = Vec::new();
    for node in 0..3 {
        told.push(fanouts(&mut cluster, node).await?);
    }
    assert_eq!(told, [3.0, 3.0, 0.0], "one record to each node with members");
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    let mut kinds = Vec::new();
    while kinds.len() < 4 {
        let receipt = receipts.next(PATIENCE).await?.json()?;
        assert_eq!((&receipt["mailbox"], &receipt["user"]), (&json!("eng"), &Value::Null));
        let text = |field: &str| receipt[field].as_str().unwrap_or_default().to_owned();
        kinds.push((text("id"), text("kind"), receipt["seq"].as_u64()));
    }
    kinds.sort();
    let accepted = |id: &str, seq| (id.to_owned(), "accepted".to_owned(), Some(seq));
    let duplicate = ("g2".to_owned(), "duplicate".to_owned(), None);
    assert_eq!(kinds, [accepted("g1", 1), accepted("g2", 2), duplicate, accepted("g3", 3)]);
    // A node whose last member has left goes on for a while; one whose first member came is told of what comes then.
    members.pop().context("carol")?.close().await?;
    subscribe(&mut listed_only, "eng").await?;
    business.send(&to_group("eng", "g4")).await?;
    for device in members.iter_mut().chain([&mut listed_only]) {
        hears(device, "eng", &["g4"]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_for_everyone_reaches_every_device_of_the_app() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let mut devices = Vec::new();
    for (node, user) in [(0, "alice"), (1, "bob"), (1, "carol")] {
        devices.push(member(&mut cluster, node, user, &[]).await?);
    }
    // A node is listed right after the first session of the app; nothing tells a device.
    for node in 0..2 {
        let listed = async {
            while cluster.node(Role::Access, node).metric("barid_access_audiences").await? < 1.0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(PATIENCE, listed).await.context("not listed")??;
    }
    let record = Push { receipts: ReceiptSet::ACCEPTED, ..to(Audience::Everyone, "e1") };
    cluster.business()?.send(&record).await?;
    let receipt = cluster.reader(&cluster.topics().receipts)?.next(PATIENCE).await?.json()?;
    assert_eq!((&receipt["mailbox"], &receipt["kind"]), (&json!("everyone"), &json!("accepted")));
    for device in &mut devices {
        hears(device, "everyone", &["e1"]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_heard_again_after_its_node_has_started_anew() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).durable_redis().start().await?;
    let business = cluster.business()?;
    let mut alice = member(&mut cluster, 0, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    business.send(&to_group("eng", "before")).await?;
    hears(&mut alice, "eng", &["before"]).await?;
    // The node is killed: its listing stays, and leads to no harm.
    cluster.kill(Role::Access, 0)?;
    let mut bob = member(&mut cluster, 1, "bob", &["eng"]).await?;
    subscribe(&mut bob, "eng").await?;
    business.send(&to_group("eng", "one-node")).await?;
    hears(&mut bob, "eng", &["one-node"]).await?;
    cluster.launch(Role::Access, 0).await?;
    cluster.wait_ready().await?;
    let mut alice = member(&mut cluster, 0, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    business.send(&to_group("eng", "both")).await?;
    hears(&mut alice, "eng", &["both"]).await?;
    hears(&mut bob, "eng", &["both"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_returns_to_another_node_gets_what_its_group_was_sent() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let business = cluster.business()?;
    let mut alice = member(&mut cluster, 0, "alice", &["eng"]).await?;
    subscribe(&mut alice, "eng").await?;
    for n in 1..=3 {
        business.send(&to_group("eng", &format!("m{n}"))).await?;
    }
    hears(&mut alice, "eng", &["m1", "m2", "m3"]).await?;
    alice.send(&json!({ "subscribe": { "group": "eng" } })).await?;
    let Incoming::Other(_, mut told) = alice.next(PATIENCE).await? else {
        anyhow::bail!("not told where it stands")
    };
    // The node is killed with its session. Nobody is listening when the rest is sent.
    cluster.kill(Role::Access, 0)?;
    for n in 4..=9 {
        business.send(&to_group("eng", &format!("m{n}"))).await?;
    }
    told["position"]["mailbox"] = "eng".into();
    let claims =
        json!({ "app": token::APP, "sub": "alice", "exp": 4_000_000_000_u64, "groups": ["eng"] });
    let positions = json!([told["position"]]);
    let hello = json!({ "device": "phone", "attempt": next_attempt(), "positions": positions });
    let url = cluster.url(1).await?;
    let token = token::sign(&claims, token::SECRET);
    let (mut alice, _) = Device::connect_with(&url, &token, hello).await?;
    subscribe(&mut alice, "eng").await?;
    hears(&mut alice, "eng", &["m4", "m5", "m6", "m7", "m8", "m9"]).await?;
    business.send(&to_group("eng", "m10")).await?;
    hears(&mut alice, "eng", &["m10"]).await?;
    alice.expect_silence(QUIET).await
}
