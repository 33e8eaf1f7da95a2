//! How many new users an app may bring per second: each takes room in the Redis that all apps share.

use std::collections::HashMap;

use barid_core::AppId;
use parking_lot::Mutex;

use crate::admission::rate::Rate;

/// A token bucket for each app that has connected lately.
#[derive(Debug)]
pub struct NewUsers {
    rate: Rate,
    /// When each bucket is full again, µs.
    full_at_us: Mutex<HashMap<AppId, u64>>,
}

impl NewUsers {
    /// Creates full buckets.
    pub fn new(rate: Rate) -> Self {
        Self { rate, full_at_us: Mutex::default() }
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.rate.is_limited()
    }

    /// Takes a token of an app. Returns whether there was one.
    pub fn acquire(&self, app: &AppId, now_us: u64) -> bool {
        if !self.rate.is_limited() {
            return true;
        }
        let mut buckets = self.full_at_us.lock();
        let taken = |full_at_us: &mut u64| self.rate.acquire(full_at_us, now_us, 1).is_ok();
        match buckets.get_mut(app) {
            Some(bucket) => taken(bucket),
            None => taken(buckets.entry(app.clone()).or_default()),
        }
    }

    /// Forgets full buckets. Call it every few seconds.
    pub fn sweep(&self, now_us: u64) {
        let mut buckets = self.full_at_us.lock();
        buckets.retain(|_, full_at_us| *full_at_us > now_us);
        buckets.shrink_to(64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SECOND_US: u64 = 1_000_000;

    #[test]
    fn each_app_has_a_bucket() {
        let app = |name| AppId::new(name).unwrap();
        let (a, b) = (app("a"), app("b"));
        let users = NewUsers::new(Rate::new(10, Duration::from_secs(2)));
        let mut now = 5 * SECOND_US;
        let taken = (0..100).filter(|_| users.acquire(&a, now)).count();
        assert_eq!(taken, 20);
        assert!(users.acquire(&b, now), "another app has its own");
        assert!(!users.acquire(&a, now));
        now += SECOND_US;
        users.sweep(now);
        assert_eq!(users.full_at_us.lock().len(), 1, "b's is full again");
        assert_eq!((0..100).filter(|_| users.acquire(&a, now)).count(), 10);
        now += 60 * SECOND_US;
        assert_eq!((0..100).filter(|_| users.acquire(&a, now)).count(), 20);
        let none = NewUsers::new(Rate::new(0, Duration::ZERO));
        assert!((0..1_000).all(|_| none.acquire(&a, now)) && none.full_at_us.lock().is_empty());
    }
}
