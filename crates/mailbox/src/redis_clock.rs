//! An estimate of Redis's time.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Bounds are forgotten after one to two windows.
const WINDOW: Duration = Duration::from_secs(10);
const ALMOST_A_US: Duration = Duration::from_nanos(999);

/// Estimates a master's time from the times in its replies. Redis read such a time between the sending of the call and
/// the arrival of the reply, so the true offset is between `time - arrival` and `time - sending`. The closest recent
/// bounds are kept.
pub(crate) struct RedisClock {
    origin: Instant,
    samples: Mutex<Samples>,
}

/// Bounds of the offset, µs, in this window and in the one before.
struct Samples {
    window_ends: Instant,
    current: Option<Bounds>,
    before: Option<Bounds>,
}

#[derive(Debug, Clone, Copy)]
struct Bounds {
    low: i64,
    high: i64,
}

impl Bounds {
    /// The intersection. If it is empty, a clock was set, and the newer bounds are right.
    fn and(self, newer: Self) -> Self {
        let both = Self { low: self.low.max(newer.low), high: self.high.min(newer.high) };
        if both.low <= both.high { both } else { newer }
    }
}

/// A master's time, valid for moments near that of its creation.
#[derive(Debug, Clone, Copy)]
pub struct RedisTime {
    origin: Instant,
    offset_us: i64,
}

impl RedisTime {
    /// The master's time at `at`, µs since the Unix epoch. The error is at most half of the fastest recent round trip.
    pub fn us(&self, at: Instant) -> u64 {
        let us = match at.checked_duration_since(self.origin) {
            Some(after) => after.as_micros() as i64,
            None => -(self.origin.duration_since(at).as_micros() as i64),
        };
        u64::try_from(self.offset_us + us).unwrap_or(0)
    }
}

impl RedisClock {
    pub fn new() -> Self {
        let now = Instant::now();
        let samples = Samples { window_ends: now + WINDOW, current: None, before: None };
        Self { origin: now, samples: Mutex::new(samples) }
    }

    /// Forgets all bounds: a new connection may lead to another machine.
    pub fn reset(&self) {
        let mut samples = self.samples.lock();
        (samples.current, samples.before) = (None, None);
    }

    /// Takes into account a reply that contains Redis's time and arrived at `arrived`; its call was sent at `sent` or
    /// later.
    pub fn observe(&self, redis_us: u64, sent: Instant, arrived: Instant) {
        // Rounded outwards, so that fractions of a microsecond make no bound too tight.
        let low = redis_us as i64 - self.elapsed_us(arrived + ALMOST_A_US);
        let high = redis_us as i64 + 1 - self.elapsed_us(sent);
        let new = Bounds { low, high };
        let mut samples = self.samples.lock();
        if arrived >= samples.window_ends {
            samples.before = samples.current.take();
            samples.window_ends = arrived + WINDOW;
        }
        samples.current = Some(samples.current.map_or(new, |known| known.and(new)));
    }

    /// Redis's time at `at`, ms since the Unix epoch, or a little less, so that a deadline computed from it is never
    /// too late, whatever this machine's clock says. `None` before any reply.
    pub fn at(&self, at: Instant) -> Option<u64> {
        let us = self.bounds()?.low + self.elapsed_us(at);
        u64::try_from(us / 1000).ok()
    }

    /// The best estimate, neither early nor late on purpose; `None` before any reply.
    pub fn time(&self) -> Option<RedisTime> {
        let Bounds { low, high } = self.bounds()?;
        Some(RedisTime { origin: self.origin, offset_us: low + (high - low) / 2 })
    }

    fn bounds(&self) -> Option<Bounds> {
        let samples = self.samples.lock();
        match (samples.before, samples.current) {
            (Some(before), Some(current)) => Some(before.and(current)),
            (before, current) => current.or(before),
        }
    }

    fn elapsed_us(&self, at: Instant) -> i64 {
        i64::try_from(at.saturating_duration_since(self.origin).as_micros()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    #[test]
    fn slow_replies_do_not_make_it_late_and_it_follows_a_clock_that_went_back() {
        let clock = RedisClock::new();
        let start = clock.origin;
        assert_eq!(clock.at(start), None);
        let at = |s: u64| start + Duration::from_secs(s);
        clock.observe(1000 * S, at(0), at(0));
        clock.observe(1000 * S + S / 2, at(0), at(1)); // this reply took half a second to come
        assert_eq!(clock.at(at(2)), Some(1_002_000));
        clock.observe(500 * S, at(3), at(3)); // stepped back
        assert_eq!(clock.at(at(4)), Some(501_000));
    }

    #[test]
    fn the_estimate_lies_within_the_fastest_round_trip() {
        let clock = RedisClock::new();
        let start = clock.origin;
        let at = |us: u64| start + Duration::from_micros(us);
        clock.observe(1000 * S, at(0), at(40_000)); // read somewhere in these 40 ms
        clock.observe(1000 * S + 100_000, at(99_900), at(100_300));
        let time = clock.time().unwrap();
        // 100 µs after it was sent by the fast call; its bounds are 400 µs apart.
        assert!(time.us(at(100_000)).abs_diff(1000 * S + 100_000) <= 200);
        assert!(time.us(start).abs_diff(1000 * S) <= 200);
    }
}
