//! The purger's settings.

use std::path::PathBuf;
use std::time::Duration;

use barid_bus::KafkaConfig;
use barid_core::Backoff;
use barid_mailbox::RedisConfig;
use barid_mesh::{InternalTlsConfig, MeshConfig};
use barid_runtime::bounds::{self, Bound, Bounded, DAY_SECONDS, HOUR_MS, TEBIBYTE, whole, within};
use barid_runtime::{AdminConfig, LogConfig};
use barid_wire::record::RecordLimits;
use serde::{Deserialize, Serialize};

/// The purger's configuration; an empty file is valid.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// Maximum duration of a drain after SIGTERM, s.
    pub drain_seconds: u64,
    /// File to which the bound addresses are written as JSON once the role is up.
    pub ready_file: Option<PathBuf>,
    /// Kafka.
    pub kafka: KafkaConfig,
    /// Redis.
    pub redis: RedisConfig,
    /// The streams to the dispatchers.
    pub mesh: MeshConfig,
    /// Mutual TLS with dispatchers.
    pub internal_tls: InternalTlsConfig,
    /// Limits of a record.
    pub limits: LimitsConfig,
    /// Compression of payloads.
    pub compression: CompressionConfig,
    /// Bounds of the work in progress.
    pub window: WindowConfig,
    /// Interval between commits of finished offsets, ms.
    pub commit_interval_ms: u64,
    /// Maximum time to finish the records of a revoked partition, ms.
    pub revoke_drain_ms: u64,
    /// Interval between checks of the topics' ids, ms. Each check also proves that a broker answers.
    pub topic_refresh_ms: u64,
    /// Interval between readings of the dispatchers' leases, ms.
    pub nodes_refresh_ms: u64,
}

/// Limits of a record.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Maximum bytes of a payload before compression.
    pub payload_bytes_max: usize,
    /// Maximum recipients of a record.
    pub users_max: usize,
    /// Maximum recipients times payload bytes of a record.
    pub fanout_bytes_max: usize,
    /// Maximum depth of nested arrays and objects in a JSON body.
    pub json_depth_max: usize,
    /// Maximum time to live, s.
    pub ttl_seconds_max: u64,
}

/// Compression of payloads, which are compressed once for all hops.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressionConfig {
    /// Payloads below this many bytes are not compressed.
    pub min_bytes: usize,
    /// zstd's level, 1 to 19.
    pub level: i32,
}

/// Bounds of the work in progress. Records beyond them stay in Kafka.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WindowConfig {
    /// Maximum unfinished records of one priority.
    pub records_max: usize,
    /// Maximum bytes of the unfinished records of one priority.
    pub bytes_max: usize,
    /// Maximum messages queued for one Redis master. Beyond it, messages for the other masters wait as well.
    pub lane_messages_max: usize,
    /// Maximum messages queued for a master that does not answer, capped at half of `records_max` over all such
    /// masters. Further ones are skipped in the log and read again once the master is back.
    pub away_messages_max: usize,
    /// Maximum records skipped that way, over all partitions, at some 20 bytes of memory each. Beyond it the partitions
    /// pause.
    pub skipped_records_max: usize,
    /// Shares of the three priorities, most urgent first, while all of them have records.
    pub weights: [usize; 3],
    /// Maximum concurrent accept calls to one master; each call has shards of its own.
    pub calls_per_lane: usize,
    /// Maximum messages of an accept call. The rest is sent with the next call, behind those of other shards.
    pub call_messages_max: usize,
    /// Maximum bytes of an accept call.
    pub call_bytes_max: usize,
    /// Maximum messages queued for one dispatcher; further ones are left to the retry timers.
    pub handoff_max: usize,
    /// Maximum wait for room in that queue, ms.
    pub handoff_wait_ms: u64,
    /// Interval at which shards without new messages are checked for lost data, ms.
    pub probe_interval_ms: u64,
    /// First wait after a failed accept call, ms; doubles with each failure.
    pub retry_base_ms: u64,
    /// Maximum wait after a failed accept call, ms.
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
            internal_tls: InternalTlsConfig::default(),
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
            away_messages_max: 2_000,
            skipped_records_max: 2_000_000,
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

impl Bounded for LimitsConfig {
    fn bounds() -> Vec<Bound> {
        let highest = RecordLimits::HIGHEST;
        vec![
            whole("payload_bytes_max", 1..=highest.payload_bytes_max as u64, "bytes"),
            whole("users_max", 1..=highest.users_max as u64, ""),
            whole("fanout_bytes_max", 1..=highest.fanout_bytes_max as u64, "bytes"),
            whole("json_depth_max", 1..=highest.json_depth_max as u64, ""),
            whole("ttl_seconds_max", 1..=highest.ttl_seconds_max, "s"),
        ]
    }
}

impl Bounded for CompressionConfig {
    fn bounds() -> Vec<Bound> {
        vec![whole("min_bytes", 0..=16 << 20, "bytes"), whole("level", 1..=19, "")]
    }
}

