//! `barid top` on a running cluster.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use barid_testkit::{Cluster, Role, paths};
use serde_json::Value;

use crate::listener::Listener;

/// A sample, with the endpoints of these roles given; others are found by leases.
async fn sample(cluster: &mut Cluster, named: &[Role]) -> Result<Value> {
    let mut command = Command::new(paths::binary("barid")?);
    command.args(["--json", "top", "--once", "--interval", "2s"]);
    for role in named {
        let admin = cluster.node(*role, 0).address("admin").await?;
        command.arg("--admin").arg(admin.to_string());
    }
    command.args(["--redis", &cluster.redis.url()]);
    // Do not use a running `barid dev`.
    command.env("BARID_DEV_STATE", "/nonexistent/dev.json");
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).context("one object")
}

#[tokio::test(flavor = "multi_thread")]
async fn top_shows_rates_hops_nodes_and_problems() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let listener = Listener::start(&cluster.url(0).await?, "u0", "phone")?;
    listener.connected().await?;
    let business = cluster.business()?;
    let flowing = tokio::spawn(async move {
        for number in 0.. {
            business.send_text("u0", &format!("m{number}"), "hello").await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    });
    listener.count(10).await?;
    let shown = sample(&mut cluster, &[Role::Purger, Role::Delayer]).await?;
    for rate in ["taken_per_s", "accepted_per_s", "written_per_s", "acked_per_s"] {
        ensure!(shown["rates"][rate].as_f64() > Some(0.0), "no {rate} in {shown:#}");
    }
    ensure!(shown["rates"]["refused_per_s"] == 0.0, "{shown:#}");
    let hops = shown["hops"].as_array().context("hops")?;
    let names: Vec<&str> = hops.iter().filter_map(|hop| hop["hop"].as_str()).collect();
    let way = [
        "produced_taken",
        "taken_accepted",
        "accepted_dispatched",
        "dispatched_written",
        "written_acked",
        "produced_written",
        "produced_acked",
    ];
    // There was no fan-out.
    let fanout = ["fanout_dispatched_written", "fanout_produced_written"];
    ensure!(names == [&way[..], &fanout].concat(), "{names:?}");
    for (number, hop) in hops.iter().enumerate() {
        let (p50, p99) = (hop["p50_ms"].as_f64(), hop["p99_ms"].as_f64());
        let flowed = hop["count"].as_u64() > Some(0) && p50.is_some() && p50 <= p99;
        ensure!(flowed == (number < way.len()), "{hop}");
    }
    let roles = shown["roles"].as_array().context("roles")?;
    ensure!(roles.len() == 4 && roles.iter().all(|role| role["ready"] == true), "{shown:#}");
    let nodes = shown["nodes"].as_array().context("nodes")?;
    let access = nodes.iter().find(|node| node["node"] == "access-0").context("access-0")?;
    ensure!(nodes.len() == 2 && access["state"] == "serving", "{nodes:?}");
    ensure!(shown["problems"].as_array().is_some_and(Vec::is_empty), "{shown:#}");
    flowing.abort();

    cluster.node(Role::Dispatcher, 0).process()?.stop()?;
    let shown = sample(&mut cluster, &[Role::Purger, Role::Dispatcher]).await?;
    let problems = shown["problems"].to_string();
    ensure!(problems.contains("no answer within 2 s"), "{problems}");
    Ok(())
}
