//! The schedule of polls. Pure: no clock, no Redis.

use std::time::Duration;

use barid_core::Backoff;
use rand::RngExt as _;

/// Jitter of each wait, as a share of it, so that several delayers do not poll at the same time.
const JITTER: f64 = 0.2;

/// The waits between the polls of one master.
#[derive(Debug, Clone)]
pub struct Schedule {
    busy: Duration,
    idle: Duration,
    away: Backoff,
    wait: Duration,
    failures: u32,
}

/// The result of a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polled {
    /// As many users as a poll may claim, so that more may be due.
    Full,
    /// Some users.
    Some,
    /// No user.
    None,
    /// The poll failed.
    Away,
}

impl Schedule {
    /// Creates a schedule that waits `busy` after a poll with a result, up to `idle` after polls without one, and
    /// `away` while the master does not answer.
    pub fn new(busy: Duration, idle: Duration, away: Backoff) -> Self {
        Self { busy, idle, away, wait: busy, failures: 0 }
    }

    /// The wait before the next poll.
    pub fn after(&mut self, polled: Polled) -> Duration {
        if polled == Polled::Away {
            let wait = self.away.delay(self.failures);
            self.failures = self.failures.saturating_add(1);
            return wait;
        }
        self.failures = 0;
        self.wait = match polled {
            Polled::None => (self.wait * 2).min(self.idle),
            _ => self.busy,
        };
        if polled == Polled::Full {
            return Duration::ZERO;
        }
        self.wait.mul_f64(1.0 + rand::rng().random_range(-JITTER..=JITTER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn schedule() -> Schedule {
        let away = Backoff::new(100 * MS, 2000 * MS, 0.2).unwrap();
        Schedule::new(100 * MS, 250 * MS, away)
    }

    #[test]
    fn a_full_page_is_followed_at_once_and_silence_slows_down() {
        let mut schedule = schedule();
        assert_eq!(schedule.after(Polled::Full), Duration::ZERO);
        assert!(schedule.after(Polled::Some) <= 120 * MS);
        schedule.after(Polled::None);
        assert!(schedule.after(Polled::None) >= 200 * MS);
        assert!(schedule.after(Polled::Some) <= 120 * MS);
    }

    #[test]
    fn a_master_that_is_away_is_asked_less_and_less_often() {
        let mut schedule = schedule();
        let waits: Vec<Duration> = (0..8).map(|_| schedule.after(Polled::Away)).collect();
        assert!(waits[0] <= 120 * MS && waits[7] >= 1600 * MS);
        schedule.after(Polled::None);
        assert!(schedule.after(Polled::Away) <= 120 * MS);
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_its_bound(polls in proptest::collection::vec(0u8..4, 1..100)) {
            let mut schedule = schedule();
            for poll in polls {
                let polled = [Polled::Full, Polled::Some, Polled::None, Polled::Away][poll as usize];
                let bound = if polled == Polled::Away { 2400 * MS } else { 300 * MS };
                prop_assert!(schedule.after(polled) <= bound);
            }
        }
    }
}
