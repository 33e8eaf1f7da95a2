//! What all connections of a node share.

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
use crate::sessions::Sessions;

/// A running node, by job. Modules that need one of the parts ask for that part.
pub struct Node {
    /// Where the node stands, for people and placement; may be empty.
    pub zone: String,
    /// The time.
    pub clock: Arc<Clock>,
    /// What is allowed.
    pub policy: Policy,
    /// Who is connected.
    pub sessions: Sessions,
    /// Messages for many of them.
    pub fanout: Fanout,
    /// Redis.
    pub mailboxes: Mailboxes,
    /// Other access nodes.
    pub peers: Peers,
    /// Receipts to the business; `None`: switched off.
    pub receipts: Option<Receipts>,
    /// Counters.
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

    fn begin_life(&self, incarnation: Incarnation) {
        self.sessions.set_incarnation(incarnation);
    }
}
