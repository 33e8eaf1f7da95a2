//! Execution of a session's effects.

use barid_session::Effect;
use barid_wire::frames::ServerFrame;
use barid_wire::v1;

use crate::connection::state::Connection;
use crate::connection::trace::wrote;

impl Connection {
    /// Carries out the session's effects, in order.
    pub(super) fn apply(&mut self) {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Deliver(entries) => {
                    self.node.metrics.delivered_sync.inc_by(entries.len() as u64);
                    let sampled = entries.iter().filter(|entry| !entry.traceparent.is_empty());
                    for entry in sampled {
                        let now_us = self.node.mailboxes.now_us(self.handle.user());
                        wrote(&self.node.tracer, &self.handle, entry, "sync", now_us);
                    }
                    self.entries(entries);
                }
                Effect::Skip { to, why } => {
                    self.node.metrics.skip(why);
                    self.control(&ServerFrame::Skip(v1::Skip {
                        mailbox: String::new(),
                        to: to.seq.0,
                        why: why.into(),
                        chain: to.chain.0,
                        generation: self.session.generation().0,
                    }));
                }
                Effect::Welcome => self.welcome(),
                Effect::Receipt(receipt) => {
                    if let Some(receipts) = &self.node.receipts {
                        receipts.offer(&receipt);
                    }
                }
                Effect::Close(close) => self.end(Some(close)),
            }
        }
    }
}
