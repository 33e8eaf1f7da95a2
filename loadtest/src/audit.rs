//! What was produced against what was shown: latency, order, loss, repeats.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Counts for one user.
#[derive(Debug, Clone, Default)]
struct User {
    /// Records of this user shown so far; the next one expected is `shown * users + number`.
    shown: u64,
}

/// The state of the check.
#[derive(Debug, Default)]
struct Books {
    users: Vec<User>,
    /// Microseconds from when a record was due to when it was shown.
    latencies_us: Vec<u32>,
    /// Shown ones that were older than one shown before.
    repeats: u64,
    /// Records passed over: shown later (out of order) or never.
    passed_over: u64,
    /// Shown, but of another run: left in the mailbox from before.
    foreign: u64,
}

/// Shared by all devices. One lock: a few hundred thousand entries a second at most.
#[derive(Debug)]
pub struct Audit {
    books: Mutex<Books>,
    started: OnceLock<Instant>,
    total: u64,
    users: u64,
    rate: u64,
}

/// What the books say.
#[derive(Debug, Clone)]
pub struct Totals {
    /// Records to be shown.
    pub total: u64,
    /// Records shown in their turn.
    pub shown: u64,
    /// Repeats.
    pub repeats: u64,
    /// Out of order or lost in mid-stream.
    pub passed_over: u64,
    /// Of other runs.
    pub foreign: u64,
    /// Sorted.
    pub latencies_us: Vec<u32>,
}

impl Audit {
    /// For `total` records, `rate` a second, dealt to `users` users in turn.
    pub fn new(users: u32, rate: u32, total: u64) -> Self {
        let books = Books { users: vec![User::default(); users as usize], ..Books::default() };
        Self {
            books: Mutex::new(books),
            started: OnceLock::new(),
            total,
            users: u64::from(users),
            rate: u64::from(rate),
        }
    }

    /// The schedule begins.
    pub fn start(&self) {
        self.started.get_or_init(Instant::now);
    }

    /// Time since [`Self::start`].
    pub fn elapsed(&self) -> Duration {
        self.started.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// A device was shown the message `id` (`run-n`).
    pub fn shown(&self, user: u32, id: &str) {
        let elapsed = self.elapsed();
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        let number = id
            .split_once('-')
            .filter(|(run, _)| *run == std::process::id().to_string())
            .and_then(|(_, number)| number.parse::<u64>().ok());
        let Some(number) = number else {
            books.foreign += 1;
            return;
        };
        let turn = number / self.users;
        let Some(state) = books.users.get_mut(user as usize) else { return };
        if turn < state.shown {
            books.repeats += 1;
            return;
        }
        let passed_over = turn - state.shown;
        state.shown = turn + 1;
        books.passed_over += passed_over;
        let due_us = number.saturating_mul(1_000_000) / self.rate;
        let late = elapsed.as_micros().saturating_sub(u128::from(due_us));
        books.latencies_us.push(u32::try_from(late).unwrap_or(u32::MAX));
    }

    /// Waits until everything was shown or passed over, at most for `timeout`.
    pub async fn settled(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            let totals = self.totals();
            if totals.shown + totals.passed_over >= self.total {
                // A repeat would follow closely.
                tokio::time::sleep(Duration::from_millis(200)).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the books say now.
    pub fn totals(&self) -> Totals {
        let books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        let mut latencies_us = books.latencies_us.clone();
        latencies_us.sort_unstable();
        Totals {
            total: self.total,
            shown: latencies_us.len() as u64,
            repeats: books.repeats,
            passed_over: books.passed_over,
            foreign: books.foreign,
            latencies_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(audit: &Audit, user: u32, number: u64) {
        audit.shown(user, &format!("{}-{number}", std::process::id()));
    }

    #[test]
    fn every_kind_of_fault_is_counted() {
        let audit = Audit::new(2, 1000, 8);
        audit.start();
        for (user, number) in [(0, 0), (1, 1), (0, 2), (1, 3)] {
            shown(&audit, user, number);
        }
        assert_eq!((audit.totals().shown, audit.totals().passed_over), (4, 0));
        shown(&audit, 0, 2); // a repeat
        shown(&audit, 0, 6); // 4 was passed over
        shown(&audit, 0, 4); // and comes late
        audit.shown(1, "other-5"); // of another run
        let totals = audit.totals();
        assert_eq!((totals.repeats, totals.passed_over, totals.foreign), (2, 1, 1));
        assert_eq!(totals.shown, 5);
    }
}
