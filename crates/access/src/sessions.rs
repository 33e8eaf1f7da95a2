//! The sessions of a node, by user and by their next clock tick, and what their routes name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use barid_core::{ConnectionId, Incarnation, NodeId, SessionRef};
use barid_session::Seconds;

use crate::clock::Clock;
use crate::handle::Handle;
use crate::registry::Registry;
use crate::wheel::Wheel;

/// The sessions of a process.
pub struct Sessions {
    /// The node's name.
    pub node: NodeId,
    /// Sessions by user.
    pub registry: Registry,
    /// Sessions by their next clock tick.
    pub wheel: Wheel,
    clock: Arc<Clock>,
    first_incarnation: Incarnation,
    incarnation: AtomicU64,
    connections: AtomicU64,
}

impl Sessions {
    /// Creates an empty set. `incarnation` identifies the node in routes until its lease lapses.
    pub fn new(node: NodeId, incarnation: Incarnation, clock: Arc<Clock>) -> Self {
        Self {
            node,
            registry: Registry::new(),
            wheel: Wheel::new(),
            clock,
            first_incarnation: incarnation,
            incarnation: AtomicU64::new(incarnation.0),
            connections: AtomicU64::new(0),
        }
    }

    /// The incarnation that new routes name.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation(self.incarnation.load(Ordering::Acquire))
    }

    /// Begins another incarnation, after the lease has lapsed.
    pub fn set_incarnation(&self, incarnation: Incarnation) {
        self.incarnation.store(incarnation.0, Ordering::Release);
    }

    /// Whether a route of this incarnation may name a session of this process. That includes earlier incarnations of
    /// the process: connection numbers are unique over all of them, and a session keeps its number when a new
    /// incarnation begins, before its route is rewritten.
    pub fn includes(&self, incarnation: Incarnation) -> bool {
        (self.first_incarnation..=self.incarnation()).contains(&incarnation)
    }

    /// Numbers a new connection.
    pub fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The reference that a route of this connection stores now.
    pub fn reference(&self, connection: ConnectionId) -> SessionRef {
        SessionRef { node: self.node.clone(), incarnation: self.incarnation(), connection }
    }

    /// Sets when a session's next clock tick is due.
    pub fn set_due(&self, handle: &Arc<Handle>, due: Seconds) {
        self.wheel.set_due(handle, due, self.clock.seconds());
    }
}
