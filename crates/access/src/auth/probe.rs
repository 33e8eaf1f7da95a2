//! Asks each key set of a configuration for its keys.

use std::time::Duration;

use barid_runtime::{Probe, Unfit};
use prometheus::IntCounter;
use tokio::task::JoinSet;

use super::jwks::Jwks;
use crate::config::{AuthConfig, JwksConfig};

/// Reads each key set, within `limit`.
pub async fn probe(config: &AuthConfig, limit: Duration) -> Vec<Probe> {
    let mut asked = JoinSet::new();
    for (at, set) in config.jwks.iter().enumerate() {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let set = JwksConfig { timeout_ms: set.timeout_ms.min(limit_ms), ..set.clone() };
        asked.spawn(async move {
            let (source, found) = ask(at, &set).await;
            Probe { name: format!("auth.jwks[{at}] {source}"), found }
        });
    }
    let mut probes = asked.join_all().await;
    probes.sort_by(|a, b| a.name.cmp(&b.name));
    probes
}

async fn ask(at: usize, config: &JwksConfig) -> (String, Result<String, Unfit>) {
    let counter = IntCounter::new("skipped", "of this probe").map_err(|error| error.to_string());
    let set = match counter.and_then(|counter| Jwks::new(at, config, counter)) {
        Ok(set) => set,
        Err(error) => return (String::new(), Err(Unfit::Unusable(error))),
    };
    let source = set.to_string();
    let found = match set.probe().await {
        Ok(0) => Err(Unfit::Unusable("the set has no key for RS256, ES256 or EdDSA".into())),
        Ok(1) => Ok("1 key".into()),
        Ok(keys) => Ok(format!("{keys} keys")),
        Err(why) if config.file.is_some() || why.starts_with("not a key set") => {
            Err(Unfit::Unusable(why))
        }
        Err(why) => Err(Unfit::Away(why)),
    };
    (source, found)
}
