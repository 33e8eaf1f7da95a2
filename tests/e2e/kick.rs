//! `barid kick` on a running cluster.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result};
use barid_testkit::device::{Device, PATIENCE};
use barid_testkit::{Cluster, Role, paths};
use serde_json::Value;

async fn barid(cluster: &Cluster, args: &[&str]) -> Result<(Output, Value)> {
    let mut command = Command::new(paths::binary("barid")?);
    command.args(["--json", "kick"]).args(args).args(["--redis", &cluster.redis.url()]);
    // Do not use a running `barid dev`.
    command.env("BARID_DEV_STATE", "/nonexistent/dev.json");
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let shown = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((output, shown))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kick_reaches_the_sessions_on_every_node_and_counts_them() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let mut devices: Vec<Device> = Vec::new();
    for n in 0..10 {
        devices.push(cluster.device_at(n % 2, "alice", &format!("d{n}")).await?);
    }
    let mut bob = cluster.device_at(1, "bob", "phone").await?;

    let (output, shown) = barid(&cluster, &["--user", "alice", "--reason", "stolen"]).await?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!((&shown["matched"], &shown["closed"]), (&10.into(), &10.into()), "{shown}");
    for node in ["access-0", "access-1"] {
        assert_eq!(shown["nodes"][node]["closed"], 5, "{shown}");
    }
    for device in &mut devices {
        assert_eq!(device.closed(PATIENCE).await?, 4503);
    }
    // Other sessions stay, and messages of the meantime wait.
    let business = cluster.business()?;
    business.send_text("bob", "m1", "still here").await?;
    assert_eq!(bob.receive(1).await?, ["m1"]);
    business.send_text("alice", "m2", "for later").await?;
    let mut back = cluster.device_at(1, "alice", "d0").await?;
    assert_eq!(back.receive(1).await?, ["m2"]);

    // A node that cannot be reached is named, and the others are asked.
    cluster.kill(Role::Access, 0)?;
    let (output, shown) = barid(&cluster, &["--everyone", "--yes", "--rate", "100"]).await?;
    assert_eq!(output.status.code(), Some(barid_runtime::exit::AWAY.into()), "{shown}");
    assert_eq!(shown["closed"], 2, "{shown}");
    assert!(shown["nodes"]["access-0"]["error"].is_string(), "{shown}");
    assert_eq!(bob.closed(PATIENCE).await?, 4503);
    assert_eq!(back.closed(Duration::from_secs(5)).await?, 4503);
    Ok(())
}
