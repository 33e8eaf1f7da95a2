//! One role's process: start it, wait for it, read its output and its metrics.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use barid_runtime::exposition::Metrics;

use crate::process::Process;
use crate::{http, paths};

/// How long a role may take to start, on a machine that runs other tests as well.
const START_LIMIT: Duration = Duration::from_secs(30);

/// One of the four roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `barid-purger`
    Purger,
    /// `barid-dispatcher`
    Dispatcher,
    /// `barid-delayer`
    Delayer,
    /// `barid-access`
    Access,
}

impl Role {
    /// All roles, in the order in which an operator stops them.
    pub const ALL: [Self; 4] = [Self::Purger, Self::Dispatcher, Self::Delayer, Self::Access];

    /// The part of the binary's name behind `barid-`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Purger => "purger",
            Self::Dispatcher => "dispatcher",
            Self::Delayer => "delayer",
            Self::Access => "access",
        }
    }

    /// The path of the binary.
    ///
    /// # Errors
    /// Returns an error if the binary was not built.
    pub fn binary(self) -> Result<PathBuf> {
        paths::binary(&format!("barid-{}", self.name()))
    }
}

/// A node of a cluster, running or not.
#[derive(Debug)]
pub struct Node {
    /// Its role.
    pub role: Role,
    /// Its number within the role, from 0.
    pub number: usize,
    process: Option<Process>,
    variables: Vec<(String, String)>,
    pub(super) config: PathBuf,
    pub(super) ready_file: PathBuf,
    log: PathBuf,
}

impl Node {
    /// A node that is not running; its files are in `dir`.
    pub(super) fn new(
        role: Role,
        number: usize,
        dir: &Path,
        variables: Vec<(String, String)>,
    ) -> Self {
        let file = |what: &str| dir.join(format!("{}-{number}.{what}", role.name()));
        let (config, ready_file, log) = (file("toml"), file("ready"), file("log"));
        Self { role, number, process: None, variables, config, ready_file, log }
    }

    pub(super) fn name(&self) -> String {
        format!("{}-{}", self.role.name(), self.number)
    }

    pub(super) fn launch(&mut self) -> Result<()> {
        let _ = std::fs::remove_file(&self.ready_file);
        let (name, binary) = (self.name(), self.role.binary()?);
        let process = Process::spawn(&name, binary, &self.log, |command| {
            command.arg("--config").arg(&self.config).env("RUST_BACKTRACE", "1");
            command.envs(self.variables.iter().cloned());
        })?;
        self.process = Some(process);
        Ok(())
    }

    pub(super) fn is_launched(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn kill(&mut self) -> Result<()> {
        self.process()?.kill()?;
        self.process = None;
        Ok(())
    }

    /// SIGTERM, and wait until the process has ended; gives the exit code.
    pub(super) async fn drain(&mut self, limit: Duration) -> Result<i32> {
        let process = self.process()?;
        process.term()?;
        let status = process.wait(limit).await?;
        self.process = None;
        status.code().with_context(|| format!("{} ended with {status}", self.name()))
    }

    /// The running process.
    ///
    /// # Errors
    /// Returns an error if the node is not running.
    pub fn process(&mut self) -> Result<&mut Process> {
        let name = self.name();
        self.process.as_mut().with_context(|| format!("{name} is not running"))
    }

    async fn addresses(&mut self) -> Result<BTreeMap<String, SocketAddr>> {
        let start = Instant::now();
        loop {
            if let Ok(text) = std::fs::read(&self.ready_file) {
                return serde_json::from_slice(&text).context("ready file");
            }
            self.process()?.must_run()?;
            if start.elapsed() > START_LIMIT {
                bail!("{} is not up:\n{}", self.name(), self.process()?.tail(40));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The address of a listener (`admin`, `ws` or `grpc`). Waits until the role has bound it.
    ///
    /// # Errors
    /// Returns an error if the role does not start, or has no such listener.
    pub async fn address(&mut self, listener: &str) -> Result<SocketAddr> {
        let addresses = self.addresses().await?;
        addresses.get(listener).copied().with_context(|| format!("no {listener} in {addresses:?}"))
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// Returns an error with the last answer if the role does not become ready.
    pub async fn ready(&mut self) -> Result<()> {
        let start = Instant::now();
        let admin = self.address("admin").await?;
        loop {
            self.process()?.must_run()?;
            let reasons = match http::get(admin, "/readyz").await {
                Ok((200, _)) => return Ok(()),
                Ok((_, body)) => body,
                Err(error) => error.to_string(),
            };
            if start.elapsed() > START_LIMIT {
                let tail = self.process()?.tail(40);
                bail!("{} is not ready: {reasons}\n{tail}", self.name());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything that the role has written to standard output and standard error.
    ///
    /// # Errors
    /// Returns an error if the role was never started.
    pub fn output(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("output of {}", self.name()))
    }

    /// The text of the role's `/metrics`.
    ///
    /// # Errors
    /// Returns an error if the admin endpoint does not answer.
    pub async fn metrics_text(&mut self) -> Result<String> {
        let admin = self.address("admin").await?;
        Ok(http::get(admin, "/metrics").await?.1)
    }

    /// The role's metrics.
    ///
    /// # Errors
    /// Returns an error if the admin endpoint does not answer.
    pub async fn metrics(&mut self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.metrics_text().await?))
    }

    /// The sum of a metric over all labels; 0 if the role does not have it.
    ///
    /// # Errors
    /// Returns an error if the admin endpoint does not answer, or `name` has labels.
    pub async fn metric(&mut self, name: &str) -> Result<f64> {
        ensure!(!name.contains('{'), "{name} has labels: use metrics()");
        Ok(self.metrics().await?.sum(name))
    }

    #[expect(clippy::print_stderr, reason = "the harness captures what tests print")]
    pub(super) fn print_tail(&self) {
        let output = self.output().unwrap_or_default();
        let skip = output.lines().count().saturating_sub(25);
        eprintln!("--- the end of {}'s output", self.name());
        for line in output.lines().skip(skip) {
            eprintln!("{line}");
        }
    }
}
