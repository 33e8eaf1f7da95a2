//! The bench on a small scale: agents that were started by themselves, the real binaries, the result.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use barid_testkit::process::Process;
use serde_json::Value;

const TOOL: &str = env!("CARGO_BIN_EXE_barid-loadtest");

async fn agent(dir: &Path, name: &str) -> (Process, String) {
    let process = Process::spawn(name, TOOL, &dir.join(name), |command| {
        command.arg("agent");
    });
    let (mut process, begun) = (process.unwrap(), Instant::now());
    loop {
        if let Some(address) = process.output().trim_end().strip_prefix("listening ") {
            return (process, address.to_owned());
        }
        process.must_run().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "{}", process.output());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn sessions_on_two_agents_are_weighed_beside_the_floor() {
    let dir = tempfile::tempdir().unwrap();
    let (_one, first) = agent(dir.path(), "one").await;
    let (_other, second) = agent(dir.path(), "other").await;
    let out = dir.path().join("new").join("bench.json");
    let mut command = Command::new(TOOL);
    command.args(["bench", "--only", "idle", "--sessions", "201", "--rate", "500"]);
    command.args(["--settle-seconds", "1", "--idle-seconds", "2"]);
    command.arg("--agents").arg(format!("{first},{second}")).arg("--out").arg(&out);
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["measure"].as_str().unwrap()).collect();
    let wanted =
        ["idle_bytes_per_session", "after_broadcast_bytes_per_session", "after_close_ratio"];
    assert_eq!(names, wanted, "{told}");
    for row in &rows {
        let value = |field: &str| row[field].as_f64().unwrap();
        assert!(value("floor") > 0.0 && value("barid") > 0.0, "{row}");
        assert!((value("ratio") - value("barid") / value("floor")).abs() < 1e-9, "{row}");
        assert_eq!(row["met"].as_bool().unwrap(), value("barid") <= value("goal"), "{row}");
        assert!(row["unit"].is_string(), "{row}");
    }
}
