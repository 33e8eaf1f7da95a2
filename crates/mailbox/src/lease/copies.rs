//! Reads copies of leases.

use barid_core::{NodeId, Shard};

use super::record::Copy;
use crate::reply::Reply;
use crate::scripts::{self, Call};
use crate::topology::Topology;
use crate::{Error, keys};

/// Returns the time of a shard's master, ms, and the copies beside the shard.
pub(crate) async fn copies(
    topology: &Topology,
    shard: Shard,
) -> Result<(u64, Vec<(NodeId, Copy)>), Error> {
    let mut call = Call::default();
    call.key(keys::copies(shard));
    let mut reply = Reply::new(topology.run(shard, &scripts::COPIES, &call).await?)?;
    let now = reply.number()? / 1000;
    let mut copies = Vec::new();
    while !reply.is_empty() {
        let (id, text) = (reply.text()?, reply.text()?);
        // Other members than nodes have copies as well.
        let copy =
            NodeId::new(&id).ok().and_then(|id| Some((id.clone(), Copy::parse(&id, &text)?)));
        copies.extend(copy);
    }
    Ok((now, copies))
}
