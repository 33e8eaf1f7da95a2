//! Configuration of a dispatcher.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use barid_mailbox::{LeaseConfig, RedisConfig};
use barid_mesh::{GrpcConfig, InternalTlsConfig, LinkConfig};
use barid_runtime::bounds::{self, Bound, Bounded, DAY_SECONDS, HOUR_MS, TEBIBYTE, whole, within};
use barid_runtime::config::listen;
use barid_runtime::{AdminConfig, LogConfig};
use serde::{Deserialize, Serialize};

use crate::resolve::Limits;

/// The dispatcher's configuration; an empty file is valid.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this dispatcher, unique in the cluster. Empty: derived from the address in its lease.
    pub node: String,
    /// Address for purgers and delayers (gRPC).
    #[serde(deserialize_with = "listen")]
    pub listen: SocketAddr,
    /// `host:port` written into the lease. Empty: the bound address.
    pub advertise: String,
    /// Zone shown to operators; may be empty.
    pub zone: String,
    /// Time to live of the lease without renewal, ms.
    pub lease_ttl_ms: u64,
    /// Interval between readings of the access nodes' leases, ms.
    pub nodes_refresh_ms: u64,
    /// Maximum batches of one caller that are looked up concurrently.
    pub window_batches: usize,
    /// Age at which the routes of a node without a lease are removed, s.
    pub void_after_seconds: u64,
    /// Time for which a draining dispatcher still takes batches, so that its callers learn of the drain, ms.
    pub drain_settle_ms: u64,
    /// Redis.
    pub redis: RedisConfig,
    /// The cache of routes.
    pub l1: L1Config,
    /// Removal of void routes.
    pub reap: ReapConfig,
    /// The port for other roles.
    pub grpc: GrpcConfig,
    /// Mutual TLS with other roles.
    pub internal_tls: InternalTlsConfig,
    /// The streams to access nodes.
    pub links: LinkConfig,
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

/// Keys under `l1`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct L1Config {
    /// Approximate maximum bytes of the cache.
    pub bytes_max: u64,
    /// Maximum age of an entry, s.
    pub ttl_seconds: u64,
    /// Timeout of a route lookup in Redis, ms. The retry timer re-sends a push whose lookup timed out.
    pub load_timeout_ms: u64,
    /// Time for which lookups on a master fail at once after one failed, ms.
    pub away_ms: u64,
}

impl Default for L1Config {
    fn default() -> Self {
        Self { bytes_max: 64 << 20, ttl_seconds: 600, load_timeout_ms: 500, away_ms: 250 }
    }
}

/// Keys under `reap`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReapConfig {
    /// Maximum void routes queued for removal. Further ones are found again by later lookups.
    pub queue_max: usize,
    /// Maximum concurrent removals.
    pub concurrency: usize,
}

impl Default for ReapConfig {
    fn default() -> Self {
        Self { queue_max: 4096, concurrency: 16 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: String::new(),
            listen: SocketAddr::from(([127, 0, 0, 1], 7091)),
            advertise: String::new(),
            zone: String::new(),
            lease_ttl_ms: 10_000,
            nodes_refresh_ms: 500,
            window_batches: 8,
            void_after_seconds: 600,
            drain_settle_ms: 1500,
            redis: RedisConfig::default(),
            l1: L1Config::default(),
            reap: ReapConfig::default(),
            grpc: GrpcConfig::default(),
            internal_tls: InternalTlsConfig::default(),
            links: LinkConfig::default(),
            admin: AdminConfig::local(7092),
            log: LogConfig::default(),
            drain_seconds: 20,
            ready_file: None,
        }
    }
}

barid_runtime::has_common!(Config);

impl Bounded for L1Config {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("bytes_max", 0..=TEBIBYTE, "bytes"),
            whole("ttl_seconds", 1..=7 * DAY_SECONDS, "s"),
            whole("load_timeout_ms", 1..=600_000, "ms"),
            whole("away_ms", 0..=600_000, "ms"),
        ]
    }
}

impl Bounded for ReapConfig {
    fn bounds() -> Vec<Bound> {
        vec![whole("queue_max", 1..=10_000_000, ""), whole("concurrency", 1..=10_000, "")]
    }
}

