//! Roles, Redis and Kafka are killed or stopped while messages flow: no message is lost, repeated, altered or out
//! of order, and only sessions of a killed node are closed.
//!
//! Times and victims are random. A failing run prints its seed, and `BARID_SEED` sets it.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::{Cluster, Role};
use toml::{Table, Value};

use crate::trial::Trial;

const MESSAGES: usize = 2_000;
const TIME: Duration = Duration::from_secs(6);

/// Kills nodes of a role at random times while messages flow.
async fn killed_while_messages_flow(role: Role) -> Result<()> {
    let mut trial = Trial::start(Cluster::builder().pairs()).await?;
    let flow = trial.flow(MESSAGES, TIME);
    let mut kills = 0;
    while flow.runs() || kills < 3 {
        trial.pause(1_000).await;
        let number = trial.pick(2);
        trial.kill(role, number)?;
        kills += 1;
        trial.pause(500).await;
        trial.launch(role, number).await?;
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_purgers() -> Result<()> {
    killed_while_messages_flow(Role::Purger).await
}

/// Redis is down for a while, so that a purger holds many records that are not accepted; then the purger is
/// killed.
#[tokio::test(flavor = "multi_thread")]
async fn killed_purgers_with_their_hands_full() -> Result<()> {
    let eager =
        Cluster::builder().pairs().durable_redis().set_of(Role::Purger, "commit_interval_ms", 50);
    let mut trial = Trial::start(eager).await?;
    let flow = trial.flow(MESSAGES, Duration::from_secs(8));
    for number in 0..2 {
        // Both hold partitions: the group has removed the one that was killed before.
        tokio::time::sleep(Duration::from_millis(if number == 0 { 500 } else { 3_500 })).await;
        trial.pause(500).await;
        trial.tell("kill Redis");
        trial.cluster.redis.kill()?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        trial.kill(Role::Purger, number)?;
        trial.cluster.redis.restart().await?;
        trial.tell("Redis is back");
        trial.launch(Role::Purger, number).await?;
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_dispatchers() -> Result<()> {
    killed_while_messages_flow(Role::Dispatcher).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_delayers() -> Result<()> {
    killed_while_messages_flow(Role::Delayer).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_access_nodes() -> Result<()> {
    killed_while_messages_flow(Role::Access).await
}

/// A third purger joins two and leaves again. Each time, one of them is killed while partitions move.
async fn killed_in_a_rebalance(protocol: &str) -> Result<()> {
    let mut settings =
        Cluster::builder().pairs().set_of(Role::Purger, "kafka.group_protocol", protocol);
    if protocol == "classic" {
        // With KIP-848 the broker has these settings.
        let properties = [("session.timeout.ms", "3000"), ("heartbeat.interval.ms", "300")];
        let properties = properties.map(|(key, value)| (key.to_owned(), value.into()));
        let properties = Value::Table(Table::from_iter(properties));
        settings = settings.set_of(Role::Purger, "kafka.properties", properties);
    }
    let mut trial = Trial::start(settings).await?;
    let flow = trial.flow(MESSAGES, TIME);
    trial.pause(500).await;
    trial.cluster.add(Role::Purger, 2)?;
    for round in 0..3 {
        if round > 0 {
            trial.restart(Role::Purger, 2).await?;
        }
        trial.pause(400).await;
        let victim = trial.pick(3);
        trial.kill(Role::Purger, victim)?;
        trial.pause(500).await;
        trial.launch(Role::Purger, victim).await?;
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purger_killed_in_a_rebalance() -> Result<()> {
    killed_in_a_rebalance("consumer").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purger_killed_in_a_classic_rebalance() -> Result<()> {
    killed_in_a_rebalance("classic").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis() -> Result<()> {
    let mut trial = Trial::start(Cluster::builder().pairs().durable_redis()).await?;
    let flow = trial.flow(MESSAGES, TIME);
    for _ in 0..3 {
        trial.pause(1_500).await;
        trial.tell("kill Redis");
        trial.cluster.redis.kill()?;
        trial.pause(1_500).await;
        trial.cluster.redis.restart().await?;
        trial.tell("Redis is back");
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_kafka() -> Result<()> {
    let mut trial = Trial::start(Cluster::builder().pairs().own_kafka()).await?;
    let flow = trial.flow(MESSAGES, TIME);
    for _ in 0..2 {
        trial.pause(1_500).await;
        trial.tell("kill Kafka");
        trial.cluster.kafka()?.kill()?;
        trial.pause(500).await;
        trial.cluster.kafka()?.restart().await?;
        trial.tell("Kafka is back");
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_13_access_nodes_stopped_past_their_lease() -> Result<()> {
    let mut trial =
        Trial::start(Cluster::builder().pairs().set_of(Role::Access, "lease_ttl_ms", 1_000))
            .await?;
    let flow = trial.flow(MESSAGES, TIME);
    for _ in 0..2 {
        trial.pause(500).await;
        let number = trial.pick(2);
        trial.freeze(Role::Access, number, Duration::from_millis(2_500)).await?;
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn dispatchers_away_for_longer_than_the_resends_take() -> Result<()> {
    // If they counted against the device, five re-sends would take 3.1 s, and the close would follow at 6.3 s.
    let quick = Cluster::builder()
        .pairs()
        .set("redis.retry_base_ms", 100)
        .set("redis.retry_max_ms", 60_000);
    let mut trial = Trial::start(quick).await?;
    let flow = trial.flow(MESSAGES, TIME);
    trial.pause(1_000).await;
    for number in 0..2 {
        trial.kill(Role::Dispatcher, number)?;
    }
    tokio::time::sleep(Duration::from_secs(8)).await;
    for number in 0..2 {
        trial.launch(Role::Dispatcher, number).await?;
    }
    trial.finish(flow).await
}
