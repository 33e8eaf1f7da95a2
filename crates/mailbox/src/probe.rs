//! Asks each configured Redis whether it can be used. Writes nothing.

use std::time::Duration;

use barid_runtime::{Probe, SecretUrl, Unfit};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use tokio::time::timeout;

use crate::cluster::masters;
use crate::dial::dial;
use crate::link::{check_meta, check_node};
use crate::{Error, RedisConfig};

/// The first version with all commands that the scripts use.
const VERSION_MIN: u32 = 7;

/// Asks every node that `config` names, and the masters that Sentinel or the cluster name: version, eviction, shard
/// count and layout. Each has to answer within `limit`.
pub async fn probe(config: &RedisConfig, limit: Duration) -> Vec<Probe> {
    let mut nodes: Vec<(String, Result<Client, Error>, Kind)> = Vec::new();
    let mut add = |key: String, url: &SecretUrl, kind| {
        let client = crate::tls::client(config, url.expose()).map_err(Error::from);
        nodes.push((format!("{key} {url}"), client, kind));
    };
    let by_sentinel = !config.sentinel_master.is_empty();
    if !by_sentinel {
        let kind = if config.cluster { Kind::Member } else { Kind::Master };
        add("redis.url".into(), &config.url, kind);
    }
    for (at, url) in config.urls.iter().enumerate() {
        add(format!("redis.urls[{at}]"), url, Kind::Member);
    }
    for (at, url) in config.sentinels.iter().enumerate() {
        add(format!("redis.sentinels[{at}]"), url, Kind::Sentinel);
    }
    if by_sentinel || config.cluster {
        let found = timeout(limit, masters(config, Vec::new())).await;
        match found.unwrap_or_else(|_| Err(silent(limit))) {
            Ok(masters) => nodes.extend(masters.into_iter().map(|master| {
                (format!("redis master {}", master.name), Ok(master.client), Kind::Master)
            })),
            Err(error) => nodes.push(("redis masters".into(), Err(error), Kind::Master)),
        }
    }
    let asked = nodes.into_iter().map(|(name, client, kind)| async move {
        let answer = async { ask(&client?, kind, config, limit).await };
        let answer = timeout(limit, answer).await.unwrap_or_else(|_| Err(silent(limit)));
        let found = answer.map_err(|error| match error {
            Error::Unusable(why) => Unfit::Unusable(why),
            Error::Unexpected(why) => Unfit::Unusable(why),
            Error::Away(why) => Unfit::Away(why),
            other => Unfit::Away(other.to_string()),
        });
        Probe { name, found }
    });
    futures::future::join_all(asked).await
}

#[derive(Clone, Copy)]
enum Kind {
    Master,
    /// A node of a Redis Cluster, which may be a replica.
    Member,
    Sentinel,
}

fn silent(limit: Duration) -> Error {
    Error::Away(format!("no answer within {} s", limit.as_secs()))
}

async fn ask(
    client: &Client,
    kind: Kind,
    config: &RedisConfig,
    limit: Duration,
) -> Result<String, Error> {
    let timeouts = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limit))
        .set_response_timeout(Some(limit));
    let mut connection = dial(client, &timeouts).await?;
    let () = redis::cmd("PING").query_async(&mut connection).await?;
    let info = info(&mut connection).await?;
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or("unknown").to_owned()
    };
    let version = field("redis_version");
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_some_and(|major| major < VERSION_MIN) {
        return Err(Error::Unusable(format!(
            "it is Redis {version}; use {VERSION_MIN}.0 or newer"
        )));
    }
    if let Kind::Sentinel = kind {
        return Ok(format!("Sentinel {version}"));
    }
    if let Kind::Master = kind {
        check_node(&mut connection).await?;
    }
    let cluster = field("cluster_enabled") == "1";
    if cluster != config.cluster && matches!(kind, Kind::Master | Kind::Member) {
        let (is, write) = if cluster { ("", "true") } else { ("not ", "false") };
        let told = format!("it is {is}a Redis Cluster; write redis.cluster = {write}");
        return Err(Error::Unusable(told));
    }
    let recorded = check_meta(&mut connection, config.shards, false).await?;
    let recorded = recorded.map_or("no shard count recorded", |()| "shard count and layout fit");
    let (role, policy) = (field("role"), field("maxmemory_policy"));
    let limit = match field("maxmemory").as_str() {
        "0" => "no maxmemory".to_owned(),
        bytes => format!("maxmemory {bytes}"),
    };
    Ok(format!("Redis {version}, {role}, {limit}, {policy}, {recorded}"))
}

async fn info(connection: &mut MultiplexedConnection) -> Result<String, Error> {
    Ok(redis::cmd("INFO").query_async(connection).await?)
}
