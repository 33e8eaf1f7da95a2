//! Shards whose last call failed, over all lanes.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use barid_core::Shard;
use parking_lot::Mutex;

/// The failing shards. Lanes write them, and the loop reads them.
#[derive(Debug, Default)]
pub struct Away {
    count: AtomicUsize,
    failing: Mutex<HashSet<Shard>>,
    reason: Mutex<String>,
}

impl Away {
    /// Number of shards whose last call failed.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether a shard's last call failed.
    pub fn is_failing(&self, shard: Shard) -> bool {
        self.count() > 0 && self.failing.lock().contains(&shard)
    }

    /// The error of the last failed call.
    pub fn reason(&self) -> String {
        self.reason.lock().clone()
    }

    /// Records the error of a failed call.
    pub fn set_reason(&self, reason: String) {
        *self.reason.lock() = reason;
    }

    /// Replaces the failing shards of one lane; returns [`Self::count`] over all lanes.
    pub fn replace(&self, before: &HashSet<Shard>, now: &HashSet<Shard>) -> usize {
        let mut failing = self.failing.lock();
        failing.retain(|shard| !before.contains(shard));
        failing.extend(now);
        self.count.store(failing.len(), Ordering::Relaxed);
        failing.len()
    }
}
