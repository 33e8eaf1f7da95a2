//! The rules of a node: who may connect, from where and how often, and the bounds of a session. It is parsed from the
//! configuration once.

use std::net::IpAddr;
use std::sync::Arc;

use barid_runtime::bounds;
use barid_session::Settings;

use crate::admission::{AddressKey, Admission, Origins};
use crate::auth::{Verifier, check_key_set_files};
use crate::config::{Config, HeartbeatConfig, LimitsConfig};
use crate::error::Error;
use crate::labels::Limit;
use crate::metrics::Metrics;
use crate::proxy::Proxies;
use crate::tls::Tls;
use crate::upstream::Upstream;

/// Upper bound of the time from the claim of a retry timer to the re-send on a busy machine, ms. Half of the first
/// wait is used if that is less.
const CROSSING_MAX_MS: u64 = 1_000;

/// The parsed configuration.
pub struct Policy {
    /// Verifies tokens.
    pub verifier: Verifier,
    /// Admits connections.
    pub admission: Arc<Admission>,
    /// Allowed origins of web pages.
    pub origins: Origins,
    /// The balancers that are trusted to name a client's address.
    pub proxies: Proxies,
    /// TLS on the devices' port; `None`: plaintext.
    pub tls: Option<Tls>,
    /// Limits on frames and bytes that a device sends.
    pub upstream: Upstream,
    /// Limits of connections and queues.
    pub limits: LimitsConfig,
    /// Heartbeats.
    pub heartbeat: HeartbeatConfig,
    /// Settings of sessions.
    pub settings: Settings,
}

impl Policy {
    /// Checks what [`Self::new`] parses and reads, and what [`Config::check`] does not.
    ///
    /// # Errors
    /// Returns the keys whose values cannot be used, one a line.
    pub fn check(config: &Config) -> Result<(), String> {
        bounds::all([
            // Its own contradictions are found by `Config::check`, in other words.
            config.auth.check().map_or(Ok(()), |()| {
                Verifier::new(&config.auth).map(drop).map_err(|error| error.to_string())
            }),
            Origins::new(&config.auth.origins).map(drop),
            Proxies::new(&config.proxy).map(drop),
            Tls::new(&config.tls).map(drop),
        ])
    }

    /// Checks the files without which a node starts, because it reads them again later.
    ///
    /// # Errors
    /// Returns the keys of those that cannot be read, one a line.
    pub fn check_late_files(config: &Config) -> Result<(), String> {
        check_key_set_files(&config.auth)
    }

    /// Parses a configuration that [`Config::check`] accepts, and reads the files that it names.
    ///
    /// # Errors
    /// Returns the first key whose value cannot be used.
    pub fn new(config: &Config) -> Result<Self, Error> {
        Ok(Self {
            verifier: Verifier::new(&config.auth)?,
            admission: Arc::new(Admission::new(&config.limits)),
            origins: Origins::new(&config.auth.origins).map_err(Error::Config)?,
            proxies: Proxies::new(&config.proxy).map_err(Error::Config)?,
            tls: Tls::new(&config.tls).map_err(Error::Config)?,
            upstream: Upstream::new(&config.limits),
            limits: config.limits.clone(),
            heartbeat: config.heartbeat.clone(),
            settings: Settings {
                unacked_max: config.limits.unacked_max,
                page_entries_max: config.sync.page_entries_max,
                page_bytes_max: config.sync.page_bytes_max,
                ack_interval_ms: config.sync.ack_interval_ms,
                crossing_ms: (config.redis.retry_base_ms / 2).min(CROSSING_MAX_MS) as u32,
            },
        })
    }

    /// Counts a refusal that a client has brought upon itself towards a block of its address.
    pub fn count_refusal(&self, metrics: &Metrics, address: IpAddr) {
        let forgotten =
            self.address_key(address).map_or(0, |key| self.admission.count_refusal(key));
        (0..forgotten).for_each(|_| metrics.limit(Limit::Blocks));
    }

