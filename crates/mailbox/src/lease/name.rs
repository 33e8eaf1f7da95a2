//! Asks Redis whether a node's name is free.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use barid_runtime::{Probe, Unfit};
use redis::AsyncConnectionConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::config::LeaseConfig;
use super::node::{NodeRecord, NodeRole};
use super::record;
use super::state::NAME_TAKEN;
use crate::cluster::{masters, slot_of};
use crate::dial::dial;
use crate::{Error, RedisConfig, keys};

impl LeaseConfig {
    /// Looks whether a process holds the lease of this node, which would listen on `listen`. Two processes with one name
    /// end each other's incarnations for as long as both run. Writes nothing. `None`: the name is known only once a port is
    /// chosen, or Redis does not answer within `limit`.
    pub async fn probe(
        &self,
        role: NodeRole,
        listen: SocketAddr,
        redis: &RedisConfig,
        limit: Duration,
    ) -> Option<Probe> {
        if self.node.is_empty() && self.advertise.is_empty() && listen.port() == 0 {
            return None;
        }
        let ours = self.record(role, listen, None, Incarnation(0)).ok()?;
        let holder = timeout(limit, holder(redis, &ours.id, limit)).await.ok()?.ok()?;
        let found = match holder {
            None => Ok("its name is free".to_owned()),
            Some(holder) => Err(judge(&ours, &holder, limit).await),
        };
        Some(Probe { name: format!("node {}", ours.id), found })
    }
}

/// Whoever holds the lease may be the process that the configuration belongs to, or one that has ended: these are
/// warnings.
async fn judge(ours: &NodeRecord, holder: &NodeRecord, limit: Duration) -> Unfit {
    let (role, at) = (holder.role.as_str(), &holder.address);
    let may_be_ours =
        holder.role == ours.role && (ours.address == *at || ours.address.ends_with(":0"));
    if may_be_ours {
        return Unfit::InUse(format!(
            "its name is in use at {at}; fine if this barid-{role} runs there already"
        ));
    }
    if holder.draining {
        return Unfit::InUse(format!("a {role} at {at}, which drains, has its name until it ends"));
    }
    match timeout(limit, TcpStream::connect(at)).await {
        Ok(Ok(_)) => Unfit::Unusable(format!(
            "{NAME_TAKEN}: a {role} at {at}; write another name, or stop that one"
        )),
        _ => Unfit::InUse(format!(
            "a {role} at {at}, which does not answer, has its name until its lease ends"
        )),
    }
}

/// The node that holds the lease of this name.
async fn holder(
    config: &RedisConfig,
    id: &NodeId,
    limit: Duration,
) -> Result<Option<NodeRecord>, Error> {
    let key = keys::node(id.as_str());
    let masters = masters(config, Vec::new()).await?;
    let Some(master) = masters.iter().find(|master| master.serves(slot_of(&key))) else {
        return Err(Error::Away("no master serves the lease".into()));
    };
    let timeouts = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limit))
        .set_response_timeout(Some(limit));
    let mut connection = dial(&master.client, &timeouts).await?;
    let fields: HashMap<String, String> =
        redis::cmd("HGETALL").arg(&key).query_async(&mut connection).await?;
    Ok(record::own(id, &fields).map(|(_, record)| record))
}
