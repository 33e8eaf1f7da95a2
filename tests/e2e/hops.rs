//! Where a message's time goes.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barid_testkit::{Cluster, Role};
use tokio::time::sleep;

const PARTS: [(Role, &str); 4] = [
    (Role::Purger, "produced_taken"),
    (Role::Purger, "taken_accepted"),
    (Role::Dispatcher, "accepted_dispatched"),
    (Role::Access, "dispatched_written"),
];

/// How often a hop was counted, and its seconds in all.
async fn hop(cluster: &mut Cluster, role: Role, name: &str) -> Result<(f64, f64)> {
    let node = cluster.node(role, 0);
    let count = node.metric(&format!("barid_hop_seconds_count{{hop=\"{name}\"}}")).await?;
    Ok((count, node.metric(&format!("barid_hop_seconds_sum{{hop=\"{name}\"}}")).await?))
}

/// Likewise of all parts; those that came out below zero; the whole; until the acknowledgement.
async fn hops(cluster: &mut Cluster) -> Result<([(f64, f64); 4], f64, (f64, f64), (f64, f64))> {
    let (mut parts, mut negative) = ([(0.0, 0.0); 4], 0.0);
    for (part, (role, name)) in parts.iter_mut().zip(PARTS) {
        *part = hop(cluster, role, name).await?;
        negative += cluster.node(role, 0).metric("barid_hop_negative_total").await?;
    }
    let written = hop(cluster, Role::Access, "produced_written").await?;
    Ok((parts, negative, written, hop(cluster, Role::Access, "produced_acked").await?))
}

async fn until_acked(cluster: &mut Cluster, count: f64) -> Result<()> {
    let begun = Instant::now();
    while hop(cluster, Role::Access, "produced_acked").await?.0 < count {
        ensure!(begun.elapsed() < Duration::from_secs(10), "acknowledgements are not counted");
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hops_of_pushed_messages_add_up_to_the_whole_way() -> Result<()> {
    const MESSAGES: usize = 20;
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    for round in 0.. {
        let before = hops(&mut cluster).await?;
        let begun = Instant::now();
        for number in 0..MESSAGES {
            business.say("alice", &format!("{round}-{number}"), "").await?;
            let message = phone.message().await?;
            phone.ack(message.seq).await?;
            // One at a time: what overlaps would add up to more than the time that passed.
            let access = cluster.node(Role::Access, 0);
            let fast = access.metric("barid_access_delivered_total{path=\"fast\"}").await?;
            until_acked(&mut cluster, fast).await?;
        }
        let took = begun.elapsed().as_secs_f64();
        let after = hops(&mut cluster).await?;
        // What was repaired from the mailbox is on the first hops only.
        if after.2.0 - before.2.0 != MESSAGES as f64 {
            ensure!(round < 10, "no round without repairs: {before:?} {after:?}");
            continue;
        }
        let mut sum = 0.0;
        for (before, after) in before.0.iter().zip(after.0) {
            assert_eq!(after.0 - before.0, MESSAGES as f64);
            sum += after.1 - before.1;
        }
        let written = after.2.1 - before.2.1;
        // On a machine this busy a clock may be estimated late by more than a hop takes: that hop
        // counts as zero, and its neighbour as more than it was.
        let negative = after.1 > before.1;
        assert!(sum - written > -1e-3, "parts {sum} s, whole {written} s");
        assert!(negative || sum - written < 1e-3, "parts {sum} s, whole {written} s");
        let acked = after.3.1 - before.3.1;
        // Kafka's timestamps are rounded down, by half a millisecond a message.
        assert!(
            written < acked && acked < took + MESSAGES as f64 * 0.001,
            "{written} {acked} {took}"
        );
        return Ok(());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_waited_for_its_device_is_on_no_hop_of_the_node() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    business.say("alice", "waits", "").await?;
    let begun = Instant::now();
    while hop(&mut cluster, Role::Purger, "taken_accepted").await?.0 < 1.0 {
        ensure!(begun.elapsed() < Duration::from_secs(10), "it is not accepted");
        sleep(Duration::from_millis(10)).await;
    }
    let mut phone = cluster.device("alice", "phone").await?;
    assert_eq!(phone.take(1).await?, ["waits"]);
    // One that is pushed shows when the acknowledgement of the first has been counted, or not.
    let mut fast = 0.0;
    for number in 0.. {
        business.say("alice", &format!("pushed-{number}"), "").await?;
        phone.take(1).await?;
        let access = cluster.node(Role::Access, 0);
        fast = access.metric("barid_access_delivered_total{path=\"fast\"}").await?;
        if fast > 0.0 {
            break;
        }
        ensure!(number < 10, "nothing takes the fast path");
    }
    until_acked(&mut cluster, fast).await?;
    for name in ["dispatched_written", "written_acked", "produced_written", "produced_acked"] {
        assert_eq!(hop(&mut cluster, Role::Access, name).await?.0, fast, "{name}");
    }
    Ok(())
}
