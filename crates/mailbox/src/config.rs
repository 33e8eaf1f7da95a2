//! Configuration of Redis: addresses, timeouts and the bounds of mailboxes.

use std::path::PathBuf;
use std::time::Duration;

use barid_core::limits::TTL_SECONDS_MAX;
use barid_core::{Audience, Backoff, InvalidBackoff, InvalidShardCount, ShardCount};
use barid_runtime::SecretUrl;
use barid_runtime::bounds::{self, Bound, Bounded, DAY_SECONDS, HOUR_MS, real, whole};
use redis::{ConnectionAddr, IntoConnectionInfo as _};
use serde::{Deserialize, Serialize};

/// Maximum of `wait_replicas`.
const WAIT_REPLICAS_MAX: u64 = 16;
/// Maximum of `ack_linger_ms`: a killed node loses the acknowledgements that linger.
const ACK_LINGER_MAX_MS: u64 = 100;
/// Maximum of `devices_max`: more would not fit into a head besides its other fields.
const DEVICES_MAX: u64 = 64;
/// Bounds of a mailbox's bytes: the largest body fits, and 32-bit sums do not wrap twice.
const MAILBOX_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 30;

/// Keys under `redis`. All roles of a cluster must agree on everything but the timeouts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RedisConfig {
    /// `redis://[user:password@]host:port[/db]`, `rediss://` for TLS, `redis+unix:///path`.
    pub url: SecretUrl,
    /// Further nodes of a Redis Cluster, tried in turn to learn its masters.
    pub urls: Vec<SecretUrl>,
    /// Whether `url` is a node of a Redis Cluster.
    pub cluster: bool,
    /// `rediss://`: trusted authorities, one or several, PEM, read at start-up. Default: Mozilla's public ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// `rediss://`: client certificate and its chain, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_file: Option<PathBuf>,
    /// Private key of the client certificate, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// Number of shards, 1 to 16384; fixed when a cluster is created, and recorded in Redis.
    pub shards: u32,
    /// Timeout of a connection attempt, ms.
    pub connect_timeout_ms: u64,
    /// Timeout of a call, ms; the connection is dropped after it.
    pub response_timeout_ms: u64,
    /// Name of the master in Sentinel: `sentinels` are asked for its host and port, which replace those of `url`.
    /// Empty: Sentinel is not used.
    pub sentinel_master: String,
    /// Sentinels, asked in turn. User and password in these URLs are the Sentinels' own, the same for all; the master's
    /// are in `url`.
    pub sentinels: Vec<SecretUrl>,
    /// Replicas that must confirm an accepted batch (WAIT); 0: none. Count every replica that may be promoted, or a
    /// promotion may still lose what was confirmed. Only purgers wait.
    pub wait_replicas: u32,
    /// Timeout of this confirmation, ms; below `response_timeout_ms`.
    pub wait_timeout_ms: u64,
    /// Maximum entries of a mailbox; the oldest are evicted.
    pub entries_max: u32,
    /// Maximum bytes of a mailbox, headers and bodies as stored; the oldest entries are evicted, never the newest.
    pub mailbox_bytes_max: u64,
    /// How long a mailbox keeps an entry, seconds.
    pub ttl_seconds: u64,
    /// As `entries_max`, of the mailbox of a group.
    pub group_entries_max: u32,
    /// As `mailbox_bytes_max`, of the mailbox of a group.
    pub group_bytes_max: u64,
    /// As `ttl_seconds`, of the mailbox of a group.
    pub group_ttl_seconds: u64,
    /// As `entries_max`, of an app's mailbox of everyone.
    pub everyone_entries_max: u32,
    /// As `mailbox_bytes_max`, of an app's mailbox of everyone.
    pub everyone_bytes_max: u64,
    /// As `ttl_seconds`, of an app's mailbox of everyone.
    pub everyone_ttl_seconds: u64,
    /// How long an access node stays listed as having members of an audience without confirming it, seconds. Nodes
    /// confirm three times as often.
    pub audience_lease_seconds: u64,
    /// How long after a shard was found to have lost data its new mailboxes keep acknowledged entries, seconds, at
    /// most a day; 0: they do not. Redis may have lost other devices of the user as well. All connected ones are known
    /// again after `sync.confirm_interval_seconds`, so this should be longer.
    pub keep_after_loss_seconds: u64,
    /// Maximum known devices of a mailbox; the offline device that was unused for longest is forgotten.
    pub devices_max: u32,
    /// Maximum messages of one Kafka partition for one shard in one accept call.
    pub accept_batch_max: usize,
    /// First wait for an acknowledgement before a re-send, ms; doubles with each.
    pub retry_base_ms: u64,
    /// Maximum wait between re-sends, ms.
    pub retry_max_ms: u64,
    /// Random variation of each wait: ± this share of it, 0 to 1.
    pub retry_jitter: f64,
    /// Maximum single calls (connect, ack, …) in one script call.
    pub batch_max: usize,
    /// How long an acknowledgement waits for others of its node to share a script call, ms, 0 to 100. Nothing waits for
    /// its outcome.
    pub ack_linger_ms: u64,
    /// Maximum script calls of one kind in flight to one master.
    pub window: usize,
    /// Maximum queued single calls of one kind to one master; callers beyond it wait, up to `response_timeout_ms`.
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
            group_entries_max: 100,
            group_bytes_max: 1 << 20,
            group_ttl_seconds: 3 * 24 * 3600,
            everyone_entries_max: 10_000,
            everyone_bytes_max: 32 << 20,
            everyone_ttl_seconds: 3 * 24 * 3600,
            audience_lease_seconds: 1_800,
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

