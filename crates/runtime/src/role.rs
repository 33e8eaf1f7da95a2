//! The shape of a role: check, start, work until drained.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bounds::Bounded;
use crate::config::HasCommon;
use crate::context::Context;

/// Why a role's run ended early.
#[derive(Debug)]
pub struct RunError {
    /// Whether the configuration must be changed: the exit code is 2.
    pub is_config: bool,
    error: Box<dyn std::error::Error + Send + Sync>,
}

impl RunError {
    /// Wraps a role's error.
    pub fn new(
        is_config: bool,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { is_config, error: error.into() }
    }
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// The answer of a dependency to `--check-config --connect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The key, and the address without its password.
    pub name: String,
    /// Its description, or why it cannot be used.
    pub found: Result<String, Unfit>,
}

/// Why a dependency is of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// It does not answer.
    Away(String),
    /// It answers, but cannot be used with this configuration.
    Unusable(String),
    /// It is taken, perhaps by the very process that the configuration belongs to: a warning.
    InUse(String),
}

/// A role, as [`main`](crate::main) runs it.
pub trait Role: Sized + Send + 'static {
    /// The name in `barid-<name>` and `BARID_<NAME>_…`.
    const NAME: &'static str;
    /// What it does, in a sentence for `--help`.
    const ABOUT: &'static str;
    /// Its configuration; an empty file means `Config::default()`.
    type Config: DeserializeOwned + Serialize + Default + HasCommon + Bounded + Send + 'static;

    /// Checks the configuration. It may read files that the configuration names. Called before anything starts.
    ///
    /// # Errors
    /// Returns what is wrong, with the keys.
    fn check(config: &Self::Config) -> Result<(), String>;

    /// Checks files without which the role can start, because it reads them again later: `--check-config` warns of
    /// them.
    ///
    /// # Errors
    /// Returns what is wrong, with the keys.
    fn check_late_files(_config: &Self::Config) -> Result<(), String> {
        Ok(())
    }

    /// Asks each dependency that the configuration names for what the role needs of it, for at most `timeout` each.
    /// Changes nothing there.
    fn probe(config: &Self::Config, timeout: Duration) -> impl Future<Output = Vec<Probe>> + Send;

    /// Connects, listens, and announces the listeners. Waits while Kafka or Redis is unavailable. `None`: draining
    /// began meanwhile.
    ///
    /// # Errors
    /// The role cannot start.
    fn start(
        config: Self::Config,
        context: Context,
    ) -> impl Future<Output = Result<Option<Self>, RunError>> + Send;

    /// Runs until draining begins, then finishes the work in flight.
    ///
    /// # Errors
    /// The role cannot continue.
    fn work(self) -> impl Future<Output = Result<Stopped, RunError>> + Send;

    /// [`Self::start`], then [`Self::work`].
    ///
    /// # Errors
    /// The role cannot start or continue.
    fn run(
        config: Self::Config,
        context: Context,
    ) -> impl Future<Output = Result<Stopped, RunError>> + Send {
        async {
            match Self::start(config, context).await? {
                Some(role) => role.work().await,
                None => Ok(Stopped::Clean),
            }
        }
    }
}

/// How a role ended after draining.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// Everything was finished.
    Clean,
    /// The deadline cut something off; exit code 3.
    Cut {
        /// The kind of work: `sessions`, `records` and so on.
        what: String,
        /// How many.
        count: u64,
    },
}
