//! A device that does not read.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barid_testkit::device::PATIENCE;
use barid_testkit::raw::Raw;
use barid_testkit::{Cluster, Role};
use tokio::net::TcpSocket;
use tokio::time::sleep;

/// Devices that were closed because they do not read.
async fn closed(cluster: &mut Cluster) -> Result<f64> {
    let metrics = cluster.node(Role::Access, 0).metrics().await?;
    Ok(metrics.sum_of("barid_access_closes_total", "code", "slow_consumer"))
}

/// Text that does not compress well.
fn noise(bytes: u32) -> String {
    let digit = |n: u32| char::from_digit(n.wrapping_mul(2_654_435_761) >> 28, 16).unwrap_or('x');
    (0..bytes).map(digit).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_read_is_closed_with_4002_and_has_everything_on_return() -> Result<()>
{
    const MESSAGES: usize = 20;
    let mut cluster = Cluster::builder()
        .set_of(Role::Access, "limits.queued_bytes_max", 256 << 10)
        .set_of(Role::Access, "limits.send_buffer_bytes", 16 << 10)
        // No re-sends: they are read from the mailbox at the pace of the socket, so the queue would stay short.
        .set("redis.retry_base_ms", 30_000)
        .set("redis.retry_max_ms", 60_000)
        .start()
        .await?;
    let business = cluster.business()?;
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4 << 10)?;
    let stream = socket.connect(cluster.node(Role::Access, 0).address("ws").await?).await?;
    let slow = Raw::session(stream, &cluster.token("alice")).await?;
    let mut other = cluster.device("bob", "phone").await?;
    let text = noise(40_000);
    let mut said = Vec::new();
    for n in 0..MESSAGES {
        let id = format!("m{n}");
        business.send_text("alice", &id, &text).await?;
        said.push(id);
        let beside = format!("b{n}");
        business.send_text("bob", &beside, "").await?;
        assert_eq!(other.receive(1).await?, [beside], "nobody else is closed or waits");
    }
    let begun = Instant::now();
    while closed(&mut cluster).await? < 1.0 {
        ensure!(begun.elapsed() < PATIENCE, "the device that does not read is not closed");
        sleep(Duration::from_millis(20)).await;
    }
    drop(slow);
    let mut back = cluster.device("alice", "phone").await?;
    assert_eq!(back.receive(MESSAGES).await?, said);
    back.expect_silence(Duration::from_millis(500)).await?;
    assert_eq!(closed(&mut cluster).await?, 1.0);
    Ok(())
}
