//! Calls that no batcher makes: their callers bring many items at once, or ask for several keys. They stand
//! above the topology, through which each of them reaches its masters.

mod accept;
mod inspect;
mod timers;

pub(crate) use self::accept::accept;
pub(crate) use self::inspect::{inspect, routes as read_routes};
pub(crate) use self::timers::{defer, fire};
