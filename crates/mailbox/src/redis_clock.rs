//! What time it is in Redis, never later than it is.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

const WINDOW: Duration = Duration::from_secs(10);
const ALMOST_A_MS: Duration = Duration::from_nanos(999_999);

/// Estimates a master's time from its replies. A reply's time was read before the reply came, so
/// `its time - arrival` is never above the true offset; the greatest of recent ones is the best.
/// So a deadline computed from it is never later than was meant, whatever this machine's clock says.
pub(crate) struct RedisClock {
    origin: Instant,
    samples: Mutex<Samples>,
}

/// Greatest offsets (ms, from `origin`) of this window and of the one before.
struct Samples {
    window_ends: Instant,
    current: Option<i64>,
    before: Option<i64>,
}

impl RedisClock {
    pub fn new() -> Self {
        let now = Instant::now();
        let samples = Samples { window_ends: now + WINDOW, current: None, before: None };
        Self { origin: now, samples: Mutex::new(samples) }
    }

    /// Forgets everything: another connection may lead to another machine.
    pub fn reset(&self) {
        let mut samples = self.samples.lock();
        (samples.current, samples.before) = (None, None);
    }

    /// A reply that carries Redis's time arrived at `arrived`.
    pub fn observe(&self, redis_ms: u64, arrived: Instant) {
        // Rounded up: a part of a millisecond must not make the estimate late.
        let offset = redis_ms as i64 - self.elapsed_ms(arrived + ALMOST_A_MS);
        let mut samples = self.samples.lock();
        if arrived >= samples.window_ends {
            samples.before = samples.current.take();
            samples.window_ends = arrived + WINDOW;
        }
        samples.current = Some(samples.current.map_or(offset, |best| best.max(offset)));
    }

    /// Redis's time at `at`, ms since the Unix epoch, or a little less; `None` before any reply.
    pub fn at(&self, at: Instant) -> Option<u64> {
        let samples = self.samples.lock();
        let offset = samples.current.max(samples.before)?;
        u64::try_from(offset + self.elapsed_ms(at)).ok()
    }

    fn elapsed_ms(&self, at: Instant) -> i64 {
        i64::try_from(at.saturating_duration_since(self.origin).as_millis()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_replies_do_not_make_it_late_and_it_follows_a_clock_that_went_back() {
        let clock = RedisClock::new();
        let start = clock.origin;
        assert_eq!(clock.at(start), None);
        let at = |s: u64| start + Duration::from_secs(s);
        clock.observe(1_000_000, at(0));
        clock.observe(1_000_500, at(1)); // this reply took half a second to come
        assert_eq!(clock.at(at(2)), Some(1_002_000));
        for s in 11..33 {
            clock.observe(500_000 + s * 1000, at(s)); // stepped back
        }
        assert_eq!(clock.at(at(40)), Some(540_000));
    }
}
