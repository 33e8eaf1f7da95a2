//! Parses what the scripts write: a mailbox's head (layout in scripts/lib/mailbox.lua), for inspection, and routes.

use barid_core::{Attempt, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef};
use bytes::Buf as _;

use crate::Route;

/// Version of the layout of all keys; a state and a device begin with it.
pub(crate) const LAYOUT: u32 = 3;

/// The part of a mailbox's state that an inspection contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub epoch: u64,
    pub oldest: u64,
    pub newest: u64,
}

/// A device's stored state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub seq: u64,
    pub chain: u32,
    pub generation: u32,
    pub due_ms: u64,
    pub resends: u8,
    pub used_ms: u64,
    /// Re-sends in a row that did not reach its node.
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
        let resends = state.try_get_u8().ok()?;
        let used_ms = state.try_get_uint_le(6).ok()?;
        let _fence = state.try_get_uint_le(7).ok()?;
        let defers = state.try_get_u8().ok()?;
        Some(Self { seq, chain, generation, due_ms, resends, used_ms, defers })
    }
}

/// The bytes after version and flags. Neither flags nor a tail affect what is parsed here.
fn known(state: &[u8]) -> Option<&[u8]> {
    let (mark, state) = state.split_first_chunk::<2>()?;
    (u32::from(mark[0]) == LAYOUT).then_some(state)
}

/// Parses a route as the scripts write it, without what a newer version appends after the platform. `None`: malformed.
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
