//! The purger's settings.

use std::path::PathBuf;
use std::time::Duration;

use barid_bus::KafkaConfig;
use barid_core::Backoff;
use barid_mailbox::RedisConfig;
use barid_mesh::MeshConfig;
use barid_runtime::{AdminConfig, LogConfig};
use barid_wire::record::RecordLimits;
use serde::{Deserialize, Serialize};

/// Everything that a purger can be told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// How long draining may take after SIGTERM.
    pub drain_seconds: u64,
    /// Where to write the bound addresses as JSON once everything is up.
    pub ready_file: Option<PathBuf>,
    /// Where the records come from.
    pub kafka: KafkaConfig,
    /// Where the mailboxes are.
    pub redis: RedisConfig,
    /// The streams to the dispatchers.
    pub mesh: MeshConfig,
    /// What a record may be.
    pub limits: LimitsConfig,
    /// How payloads are compressed.
    pub compression: CompressionConfig,
    /// How much is under way at once.
    pub window: WindowConfig,
    /// How often finished offsets are committed.
    pub commit_interval_ms: u64,
    /// How long a partition that is taken away may take to finish what is under way.
    pub revoke_drain_ms: u64,
    /// How often the topics' ids are compared, which also shows that a broker answers.
    pub topic_refresh_ms: u64,
    /// How often the dispatchers' leases are read.
    pub nodes_refresh_ms: u64,
}

/// What a record may be.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Bytes of a payload before compression.
    pub payload_bytes_max: usize,
    /// Users of one record.
    pub users_max: usize,
    /// Users times payload bytes of one record.
    pub fanout_bytes_max: usize,
    /// Arrays and objects inside each other in a JSON body.
    pub json_depth_max: usize,
    /// The longest time to live.
    pub ttl_seconds_max: u64,
}

/// How payloads are compressed, once for every hop.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressionConfig {
    /// Payloads below so many bytes stay as they are.
    pub min_bytes: usize,
    /// zstd's level, 1 to 19.
    pub level: i32,
}

/// How much is under way at once. What does not fit stays in Kafka.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WindowConfig {
    /// Records of one priority that are taken and not finished.
    pub records_max: usize,
    /// Their size in memory.
    pub bytes_max: usize,
    /// Messages that wait for one Redis master: what may pile up while it is away before the other
    /// masters' messages behind them have to wait.
    pub lane_messages_max: usize,
    /// Shares of the three priorities, most urgent first, while all have something to do.
    pub weights: [usize; 3],
    /// Accept calls under way to one master at once; each has its own shards.
    pub calls_per_lane: usize,
    /// Messages of one accept call: what waits beyond them goes in the next, other shards first.
    pub call_messages_max: usize,
    /// Bytes of one accept call.
    pub call_bytes_max: usize,
    /// Messages that wait for dispatchers; further ones are left to the retry timers.
    pub handoff_max: usize,
    /// How long accepting waits for room there before it goes on without.
    pub handoff_wait_ms: u64,
    /// How often shards without new messages are asked whether they still know what they confirmed.
    pub probe_interval_ms: u64,
    /// First wait after a failed accept call.
    pub retry_base_ms: u64,
    /// Longest wait between them.
    pub retry_max_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            admin: AdminConfig::local(7102),
            log: LogConfig::default(),
            drain_seconds: 20,
            ready_file: None,
            kafka: KafkaConfig::default(),
            redis: RedisConfig::default(),
            mesh: MeshConfig::default(),
            limits: LimitsConfig::default(),
            compression: CompressionConfig::default(),
            window: WindowConfig::default(),
            commit_interval_ms: 1000,
            revoke_drain_ms: 5000,
            topic_refresh_ms: 5000,
            nodes_refresh_ms: 1000,
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let limits = RecordLimits::default();
        Self {
            payload_bytes_max: limits.payload_bytes_max,
            users_max: limits.users_max,
            fanout_bytes_max: limits.fanout_bytes_max,
            json_depth_max: limits.json_depth_max,
            ttl_seconds_max: limits.ttl_seconds_max,
        }
    }
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self { min_bytes: 256, level: 3 }
    }
}

impl Default for WindowConfig {
    fn default() -> Self {
        Self {
            records_max: 20_000,
            bytes_max: 128 * 1024 * 1024,
            lane_messages_max: 15_000,
            weights: [8, 4, 1],
            calls_per_lane: 1,
            call_messages_max: 2048,
            call_bytes_max: 2 * 1024 * 1024,
            handoff_max: 8192,
            handoff_wait_ms: 100,
            probe_interval_ms: 10_000,
            retry_base_ms: 50,
            retry_max_ms: 2000,
        }
    }
}

barid_runtime::has_common!(Config);

impl Config {
    /// Relations that types do not check.
    ///
    /// # Errors
    /// What is wrong, naming the keys.
    pub fn check(&self) -> Result<(), String> {
        self.kafka.check()?;
        self.redis.check().map_err(|e| format!("redis: {e}"))?;
        self.mesh.check().map_err(|e| format!("mesh: {e}"))?;
        let (limits, window) = (&self.limits, &self.window);
        let above_zero = [
            ("limits.payload_bytes_max", limits.payload_bytes_max),
            ("limits.users_max", limits.users_max),
            ("limits.json_depth_max", limits.json_depth_max),
            ("window.records_max", window.records_max),
            ("window.bytes_max", window.bytes_max),
            ("window.lane_messages_max", window.lane_messages_max),
            ("window.calls_per_lane", window.calls_per_lane),
            ("window.call_messages_max", window.call_messages_max),
            ("window.call_bytes_max", window.call_bytes_max),
            ("window.handoff_max", window.handoff_max),
        ];
        if let Some((key, _)) = above_zero.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} must be above zero"));
        }
        if window.weights.contains(&0) {
            return Err("window.weights must be above zero: no priority may starve".into());
        }
        if !(1..=19).contains(&self.compression.level) {
            return Err("compression.level must be within 1 and 19".into());
        }
        if limits.ttl_seconds_max >= 1 << 43 {
            return Err("limits.ttl_seconds_max must be below 2^43".into());
        }
        for (key, value) in [
            ("commit_interval_ms", self.commit_interval_ms),
            ("topic_refresh_ms", self.topic_refresh_ms),
            ("nodes_refresh_ms", self.nodes_refresh_ms),
            ("window.probe_interval_ms", window.probe_interval_ms),
        ] {
            if value == 0 {
                return Err(format!("{key} must be above zero"));
            }
        }
        self.admin.check()?;
        self.retry().map(|_| ())
    }

    /// Waits between failed accept calls.
    ///
    /// # Errors
    /// They make no sense.
    pub fn retry(&self) -> Result<Backoff, String> {
        let base = Duration::from_millis(self.window.retry_base_ms);
        let max = Duration::from_millis(self.window.retry_max_ms);
        Backoff::new(base, max, 0.2).map_err(|e| format!("window.retry_*_ms: {e}"))
    }

    /// The limits as the decoder takes them.
    pub fn record_limits(&self) -> RecordLimits {
        let limits = &self.limits;
        RecordLimits {
            payload_bytes_max: limits.payload_bytes_max,
            users_max: limits.users_max,
            fanout_bytes_max: limits.fanout_bytes_max,
            json_depth_max: limits.json_depth_max,
            ttl_seconds_max: limits.ttl_seconds_max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_a_valid_configuration() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn no_priority_may_starve() {
        let config: Config = toml::from_str("[window]\nweights = [8, 4, 0]").unwrap();
        assert!(config.check().unwrap_err().starts_with("window.weights"));
    }
}
