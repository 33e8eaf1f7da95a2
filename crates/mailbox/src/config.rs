//! Where Redis is, and the bounds of what is kept there.

use std::time::Duration;

use barid_core::{Backoff, InvalidBackoff, InvalidShardCount, ShardCount};
use barid_runtime::SecretUrl;
use serde::{Deserialize, Serialize};

/// Above it, a node that dies would take more acknowledgements with it than pacing does.
const ACK_LINGER_MAX_MS: u64 = 100;
/// Ten years: what the scripts add to a time stays far below what they pack it in.
pub(crate) const TTL_SECONDS_MAX: u64 = 10 * 366 * 24 * 3600;
/// More would not fit beside a mailbox's other fields.
const DEVICES_MAX: u32 = 64;
/// Bytes of a mailbox: the largest body has room, and sums of 32 bits do not wrap.
const MAILBOX_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 30;

/// Keys under `redis`. All roles of a cluster must agree on everything but the time-outs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RedisConfig {
    /// `redis://[user:password@]host:port[/db]`, `rediss://` for TLS, `redis+unix:///path`.
    pub url: SecretUrl,
    /// Further nodes of a Redis Cluster, tried in turn to learn its masters.
    pub urls: Vec<SecretUrl>,
    /// Whether it is a Redis Cluster.
    pub cluster: bool,
    /// How many shards; fixed when a cluster is created, recorded in Redis, 1 to 16384.
    pub shards: u32,
    /// How long to wait for a connection, ms.
    pub connect_timeout_ms: u64,
    /// How long to wait for an answer, ms; then the connection is dropped.
    pub response_timeout_ms: u64,
    /// Entries that a mailbox keeps.
    pub entries_max: u32,
    /// Bytes that they have in all, headers and bodies as stored; the oldest are evicted, never the newest.
    pub mailbox_bytes_max: u64,
    /// How long it keeps them, seconds.
    pub ttl_seconds: u64,
    /// Devices that a mailbox knows; the one that is offline and unused for longest is forgotten.
    pub devices_max: u32,
    /// Messages of one Kafka partition for one shard in one accept call.
    pub accept_batch_max: usize,
    /// First wait for an acknowledgement before a re-send, ms; doubles with each.
    pub retry_base_ms: u64,
    /// Longest wait between re-sends, ms.
    pub retry_max_ms: u64,
    /// Share by which each wait may be longer or shorter, 0 to 1.
    pub retry_jitter: f64,
    /// Single calls (connect, ack, …) that one script call may carry.
    pub batch_max: usize,
    /// How long an acknowledgement waits for others of its node that share its script call, ms; 0: not
    /// at all; at most 100. Nobody waits for its answer.
    pub ack_linger_ms: u64,
    /// Script calls of one kind in flight to one master.
    pub window: usize,
    /// Single calls that wait for one master, per kind; more of them wait outside, up to the
    /// response time-out.
    pub queue_max: usize,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            url: SecretUrl::new("redis://127.0.0.1:6379"),
            urls: Vec::new(),
            cluster: false,
            shards: 64,
            connect_timeout_ms: 2_000,
            response_timeout_ms: 3_000,
            entries_max: 500,
            mailbox_bytes_max: 4 << 20,
            ttl_seconds: 7 * 24 * 3600,
            devices_max: 16,
            accept_batch_max: 512,
            retry_base_ms: 2_000,
            retry_max_ms: 60_000,
            retry_jitter: 0.2,
            batch_max: 128,
            ack_linger_ms: 20,
            window: 3,
            queue_max: 8_192,
        }
    }
}

/// Bounds of a mailbox and of the scripts' batches.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries a mailbox keeps.
    pub entries_max: u32,
    /// How long it keeps them.
    pub ttl: Duration,
    /// Devices it knows; the one unused for longest is forgotten first.
    pub devices_max: u32,
    /// Messages of one Kafka partition for one shard in one accept call.
    pub accept_batch_max: usize,
}

impl RedisConfig {
    /// What must hold before anything starts.
    ///
    /// # Errors
    /// A key out of its range; names it.
    pub fn check(&self) -> Result<(), String> {
        self.shard_count().map_err(|e| format!("redis.shards: {e}"))?;
        self.retry().map_err(|e| format!("redis.retry_*: {e}"))?;
        let positive = [
            ("connect_timeout_ms", self.connect_timeout_ms),
            ("response_timeout_ms", self.response_timeout_ms),
            ("entries_max", u64::from(self.entries_max)),
            ("ttl_seconds", self.ttl_seconds),
            ("devices_max", u64::from(self.devices_max)),
            ("accept_batch_max", self.accept_batch_max as u64),
            ("batch_max", self.batch_max as u64),
            ("window", self.window as u64),
            ("queue_max", self.queue_max as u64),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("redis.{key} must be above 0"));
        }
        if self.ttl_seconds > TTL_SECONDS_MAX {
            return Err(format!("redis.ttl_seconds must be at most {TTL_SECONDS_MAX}, ten years"));
        }
        if self.devices_max > DEVICES_MAX {
            return Err(format!("redis.devices_max must be at most {DEVICES_MAX}"));
        }
        if !MAILBOX_BYTES.contains(&self.mailbox_bytes_max) {
            let (least, most) = MAILBOX_BYTES.into_inner();
            return Err(format!("redis.mailbox_bytes_max must be between {least} and {most}"));
        }
        if self.ack_linger_ms > ACK_LINGER_MAX_MS {
            return Err(format!("redis.ack_linger_ms must be at most {ACK_LINGER_MAX_MS}"));
        }
        Ok(())
    }

    /// The number of shards.
    ///
    /// # Errors
    /// Out of range.
    pub fn shard_count(&self) -> Result<ShardCount, InvalidShardCount> {
        ShardCount::new(self.shards)
    }

    /// The backoff between re-sends.
    ///
    /// # Errors
    /// The settings contradict each other.
    pub fn retry(&self) -> Result<Backoff, InvalidBackoff> {
        Backoff::new(
            Duration::from_millis(self.retry_base_ms),
            Duration::from_millis(self.retry_max_ms),
            self.retry_jitter,
        )
    }

    /// The bounds of a mailbox.
    pub fn limits(&self) -> Limits {
        Limits {
            entries_max: self.entries_max,
            ttl: Duration::from_secs(self.ttl_seconds),
            devices_max: self.devices_max,
            accept_batch_max: self.accept_batch_max,
        }
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn response_timeout(&self) -> Duration {
        Duration::from_millis(self.response_timeout_ms)
    }
}