impl Bounded for WindowConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("records_max", 1..=10_000_000, ""),
            whole("bytes_max", 1..=TEBIBYTE, "bytes"),
            whole("lane_messages_max", 1..=10_000_000, ""),
            whole("away_messages_max", 1..=10_000_000, ""),
            whole("skipped_records_max", 1..=100_000_000, ""),
            // No priority may starve.
            whole("weights", 1..=1_000, ""),
            whole("calls_per_lane", 1..=1_000, ""),
            whole("call_messages_max", 1..=10_000, ""),
            // Far below what Redis takes as one query (client-query-buffer-limit, 1 GiB).
            whole("call_bytes_max", 1..=256 << 20, "bytes"),
            whole("handoff_max", 1..=10_000_000, ""),
            whole("handoff_wait_ms", 0..=60_000, "ms"),
            whole("probe_interval_ms", 1..=HOUR_MS, "ms"),
            whole("retry_base_ms", 1..=60_000, "ms"),
            whole("retry_max_ms", 1..=600_000, "ms"),
        ]
    }
}

impl Bounded for Config {
    fn bounds() -> Vec<Bound> {
        let own = vec![
            whole("drain_seconds", 1..=DAY_SECONDS, "s"),
            whole("commit_interval_ms", 1..=HOUR_MS, "ms"),
            whole("revoke_drain_ms", 0..=240_000, "ms"),
            whole("topic_refresh_ms", 1..=HOUR_MS, "ms"),
            whole("nodes_refresh_ms", 1..=60_000, "ms"),
        ];
        [
            own,
            within::<AdminConfig>("admin"),
            within::<LogConfig>("log"),
            within::<KafkaConfig>("kafka"),
            within::<RedisConfig>("redis"),
            within::<MeshConfig>("mesh"),
            within::<LimitsConfig>("limits"),
            within::<CompressionConfig>("compression"),
            within::<WindowConfig>("window"),
        ]
        .concat()
    }
}

impl Config {
    /// Checks numbers, names and relations.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line, with the values that contradict each other.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        let payload = self.limits.payload_bytes_max;
        let (mailbox, fanout) = (self.redis.mailbox_bytes_max, self.limits.fanout_bytes_max);
        let in_mailbox = bounds::refuse_if(payload as u64 > mailbox, || {
            format!(
                "limits.payload_bytes_max must be at most redis.mailbox_bytes_max, {mailbox}: one \
                 message would push out all others"
            )
        });
        let in_fanout = bounds::refuse_if(payload > fanout, || {
            format!("limits.payload_bytes_max must be at most limits.fanout_bytes_max, {fanout}")
        });
        bounds::all([
            self.kafka.check(),
            self.redis.check(),
            self.mesh.check().map_err(|e| format!("mesh.{e}")),
            in_mailbox,
            in_fanout,
            self.retry().map(drop),
        ])
    }

    /// Waits between failed accept calls.
    ///
    /// # Errors
    /// Returns an error if the two waits contradict each other.
    pub fn retry(&self) -> Result<Backoff, String> {
        let base = Duration::from_millis(self.window.retry_base_ms);
        let max = Duration::from_millis(self.window.retry_max_ms);
        Backoff::new(base, max, 0.2)
            .map_err(|e| format!("window.retry_base_ms and window.retry_max_ms: {e}"))
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
    use std::time::Instant;

    #[test]
    fn hazard_59_a_limit_that_another_one_would_overrule_is_told_with_it() {
        let error = |text: &str| {
            let config: Config = toml::from_str(text).unwrap();
            config.check().unwrap_err()
        };
        let told =
            error("redis = { mailbox_bytes_max = 65536 }\nlimits = { payload_bytes_max = 65537 }");
        assert!(
            told.starts_with("limits.payload_bytes_max must be at most redis.mailbox_bytes_max")
        );
        let told = error("limits = { fanout_bytes_max = 65535 }");
        assert_eq!(told, "limits.payload_bytes_max must be at most limits.fanout_bytes_max, 65535");
        let told =
            error("mesh = { link = { queue_bytes_max = 2097152, batch_bytes_max = 2097153 } }");
        assert_eq!(told, "mesh.link.batch_bytes_max must be at most queue_bytes_max");
    }

    #[test]
    fn hazard_61_every_number_is_bounded_and_what_is_taken_can_be_built() {
        bounds::walk("", Config::check, |config| {
            let (window, limits) = (&config.window, config.record_limits());
            let retry = config.retry().unwrap();
            let delays = [0, 31, 32, u32::MAX].map(|failures| retry.delay(failures));
            let ms = [
                config.commit_interval_ms,
                config.revoke_drain_ms,
                config.topic_refresh_ms,
                config.drain_seconds * 1000,
                window.handoff_wait_ms,
                window.probe_interval_ms,
                limits.ttl_seconds_max * 1000,
            ];
            for time in ms.map(Duration::from_millis).into_iter().chain(delays) {
                let _ = Instant::now() + time;
            }
            drop(tokio::sync::mpsc::channel::<u8>(window.handoff_max));
            assert!(window.weights.iter().sum::<usize>() > 0);
        });
    }

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
