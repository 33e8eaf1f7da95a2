//! The shape of a role: check, start, work until drained.

use std::future::Future;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bounds::Bounded;
use crate::config::HasCommon;
use crate::context::Context;

/// Why a role's run ended early.
pub type RunError = Box<dyn std::error::Error + Send + Sync>;

/// A role, as [`main`](crate::main) runs it.
pub trait Role: Sized + Send + 'static {
    /// The name in `barid-<name>` and `BARID_<NAME>_…`.
    const NAME: &'static str;
    /// Its configuration; an empty file means `Config::default()`.
    type Config: DeserializeOwned + Serialize + Default + HasCommon + Bounded + Send + 'static;

    /// Checks the configuration. It may read files that the configuration names. Called before anything starts.
    ///
    /// # Errors
    /// Returns what is wrong, with the keys.
    fn check(config: &Self::Config) -> Result<(), String>;

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