/// Maximum of a timeout, ms.
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
            whole("group_entries_max", 1..=100_000, ""),
            whole("group_bytes_max", MAILBOX_BYTES, "bytes"),
            whole("group_ttl_seconds", 1..=TTL_SECONDS_MAX, "s"),
            whole("everyone_entries_max", 1..=100_000, ""),
            whole("everyone_bytes_max", MAILBOX_BYTES, "bytes"),
            whole("everyone_ttl_seconds", 1..=TTL_SECONDS_MAX, "s"),
            whole("audience_lease_seconds", 3..=DAY_SECONDS, "s"),
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

/// Bounds of an audience's mailbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AudienceBounds {
    pub entries_max: u32,
    pub bytes_max: u64,
    pub ttl_ms: u64,
}

impl RedisConfig {
    /// Checks all keys and files.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line.
    pub fn check(&self) -> Result<(), String> {
        bounds::check_under("redis.", self)?;
        let retry = self.retry().map(drop);
        bounds::all([
            self.check_urls(),
            crate::tls::check(self),
            self.check_replicas(),
            retry.map_err(|e| format!("redis.retry_base_ms and retry_max_ms: {e}")),
        ])
    }

    fn check_urls(&self) -> Result<(), String> {
        let list = |key: &str, urls: &[SecretUrl]| {
            let urls = urls.iter().enumerate();
            urls.map(|(at, url)| check_url(&format!("{key}[{at}]"), url, self.cluster))
                .collect::<Vec<_>>()
        };
        let mut checks = vec![check_url("redis.url", &self.url, self.cluster)];
        checks.extend(list("redis.urls", &self.urls));
        checks.extend(list("redis.sentinels", &self.sentinels));
        if !(self.cluster || self.urls.is_empty()) {
            checks.push(Err(
                "redis.urls are nodes of a Redis Cluster; set redis.cluster = true, or \
                             clear them"
                    .into(),
            ));
        }
        bounds::all(checks)
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

    /// Whether other servers than those configured may become masters.
    pub(crate) fn may_move(&self) -> bool {
        self.cluster || !self.sentinel_master.is_empty()
    }

    /// The number of shards.
    ///
    /// # Errors
    /// Returns an error if it is out of range.
    pub fn shard_count(&self) -> Result<ShardCount, InvalidShardCount> {
        ShardCount::new(self.shards)
    }

    /// The backoff between re-sends.
    ///
    /// # Errors
    /// Returns an error if the settings contradict each other.
    pub fn retry(&self) -> Result<Backoff, InvalidBackoff> {
        Backoff::new(
            Duration::from_millis(self.retry_base_ms),
            Duration::from_millis(self.retry_max_ms),
            self.retry_jitter,
        )
    }

    /// How often a node confirms that it has members of an audience, seconds.
    pub fn audience_confirm_seconds(&self) -> u32 {
        u32::try_from(self.audience_lease_seconds / 3).unwrap_or(u32::MAX).max(1)
    }

    /// Bounds of an audience's mailbox.
    pub(crate) fn audience_bounds(&self, audience: &Audience) -> AudienceBounds {
        let (entries_max, bytes_max, ttl_seconds) = match audience {
            Audience::Everyone => {
                (self.everyone_entries_max, self.everyone_bytes_max, self.everyone_ttl_seconds)
            }
            Audience::Group(_) => {
                (self.group_entries_max, self.group_bytes_max, self.group_ttl_seconds)
            }
        };
        AudienceBounds { entries_max, bytes_max, ttl_ms: ttl_seconds.min(TTL_SECONDS_MAX) * 1000 }
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn response_timeout(&self) -> Duration {
        Duration::from_millis(self.response_timeout_ms)
    }
}

/// The largest number that Redis accepts for `databases`, less one.
const DATABASE_MAX: i64 = i32::MAX as i64 - 1;

/// Errors name the key without its URL, which may contain a password.
fn check_url(key: &str, url: &SecretUrl, cluster: bool) -> Result<(), String> {
    let form = "write redis://[user:password@]host:port[/db], rediss:// for TLS, or \
                redis+unix:///path";
    let info = url.expose().into_connection_info();
    let info = info.map_err(|_| format!("{key} is not a Redis URL; {form}"))?;
    match info.addr() {
        ConnectionAddr::Tcp(_, 0) | ConnectionAddr::TcpTls { port: 0, .. } => {
            Err(format!("{key}: port 0 cannot be connected to; {form}"))
        }
        _ if info.redis_settings().db() < 0 => {
            Err(format!("{key}: databases have numbers from 0; {form}"))
        }
        _ if info.redis_settings().db() > DATABASE_MAX => {
            Err(format!("{key}: databases have numbers up to {DATABASE_MAX}; {form}"))
        }
        _ if cluster && info.redis_settings().db() != 0 => {
            Err(format!("{key}: a Redis Cluster has only database 0; write the URL without one"))
        }
        _ => Ok(()),
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
            check(|config| config.url = SecretUrl::new("redis://:hunter2@h:0")),
            check(|config| config.url = SecretUrl::new("redis://:hunter2@h/-1")),
            check(|config| config.url = SecretUrl::new("redis://:hunter2@h/99999999999")),
            check(|config| {
                config.url = SecretUrl::new("redis://:hunter2@h/3");
                config.cluster = true;
            }),
            check(|config| config.sentinels = vec![SecretUrl::new("h:26379")]),
            check(|config| config.urls = vec![SecretUrl::new("redis://h:6379")]),
        ];
        for (told, key) in told.into_iter().zip([
            "redis.url is not",
            "redis.url is not",
            "redis.url is not",
            "redis.url is not",
            "redis.url: port 0",
            "redis.url: databases have numbers from 0",
            "redis.url: databases have numbers up to 2147483646",
            "redis.url: a Redis Cluster has only database 0",
            "redis.sentinels[0] is not",
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
