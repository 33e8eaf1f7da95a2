//! A private redis-server: on a free port, in memory, and ended with this process.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::port::Port;
use crate::output::Coded;
use crate::values::temporary_dir;

/// Attempts: another process may take a port before it is used.
const TRIES: usize = 5;
/// For its first answer.
const START: Duration = Duration::from_secs(10);

/// A running server, killed on drop.
pub struct RedisServer {
    child: Child,
    port: u16,
    version: String,
    // Holds its log; removed on drop.
    dir: TempDir,
}

impl RedisServer {
    /// Starts a server and waits until it answers. Must be called on the main thread: the kernel kills the
    /// server when the thread that started it ends.
    pub async fn start(port: &Port) -> anyhow::Result<Self> {
        let program = find("redis-server").ok_or_else(|| {
            anyhow!(
                "redis-server is not in PATH. Install it, on Debian and Ubuntu with\n\n    \
                 sudo apt-get install -y --no-install-recommends redis-server\n\n\
                 or give another Redis: --redis redis://HOST:PORT"
            )
        })?;
        let mut problem = anyhow!("no free port");
        for number in port.candidates().take(TRIES) {
            match Self::try_start(&program, number).await {
                Ok(server) => return Ok(server),
                Err(error) => problem = error,
            }
        }
        let io = problem.downcast_ref::<std::io::Error>();
        if io.is_some_and(|error| error.kind() == std::io::ErrorKind::AddrInUse) {
            bail!(Coded::config(port.remedy(io)));
        }
        Err(problem.context(format!("cannot start {}", program.display())))
    }

    /// The URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Waits until it ends unexpectedly.
    pub async fn died(&mut self) -> anyhow::Error {
        match self.child.wait().await {
            Ok(status) => anyhow!("the private redis-server ended ({status}){}", self.last_words()),
            Err(error) => anyhow!("cannot wait for the private redis-server: {error}"),
        }
    }

    async fn try_start(program: &Path, port: u16) -> anyhow::Result<Self> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.local_addr()?.port();
        let dir = temporary_dir("barid-dev-redis-")?;
        let child = command(program, port, dir.path()).spawn()?;
        let mut server = Self { child, port, version: String::new(), dir };
        let deadline = Instant::now() + START;
        loop {
            if let Some(status) = server.child.try_wait()? {
                bail!("it ended ({status}){}", server.last_words());
            }
            if let Some((version, process)) = ask_version(port).await {
                // Another server may have taken the port first.
                if server.child.id() != Some(process) {
                    bail!("port {port} was taken by process {process}");
                }
                server.version = version;
                return Ok(server);
            }
            if Instant::now() > deadline {
                bail!("it does not answer on port {port}{}", server.last_words());
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(3).collect();
        last.iter().rev().fold(String::new(), |words, line| words + "\n  " + line)
    }
}

fn command(program: &Path, port: u16, dir: &Path) -> Command {
    // setpriv (util-linux) makes the kernel kill the server when this process ends.
    let mut command = match find("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"])
        .arg(dir)
        .args(["--logfile", "log", "--save", "", "--appendonly", "no"])
        .args(["--maxmemory-policy", "noeviction", "--daemonize", "no"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C must not reach the server: the roles need it to drain.
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// The server's version and process; `None` if it does not answer.
async fn ask_version(port: u16) -> Option<(String, u32)> {
    let ask = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(b"INFO server\r\nQUIT\r\n").await?;
        let mut answer = String::new();
        stream.take(64 << 10).read_to_string(&mut answer).await.context("no text")?;
        anyhow::Ok(answer)
    };
    let answer = timeout(Duration::from_secs(2), ask).await.ok()?.ok()?;
    let field = |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some((field("redis_version:")?.to_owned(), field("process_id:")?.parse().ok()?))
}

/// Finds a program in the directories of PATH.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}
