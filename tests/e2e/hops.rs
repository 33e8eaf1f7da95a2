//! The latencies of a message's hops.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barid_testkit::cluster::Node;
use barid_testkit::{Cluster, Role};
use tokio::time::sleep;

const PARTS: [(Role, &str); 4] = [
    (Role::Purger, "produced_taken"),
    (Role::Purger, "taken_accepted"),
    (Role::Dispatcher, "accepted_dispatched"),
    (Role::Access, "dispatched_written"),
];

/// The count and the total seconds of a hop.
async fn hop(cluster: &mut Cluster, role: Role, name: &str) -> Result<(f64, f64)> {
    let node = cluster.node(role, 0);
    let metrics = node.metrics().await?;
    let of = |what: &str| metrics.sum_of(&format!("barid_hop_seconds_{what}"), "hop", name);
    Ok((of("count"), of("sum")))
}

async fn delivered_fast(access: &mut Node) -> Result<f64> {
    Ok(access.metrics().await?.sum_of("barid_access_delivered_total", "path", "fast"))
}

/// Those of all parts, the number of negative ones, the whole way, and the way to the acknowledgement.
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
            business.send_text("alice", &format!("{round}-{number}"), "").await?;
            let message = phone.message().await?;
            phone.ack(message.seq).await?;
            // One at a time: overlapping hops would add up to more than the time that passed.
            let access = cluster.node(Role::Access, 0);
            let fast = delivered_fast(access).await?;
            until_acked(&mut cluster, fast).await?;
        }
        let took = begun.elapsed().as_secs_f64();
        let after = hops(&mut cluster).await?;
        // Messages that were read from the mailbox count on the first hops only.
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
        // On a busy machine the estimate of a clock may be off by more than a hop takes: that hop counts as zero,
        // and the next one as longer.
        let negative = after.1 > before.1;
        assert!(sum - written > -1e-3, "parts {sum} s, whole {written} s");
        assert!(negative || sum - written < 1e-3, "parts {sum} s, whole {written} s");
        let acked = after.3.1 - before.3.1;
        // Kafka's timestamps are rounded down, by half a millisecond on average.
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
    business.send_text("alice", "waits", "").await?;
    let begun = Instant::now();
    while hop(&mut cluster, Role::Purger, "taken_accepted").await?.0 < 1.0 {
        ensure!(begun.elapsed() < Duration::from_secs(10), "it is not accepted");
        sleep(Duration::from_millis(10)).await;
    }
    let mut phone = cluster.device("alice", "phone").await?;
    assert_eq!(phone.receive(1).await?, ["waits"]);
    // A message of the fast path shows that the acknowledgement of the first one has been counted.
    let mut fast = 0.0;
    for number in 0.. {
        business.send_text("alice", &format!("pushed-{number}"), "").await?;
        phone.receive(1).await?;
        let access = cluster.node(Role::Access, 0);
        fast = delivered_fast(access).await?;
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
