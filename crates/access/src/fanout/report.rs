//! Reports of a connection that has written messages for an audience: the hops of one delivery in sixteen, and
//! the trace events of sampled messages.

use std::sync::Arc;

use barid_wire::envelope::Envelope;

/// The report for one run of messages.
#[derive(Debug, PartialEq)]
pub struct Report {
    /// The audience's name in frames.
    pub mailbox: Arc<str>,
    /// If this delivery is measured: when the dispatcher queued the oldest message for this node, µs in Redis's
    /// time, and when it was produced, ms since the Unix epoch; 0: unknown.
    pub hop: Option<(u64, u64)>,
    /// Sampled messages that no other session of the node was sent before.
    pub traced: Vec<Envelope>,
}
