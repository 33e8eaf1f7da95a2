//! State shared by all connections of a node.

use std::sync::Arc;

use barid_bus::Receipts;
use barid_core::{Incarnation, Shard};
use barid_mailbox::LiveSessions;
use barid_runtime::{Shutdown, Tracer};

use crate::clock::Clock;
use crate::fanout::Fanout;
use crate::handle::Handle;
use crate::mailboxes::Mailboxes;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::policy::Policy;
use crate::revocations::Revocations;
use crate::sessions::Sessions;

/// The parts of a running node. A function that needs only one of them takes only that one.
pub struct Node {
    /// The node's zone; may be empty.
    pub zone: String,
    /// The clocks.
    pub clock: Arc<Clock>,
    /// The rules and limits for devices.
    pub policy: Policy,
    /// Tokens that are revoked.
    pub revocations: Revocations,
    /// The sessions.
    pub sessions: Sessions,
    /// Messages for audiences.
    pub fanout: Fanout,
    /// Redis.
    pub mailboxes: Mailboxes,
    /// Other access nodes.
    pub peers: Peers,
    /// Receipts to Kafka; `None`: disabled (`receipts`).
    pub receipts: Option<Receipts>,
    /// The metrics.
    pub metrics: Metrics,
    /// Logs sampled messages.
    pub tracer: Tracer,
    /// Draining.
    pub shutdown: Shutdown,
}

impl LiveSessions for Node {
    type Session = Handle;

    fn all(&self) -> Vec<Arc<Handle>> {
        self.sessions.registry.all()
    }

    fn shard_of(&self, session: &Handle) -> Shard {
        self.mailboxes.store().shard_of(session.user())
    }

    fn begin_incarnation(&self, incarnation: Incarnation) {
        self.sessions.set_incarnation(incarnation);
    }
}
