//! Reads what the scripts write: a mailbox's head (scripts/lib.lua), for inspection, and routes.

use barid_core::{Attempt, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef};
use bytes::Buf as _;

use crate::Route;

/// The layout of the keys, and the version that a state and a device begin with.
pub(crate) const LAYOUT: u32 = 3;

/// The part of a mailbox's state that `barid inspect` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub epoch: u64,
    pub oldest: u64,
    pub newest: u64,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub seq: u64,
    pub chain: u32,
    pub generation: u32,
    pub due_ms: u64,
    pub attempt: u8,
    pub used_ms: u64,
    /// How often in a row a re-send did not reach its node.
    pub defers: u8,
}

/// The state of a mailbox that does not exist.
impl Default for State {
    fn default() -> Self {
        Self { epoch: 0, oldest: 1, newest: 0 }
    }
}

impl State {
    /// `None`: another layout, or a newer version's.
    pub fn parse(state: &[u8]) -> Option<Self> {
        let mut state = known(state)?;
        let epoch = state.try_get_uint_le(7).ok()?;
        let oldest = state.try_get_uint_le(6).ok()?;
        let _chain_before_oldest = state.try_get_u32_le().ok()?;
        let newest = state.try_get_uint_le(6).ok()?;
        Some(Self { epoch, oldest, newest })
    }
}

impl Device {
    /// `None`: another layout, or a newer version's.
    pub fn parse(state: &[u8]) -> Option<Self> {
        let mut state = known(state)?;
        let seq = state.try_get_uint_le(6).ok()?;
        let chain = state.try_get_u32_le().ok()?;
        let generation = state.try_get_u32_le().ok()?;
        let due_ms = state.try_get_uint_le(6).ok()?;
        let attempt = state.try_get_u8().ok()?;
        let used_ms = state.try_get_uint_le(6).ok()?;
        let _fence = state.try_get_uint_le(7).ok()?;
        let defers = state.try_get_u8().ok()?;
        Some(Self { seq, chain, generation, due_ms, attempt, used_ms, defers })
    }
}

/// The bytes behind the version and the flags. Flags and a tail do not change what is read here.
fn known(state: &[u8]) -> Option<&[u8]> {
    let (mark, state) = state.split_first_chunk::<2>()?;
    (u32::from(mark[0]) == LAYOUT).then_some(state)
}

/// A route as the scripts write it, but for what a newer version writes behind the platform; `None`:
/// somebody else did.
pub(crate) fn parse_route(device: &str, route: &str) -> Option<Route> {
    let mut parts = route.split(' ');
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
