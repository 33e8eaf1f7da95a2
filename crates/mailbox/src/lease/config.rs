//! Configuration of a lease, and the record that follows from it.

use std::net::SocketAddr;
use std::time::Duration;

use barid_core::{Incarnation, InvalidName, NodeId};
use barid_runtime::bounds::{self, Bound, DAY_SECONDS, whole};
use barid_runtime::words::{is_host_port, is_wildcard, shown_address};

use super::node::{NodeRecord, NodeRole, check_text};

/// Configuration of a node's lease.
#[derive(Debug, Clone)]
pub struct LeaseConfig {
    /// `node`: the node's name; empty: made from its role and address.
    pub node: String,
    /// `advertise`: the `host:port` at which others reach the node; empty: where it listens.
    pub advertise: String,
    /// `zone`: the node's availability zone; may be empty.
    pub zone: String,
    /// `lease_ttl_ms`: how long the lease is valid without renewal.
    pub ttl: Duration,
    /// `void_after_seconds`: how long dispatchers keep the routes of a node whose lease ended.
    pub void_after: Duration,
}

impl LeaseConfig {
    /// Bounds of the numeric keys.
    pub fn bounds() -> Vec<Bound> {
        vec![
            whole("lease_ttl_ms", 100..=600_000, "ms"),
            // Until then each route of a node that does not return costs a re-send.
            whole("void_after_seconds", 1..=DAY_SECONDS, "s"),
        ]
    }

    /// Checks all keys, before a port is bound. `key` is the key of the address `listen`.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line.
    pub fn check(&self, key: &str, listen: SocketAddr) -> Result<(), String> {
        bounds::all([
            self.check_ttl(),
            self.check_node(),
            self.check_advertise(key, listen),
            check_text("zone", &self.zone),
        ])
    }

    fn check_ttl(&self) -> Result<(), String> {
        let (ttl, most) = (self.ttl.as_millis(), self.void_after.as_millis() / 2);
        if ttl > most {
            let of = "lease_ttl_ms must be at most half of void_after_seconds";
            return Err(format!("{of}, {most} ms; it is {ttl}"));
        }
        Ok(())
    }

    fn check_node(&self) -> Result<(), String> {
        match self.node.as_str() {
            "" => Ok(()),
            node => NodeId::new(node).map(drop).map_err(|error| format!("node: {error}")),
        }
    }

    fn check_advertise(&self, key: &str, listen: SocketAddr) -> Result<(), String> {
        check_text("advertise", &self.advertise)?;
        let text = self.advertise.as_str();
        match text {
            "" if listen.ip().is_unspecified() => {
                Err(format!("advertise must be set where {key} names no address"))
            }
            "" => Ok(()),
            text if !is_host_port(text) => Err(format!(
                "advertise: {} is not an address; write host:port, as others reach {key}",
                shown_address(text)
            )),
            text if is_wildcard(text) => Err(format!(
                "advertise: {text:?} reaches nobody; write this machine's host:port, as others \
                 reach {key}"
            )),
            _ => Ok(()),
        }
    }

