//! Reading a user's keys, for operators and for re-sends. Without a script: the parts need not be of the same moment.

use barid_core::{Chain, DeviceId, Epoch, Generation, Position, Seq};

use crate::encoding::entry;
use crate::layout::{self, parse_route};
use crate::topology::Topology;
use crate::{DeviceState, Error, Inspection, Route, UserKey, keys};

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

/// Reads everything that Redis holds about a user.
pub(crate) async fn inspect(topology: &Topology, user: &UserKey) -> Result<Inspection, Error> {
    let shard = topology.shard_of(user);
    let (app, name) = (&user.app, &user.user);
    let mut cmd = redis::cmd("HGETALL");
    cmd.arg(keys::head(shard, app, name));
    let fields: Vec<(Vec<u8>, Vec<u8>)> = topology.query(shard, &cmd).await?;
    let mut cmd = redis::cmd("LRANGE");
    cmd.arg(keys::queue(shard, app, name)).arg(-2 * ENTRIES_MAX).arg(-1);
    let parts: Vec<Vec<u8>> = topology.query(shard, &cmd).await?;
    let mut cmd = redis::cmd("MEMORY");
    cmd.arg("USAGE").arg(keys::queue(shard, app, name));
    let bytes: Option<u64> = topology.query(shard, &cmd).await?;
    let mut cmd = redis::cmd("ZSCORE");
    cmd.arg(keys::timers(shard)).arg(keys::member(app, name));
    let timer: Option<f64> = topology.query(shard, &cmd).await?;
    let (seconds, micros): (u64, u64) = topology.query(shard, &redis::cmd("TIME")).await?;

    let state = fields.iter().find(|(name, _)| name == b"s");
    let state = state.and_then(|(_, state)| layout::State::parse(state)).unwrap_or_default();
    let epoch = Epoch(state.epoch);
    Ok(Inspection {
        shard,
        epoch,
        oldest: Seq(state.oldest),
        newest: Seq(state.newest),
        bytes: bytes.unwrap_or(0),
        entries: parts.chunks_exact(2).map(|parts| entry(&parts[0], &parts[1])).collect(),
        devices: fields.iter().filter_map(|(name, text)| device(epoch, name, text)).collect(),
        routes: routes(topology, user).await?,
        timer_due_ms: timer.map(|due| due as u64),
        now_ms: seconds * 1000 + micros / 1000,
    })
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
