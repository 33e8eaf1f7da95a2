//! Outages of Redis. Kills while messages flow are in `kills`.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::{Cluster, Role};

use crate::trial::Trial;

/// Redis loses everything, and Kafka still has it. Each user has one device: a second device may miss what the
/// first acknowledges in the new mailbox before the second connects.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_forgot_everything_is_filled_from_kafka() -> Result<()> {
    let mut trial = Trial::with_phones_only(Cluster::builder().pairs()).await?;
    let flow = trial.flow(1_000, Duration::from_secs(3));
    trial.pause(2_000).await;
    trial.cluster.redis.kill()?;
    trial.pause(1_000).await;
    trial.cluster.redis.restart().await?;
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purger_says_that_it_cannot_work_and_goes_on_when_it_can() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let admin = cluster.node(Role::Purger, 0).address("admin").await?;
    cluster.redis.kill()?;
    business.send_text("alice", "m", "while Redis is away").await?;
    let reason = loop {
        let (status, body) = barid_testkit::http::get(admin, "/readyz").await?;
        if status == 503 {
            break body;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(reason.contains("redis"), "{reason}");
    cluster.redis.restart().await?;
    cluster.wait_ready().await?;
    let mut phone = cluster.device("alice", "phone").await?;
    assert_eq!(phone.receive(1).await?, ["m"]);
    Ok(())
}
