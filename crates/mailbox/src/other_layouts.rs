//! Refuses a Redis that running processes use with another layout.

use crate::layout::LAYOUT;
use crate::lease::copies::copies;
use crate::topology::Topology;
use crate::{Error, keys};

/// Role, address and layout of a node.
type Lease = (Option<String>, Option<String>, Option<String>);

/// A process of another layout would consider this one's data corrupt and delete it. Detects only processes whose
/// leases can be read.
pub(crate) async fn refuse_other_layouts(topology: &Topology) -> Result<(), Error> {
    for shards in topology.shards_by_lane() {
        let Ok((now, copies)) = copies(topology, shards[0]).await else { continue };
        let living = copies.into_iter().filter(|(_, copy)| !copy.released && copy.ends > now);
        for (id, copy) in living {
            let layout = copy.layout.unwrap_or(LAYOUT);
            if layout != LAYOUT {
                return Err(other_layout(&id, layout));
            }
        }
    }
    let mut list = redis::cmd("ZRANGE");
    list.arg(keys::NODES_OF_LAYOUT_2).arg(0).arg(-1);
    let ids = topology.query_on::<Vec<String>>(keys::NODES_OF_LAYOUT_2, &list).await;
    for id in ids.unwrap_or_default() {
        let key = keys::node(&id);
        let mut get = redis::cmd("HMGET");
        get.arg(&key).arg("role").arg("address").arg("layout");
        let lease: Lease = match topology.query_on(&key, &get).await {
            Ok(lease) => lease,
            Err(error) => {
                tracing::warn!(%error, node = id, "reading a lease failed");
                continue;
            }
        };
        if let (Some(role), Some(address), None) = lease {
            let node = format_args!("{role} {id} at {address}");
            return Err(other_layout(&node, 2));
        }
    }
    Ok(())
}

fn other_layout(node: &impl std::fmt::Display, layout: u32) -> Error {
    Error::Unusable(format!(
        "{node} is running with layout {layout}, but this program uses layout {LAYOUT}: stop all processes of its \
         version first, and empty this redis"
    ))
}
