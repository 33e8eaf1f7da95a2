//! The sessions of a node: by user, by the second at which each looks at the clock, and the names of their routes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use barid_core::{ConnectionId, Incarnation, NodeId, SessionRef};
use barid_session::Seconds;

use crate::clock::Clock;
use crate::handle::Handle;
use crate::registry::Registry;
use crate::wheel::Wheel;

/// All sessions of one process.
pub struct Sessions {
    /// The node's name.
    pub node: NodeId,
    /// Sessions by user.
    pub registry: Registry,
    /// Sessions by time.
    pub wheel: Wheel,
    clock: Arc<Clock>,
    first_incarnation: Incarnation,
    incarnation: AtomicU64,
    connections: AtomicU64,
}

impl Sessions {
    /// A node without sessions. `incarnation` identifies it in routes until its lease lapses.
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

    /// Begins another incarnation, behind a lapse of the lease.
    pub fn set_incarnation(&self, incarnation: Incarnation) {
        self.incarnation.store(incarnation.0, Ordering::Release);
    }

    /// Whether a route of this incarnation may name a session of this process. Connections are numbered over all
    /// incarnations of the process, and a session that lives on into another one is found by its number before its
    /// route names that.
    pub fn was(&self, incarnation: Incarnation) -> bool {
        (self.first_incarnation..=self.incarnation()).contains(&incarnation)
    }

    /// Numbers a new connection.
    pub fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// What a route of this connection names now.
    pub fn reference(&self, connection: ConnectionId) -> SessionRef {
        SessionRef { node: self.node.clone(), incarnation: self.incarnation(), connection }
    }

    /// Sets when a session looks at the clock next.
    pub fn set_due(&self, handle: &Arc<Handle>, due: Seconds) {
        self.wheel.set_due(handle, due, self.clock.seconds());
    }
}
