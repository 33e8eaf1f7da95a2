//! `barid dev` and the commands beside it, as users run them: the real program, its own redis-server
//! and broker, nothing played.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A place of its own, so that tests and a developer's own cluster do not meet.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn state(&self) -> std::path::PathBuf {
        self.dir.path().join("dev.json")
    }

    /// `barid --json <line>`, not started.
    fn barid(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_barid"));
        command.arg("--json").args(line.split_whitespace()).env("BARID_DEV_STATE", self.state());
        for variable in ["BROKERS", "REDIS", "URL", "TOKEN", "SECRET_FILE", "KEY_ID", "APP"] {
            command.env_remove(format!("BARID_{variable}"));
        }
        command
    }

    /// Runs to the end; what it printed, and how it ended.
    fn run(&self, line: &str) -> (Vec<Value>, ExitStatus) {
        let output = self.barid(line).stderr(Stdio::inherit()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), output.status)
    }

    /// Starts; its lines can be awaited.
    fn start(&self, line: &str) -> Running {
        let mut child = self.barid(line).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        Running { child, lines: lines(stdout) }
    }
}

struct Running {
    child: Child,
    lines: mpsc::Receiver<Value>,
}

fn lines(stdout: ChildStdout) -> mpsc::Receiver<Value> {
    let (tx, rx) = mpsc::sync_channel(1024);
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if tx.send(serde_json::from_str(&line).unwrap()).is_err() {
                return;
            }
        }
    });
    rx
}

impl Running {
    /// The next line whose `event` is this.
    fn event(&self, event: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|e| panic!("waiting for {event}: {e}"));
            if line["event"] == event {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let kill = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still running");
            pause();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::disallowed_methods, reason = "a test thread may block")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Whether somebody listens at `redis://HOST:PORT`.
fn is_up(redis: &str) -> bool {
    std::net::TcpStream::connect(redis.trim_start_matches("redis://")).is_ok()
}

#[test]
fn once_shows_an_online_and_an_offline_push_and_leaves_nothing_behind() {
    let place = Place::new();
    let (shown, status) = place.run("dev --once --port 0");
    assert!(status.success(), "{shown:#?}");
    let steps: Vec<(&str, &str)> = shown
        .iter()
        .filter(|line| line["event"] == "demo")
        .map(|line| (line["case"].as_str().unwrap(), line["step"].as_str().unwrap()))
        .collect();
    for case in ["online", "offline"] {
        for step in ["connected", "produced", "accepted", "received", "acked"] {
            assert!(steps.contains(&(case, step)), "{case} {step} in {steps:?}");
        }
    }
    let at = |step| steps.iter().position(|s| *s == ("offline", step)).unwrap();
    assert!(at("accepted") < at("connected") && at("connected") < at("received"));
    let order: Vec<&str> = shown
        .iter()
        .filter(|line| line["event"] == "drained")
        .map(|line| line["role"].as_str().unwrap())
        .collect();
    assert_eq!(order, ["purger", "dispatcher", "delayer", "access"]);
    let ready = shown.iter().find(|line| line["event"] == "ready").unwrap();
    assert!(!is_up(ready["redis"].as_str().unwrap()), "redis-server is still there");
    assert!(!place.state().exists());
}

#[test]
fn the_other_commands_find_the_running_cluster() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    let redis = dev.event("ready")["redis"].as_str().unwrap().to_owned();
    while !place.state().exists() {
        pause();
    }

    let (sent, status) = place.run("send --user alice --id order-7 --wait accepted hello");
    assert!(status.success(), "{sent:?}");
    assert_eq!(
        (sent[0]["event"].as_str(), sent[0]["id"].as_str()),
        (Some("sent"), Some("order-7"))
    );
    assert_eq!((sent[1]["kind"].as_str(), sent[1]["seq"].as_u64()), (Some("accepted"), Some(1)));

    let (held, _) = place.run("inspect user alice");
    assert_eq!((held[0]["kept"].as_u64(), held[0]["newest"].as_u64()), (Some(1), Some(1)));
    assert_eq!(held[0]["entries"][0]["id"], "order-7");

    let listener = place.start("listen --user alice --device phone --count 2");
    let first = listener.event("message");
    assert_eq!((first["seq"].as_u64(), first["text"].as_str()), (Some(1), Some("hello")));
    let (sent, status) =
        place.run("send --user alice --json-body {\"n\":1} --priority high --wait acked");
    assert!(status.success(), "{sent:?}");
    let second = listener.event("message");
    assert_eq!((second["kind"].as_str(), second["json"]["n"].as_u64()), (Some("json"), Some(1)));

    let mut listener = listener;
    assert!(listener.end().success());
    let (held, _) = place.run("inspect user alice");
    assert_eq!(held[0]["kept"].as_u64(), Some(0));
    assert_eq!(held[0]["devices"][0]["seq"].as_u64(), Some(2));

    let (token, _) = place.run("token --user bob --ttl 1h");
    let with_token = format!("listen --for 200ms --token {}", token[0]["token"].as_str().unwrap());
    let (events, status) = place.run(&with_token);
    assert!(status.success() && events.iter().any(|e| e["event"] == "connected"), "{events:?}");
    let (_, status) = place.run("listen --user bob --secret not-the-secret-of-this-cluster-at-all");
    assert!(!status.success());

    let second = place.barid("dev").output().unwrap();
    let complaint = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && complaint.contains("runs already"), "{complaint}");

    dev.signal("TERM");
    assert!(dev.end().success());
    assert!(!is_up(&redis) && !place.state().exists());
}

#[test]
fn a_killed_cluster_takes_its_redis_with_it() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    let redis = dev.event("ready")["redis"].as_str().unwrap().to_owned();
    assert!(is_up(&redis));
    dev.signal("KILL");
    dev.end();
    let deadline = Instant::now() + PATIENCE;
    while is_up(&redis) {
        assert!(Instant::now() < deadline, "redis-server outlives barid");
        pause();
    }
    // What it left behind names a process that is gone: not taken for a running cluster.
    let (_, status) = place.run("token --user alice");
    assert!(!status.success());
}

#[test]
fn a_missing_redis_server_is_named_with_its_remedy() {
    let place = Place::new();
    let nothing = place.dir.path().join("bin");
    std::fs::create_dir(&nothing).unwrap();
    let output = place.barid("dev --once").env("PATH", nothing).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(complaint.contains("apt-get install"), "{complaint}");
}
