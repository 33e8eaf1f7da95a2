//! The waits before reconnects, and the numbers of attempts.

use std::time::Duration;

use barid_core::limits::WIRE_NUMBER_MAX;
use rand::RngExt as _;

/// Full jitter over a doubling range: the first wait is between `min` and twice that, later ones between `min` and
/// `max`, so that the devices of a lost node do not all reconnect at the same time.
#[derive(Debug, Clone)]
pub(crate) struct Reconnect {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Reconnect {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max: max.max(min), failures: 0 }
    }

    /// Resets the range, after a connection that lasted.
    pub(crate) fn held(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure.
    pub(crate) fn next_wait(&mut self) -> Duration {
        let top = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        rand::rng().random_range(self.min..=top)
    }

    fn ceiling(&self) -> Duration {
        let factor = 2u32.checked_shl(self.failures).filter(|f| *f > 0).unwrap_or(u32::MAX);
        self.min.saturating_mul(factor).min(self.max)
    }
}

/// The number of the next connection attempt: the wall clock in ms, but always above the last number, and within the
/// bound of the protocol.
pub(crate) fn next_attempt(last: u64, now_ms: u64) -> u64 {
    now_ms.max(last.saturating_add(1)).min(WIRE_NUMBER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_within_bounds_and_start_over() {
        let (min, max) = (Duration::from_millis(500), Duration::from_secs(20));
        let mut reconnect = Reconnect::new(min, max);
        for round in 0..100u32 {
            let ceiling = min.saturating_mul(2u32.saturating_pow(round + 1)).min(max);
            let wait = reconnect.next_wait();
            assert!(wait >= min && wait <= ceiling, "round {round}: {wait:?}");
        }
        reconnect.held();
        assert!(reconnect.next_wait() <= min * 2);
    }

    #[test]
    fn attempts_grow_even_if_the_clock_goes_back() {
        assert_eq!(next_attempt(0, 1000), 1000);
        assert_eq!(next_attempt(1000, 1000), 1001);
        assert_eq!(next_attempt(1001, 5), 1002);
        // hazard 43
        for last in [WIRE_NUMBER_MAX - 1, WIRE_NUMBER_MAX, 1 << 53, 1 << 63, u64::MAX] {
            assert_eq!(next_attempt(last, 5), WIRE_NUMBER_MAX);
        }
    }
}
