//! The example in docs/examples/python.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use barid_testkit::token::{KEY_ID, SECRET};
use barid_testkit::{Cluster, paths};

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_two_packages_from_pypi_pushes_and_receives() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let python = paths::target_dir()?.join("python/bin/python");
    ensure!(python.is_file(), "{} is missing: run scripts/python.sh", python.display());
    let script =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/python/push_and_receive.py");
    let token = std::process::Command::new(paths::binary("barid")?)
        .args(["token", "--user", "alice", "--secret", SECRET, "--key-id", KEY_ID])
        .output()?;
    ensure!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
    let token = String::from_utf8(token.stdout)?.trim().to_owned();
    let (url, brokers) = (cluster.url(0).await?, cluster.brokers());
    let run = tokio::process::Command::new(python)
        .arg(script)
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
