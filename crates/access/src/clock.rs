//! The clocks of a node: the machine's clock, a coarse clock for sessions, and the node's uptime.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use barid_session::Seconds;

/// The clocks of a node.
pub struct Clock {
    wall: Arc<dyn barid_core::Clock>,
    began: Instant,
    seconds: AtomicU32,
}

impl Clock {
    /// Starts the coarse clock at 0. `wall` is the machine's clock.
    pub fn new(wall: Arc<dyn barid_core::Clock>) -> Self {
        Self { wall, began: Instant::now(), seconds: AtomicU32::new(0) }
    }

    /// Milliseconds since the Unix epoch, by this machine's clock.
    pub fn now_ms(&self) -> u64 {
        self.wall.now_ms()
    }

    /// Seconds since the Unix epoch, by this machine's clock.
    pub fn now_s(&self) -> u64 {
        self.now_ms() / 1000
    }

    /// The coarse clock: uptime in seconds, as last set by [`Self::set_seconds`].
    pub fn seconds(&self) -> Seconds {
        self.seconds.load(Ordering::Relaxed)
    }

    /// Sets the coarse clock.
    pub fn set_seconds(&self, now: Seconds) {
        self.seconds.store(now, Ordering::Relaxed);
    }

    /// The coarse clock's value at `expires_s`, in seconds since the Unix epoch.
    pub fn seconds_at(&self, expires_s: u64) -> Seconds {
        let left_ms = expires_s.saturating_mul(1000).saturating_sub(self.now_ms());
        let left = Seconds::try_from(left_ms.div_ceil(1000)).unwrap_or(Seconds::MAX);
        self.seconds().saturating_add(left)
    }

    /// Uptime in ms, modulo 2^32.
    pub fn uptime_ms(&self) -> u32 {
        self.began.elapsed().as_millis() as u32
    }

    /// Uptime in µs.
    pub fn uptime_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::ManualClock;

    #[test]
    fn a_token_expires_at_the_second_that_it_names() {
        let clock = Clock::new(Arc::new(ManualClock::at(10_500)));
        clock.set_seconds(7);
        assert_eq!(clock.seconds_at(10), 7, "it has expired");
        assert_eq!(clock.seconds_at(11), 8);
        assert_eq!(clock.seconds_at(u64::MAX), Seconds::MAX);
    }
}