impl Bounded for Config {
    fn bounds() -> Vec<Bound> {
        let own = vec![
            whole("nodes_refresh_ms", 1..=60_000, "ms"),
            whole("window_batches", 1..=10_000, ""),
            whole("drain_settle_ms", 0..=HOUR_MS, "ms"),
            whole("drain_seconds", 1..=DAY_SECONDS, "s"),
        ];
        [
            own,
            LeaseConfig::bounds(),
            within::<RedisConfig>("redis"),
            within::<L1Config>("l1"),
            within::<ReapConfig>("reap"),
            within::<GrpcConfig>("grpc"),
            within::<LinkConfig>("links"),
            within::<AdminConfig>("admin"),
            within::<LogConfig>("log"),
        ]
        .concat()
    }
}

impl Config {
    /// Checks numbers, texts and relations.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        let (refresh, lease_ttl) = (self.nodes_refresh_ms, self.lease_ttl_ms);
        let refresh = bounds::refuse_if(refresh > lease_ttl, || {
            format!("nodes_refresh_ms ({refresh}) must be at most lease_ttl_ms ({lease_ttl})")
        });
        let (settle, drain) = (self.drain_settle_ms, self.drain_seconds);
        let is_long = Duration::from_millis(settle) >= Duration::from_secs(drain);
        let settle = bounds::refuse_if(is_long, || {
            format!("drain_settle_ms ({settle}) must be below drain_seconds ({drain})")
        });
        bounds::all([
            self.lease().check("listen", self.listen),
            self.grpc.check("listen", self.listen, &self.internal_tls),
            bounds::check_apart(&[("listen", self.listen), ("admin.listen", self.admin.listen)]),
            refresh,
            settle,
            self.redis.check(),
            self.links.check().map_err(|e| format!("links.{e}")),
        ])
    }

    pub(crate) fn lease(&self) -> LeaseConfig {
        LeaseConfig {
            node: self.node.clone(),
            advertise: self.advertise.clone(),
            zone: self.zone.clone(),
            ttl: Duration::from_millis(self.lease_ttl_ms),
            void_after: Duration::from_secs(self.void_after_seconds),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            bytes_max: self.l1.bytes_max,
            ttl: Duration::from_secs(self.l1.ttl_seconds),
            load_timeout: Duration::from_millis(self.l1.load_timeout_ms),
            away: Duration::from_millis(self.l1.away_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[test]
    fn hazard_61_every_number_is_bounded_and_what_is_taken_can_be_built() {
        bounds::walk("", Config::check, |config| {
            let (void, drain) = (config.void_after_seconds, config.drain_seconds);
            let Limits { ttl, load_timeout, away, bytes_max } = config.limits();
            for time in [Duration::from_secs(void), Duration::from_secs(drain), load_timeout, away]
            {
                let _ = Instant::now() + time + config.lease().ttl;
            }
            drop(
                moka::sync::Cache::<u64, u64>::builder()
                    .max_capacity(bytes_max)
                    .time_to_live(ttl)
                    .build(),
            );
            drop(tokio::sync::mpsc::channel::<u8>(config.links.queue_items_max));
            drop(std::collections::VecDeque::<u64>::with_capacity(config.links.window_batches));
            let _ = tokio::sync::Semaphore::new(config.reap.concurrency);
        });
    }

    #[test]
    fn hazard_59_settings_that_contradict_each_other_are_named() {
        assert_eq!(Config::default().check(), Ok(()));
        let listen = "0.0.0.0:0".parse().unwrap();
        let config = Config { listen, ..Default::default() };
        assert!(config.check().unwrap_err().starts_with("advertise must be set"));
        let config = Config { nodes_refresh_ms: 10_001, ..Default::default() };
        let told = "nodes_refresh_ms (10001) must be at most lease_ttl_ms (10000)";
        assert_eq!(config.check().unwrap_err(), told);
        let config = Config { drain_seconds: 1, ..Default::default() };
        assert!(config.check().unwrap_err().starts_with("drain_settle_ms"));
        let config = Config { node: "a:b".into(), ..Default::default() };
        assert!(config.check().unwrap_err().starts_with("node: node contains ':'"));
    }
}
