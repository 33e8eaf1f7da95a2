//! Traces: the same trace id in the record, in every role's log, and in the receipts.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barid_core::ReceiptSet;
use barid_testkit::device::PATIENCE;
use barid_testkit::grpc::{NodeStream, audience_entry};
use barid_testkit::token::APP;
use barid_testkit::{Cluster, Role, records};
use barid_wire::record::Push;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::sleep;

const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const NOT_SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// The hops of a trace in a role's log, each `hop` or `hop how`.
fn hops(cluster: &mut Cluster, role: Role, trace_id: &str) -> Result<Vec<String>> {
    let output = cluster.node(role, 0).output()?;
    let events = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ours = events.filter(|event| {
        event["target"] == "barid::trace" && event["fields"]["trace_id"] == trace_id
    });
    let hop = |event: Value| {
        let fields = &event["fields"];
        assert_eq!((&fields["id"], &fields["app"]), (&json!("m"), &json!("demo")), "{event}");
        let since = fields["since_produced_us"].as_i64();
        assert!(since.is_some_and(|us| us.abs() < 60_000_000), "{event}");
        let words = [&fields["hop"], &fields["how"]].map(|word| word.as_str().unwrap_or("?"));
        words.join(" ").trim().to_owned()
    };
    Ok(ours.map(hop).collect())
}

/// Waits until the log has this hop.
async fn until(cluster: &mut Cluster, role: Role, hop: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let seen = hops(cluster, role, TRACE_ID)?;
        if seen.iter().any(|seen| seen == hop) {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "{hop} is not in {seen:?} of {role:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sampled_message_is_found_in_every_log_and_receipt_by_its_trace_id() -> Result<()> {
    let mut cluster = Cluster::builder().set("log.format", "json").start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let topic = cluster.topics().push.clone();
    let record = Push { receipts: ReceiptSet::ALL, ..records::text("alice", "m", "hi") };
    let value = records::json(&record);
    let headers = [("traceparent", SAMPLED)];
    business.produce_with(&topic, "alice", &value, &headers).await?;
    // Not acknowledged, so that it is re-sent.
    let first = phone.message().await?;
    until(&mut cluster, Role::Delayer, "resent 1").await?;
    phone.message().await?;
    phone.ack(first.seq).await?;
    until(&mut cluster, Role::Access, "acked").await?;
    until(&mut cluster, Role::Dispatcher, "dispatched resend").await?;
    // The repeated record is a duplicate, and the invalid one is refused.
    business.produce_with(&topic, "alice", &value, &headers).await?;
    let flawed = r#"{"id":"m","app":"demo","text":"for nobody"}"#;
    business.produce_with(&topic, "alice", flawed.as_bytes(), &headers).await?;
    until(&mut cluster, Role::Purger, "refused no_audience").await?;

    let purger = hops(&mut cluster, Role::Purger, TRACE_ID)?;
    assert_eq!(purger, ["taken", "accepted", "taken", "refused no_audience"]);
    let lines = cluster.node(Role::Purger, 0).process()?.output();
    let taken = lines.lines().find(|line| line.contains("taken") && line.contains(TRACE_ID));
    assert!(taken.is_some_and(|line| line.contains("alice")), "the record's only user: {taken:?}");
    let dispatcher = hops(&mut cluster, Role::Dispatcher, TRACE_ID)?;
    assert_eq!(dispatcher[..2], ["dispatched", "dispatched resend"], "{dispatcher:?}");
    let access = hops(&mut cluster, Role::Access, TRACE_ID)?;
    assert!(access.contains(&"written sync".to_owned()), "{access:?}");
    assert_eq!(access.iter().filter(|hop| *hop == "acked").count(), 1, "{access:?}");

    let receipts = cluster.reader(&cluster.topics().receipts)?;
    let mut kinds = BTreeSet::new();
    while kinds.len() < 5 {
        let receipt = receipts.next(PATIENCE).await?.json()?;
        assert_eq!(receipt["traceparent"], SAMPLED, "{receipt}");
        kinds.insert(receipt["kind"].as_str().unwrap_or_default().to_owned());
    }
    let told = ["accepted", "acked", "duplicate", "refused", "sent"].map(str::to_owned);
    assert_eq!(kinds, BTreeSet::from(told));
    let dead = cluster.reader(&cluster.topics().dead)?.next(PATIENCE).await?;
    assert_eq!(dead.headers["traceparent"], SAMPLED);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_sampled_is_not_logged_and_what_is_malformed_is_ignored() -> Result<()> {
    let mut cluster = Cluster::builder().set("log.format", "json").start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    let topic = cluster.topics().push.clone();
    for (id, header, told) in
        [("a", NOT_SAMPLED, json!(NOT_SAMPLED)), ("b", "00-junk", json!(null))]
    {
        let record = Push { receipts: ReceiptSet::ACKED, ..records::text("alice", id, "hi") };
        let headers = [("traceparent", header)];
        business.produce_with(&topic, "alice", &records::json(&record), &headers).await?;
        phone.receive(1).await?;
        let receipt = receipts.next(PATIENCE).await?.json()?;
        assert_eq!((&receipt["id"], &receipt["traceparent"]), (&json!(id), &told));
    }
    for role in Role::ALL {
        let node = cluster.node(role, 0);
        assert!(!node.output()?.contains("barid::trace"), "{role:?}");
        assert_eq!(node.metric("barid_trace_events_total").await?, 0.0);
    }
    let purger = cluster.node(Role::Purger, 0);
    assert_eq!(purger.metric("barid_purger_traceparents_ignored_total").await?, 1.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_sampled_message_for_everyone_each_node_tells_once_that_it_is_written() -> Result<()> {
    let mut cluster = Cluster::builder().set("log.format", "json").start().await?;
    let node = cluster.node(Role::Access, 0).address("grpc").await?;
    let mut devices = Vec::new();
    for user in ["alice", "bob", "carol"] {
        devices.push(cluster.device(user, "phone").await?);
    }
    let mut dispatcher = NodeStream::connect(node).await?;
    let entry = |seq, traceparent: &'static str| {
        audience_entry(seq, "m", Bytes::from_static(b"hi"), |entry| {
            entry.traceparent = traceparent.into();
        })
    };
    dispatcher.fan_out(APP, "", vec![entry(1, NOT_SAMPLED), entry(2, SAMPLED)]).await?;
    dispatcher.fan_out(APP, "", vec![entry(3, "")]).await?;
    for device in &mut devices {
        for seq in 1..=3 {
            assert_eq!(device.message().await?.seq, seq);
        }
    }
    until(&mut cluster, Role::Access, "written fanout").await?;
    assert_eq!(hops(&mut cluster, Role::Access, TRACE_ID)?, ["written fanout"]);
    let logged = cluster.node(Role::Access, 0).metric("barid_trace_events_total").await?;
    assert_eq!(logged, 1.0, "the other one is not sampled");
    Ok(())
}
