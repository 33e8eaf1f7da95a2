//! Where Redis is, and the bounds of what is kept there.

use std::path::PathBuf;
use std::time::Duration;

use barid_core::limits::TTL_SECONDS_MAX;
use barid_core::{Backoff, InvalidBackoff, InvalidShardCount, ShardCount};
use barid_runtime::SecretUrl;
use barid_runtime::bounds::{self, Bound, Bounded, DAY_SECONDS, HOUR_MS, real, whole};
use redis::IntoConnectionInfo as _;
use serde::{Deserialize, Serialize};

/// More replicas of one master are not known to anybody.
const WAIT_REPLICAS_MAX: u64 = 16;
/// Above it, a node that dies would take more acknowledgements with it than pacing does.
const ACK_LINGER_MAX_MS: u64 = 100;
/// More would not fit beside a mailbox's other fields.
const DEVICES_MAX: u64 = 64;
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
    /// `rediss://`: the only authorities that are trusted, PEM, one or several; Mozilla's public ones if not
    /// given. Read when a process starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// `rediss://`: the certificate that a process shows to Redis, with those that it was issued by, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_file: Option<PathBuf>,
    /// Its private key, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// How many shards; fixed when a cluster is created, recorded in Redis, 1 to 16384.
    pub shards: u32,
    /// How long to wait for a connection, ms.
    pub connect_timeout_ms: u64,
    /// How long to wait for an answer, ms; then the connection is dropped.
    pub response_timeout_ms: u64,
    /// The name that Sentinels know the master by: `sentinels` say where it is, in place of the host
    /// and port of `url`. Empty: there are no Sentinels.
    pub sentinel_master: String,
    /// Sentinels, asked in turn. Users and passwords in these URLs are theirs, and the same for all of them;
    /// those of the master are in `url`.
    pub sentinels: Vec<SecretUrl>,
    /// Replicas that must have a batch before it is confirmed (WAIT); 0: none. All that may be
    /// promoted, else a promotion may still forget what is confirmed. Only purgers wait.
    pub wait_replicas: u32,
    /// How long a batch waits for them, ms; below `response_timeout_ms`.
    pub wait_timeout_ms: u64,
    /// Entries that a mailbox keeps.
    pub entries_max: u32,
    /// Bytes that they have in all, headers and bodies as stored; the oldest are evicted, never the newest.
    pub mailbox_bytes_max: u64,
    /// How long it keeps them, seconds.
    pub ttl_seconds: u64,
    /// For how long after Redis was found to have forgotten something of a shard a mailbox that has dropped
    /// nothing yet keeps what is acknowledged, seconds, at most a day; 0: not at all. Other devices of its user
    /// may be forgotten, too: all that are connected are known again when
    /// `sync.confirm_interval_seconds` have passed, so longer than that.
    pub keep_after_loss_seconds: u64,
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
            ca_file: None,
            certificate_file: None,
            key_file: None,
            shards: 64,
            connect_timeout_ms: 2_000,
            response_timeout_ms: 3_000,
            sentinel_master: String::new(),
            sentinels: Vec::new(),
            wait_replicas: 0,
            wait_timeout_ms: 1_000,
            entries_max: 500,
            mailbox_bytes_max: 4 << 20,
            ttl_seconds: 7 * 24 * 3600,
            keep_after_loss_seconds: 900,
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

/// Waits for Redis, ms.
const WAIT_MS_MAX: u64 = HOUR_MS / 6;

impl Bounded for RedisConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("shards", 1..=16_384, ""),
            whole("connect_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("response_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("wait_replicas", 0..=WAIT_REPLICAS_MAX, ""),
            whole("wait_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("entries_max", 1..=100_000, ""),
            whole("mailbox_bytes_max", MAILBOX_BYTES, "bytes"),
            whole("ttl_seconds", 1..=TTL_SECONDS_MAX, "s"),
            whole("keep_after_loss_seconds", 0..=DAY_SECONDS, "s"),
            whole("devices_max", 1..=DEVICES_MAX, ""),
            whole("accept_batch_max", 1..=10_000, ""),
            whole("retry_base_ms", 1..=HOUR_MS, "ms"),
            whole("retry_max_ms", 1..=DAY_SECONDS * 1000, "ms"),
            real("retry_jitter", 0.0..=1.0, ""),
            whole("batch_max", 1..=10_000, ""),
            whole("ack_linger_ms", 0..=ACK_LINGER_MAX_MS, "ms"),
            whole("window", 1..=1_000, ""),
            whole("queue_max", 1..=10_000_000, ""),
        ]
    }
}

