//! A child process that tests signal and wait for.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::spawner;

/// A running program whose output goes to a file. Killed on drop, and with the test process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`; `configure` adds arguments and environment. Standard output and error are
    /// appended to `log`.
    ///
    /// # Errors
    /// Returns an error if the program or the log file cannot be opened.
    pub fn spawn(
        name: &str,
        program: impl AsRef<std::ffi::OsStr>,
        log: &Path,
        configure: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log);
        let output = output.with_context(|| format!("log file {}", log.display()))?;
        let mut command = spawner::command(program);
        configure(&mut command);
        command.stdout(output.try_clone()?).stderr(Stdio::from(output));
        let child = spawner::spawn(command).with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.into(), child, log: log.into() })
    }

    /// The name given to [`Process::spawn`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds its output.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its whole output so far.
    pub fn output(&self) -> String {
        std::fs::read(&self.log)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of its output, for messages about failures.
    pub fn tail(&self, lines: usize) -> String {
        let output = self.output();
        let skip = output.lines().count().saturating_sub(lines);
        output.lines().skip(skip).collect::<Vec<_>>().join("\n")
    }

    /// SIGTERM: asks the process to drain and end.
    ///
    /// # Errors
    /// Returns an error if it has ended already.
    pub fn term(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// SIGHUP: asks the process to read its files again.
    ///
    /// # Errors
    /// Returns an error if it has ended already.
    pub fn hang_up(&mut self) -> Result<()> {
        self.signal(Signal::SIGHUP)
    }

    /// SIGKILL, and wait until it has ended.
    ///
    /// # Errors
    /// Returns an error if it has ended already.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGSTOP: the process does nothing, and its sockets stay open.
    ///
    /// # Errors
    /// Returns an error if it has ended already.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// SIGCONT, after [`Process::stop`].
    ///
    /// # Errors
    /// Returns an error if it has ended already.
    pub fn cont(&mut self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// Returns an error with the end of its output if it is still running after `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!("{} still runs after {limit:?}:\n{}", self.name, self.tail(30));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Checks that it is running.
    ///
    /// # Errors
    /// Returns an error with the end of its output if it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.tail(30)),
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        // try_wait reaps: otherwise a signal to a zombie would succeed.
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has already ended with {status}:\n{}", self.name, self.tail(30));
        }
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("sending {signal} to {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL ends a stopped process as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
