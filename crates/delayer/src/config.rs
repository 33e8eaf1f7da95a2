//! Configuration of a delayer.

use std::path::PathBuf;
use std::time::Duration;

use barid_mailbox::RedisConfig;
use barid_mesh::{InternalTlsConfig, MeshConfig};
use barid_runtime::bounds::{self, Bound, Bounded, DAY_SECONDS, whole, within};
use barid_runtime::{AdminConfig, LogConfig};
use serde::{Deserialize, Serialize};

/// The delayer's configuration; an empty file is valid.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Interval between polls of a master while timers come due, ms.
    pub poll_ms: u64,
    /// Maximum interval between polls of a master while none do, ms.
    pub poll_idle_ms: u64,
    /// Maximum users claimed in one poll. A full page is followed by the next poll at once.
    pub page_users_max: u32,
    /// Maximum pages of one master that are handed on concurrently.
    pub pages_max: usize,
    /// Delay of a claim that could not be handed on, ms, approximately. Doubles with each consecutive failure, up to
    /// `redis.retry_max_ms`.
    pub defer_ms: u32,
    /// The same delay if the device's access node is full, ms.
    pub defer_full_ms: u32,
    /// Interval between readings of the nodes' leases, ms.
    pub nodes_refresh_ms: u64,
    /// The dispatchers' `void_after_seconds`, s. For that time after an access node's lease ended, timers of its
    /// devices are deferred without a lookup.
    pub void_after_seconds: u64,
    /// Redis, and the times between re-sends.
    pub redis: RedisConfig,
    /// Mutual TLS with other roles.
    pub internal_tls: InternalTlsConfig,
    /// The streams to dispatchers.
    pub mesh: MeshConfig,
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// Maximum duration of a drain after SIGTERM, s.
    pub drain_seconds: u64,
    /// File to which the bound addresses are written as JSON once the role is up.
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
            defer_full_ms: 2_000,
            nodes_refresh_ms: 500,
            void_after_seconds: 600,
            redis: RedisConfig::default(),
            internal_tls: InternalTlsConfig::default(),
            mesh: MeshConfig::default(),
            admin: AdminConfig::local(7112),
            log: LogConfig::default(),
            drain_seconds: 20,
            ready_file: None,
        }
    }
}

barid_runtime::has_common!(Config);

impl Bounded for Config {
    fn bounds() -> Vec<Bound> {
        let own = vec![
            whole("poll_ms", 1..=60_000, "ms"),
            whole("poll_idle_ms", 1..=60_000, "ms"),
            whole("page_users_max", 1..=10_000, ""),
            whole("pages_max", 1..=1_000, ""),
            whole("defer_ms", 1..=600_000, "ms"),
            whole("defer_full_ms", 1..=600_000, "ms"),
            whole("nodes_refresh_ms", 1..=60_000, "ms"),
            whole("void_after_seconds", 1..=DAY_SECONDS, "s"),
            whole("drain_seconds", 1..=DAY_SECONDS, "s"),
        ];
        [
            own,
            within::<RedisConfig>("redis"),
            within::<MeshConfig>("mesh"),
            within::<AdminConfig>("admin"),
            within::<LogConfig>("log"),
        ]
        .concat()
    }
}

impl Config {
    /// Checks numbers and relations.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        let (poll, idle) = (self.poll_ms, self.poll_idle_ms);
        let poll = bounds::refuse_if(idle < poll, || {
            format!("poll_idle_ms ({idle}) must not be below poll_ms ({poll})")
        });
        let longest = self.redis.retry_max_ms;
        let defer = |name: &str, value: u32| {
            bounds::refuse_if(u64::from(value) > longest, || {
                format!("{name} ({value}) must not be above redis.retry_max_ms ({longest})")
            })
        };
        bounds::all([
            poll,
            defer("defer_ms", self.defer_ms),
            defer("defer_full_ms", self.defer_full_ms),
            self.redis.check(),
            self.mesh.check().map_err(|e| format!("mesh.{e}")),
        ])
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
    use tokio::time::Instant;

    #[test]
    fn hazard_61_every_number_is_bounded_and_what_is_taken_can_be_built() {
        bounds::walk("", Config::check, |config| {
            let defer = Duration::from_millis(config.defer_ms.into());
            let retry = config.redis.retry().unwrap();
            let delays = [0, 31, 32, u32::MAX].map(|failures| retry.delay(failures));
            let times = [
                config.poll(),
                config.poll_idle(),
                defer,
                Duration::from_secs(config.redis.ttl_seconds),
                Duration::from_secs(config.void_after_seconds),
            ];
            for time in times.into_iter().chain(delays) {
                let _ = Instant::now() + time;
            }
        });
    }

    #[test]
    fn hazard_59_settings_that_contradict_each_other_are_named() {
        assert_eq!(Config::default().check(), Ok(()));
        let config = Config { poll_idle_ms: 1, ..Default::default() };
        let told = "poll_idle_ms (1) must not be below poll_ms (100)";
        assert_eq!(config.check().unwrap_err(), told);
        let config = Config { defer_full_ms: 60_001, ..Default::default() };
        assert!(config.check().unwrap_err().starts_with("defer_full_ms"));
        let config = Config { page_users_max: 0, ..Default::default() };
        assert_eq!(
            config.check().unwrap_err(),
            "page_users_max: 0 is out of range; write 1 to 10000"
        );
    }
}