    /// The key under which a client's address is limited; `None`: not by its address, because it is a trusted
    /// balancer's, or unknown.
    pub fn address_key(&self, address: IpAddr) -> Option<AddressKey> {
        AddressKey::of(address).filter(|_| !self.proxies.trusts(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Received;
    use crate::upstream::Spent;
    use barid_runtime::config::Loaded;
    use std::time::{Duration, Instant};

    #[test]
    fn hazard_61_every_number_is_bounded_and_what_is_taken_can_be_built() {
        let keys = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(keys.path(), r#"{"keys": []}"#).unwrap();
        let base = format!("[[auth.jwks]]\nfile = '{}'", keys.path().display());
        bounds::walk(&base, Config::check, |config| {
            let limits = &config.limits;
            let Policy { upstream, .. } = Policy::new(&config).unwrap();
            let mut spent = Spent::default();
            for now_us in [0, 1 << 32, 1 << 53] {
                let received = Received { frames: u32::MAX, bytes: limits.frame_bytes_max };
                let _ = upstream.charge(&mut spent, received, || now_us);
            }
            for wanted_ms in [0, 1, 999, 1 << 16, u32::MAX] {
                let interval = config.heartbeat.interval(wanted_ms);
                assert!(interval > 0 && u32::from(interval).checked_mul(1000).is_some());
            }
            let ms = [
                limits.handshake_timeout_ms,
                limits.hello_timeout_ms,
                limits.close_timeout_ms,
                config.sync.confirm_interval_seconds * 1000,
                config.drain_seconds * 1000,
                config.lease_ttl_ms,
            ];
            let _ = ms.map(|ms| Instant::now() + Duration::from_millis(ms));
            drop(tokio::sync::mpsc::channel::<u8>(limits.batches_max));
        });
    }

    #[test]
    fn hazard_74_no_slip_with_a_secret_shows_it() {
        let load = |file: &str, variables: &[(&str, &str)]| {
            let path = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(path.path(), file).unwrap();
            let variables = variables.iter().map(|(k, v)| ((*k).into(), (*v).into()));
            match barid_runtime::config::load(Some(path.path()), "BARID_ACCESS_", variables) {
                Ok(Loaded::<Config> { config, sources }) => {
                    let policy = || Policy::new(&config).map(drop).map_err(|e| e.to_string());
                    sources.add_to(&config.check().and_then(|()| policy()).unwrap_err())
                }
                Err(error) => error.to_string(),
            }
        };
        let hides = |told: String| {
            assert!(!told.contains("12345") && !told.contains("hunter2"), "{told}");
            told
        };
        for file in [
            "kafka.properties = { \"sasl.password\" = 12345 }",
            "kafka.properties = { \"sasl.password\" = 12345.5 }",
            "kafka.properties = { \"sasl.password\" = [\"hunter2\"] }",
            "[kafka.properties]\nsasl.password = \"hunter2\"",
            "[kafka.properties]\n\"sasl.password\" = hunter2",
            "kafka.properties = \"sasl.password=hunter2\"",
            "kafka.properties = [\"hunter2\"]",
            "[kafka]\n\"sasl.password\" = \"hunter2\"",
            "[[auth.keys]]\nsecret = 12345",
            "[[auth.keys]]\nsecret = 'hunter2",
            "[[auth.keys]]\nsecret = hunter2",
            "[[auth.keys]]\nsecret = { value = \"hunter2\" }",
            "[[auth.keys]]\nsecret = \"hunter2\"",
            "auth.keys = \"hunter2\"",
            "auth.keys = [\"hunter2\"]",
            "auth.keys = 12345",
            "auth = \"hunter2\"",
            "auth.secret = \"hunter2\"",
            "redis = \"redis://:hunter2@h\"",
            "redis.url = [\"redis://:hunter2@h\"]",
            "redis.urls = \"redis://:hunter2@h\"",
            "redis.sentinels = \"redis://:hunter2@h\"",
            "redis.password = \"hunter2\"",
        ] {
            hides(load(file, &[]));
        }
        for (variable, value) in [
            ("KAFKA__PROPERTIES", "{ \"sasl.password\" = 12345 }"),
            ("KAFKA__PROPERTIES", "sasl.password=hunter2"),
            ("KAFKA__PROPERTIES__SASL__PASSWORD", "hunter2"),
            ("KAFKA__PROPERTIES__SASL.PASSWORD", "12345"),
            ("AUTH__KEYS", "[{ secret = 12345 }]"),
            ("AUTH__KEYS", "hunter2"),
            ("AUTH__KEYS__SECRET", "hunter2"),
            ("AUTH__SECRET", "hunter2"),
            ("REDIS", "redis://:hunter2@h"),
            ("REDIS__URLS", "redis://:hunter2@h"),
            ("REDIS__PASSWORD", "hunter2"),
        ] {
            let variable = format!("BARID_ACCESS_{variable}");
            let told = hides(load("", &[(&variable, value)]));
            assert!(told.contains(&variable), "{told}");
        }
        let told = load("[kafka.properties]\n\"linger.ms\" = 5", &[]);
        assert!(told.contains("the value in quotes: \"linger.ms\" = \"5\""), "{told}");
    }
}
