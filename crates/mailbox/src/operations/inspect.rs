//! Reading a user's keys, for people and for re-sends. No script: nothing depends on the parts being
//! of one moment.

use barid_core::{
    Attempt, Chain, ConnectionId, DeviceId, Epoch, Generation, Incarnation, NodeId, Position, Seq,
    SessionRef,
};

use super::entry;
use crate::topology::Topology;
use crate::{DeviceState, Error, Inspection, Route, UserKey, keys};

/// Entries that an inspection shows.
const ENTRIES_MAX: i64 = 100;

/// A user's routes, as they are now.
pub(crate) async fn routes(topology: &Topology, user: &UserKey) -> Result<Vec<Route>, Error> {
    let shard = topology.shard_of(user);
    let mut get = redis::cmd("HGETALL");
    get.arg(keys::routes(shard, &user.app, &user.user));
    let fields: Vec<(String, String)> = topology.query(shard, &get).await?;
    Ok(fields.iter().filter_map(|(device, route)| parse_route(device, route)).collect())
}

/// A route as the scripts write it; `None`: somebody else did.
pub(crate) fn parse_route(device: &str, route: &str) -> Option<Route> {
    let mut parts = route.splitn(5, ' ');
    let number = |text: Option<&str>| text?.parse::<u64>().ok();
    let node = NodeId::new(parts.next()?).ok()?;
    let incarnation = Incarnation(number(parts.next())?);
    let connection = ConnectionId(number(parts.next())?);
    let attempt = Attempt(number(parts.next())?);
    Some(Route {
        device: DeviceId::new(device).ok()?,
        session: SessionRef { node, incarnation, connection },
        attempt,
        platform: parts.next().unwrap_or_default().into(),
    })
}

/// Everything that Redis holds about a user.
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

    let state = fields.iter().find(|(name, _)| name == b"s").map(|(_, state)| unpack(state));
    let number = |index: usize| state.as_ref().and_then(|state| state.get(index).copied());
    let epoch = Epoch(number(0).unwrap_or(0));
    Ok(Inspection {
        shard,
        epoch,
        oldest: Seq(number(1).unwrap_or(1)),
        newest: Seq(number(3).unwrap_or(0)),
        bytes: bytes.unwrap_or(0),
        entries: parts.chunks_exact(2).map(|parts| entry(&parts[0], &parts[1])).collect(),
        devices: fields.iter().filter_map(|(name, text)| device(epoch, name, text)).collect(),
        routes: routes(topology, user).await?,
        timer_due_ms: timer.map(|due| due as u64),
        now_ms: seconds * 1000 + micros / 1000,
    })
}

/// `d:<device>` -> its state: seq, chain, generation, due, attempt, used, fence.
fn device(epoch: Epoch, name: &[u8], state: &[u8]) -> Option<DeviceState> {
    let name = std::str::from_utf8(name).ok()?.strip_prefix("d:")?;
    let &[seq, chain, generation, due_ms, attempt, used_ms, _] = unpack(state).as_slice() else {
        return None;
    };
    Some(DeviceState {
        device: DeviceId::new(name).ok()?,
        cursor: Position {
            epoch,
            generation: Generation(u32::try_from(generation).ok()?),
            seq: Seq(seq),
            chain: Some(Chain(u32::try_from(chain).ok()?)),
        },
        due_ms,
        attempt: u32::try_from(attempt).ok()?,
        used_ms,
    })
}

/// What the scripts pack: whole numbers, each a little-endian double.
fn unpack(state: &[u8]) -> Vec<u64> {
    let (numbers, _) = state.as_chunks::<8>();
    numbers.iter().map(|number| f64::from_le_bytes(*number) as u64).collect()
}
