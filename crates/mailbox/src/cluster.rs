//! The masters of a Redis, and the hash slots that each serves.

use std::time::Duration;

use futures::FutureExt as _;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, Value};

use crate::dial::dial;
use crate::reply::Reply;
use crate::{Error, RedisConfig};

/// Hash slots of a Redis Cluster.
const SLOTS: u16 = 16_384;

/// A master and its hash slots.
pub(crate) struct Master {
    /// `host:port`, which identifies it.
    pub name: String,
    pub client: Client,
    /// First and last slot of each range.
    pub slots: Vec<(u16, u16)>,
}

impl Master {
    /// The only master, which serves all slots.
    pub fn alone(client: Client) -> Self {
        Self { name: "redis".into(), client, slots: vec![(0, SLOTS - 1)] }
    }

    pub fn serves(&self, slot: u16) -> bool {
        self.slots.iter().any(|(from, to)| (*from..=*to).contains(&slot))
    }
}

/// The configured Redis, or the masters according to Sentinel or to the first node of a Redis Cluster that answers.
/// `known` nodes are asked as well as the configured ones.
pub(crate) async fn masters(
    config: &RedisConfig,
    known: Vec<Client>,
) -> Result<Vec<Master>, Error> {
    let seeds = std::iter::once(&config.url)
        .chain(&config.urls)
        .map(|url| crate::tls::client(config, url.expose()))
        .collect::<Result<Vec<_>, _>>()?;
    let Some(first) = seeds.first().cloned() else {
        return Err(Error::Unusable("redis.url is missing".into()));
    };
    let timeout = config.connect_timeout();
    if !config.sentinel_master.is_empty() {
        return master_by_sentinels(config, &first, timeout).await.map(|master| vec![master]);
    }
    if !config.cluster {
        return Ok(vec![Master::alone(first)]);
    }
    let asked = known.into_iter().chain(seeds).map(|client| slots(client, timeout).boxed());
    let (masters, _) = futures::future::select_ok(asked).await?;
    Ok(masters)
}

/// The master according to the first Sentinel that answers: `url` with its host and port.
async fn master_by_sentinels(
    config: &RedisConfig,
    url: &Client,
    timeout: Duration,
) -> Result<Master, Error> {
    let name = &config.sentinel_master;
    let mut last = Error::Away("redis.sentinels is empty".into());
    for sentinel in &config.sentinels {
        let client = crate::tls::client(config, sentinel.expose())?;
        match address_by(&client, name, timeout).await {
            Ok((host, port)) => {
                let seed = url.get_connection_info();
                let address = readdressed(seed.addr(), Some(host), port);
                let name = address.to_string();
                let client = Client::open(seed.clone().set_addr(address))?;
                return Ok(Master { name, ..Master::alone(client) });
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn address_by(
    sentinel: &Client,
    name: &str,
    timeout: Duration,
) -> Result<(String, u16), Error> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(timeout))
        .set_response_timeout(Some(timeout));
    let mut connection = dial(sentinel, &config).await?;
    let mut cmd = redis::cmd("SENTINEL");
    cmd.arg("GET-MASTER-ADDR-BY-NAME").arg(name);
    let address: Option<(String, u16)> = cmd.query_async(&mut connection).await?;
    address.ok_or_else(|| {
        Error::Unusable(format!("Sentinel has no master {name:?}; check redis.sentinel_master"))
    })
}

async fn slots(client: Client, timeout: Duration) -> Result<Vec<Master>, Error> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(timeout))
        .set_response_timeout(Some(timeout));
    let mut connection = dial(&client, &config).await?;
    let mut cmd = redis::cmd("CLUSTER");
    cmd.arg("SLOTS");
    let value: Value = cmd.query_async(&mut connection).await?;
    let masters = parse(value, client.get_connection_info())?;
    if masters.is_empty() {
        return Err(Error::Away("this node has no hash slots".into()));
    }
    Ok(masters)
}

/// Parses `CLUSTER SLOTS`: first slot, last slot, [host, port, …] of the master, then replicas.
fn parse(value: Value, seed: &ConnectionInfo) -> Result<Vec<Master>, Error> {
    let mut masters: Vec<Master> = Vec::new();
    let mut ranges = Reply::new(value)?;
    while !ranges.is_empty() {
        let mut range = ranges.array()?;
        let slot = |number: u64| u16::try_from(number).unwrap_or(SLOTS - 1);
        let range_slots = (slot(range.number()?), slot(range.number()?));
        let mut master = range.array()?;
        // A node that does not know its own name means the address at which it was asked.
        let host = master.text().ok().filter(|host| !host.is_empty() && host != "?");
        let port = u16::try_from(master.number()?).unwrap_or(0);
        let address = readdressed(seed.addr(), host, port);
        let name = address.to_string();
        match masters.iter_mut().find(|master| master.name == name) {
            Some(master) => master.slots.push(range_slots),
            None => {
                let client = Client::open(seed.clone().set_addr(address))?;
                masters.push(Master { name, client, slots: vec![range_slots] });
            }
        }
    }
    Ok(masters)
}

/// The seed's address (plain or TLS) with another host and port.
fn readdressed(seed: &ConnectionAddr, other: Option<String>, other_port: u16) -> ConnectionAddr {
    match seed.clone() {
        ConnectionAddr::TcpTls { host, insecure, tls_params, .. } => ConnectionAddr::TcpTls {
            host: other.unwrap_or(host),
            port: other_port,
            insecure,
            tls_params,
        },
        ConnectionAddr::Tcp(host, _) => ConnectionAddr::Tcp(other.unwrap_or(host), other_port),
        unix => match other {
            Some(host) => ConnectionAddr::Tcp(host, other_port),
            None => unix,
        },
    }
}

/// The hash slot of a key: CRC-16/XMODEM of its tag.
pub(crate) fn slot_of(key: &str) -> u16 {
    let tag = key
        .split_once('{')
        .and_then(|(_, rest)| rest.split_once('}'))
        .map_or(key, |(tag, _)| if tag.is_empty() { key } else { tag });
    let crc = tag.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        // By CLUSTER KEYSLOT.
        assert_eq!(slot_of("123456789"), 0x31c3);
        assert_eq!(slot_of("{17}:t"), slot_of("17"));
        assert_eq!(slot_of("foo"), 12182);
    }
}
