//! Events of a lease, from its task to its owner.

use std::collections::BTreeSet;

use barid_core::{Incarnation, Shard};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::state::{News, Place};

/// An event of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEvent {
    /// This incarnation has ended; a new one is being taken.
    Lapsed,
    /// A new incarnation was taken. Its record is not `confirmed`, until [`crate::Lease::set_confirmed`].
    NewIncarnation(Incarnation),
    /// The lease was missing, and is held again in the same incarnation: all sessions must be confirmed.
    WasGone,
    /// These shards have lost data, or may have, because a connection is new. Their sessions must be confirmed.
    Forgot(Vec<Shard>),
}

/// Events that the owner has not received yet, merged: a slow owner misses repetitions, but no kind and no shard.
#[derive(Default)]
pub(super) struct Happened {
    pending: Mutex<Pending>,
    more: Notify,
}

#[derive(Default)]
pub(super) struct Pending {
    lapsed: bool,
    incarnation: Option<Incarnation>,
    was_gone: bool,
    forgot: BTreeSet<Shard>,
}

impl Happened {
    pub fn add(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.pending.lock());
        self.more.notify_one();
    }

    /// Discards all pending events.
    pub fn clear(&self) {
        *self.pending.lock() = Pending::default();
    }

    /// Waits for the next event. Cancel-safe.
    pub async fn next(&self) -> LeaseEvent {
        loop {
            if let Some(event) = self.pending.lock().next() {
                return event;
            }
            self.more.notified().await;
        }
    }
}

impl Pending {
    pub fn add(&mut self, news: News) {
        match news {
            News::Lapsed(_) => (self.lapsed, self.incarnation) = (true, None),
            News::Taken(incarnation) => self.incarnation = Some(incarnation),
            News::Forgot(Place::Own) => self.was_gone = true,
            News::Forgot(Place::Copy(shard)) | News::Uncertain(shard) => self.forget([shard]),
        }
    }

    /// Marks these shards as having possibly lost data.
    pub fn forget(&mut self, shards: impl IntoIterator<Item = Shard>) {
        self.forgot.extend(shards);
    }

    pub fn next(&mut self) -> Option<LeaseEvent> {
        if std::mem::take(&mut self.lapsed) {
            return Some(LeaseEvent::Lapsed);
        }
        if let Some(incarnation) = self.incarnation.take() {
            return Some(LeaseEvent::NewIncarnation(incarnation));
        }
        if std::mem::take(&mut self.was_gone) {
            return Some(LeaseEvent::WasGone);
        }
        let forgot = std::mem::take(&mut self.forgot);
        (!forgot.is_empty()).then(|| LeaseEvent::Forgot(forgot.into_iter().collect()))
    }
}