impl RedisConfig {
    /// What must hold before anything starts.
    ///
    /// # Errors
    /// A key out of its range; names it.
    pub fn check(&self) -> Result<(), String> {
        bounds::check_under("redis.", self)?;
        self.check_urls()?;
        crate::tls::check(self)?;
        self.check_replicas()?;
        self.retry().map(drop).map_err(|e| format!("redis.retry_base_ms and retry_max_ms: {e}"))
    }

    /// Errors name the key and show no URL: it may hold a password.
    fn check_urls(&self) -> Result<(), String> {
        let nodes = self.urls.iter().map(|url| ("redis.urls", url));
        let sentinels = self.sentinels.iter().map(|url| ("redis.sentinels", url));
        for (key, url) in std::iter::once(("redis.url", &self.url)).chain(nodes).chain(sentinels) {
            if url.expose().into_connection_info().is_err() {
                return Err(format!(
                    "{key} is not a URL of Redis; write redis://[user:password@]host:port[/db], rediss:// for \
                     TLS, or redis+unix:///path"
                ));
            }
        }
        if !(self.cluster || self.urls.is_empty()) {
            return Err(
                "redis.urls are nodes of a Redis Cluster; set redis.cluster = true, or clear them"
                    .into(),
            );
        }
        Ok(())
    }

    fn check_replicas(&self) -> Result<(), String> {
        // Behind the time-out the connection is dropped, and with it what WAIT would have said.
        if self.wait_replicas > 0 && self.wait_timeout_ms >= self.response_timeout_ms {
            return Err(format!(
                "redis.wait_timeout_ms ({}) must be below redis.response_timeout_ms ({})",
                self.wait_timeout_ms, self.response_timeout_ms
            ));
        }
        match (self.sentinel_master.is_empty(), self.sentinels.is_empty()) {
            (false, _) if self.cluster => {
                Err("redis.sentinel_master: a Redis Cluster has no Sentinels; clear one of the two"
                    .into())
            }
            (false, true) => {
                Err("redis.sentinels must name some, as redis.sentinel_master is set".into())
            }
            (true, false) => Err("redis.sentinel_master must be set, as redis.sentinels is".into()),
            _ => Ok(()),
        }
    }

    /// Whether its masters may be others than those that are configured.
    pub(crate) fn may_move(&self) -> bool {
        self.cluster || !self.sentinel_master.is_empty()
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

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn response_timeout(&self) -> Duration {
        Duration::from_millis(self.response_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_59_a_url_that_start_would_refuse_is_refused_with_its_key() {
        let check = |change: fn(&mut RedisConfig)| {
            let mut config = RedisConfig::default();
            change(&mut config);
            config.check()
        };
        assert_eq!(check(|_| ()), Ok(()));
        let told = [
            check(|config| config.url = SecretUrl::new("localhost:6379")),
            check(|config| config.url = SecretUrl::new("")),
            check(|config| config.url = SecretUrl::new("http://:hunter2@h")),
            check(|config| config.url = SecretUrl::new("redis://h:99999")),
            check(|config| config.sentinels = vec![SecretUrl::new("h:26379")]),
            check(|config| config.urls = vec![SecretUrl::new("redis://h:6379")]),
        ];
        for (told, key) in told.into_iter().zip([
            "redis.url is not",
            "redis.url is not",
            "redis.url is not",
            "redis.url is not",
            "redis.sentinels is not",
            "redis.urls are nodes",
        ]) {
            let told = told.unwrap_err();
            assert!(told.starts_with(key) && !told.contains("hunter2"), "{told}");
        }
        for good in ["redis://h", "rediss://u:p@h:1/2", "redis+unix:///run/redis.sock"] {
            let config = RedisConfig { url: SecretUrl::new(good), ..Default::default() };
            assert_eq!(config.check(), Ok(()), "{good}");
        }
    }
}
