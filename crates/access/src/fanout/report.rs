//! What a connection reports of a delivery for an audience once it is written: the hops of one in sixteen, and the
//! traces of sampled messages.

use std::sync::Arc;

use barid_wire::envelope::Envelope;

/// The report for messages that a member reads together.
#[derive(Debug, PartialEq)]
pub struct Report {
    /// What frames call the audience.
    pub mailbox: Arc<str>,
    /// If this delivery counts: when the dispatcher queued the oldest message for this node, µs in Redis's
    /// time, and when it was produced, ms since the Unix epoch; 0: not known.
    pub hop: Option<(u64, u64)>,
    /// Sampled messages that nobody on the node was written before.
    pub traced: Vec<Envelope>,
}
