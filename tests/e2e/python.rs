//! The example in docs/examples/python.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use barid_testkit::token::{KEY_ID, SECRET};
use barid_testkit::{Cluster, paths};
use tokio::io::{AsyncBufReadExt as _, BufReader};

const SCRIPT: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/python/push_and_receive.py");

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_two_packages_from_pypi_pushes_and_receives() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let python = paths::target_dir()?.join("python/bin/python");
    ensure!(python.is_file(), "{} is missing: run scripts/python.sh", python.display());
    let token = std::process::Command::new(paths::binary("barid")?)
        .args(["token", "--user", "alice", "--secret", SECRET, "--key-id", KEY_ID])
        .output()?;
    ensure!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
    let token = String::from_utf8(token.stdout)?.trim().to_owned();
    let (url, brokers) = (cluster.url(0).await?, cluster.brokers());
    let run = tokio::process::Command::new(python)
        .arg(SCRIPT)
        .args(["--brokers", &brokers, "--topic", &cluster.topics().push])
        .args(["--url", &url, "--token", &token, "--user", "alice"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let limit = std::time::Duration::from_secs(60);
    let output = tokio::time::timeout(limit, run).await.context("the script hangs")??;
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {said}\n{complained}", output.status);
    assert_eq!(said.lines().filter(|line| line.starts_with("received ")).count(), 3, "{said}");
    assert!(said.ends_with("all received and acknowledged\n"), "{said}");
    Ok(())
}

/// As README and the script itself say: `barid dev`, `barid token`, and no other option, unless a usual port is in use.
#[tokio::test(flavor = "multi_thread")]
async fn hazard_122_the_example_runs_beside_barid_dev_as_documented() -> Result<()> {
    let python = paths::target_dir()?.join("python/bin/python");
    let dir = tempfile::tempdir()?;
    let barid = paths::binary("barid")?;
    let state = dir.path().join("dev.json");
    let mut dev = tokio::process::Command::new(&barid)
        .args(["--json", "dev"])
        .env("BARID_DEV_STATE", &state)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(dev.stdout.take().context("no stdout")?).lines();
    let limit = std::time::Duration::from_secs(60);
    let ready = async {
        while let Some(line) = lines.next_line().await? {
            let line: serde_json::Value = serde_json::from_str(&line)?;
            if line["event"] == "ready" {
                return Ok(line);
            }
        }
        anyhow::bail!("barid dev ended")
    };
    let ready = tokio::time::timeout(limit, ready).await.context("not ready")??;
    // The demonstration goes on.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
    let token = std::process::Command::new(&barid)
        .args(["token", "--user", "alice"])
        .env("BARID_DEV_STATE", &state)
        .output()?;
    ensure!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
    let token = String::from_utf8(token.stdout)?.trim().to_owned();
    let mut run = tokio::process::Command::new(python);
    run.arg(SCRIPT).args(["--user", "alice", "--token", &token]);
    if text("brokers") != "127.0.0.1:9092" {
        run.args(["--brokers", &text("brokers")]);
    }
    if text("url") != "ws://127.0.0.1:7080" {
        run.args(["--url", &format!("{}/v1/connect", text("url"))]);
    }
    let run = run.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(limit, run).await.context("the script hangs")??;
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {said}\n{complained}", output.status);
    assert!(said.ends_with("all received and acknowledged\n"), "{said}");
    assert_eq!(complained, "");
    Ok(())
}