    /// The record of a node that listens on `bound`, with its admin endpoint on `admin`.
    ///
    /// # Errors
    /// Returns an error if the name made from its address is invalid: then `node` must be set.
    pub fn record(
        &self,
        role: NodeRole,
        bound: SocketAddr,
        admin: Option<SocketAddr>,
        incarnation: Incarnation,
    ) -> Result<NodeRecord, InvalidName> {
        let address = match self.advertise.as_str() {
            "" => bound.to_string(),
            advertised => advertised.to_owned(),
        };
        let id = match self.node.as_str() {
            // Names hold no ':' and no brackets.
            "" => format!("{}-{}", role.as_str(), address.replace([':', '[', ']'], "-")),
            name => name.to_owned(),
        };
        let id = NodeId::new(&id)?;
        let admin = admin.map_or_else(String::new, |admin| match address.rsplit_once(':') {
            // Bound to all interfaces: reached at the node's own host.
            Some((host, _)) if admin.ip().is_unspecified() => format!("{host}:{}", admin.port()),
            _ => admin.to_string(),
        });
        let zone = self.zone.clone();
        Ok(NodeRecord { zone, admin, ..NodeRecord::new(role, id, incarnation, address) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(node: &str, advertise: &str) -> LeaseConfig {
        LeaseConfig {
            node: node.into(),
            advertise: advertise.into(),
            zone: "z".into(),
            ttl: Duration::from_secs(1),
            void_after: Duration::from_secs(600),
        }
    }

    #[test]
    fn a_node_without_a_name_is_called_after_the_address_that_others_use() {
        let bound = SocketAddr::from(([0, 0, 0, 0], 7081));
        let told = |config: LeaseConfig| {
            let admin = Some(SocketAddr::from(([0, 0, 0, 0], 7082)));
            let record = config.record(NodeRole::Access, bound, admin, Incarnation(1)).unwrap();
            (record.id.to_string(), record.address, record.admin)
        };
        let expect = |id: &str, address: &str, admin: &str| {
            (id.to_owned(), address.to_owned(), admin.to_owned())
        };
        // Two nodes that listen on the same port everywhere are two nodes.
        assert_eq!(told(config("", "h1:7081")), expect("access-h1-7081", "h1:7081", "h1:7082"));
        assert_eq!(
            told(config("", "[::1]:7081")),
            expect("access----1--7081", "[::1]:7081", "[::1]:7082")
        );
        assert_eq!(told(config("n", "")), expect("n", "0.0.0.0:7081", "0.0.0.0:7082"));
    }

    #[test]
    fn an_address_that_nobody_can_reach_is_refused() {
        let everywhere = SocketAddr::from(([0, 0, 0, 0], 7081));
        let error = config("", "").check("grpc_listen", everywhere).unwrap_err();
        assert_eq!(error, "advertise must be set where grpc_listen names no address");
        for good in ["h1:1", "a-1.b_c:65535", "10.0.0.1:7081", "[::1]:7081"] {
            assert_eq!(config("", good).check("grpc_listen", everywhere), Ok(()), "{good}");
        }
        for bad in [
            "localhost",
            "not a host:1",
            "127.0.0.1:0",
            "a:b:c",
            ":7081",
            "h:99999",
            "http://h:1",
            "::1:7",
            "h:",
        ] {
            let error = config("", bad).check("grpc_listen", everywhere).unwrap_err();
            let told = format!(
                "advertise: {} is not an address; write host:port, as others reach grpc_listen",
                shown_address(bad)
            );
            assert_eq!(error, told);
        }
        for secret in ["me:hush@h:1", "me:hush"] {
            let error = config("", secret).check("grpc_listen", everywhere).unwrap_err();
            assert!(error.starts_with("advertise: \"me:***") && !error.contains("hush"), "{error}");
        }
        for bad in ["0.0.0.0:7081", "[::]:7081", "[::ffff:0.0.0.0]:7081"] {
            let error = config("", bad).check("grpc_listen", everywhere).unwrap_err();
            assert!(error.starts_with(&format!("advertise: {bad:?} reaches nobody")), "{error}");
        }
        let error = config("a:b", "").check("listen", ([127, 0, 0, 1], 1).into()).unwrap_err();
        assert!(error.starts_with("node: node contains ':'"), "{error}");
    }

    #[test]
    fn hazard_75_texts_that_would_break_a_copy_are_refused_by_key() {
        let local = SocketAddr::from(([127, 0, 0, 1], 1));
        let zone = |zone: &str| {
            let config = LeaseConfig { zone: zone.into(), ..config("n", "") };
            config.check("listen", local)
        };
        assert_eq!(zone("a zone, with = and ümlauts"), Ok(()));
        assert_eq!(zone(&"z".repeat(256)), Ok(()));
        let told = zone("a\0confirmed\x001").unwrap_err();
        assert_eq!(told, "zone contains '\\0'; write it without control characters");
        for bad in ["a\nb", "\u{1b}[2J", "\u{9b}"] {
            assert!(zone(bad).unwrap_err().starts_with("zone contains "));
            let error = config("n", &format!("h{bad}:1")).check("listen", local).unwrap_err();
            assert!(error.starts_with("advertise contains "), "{error}");
        }
        let told = zone(&"z".repeat(257)).unwrap_err();
        assert_eq!(told, "zone has 257 bytes, the limit is 256");
    }
}
