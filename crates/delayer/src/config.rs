//! What an operator may set.

use std::path::PathBuf;
use std::time::Duration;

use barid_mailbox::RedisConfig;
use barid_mesh::MeshConfig;
use barid_runtime::{AdminConfig, LogConfig};
use serde::{Deserialize, Serialize};

/// The delayer's configuration; an empty file is valid.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The wait between two polls of a master while timers come due.
    pub poll_ms: u64,
    /// The wait that it grows to while none do.
    pub poll_idle_ms: u64,
    /// Users claimed in one poll; after a full page the next poll follows at once.
    pub page_users_max: u32,
    /// Pages of one master that are being handed on at the same time.
    pub pages_max: usize,
    /// A claim that could not be handed on is due again after about so long.
    pub defer_ms: u32,
    /// How often it reads the table of dispatchers.
    pub nodes_refresh_ms: u64,
    /// Redis, and the times between re-sends.
    pub redis: RedisConfig,
    /// The streams to dispatchers.
    pub mesh: MeshConfig,
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// How long draining may take.
    pub drain_seconds: u64,
    /// Where to write the bound addresses once it is up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            poll_ms: 100,
            poll_idle_ms: 250,
            page_users_max: 256,
            pages_max: 4,
            defer_ms: 500,
            nodes_refresh_ms: 500,
            redis: RedisConfig::default(),
            mesh: MeshConfig::default(),
            admin: AdminConfig::local(7112),
            log: LogConfig::default(),
            drain_seconds: 20,
            ready_file: None,
        }
    }
}

barid_runtime::has_common!(Config);

impl Config {
    /// # Errors
    /// What is wrong, naming the key.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("poll_ms", self.poll_ms),
            ("page_users_max", u64::from(self.page_users_max)),
            ("pages_max", self.pages_max as u64),
            ("defer_ms", u64::from(self.defer_ms)),
            ("nodes_refresh_ms", self.nodes_refresh_ms),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{name} must be above zero"));
        }
        if self.poll_idle_ms < self.poll_ms {
            return Err("poll_idle_ms must not be below poll_ms".into());
        }
        self.admin.check()?;
        self.redis.check()?;
        self.mesh.check().map_err(|e| format!("mesh.{e}"))
    }

    pub(crate) fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }

    pub(crate) fn poll_idle(&self) -> Duration {
        Duration::from_millis(self.poll_idle_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_contradict_each_other_are_named() {
        assert_eq!(Config::default().check(), Ok(()));
        let config = Config { poll_idle_ms: 1, ..Default::default() };
        assert_eq!(config.check().unwrap_err(), "poll_idle_ms must not be below poll_ms");
        let config = Config { page_users_max: 0, ..Default::default() };
        assert_eq!(config.check().unwrap_err(), "page_users_max must be above zero");
    }
}
