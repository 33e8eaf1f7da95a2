//! Which nodes a device should connect to.

use barid_mailbox::NodeRecord;
use serde::Serialize;

/// Nodes of one answer.
const OFFERED_MAX: usize = 5;

/// What `GET /v1/nodes` answers.
#[derive(Debug, Serialize)]
pub struct Offer<'a> {
    zone: &'a str,
    nodes: Vec<Offered<'a>>,
}

#[derive(Debug, Serialize)]
struct Offered<'a> {
    node: &'a str,
    url: &'a str,
    zone: &'a str,
    load: u64,
}

/// The nodes that devices of a zone should go to: those of the zone first, and of those the least loaded.
/// Draining ones are not among them, nor those that do not say where devices connect.
pub fn offer<'a>(nodes: &'a [NodeRecord], zone: &'a str) -> Offer<'a> {
    let mut serving: Vec<_> =
        nodes.iter().filter(|node| !node.draining && !node.devices.is_empty()).collect();
    serving.sort_by_key(|node| (node.zone != zone, node.load));
    let offered = serving.into_iter().take(OFFERED_MAX).map(|node| Offered {
        node: node.id.as_str(),
        url: &node.devices,
        zone: &node.zone,
        load: node.load,
    });
    Offer { zone, nodes: offered.collect() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use barid_core::{Incarnation, NodeId};
    use barid_mailbox::NodeRole;

    pub(crate) fn node(id: &str, zone: &str, load: u64) -> NodeRecord {
        let devices = format!("ws://{id}/v1/connect");
        let id = NodeId::new(id).unwrap();
        let record = NodeRecord::new(NodeRole::Access, id, Incarnation(1), "h:1");
        NodeRecord { load, zone: zone.into(), devices, ..record }
    }

    #[test]
    fn the_least_loaded_of_the_zone_come_first() {
        let mut nodes = vec![
            node("a", "x", 9),
            node("b", "x", 3),
            node("c", "y", 0),
            node("d", "x", 5),
            node("e", "x", 1),
            node("f", "x", 2),
        ];
        nodes[4].draining = true;
        nodes[5].devices = String::new();
        let ids = |zone| -> Vec<String> {
            offer(&nodes, zone).nodes.iter().map(|node| node.node.to_owned()).collect()
        };
        assert_eq!(ids("x"), ["b", "d", "a", "c"]);
        assert_eq!(ids("y"), ["c", "b", "d", "a"]);
        assert_eq!(ids("elsewhere"), ["c", "b", "d", "a"]);
        let json = serde_json::to_value(offer(&nodes[..1], "x")).unwrap();
        let url = "ws://a/v1/connect";
        let expected = serde_json::json!({
            "zone": "x", "nodes": [{ "node": "a", "url": url, "zone": "x", "load": 9 }]
        });
        assert_eq!(json, expected);
    }
}
