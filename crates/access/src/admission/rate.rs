//! Token buckets, each as one number: the time at which it is full again (the generic cell rate
//! algorithm of ITU-T I.371).

use std::time::Duration;

const SECOND_US: u64 = 1_000_000;

/// A rate in tokens per second. A full bucket holds the tokens of the burst time.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    per_second: u64,
    burst_us: u64,
}

impl Rate {
    /// Creates a rate; `per_second` 0: no limit.
    pub fn new(per_second: u64, burst: Duration) -> Self {
        let burst_us = u64::try_from(burst.as_micros()).unwrap_or(u64::MAX);
        let one_us = SECOND_US.checked_div(per_second).unwrap_or(0);
        Self { per_second, burst_us: burst_us.max(one_us) }
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.per_second > 0
    }

    /// Takes tokens out of the bucket that is full at `full_at_us`.
    ///
    /// # Errors
    /// There are not enough tokens. Returns the time until there are, and takes none.
    pub fn acquire(&self, full_at_us: &mut u64, now_us: u64, tokens: u64) -> Result<(), Duration> {
        if !self.is_limited() {
            return Ok(());
        }
        let cost_us = (tokens * SECOND_US).div_ceil(self.per_second);
        let full_at = (*full_at_us).max(now_us) + cost_us;
        let latest = now_us + self.burst_us;
        if full_at > latest {
            return Err(Duration::from_micros(full_at - latest));
        }
        *full_at_us = full_at;
        Ok(())
    }

    /// Gives tokens back that were taken for nothing.
    pub fn give_back(&self, full_at_us: &mut u64, tokens: u64) {
        let worth_us = (tokens * SECOND_US).div_ceil(self.per_second.max(1));
        *full_at_us = full_at_us.saturating_sub(worth_us);
    }

    /// As [`Self::acquire`], for a bucket that is stored as the lower 32 bits of its time (71 minutes in µs). After a
    /// longer pause it may, rarely, seem less full than it is.
    pub fn acquire_packed(&self, full_at_us: &mut u32, now_us: u64, tokens: u64) -> bool {
        let left_us = u64::from(full_at_us.wrapping_sub(now_us as u32));
        // A time further ahead than a burst is one that has passed: the clock has wrapped.
        let left_us = if left_us > self.burst_us { 0 } else { left_us };
        let mut full_at = now_us + left_us;
        let taken = self.acquire(&mut full_at, now_us, tokens).is_ok();
        *full_at_us = full_at as u32;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURST: Duration = Duration::from_secs(2);

    #[test]
    fn a_burst_and_then_the_rate() {
        let rate = Rate::new(10, BURST);
        let mut bucket = 0;
        let now = 5 * SECOND_US;
        let taken = (0..100).filter(|_| rate.acquire(&mut bucket, now, 1).is_ok()).count();
        assert_eq!(taken, 20);
        assert_eq!(rate.acquire(&mut bucket, now, 1), Err(Duration::from_millis(100)));
        assert_eq!(rate.acquire(&mut bucket, now + 100_000, 1), Ok(()));
        assert!(rate.acquire(&mut bucket, now + 100_000, 1).is_err());
        // Never more than a burst, however long the pause.
        let now = now + 3600 * SECOND_US;
        let taken = (0..100).filter(|_| rate.acquire(&mut bucket, now, 1).is_ok()).count();
        assert_eq!(taken, 20);
    }

    #[test]
    fn one_token_always_fits_and_no_limit_is_none() {
        let rate = Rate::new(1, Duration::ZERO);
        assert_eq!(rate.acquire(&mut 0, 7, 1), Ok(()));
        let none = Rate::new(0, BURST);
        assert_eq!(none.acquire(&mut 0, 7, u64::MAX), Ok(()));
        assert!(!none.is_limited());
    }

    #[test]
    fn the_packed_bucket_does_the_same_at_any_time() {
        let rate = Rate::new(10, BURST);
        for now in [0, 7 * SECOND_US, u64::from(u32::MAX) - 500_000, u64::from(u32::MAX) * 9 + 1] {
            let mut bucket = 0;
            // Tokens left long ago do not count.
            let _ = rate.acquire_packed(&mut bucket, now + u64::from(u32::MAX) / 2, 20);
            let taken = (0..100).filter(|_| rate.acquire_packed(&mut bucket, now, 1)).count();
            assert_eq!(taken, 20, "{now}");
            assert!(rate.acquire_packed(&mut bucket, now + 100_000, 1), "{now}");
            assert!(!rate.acquire_packed(&mut bucket, now + 100_000, 1), "{now}");
        }
    }
}
