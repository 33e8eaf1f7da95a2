//! The bound on the bytes of all audiences' logs (`limits.node_fanout_bytes_max`).

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::IntGauge;

use crate::config::LimitsConfig;

/// Bytes that all logs together hold, and the bounds.
#[derive(Debug)]
pub(super) struct Room {
    held: AtomicU64,
    held_max: u64,
    /// Bound of one log.
    pub(super) log_bytes_max: usize,
    gauge: IntGauge,
}

impl Room {
    pub(super) fn new(limits: &LimitsConfig, gauge: IntGauge) -> Self {
        Self {
            held: AtomicU64::new(0),
            held_max: limits.node_fanout_bytes_max,
            log_bytes_max: limits.fanout_bytes_max,
            gauge,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.held_max
    }

    /// Bytes that all logs hold.
    #[cfg(test)]
    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Records that a log holds `now` bytes instead of `before`.
    pub(super) fn changed(&self, before: usize, now: usize) {
        let (before, now) = (before as u64, now as u64);
        self.held.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
        self.gauge.add((now as i64).wrapping_sub(before as i64));
    }
}
