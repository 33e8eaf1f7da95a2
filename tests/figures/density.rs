//! The memory that a session takes in an access node.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_testkit::{Cluster, Role, alone, raw};
use tokio::time::sleep;

/// Sessions with which the process reaches its size, and sessions that are measured.
const BEFORE: usize = 400;
const WEIGHED: usize = 1_600;
/// Bytes. 1.7 KiB is measured in a release build (docs/benchmarks.md). The margin is below a forgotten buffer of
/// a kibibyte, and above the noise of pages and other tests.
const SESSION_BYTES_MAX: f64 = 3_072.0;

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_takes_no_more_than_its_kibibytes() -> Result<()> {
    let _alone = alone().await;
    // All users are new, and connect at once.
    let mut cluster = Cluster::builder()
        .set_of(Role::Access, "limits.app_new_users_per_second", 0)
        .start()
        .await?;
    let address = cluster.node(Role::Access, 0).address("ws").await?;
    let tokens = |users: Range<usize>| users.map(|user| cluster.token(&format!("user-{user}")));
    let (first, rest) = (tokens(0..BEFORE), tokens(BEFORE..BEFORE + WEIGHED));
    let (first, rest): (Vec<_>, Vec<_>) = (first.collect(), rest.collect());
    let _before = raw::sessions(address, first).await?;
    let before = settled(&mut cluster).await?;
    let _weighed = raw::sessions(address, rest).await?;
    let after = settled(&mut cluster).await?;
    let each = (after - before) / WEIGHED as f64;
    ensure!(each <= SESSION_BYTES_MAX, "{each:.0} bytes a session ({before} to {after})");
    // The node's own figure is relative to the process without sessions.
    let told = cluster.node(Role::Access, 0).metric("barid_access_session_bytes").await?;
    ensure!(told >= each / 2.0 && told < 20_000.0, "it tells of {told}, and it is {each:.0}");
    Ok(())
}

/// Resident bytes of the node, after the memory of handshakes was returned.
async fn settled(cluster: &mut Cluster) -> Result<f64> {
    sleep(Duration::from_secs(4)).await;
    cluster.node(Role::Access, 0).metric("process_resident_memory_bytes").await
}
