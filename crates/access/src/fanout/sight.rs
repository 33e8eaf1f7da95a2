//! What is told of a delivery for an audience: the hops of one in sixteen, and the traces of sampled messages.

use std::sync::Arc;

use barid_runtime::Hop;
use barid_wire::envelope::Envelope;

use crate::connection::wrote;
use crate::handle::Handle;
use crate::node::Node;

/// Of messages that a member reads together.
#[derive(Debug, PartialEq)]
pub struct Sight {
    /// What frames call the audience.
    pub(super) mailbox: Arc<str>,
    /// If this delivery counts: when the dispatcher queued the oldest message for this node, µs in Redis's
    /// time, and when it was produced, ms since the Unix epoch; 0: not known.
    pub(super) hop: Option<(u64, u64)>,
    /// Sampled messages that nobody on the node was written before.
    pub(super) traced: Vec<Envelope>,
}

impl Sight {
    /// They were written to this session.
    pub fn written(&self, node: &Node, handle: &Handle) {
        let now_us = node.audience_now_us(&handle.user().app, &self.mailbox);
        if let Some((dispatched_us, produced_ms)) = self.hop {
            let hops = &node.metrics.hops;
            hops.observe(Hop::FanoutDispatchedWritten, dispatched_us, now_us);
            hops.observe(Hop::FanoutProducedWritten, produced_ms.saturating_mul(1000), now_us);
        }
        for entry in &self.traced {
            wrote(node, handle, entry, "fanout", now_us);
        }
    }
}
