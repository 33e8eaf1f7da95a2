//! Reading the keys of a user or an audience, for operators and for re-sends. Without a script: the parts need not be
//! of the same moment.

use barid_core::{AudienceKey, Chain, DeviceId, Epoch, Generation, NodeId, Position, Seq, Shard};

use crate::encoding::entry;
use crate::layout::{self, parse_route};
use crate::topology::Topology;
use crate::{AudienceInspection, Contents, DeviceState, Error, Inspection, Route, UserKey, keys};

/// Newest entries in an inspection.
const ENTRIES_MAX: i64 = 100;

/// Reads a user's routes.
pub(crate) async fn routes(topology: &Topology, user: &UserKey) -> Result<Vec<Route>, Error> {
    let shard = topology.shard_of(user);
    let mut get = redis::cmd("HGETALL");
    get.arg(keys::routes(shard, &user.app, &user.user));
    let fields: Vec<(String, String)> = topology.query(shard, &get).await?;
    Ok(fields.iter().filter_map(|(device, route)| parse_route(device, route)).collect())
}

/// The keys of a mailbox and where their values are.
struct Place {
    shard: Shard,
    head: String,
    queue: String,
}

/// Reads a mailbox. Also returns the fields of its head.
async fn contents(
    topology: &Topology,
    Place { shard, head, queue }: Place,
) -> Result<(Contents, Vec<(Vec<u8>, Vec<u8>)>), Error> {
    let mut cmd = redis::cmd("HGETALL");
    cmd.arg(head);
    let fields: Vec<(Vec<u8>, Vec<u8>)> = topology.query(shard, &cmd).await?;
    let mut cmd = redis::cmd("LRANGE");
    cmd.arg(&queue).arg(-2 * ENTRIES_MAX).arg(-1);
    let parts: Vec<Vec<u8>> = topology.query(shard, &cmd).await?;
    let mut cmd = redis::cmd("MEMORY");
    cmd.arg("USAGE").arg(queue);
    let bytes: Option<u64> = topology.query(shard, &cmd).await?;
    let (seconds, micros): (u64, u64) = topology.query(shard, &redis::cmd("TIME")).await?;
    let state = fields.iter().find(|(name, _)| name == b"s");
    let state = state.and_then(|(_, state)| layout::State::parse(state)).unwrap_or_default();
    let contents = Contents {
        shard,
        epoch: Epoch(state.epoch),
        oldest: Seq(state.oldest),
        newest: Seq(state.newest),
        bytes: bytes.unwrap_or(0),
        entries: parts.chunks_exact(2).map(|parts| entry(&parts[0], &parts[1])).collect(),
        now_ms: seconds * 1000 + micros / 1000,
    };
    Ok((contents, fields))
}

/// Reads everything that Redis holds about a user.
pub(crate) async fn inspect(topology: &Topology, user: &UserKey) -> Result<Inspection, Error> {
    let shard = topology.shard_of(user);
    let (app, name) = (&user.app, &user.user);
    let (head, queue) = (keys::head(shard, app, name), keys::queue(shard, app, name));
    let (mailbox, fields) = contents(topology, Place { shard, head, queue }).await?;
    let mut cmd = redis::cmd("ZSCORE");
    cmd.arg(keys::timers(shard)).arg(keys::member(app, name));
    let timer: Option<f64> = topology.query(shard, &cmd).await?;
    let epoch = mailbox.epoch;
    Ok(Inspection {
        mailbox,
        devices: fields.iter().filter_map(|(name, text)| device(epoch, name, text)).collect(),
        routes: routes(topology, user).await?,
        timer_due_ms: timer.map(|due| due as u64),
    })
}

/// Reads everything that Redis holds about an audience.
pub(crate) async fn inspect_audience(
    topology: &Topology,
    AudienceKey { app, audience }: &AudienceKey,
) -> Result<AudienceInspection, Error> {
    let shard = topology.shard_of_audience(app, audience.as_str());
    let head = keys::audience_head(shard, app, audience);
    let queue = keys::audience_queue(shard, app, audience);
    let (mailbox, _) = contents(topology, Place { shard, head, queue }).await?;
    let mut cmd = redis::cmd("HGETALL");
    cmd.arg(keys::audience_nodes(shard, app, audience));
    let fields: Vec<(String, String)> = topology.query(shard, &cmd).await?;
    Ok(AudienceInspection { mailbox, nodes: fields.iter().filter_map(listed).collect() })
}

/// A node's name, and when it has confirmed that it has members.
fn listed((node, field): &(String, String)) -> Option<(NodeId, u64)> {
    let confirmed_ms = field.rsplit(' ').next()?.parse().ok()?;
    Some((NodeId::new(node).ok()?, confirmed_ms))
}

fn device(epoch: Epoch, name: &[u8], state: &[u8]) -> Option<DeviceState> {
    let name = std::str::from_utf8(name).ok()?.strip_prefix("d:")?;
    let layout::Device { seq, chain, generation, due_ms, resends, used_ms, defers } =
        layout::Device::parse(state)?;
    Some(DeviceState {
        device: DeviceId::new(name).ok()?,
        cursor: Position {
            epoch,
            generation: Generation(generation),
            seq: Seq(seq),
            chain: Some(Chain(chain)),
        },
        due_ms,
        resends: resends.into(),
        defers: defers.into(),
        used_ms,
    })
}
