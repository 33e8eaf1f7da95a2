//! Roles are drained and restarted while messages flow, as in an upgrade; and dead connections. Kills are in
//! `kills`.

use std::time::Duration;

use anyhow::{Result, ensure};
use barid_testkit::device::{Device, Incoming, PATIENCE};
use barid_testkit::{Cluster, Relay, Role};

use crate::listener::Listener;
use crate::trial::Trial;

async fn restarted_while_messages_flow(role: Role) -> Result<()> {
    let mut trial = Trial::start(Cluster::builder().pairs()).await?;
    let flow = trial.flow(1_000, Duration::from_secs(3));
    trial.pause(500).await;
    for number in 0..2 {
        trial.restart(role, number).await?;
    }
    trial.finish(flow).await
}

#[tokio::test(flavor = "multi_thread")]
async fn purgers_restart_while_messages_flow() -> Result<()> {
    restarted_while_messages_flow(Role::Purger).await
}

#[tokio::test(flavor = "multi_thread")]
async fn dispatchers_restart_while_messages_flow() -> Result<()> {
    restarted_while_messages_flow(Role::Dispatcher).await
}

#[tokio::test(flavor = "multi_thread")]
async fn delayers_restart_while_messages_flow() -> Result<()> {
    restarted_while_messages_flow(Role::Delayer).await
}

#[tokio::test(flavor = "multi_thread")]
async fn access_nodes_restart_while_messages_flow() -> Result<()> {
    restarted_while_messages_flow(Role::Access).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_access_node_delays_no_other() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let business = cluster.business()?;
    let (here, there) = (cluster.url(0).await?, cluster.url(1).await?);
    let healthy = Listener::start(&here, "u0", "phone")?;
    let stopped = Listener::start(&there, "u1", "phone")?;
    healthy.connected().await?;
    stopped.connected().await?;
    cluster.node(Role::Access, 1).process()?.stop()?;
    let ids: Vec<String> = (0..100).map(|number| format!("m{number}")).collect();
    for id in &ids {
        for user in ["u0", "u1"] {
            business.send_text(user, id, "").await?;
        }
    }
    healthy.count(100).await?;
    cluster.node(Role::Access, 1).process()?.cont()?;
    stopped.count(100).await?;
    ensure!(healthy.ids() == ids && stopped.ids() == ids, "{:?}", stopped.ids());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_cuts_sessions_off_and_says_how_many() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let _phones = [cluster.device("alice", "a").await?, cluster.device("bob", "b").await?];
    let access = cluster.node(Role::Access, 0);
    access.process()?.term()?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let ready = access.metrics_text().await?;
    ensure!(ready.contains(r#"barid_ready{condition="draining"} 0"#), "{ready}");
    access.process()?.term()?;
    let status = access.process()?.wait(Duration::from_secs(3)).await?;
    let output = access.output()?;
    ensure!(status.code() == Some(3), "{status}:\n{output}");
    ensure!(output.contains(r#"cut off what="sessions" count=2"#), "{output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_node_says_where_to_go_before_it_closes() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    cluster.node(Role::Access, 0).process()?.term()?;
    let reconnect_after = loop {
        match phone.next(PATIENCE).await? {
            Incoming::Other(kind, fields) if kind == "goAway" => break fields,
            Incoming::Closed(code, reason) => panic!("closed with {code} ({reason}) before goAway"),
            _ => {}
        }
    };
    ensure!(reconnect_after["why"] == "draining", "{reconnect_after}");
    business.send_text("alice", "m", "in between").await?;
    let mut phone_elsewhere = cluster.device_at(1, "alice", "phone").await?;
    ensure!(phone_elsewhere.receive(1).await? == ["m"]);
    let code = phone.closed(PATIENCE).await?;
    ensure!(code == 4000 || code == 4502, "closed with {code}");
    let status = cluster.node(Role::Access, 0).process()?.wait(PATIENCE).await?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_13_a_node_whose_lease_lapsed_keeps_its_sessions() -> Result<()> {
    let mut cluster =
        Cluster::builder().set_of(Role::Access, "lease_ttl_ms", 1_000).start().await?;
    let listener = Listener::start(&cluster.url(0).await?, "u0", "phone")?;
    listener.connected().await?;
    let business = cluster.business()?;
    cluster.node(Role::Access, 0).process()?.stop()?;
    business.send_text("u0", "stopped", "").await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.node(Role::Access, 0).process()?.cont()?;
    listener.count(1).await?;
    // On the fast path again, once dispatchers know the node's new incarnation.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = cluster.node(Role::Access, 0).metric("barid_access_resends_total").await?;
    for number in 0..20 {
        business.send_text("u0", &format!("m{number}"), "").await?;
    }
    listener.count(21).await?;
    let after = cluster.node(Role::Access, 0).metric("barid_access_resends_total").await?;
    ensure!(after - before < 1.0, "{} re-sends were needed", after - before);
    ensure!(listener.connections() == 1, "the session was closed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_behind_a_dead_link_is_given_up_and_finds_its_messages_later() -> Result<()> {
    let mut cluster = Cluster::builder()
        .set_of(Role::Access, "heartbeat.interval_seconds", 1)
        .set_of(Role::Access, "heartbeat.timeout_seconds", 1)
        .start()
        .await?;
    let relay = Relay::to(cluster.node(Role::Access, 0).address("ws").await?).await?;
    let url = format!("ws://{}/v1/connect", relay.address());
    let mut phone = Device::connect(&url, &cluster.token("alice"), "phone").await?;
    phone.expect_silence(Duration::from_secs(3)).await?;
    relay.hold();
    let start = tokio::time::Instant::now();
    while cluster.node(Role::Access, 0).metric("barid_access_sessions").await? > 0.0 {
        ensure!(start.elapsed() < Duration::from_secs(8), "the session is still there");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.business()?.send_text("alice", "m", "").await?;
    let mut phone = cluster.device("alice", "phone").await?;
    ensure!(phone.receive(1).await? == ["m"]);
    Ok(())
}
