//! The real program in a place of its own.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Far above what anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A place of its own, so that tests and a developer's own cluster do not meet.
pub struct Place {
    pub dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn state(&self) -> std::path::PathBuf {
        self.dir.path().join("dev.json")
    }

    /// Whether a redis-server runs that was started from here: it works in a directory of its own
    /// below this one. Its port would not tell, another test's server may have it by now.
    pub fn redis_runs(&self) -> bool {
        let is_ours = |process: std::path::PathBuf| {
            let name = std::fs::read(process.join("comm")).unwrap_or_default();
            let cwd = std::fs::read_link(process.join("cwd")).unwrap_or_default();
            name.starts_with(b"redis-server") && cwd.starts_with(self.dir.path())
        };
        std::fs::read_dir("/proc").unwrap().flatten().any(|process| is_ours(process.path()))
    }

    /// `barid --json <line>`, not started.
    pub fn barid(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_barid"));
        command.arg("--json").args(line.split_whitespace());
        self.settle(&mut command);
        command
    }

    /// Has a command use this place, and no other.
    pub fn settle(&self, command: &mut Command) {
        command.env("BARID_DEV_STATE", self.state()).env("TMPDIR", self.dir.path());
        for variable in
            ["BROKERS", "REDIS", "URL", "TOKEN", "SECRET_FILE", "KEY_ID", "APP", "ADMIN"]
        {
            command.env_remove(format!("BARID_{variable}"));
        }
    }

    /// Runs to the end; what it printed, and how it ended.
    pub fn run(&self, line: &str) -> (Vec<Value>, ExitStatus) {
        let output = self.barid(line).stderr(Stdio::inherit()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), output.status)
    }

    /// Starts; its lines can be awaited.
    pub fn start(&self, line: &str) -> Running {
        Running::of(self.barid(line))
    }

    /// Starts barid by another program, which changes how it handles signals.
    pub fn start_through(&self, program: &str, line: &str) -> Running {
        let barid = self.barid(line);
        let mut words = program.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg(barid.get_program()).args(barid.get_args());
        for (name, value) in barid.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Running::of(command)
    }
}

pub struct Running {
    pub child: Child,
    pub lines: mpsc::Receiver<Value>,
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
    /// Starts; its lines can be awaited.
    pub fn of(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        Self { child, lines: lines(stdout) }
    }

    /// Nobody reads what it prints.
    pub fn unheard(child: Child) -> Self {
        Self { child, lines: mpsc::sync_channel(1).1 }
    }

    /// The next line whose `event` is this.
    pub fn event(&self, event: &str) -> Value {
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

    pub fn signal(&self, name: &str) {
        // The shell's own: a bare Debian has no kill program.
        let pid = self.child.id().to_string();
        let kill = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &pid]).status();
        assert!(kill.unwrap().success());
    }

    pub fn end(&mut self) -> ExitStatus {
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
pub fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
