//! Exponential backoff with jitter.

use std::time::Duration;

use rand::RngExt as _;

/// An exponential backoff: `base`, `2 base`, `4 base` and so on up to `max`, each with a uniform jitter of ± `jitter`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    jitter: f64,
}

/// Why the parameters of a backoff are invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBackoff {
    /// The base is zero.
    #[error("base must be above zero")]
    ZeroBase,
    /// The longest wait is below the first.
    #[error("max must not be below base")]
    MaxBelowBase,
    /// The jitter is out of range.
    #[error("jitter must be within 0 and 1")]
    Jitter,
}

impl Backoff {
    /// Creates a backoff.
    ///
    /// # Errors
    /// `base` is zero, `max` is below `base`, or `jitter` is not within 0 and 1.
    pub fn new(base: Duration, max: Duration, jitter: f64) -> Result<Self, InvalidBackoff> {
        if base.is_zero() {
            return Err(InvalidBackoff::ZeroBase);
        }
        if max < base {
            return Err(InvalidBackoff::MaxBelowBase);
        }
        if !(0.0..=1.0).contains(&jitter) {
            return Err(InvalidBackoff::Jitter);
        }
        Ok(Self { base, max, jitter })
    }

    /// The first wait, without jitter.
    pub fn base(&self) -> Duration {
        self.base
    }

    /// The longest wait, without jitter.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The jitter, as a share of the wait.
    pub fn jitter(&self) -> f64 {
        self.jitter
    }

    /// The wait after `failures` earlier ones (0: the first), without jitter.
    pub fn nominal(&self, failures: u32) -> Duration {
        self.base.saturating_mul(1u32.checked_shl(failures).unwrap_or(u32::MAX)).min(self.max)
    }

    /// The wait after `failures` earlier ones, with jitter.
    pub fn delay(&self, failures: u32) -> Duration {
        let spread = 1.0 + self.jitter * rand::rng().random_range(-1.0..=1.0);
        self.nominal(failures).mul_f64(spread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn stays_within_jitter_and_bounds(base in 1u64..10_000, factor in 1u64..100, jitter in 0.0..=1.0, failures in 0u32..100) {
            let base = Duration::from_millis(base);
            let max = base * factor as u32;
            let backoff = Backoff::new(base, max, jitter).unwrap();
            let nominal = backoff.nominal(failures);
            prop_assert!(nominal >= base && nominal <= max);
            prop_assert!(backoff.nominal(failures + 1) >= nominal);
            let delay = backoff.delay(failures);
            prop_assert!(delay >= nominal.mul_f64((1.0 - jitter).max(0.0)));
            prop_assert!(delay <= nominal.mul_f64(1.0 + jitter) + Duration::from_nanos(1));
        }
    }

    #[test]
    fn doubles_until_the_maximum() {
        let backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(20), 0.2).unwrap();
        let waits: Vec<u64> = (0..6).map(|n| backoff.nominal(n).as_secs()).collect();
        assert_eq!(waits, [2, 4, 8, 16, 20, 20]);
    }
}
