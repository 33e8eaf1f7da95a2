//! Calls that are not batched here: their callers pass many items at once, or read several keys. They reach the masters
//! through the topology.

mod accept;
mod inspect;
mod timers;

pub(crate) use self::accept::accept;
pub(crate) use self::inspect::{inspect, inspect_audience, routes as read_routes};
pub(crate) use self::timers::{defer, fire};
