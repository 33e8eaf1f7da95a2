//! What Barid rests on goes away and comes back.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::{Cluster, Role};

use crate::listener::{Flow, Listener};

const USERS: usize = 4;

async fn listeners(cluster: &mut Cluster) -> Result<Vec<Listener>> {
    let url = cluster.url(0).await?;
    let listeners: Vec<Listener> = (0..USERS)
        .map(|user| Listener::start(&url, &format!("u{user}"), "phone"))
        .collect::<Result<_>>()?;
    for listener in &listeners {
        listener.connected().await?;
    }
    Ok(listeners)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis_that_comes_back_with_its_log_loses_nothing() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let listeners = listeners(&mut cluster).await?;
    let flow = Flow::start(cluster.business()?, USERS, 150, Duration::from_millis(20));
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.redis.kill()?;
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    cluster.redis.restart().await?;
    flow.finish(&listeners).await?;
    cluster.wait_ready().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_kafka_that_comes_back_loses_nothing() -> Result<()> {
    let mut cluster = Cluster::builder().own_kafka().start().await?;
    let listeners = listeners(&mut cluster).await?;
    let flow = Flow::start(cluster.business()?, USERS, 150, Duration::from_millis(20));
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.kafka()?.kill()?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.kafka()?.restart().await?;
    flow.finish(&listeners).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purger_says_that_it_cannot_work_and_goes_on_when_it_can() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let admin = cluster.node(Role::Purger, 0).address("admin").await?;
    cluster.redis.kill()?;
    business.say("alice", "m", "while Redis is away").await?;
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
    assert_eq!(phone.take(1).await?, ["m"]);
    Ok(())
}
