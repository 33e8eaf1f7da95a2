//! Starts child processes that do not outlive the test process, even if it is ended by `kill -9`.

use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{SyncSender, sync_channel};

type Request = (Command, SyncSender<io::Result<Child>>);

/// The kernel sends the parent-death signal when the *thread* that forked ends, and each test has its own
/// thread. So one thread, which lives as long as the process, forks for all.
static FORKER: LazyLock<SyncSender<Request>> = LazyLock::new(|| {
    let (requests, inbox) = sync_channel::<Request>(16);
    std::thread::Builder::new()
        .name("testkit-forker".into())
        .spawn(move || {
            for (mut command, reply) in inbox {
                let _ = reply.send(command.spawn());
            }
        })
        .expect("a thread can be started");
    requests
});

/// A command for `program` that is killed when this process ends.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

/// Starts what [`command`] made.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    let (reply, outcome) = sync_channel(1);
    FORKER.send((command, reply)).map_err(|_| io::Error::other("the forking thread is gone"))?;
    outcome.recv().map_err(|_| io::Error::other("the forking thread is gone"))?
}

/// A temporary directory. It is removed when [`Scratch`] is dropped, or when this process has ended: statics
/// are never dropped, and a killed process drops nothing.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
    // A shell that waits for the end of a pipe from this process.
    janitor: Child,
}

impl Scratch {
    pub(crate) fn new(prefix: &str) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix(prefix).tempdir()?;
        let mut janitor = Command::new("sh");
        janitor
            .args(["-c", "trap '' INT TERM HUP; cat >/dev/null; sleep 0.3; rm -rf -- \"$0\""])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let janitor = spawn(janitor)?;
        Ok(Self { dir, janitor })
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.dir.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // `dir` removes the directory.
        let _ = self.janitor.kill();
        let _ = self.janitor.wait();
    }
}
