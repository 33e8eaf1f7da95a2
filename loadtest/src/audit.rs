//! What was produced against what was shown: latency, order, loss, repeats.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use barid_testkit::audit::{Order, Shown};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;

use crate::histogram;

/// How long the last deliveries of a measurement may take.
pub const SETTLE: Duration = Duration::from_secs(30);

/// Audits of this process.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// Shared by all devices.
#[derive(Debug)]
pub struct Audit {
    /// By user, the turns shown so far. Locked by that user's device alone while a run lasts.
    turns: Vec<Mutex<Order>>,
    /// Records of one user in a row.
    burst: u64,
    started: OnceLock<(Instant, u64)>,
    run: String,
    total: AtomicU64,
    rate: Option<u32>,
    shown: AtomicU64,
    repeats: AtomicU64,
    passed_over: AtomicU64,
    foreign: AtomicU64,
    /// Of records shown in other processes, or passed over there.
    elsewhere: AtomicU64,
    /// From when a record was due to when it was shown; empty without a rate.
    latencies_us: Mutex<Histogram<u64>>,
}

/// What the books say.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    /// Records to be shown.
    pub total: u64,
    /// Records shown.
    pub shown: u64,
    /// Records shown after a later one, or twice.
    pub repeats: u64,
    /// Records passed over, and not shown since.
    pub passed_over: u64,
    /// Shown, but of another run: left in the mailbox from before.
    pub foreign: u64,
}

impl Audit {
    /// For records that are dealt to `users` users in turn, `rate` a second; without a rate they
    /// have no time at which they are due, and no latency.
    pub fn new(users: u32, rate: Option<u32>) -> Self {
        Self {
            turns: (0..users).map(|_| Mutex::default()).collect(),
            burst: 1,
            started: OnceLock::new(),
            run: format!("{}.{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed)),
            total: AtomicU64::new(0),
            rate,
            shown: AtomicU64::new(0),
            repeats: AtomicU64::new(0),
            passed_over: AtomicU64::new(0),
            foreign: AtomicU64::new(0),
            elsewhere: AtomicU64::new(0),
            latencies_us: Mutex::new(histogram::new()),
        }
    }

    /// Users get so many records in a row, at least one, before it is the next one's turn.
    #[must_use]
    pub fn in_bursts_of(self, burst: u32) -> Self {
        Self { burst: u64::from(burst.max(1)), ..self }
    }

    /// Records of one user in a row.
    pub fn burst(&self) -> u64 {
        self.burst
    }

    /// Whose record `number` is.
    pub fn user_of(&self, number: u64) -> u64 {
        number / self.burst % self.users()
    }

    /// How many records that user was dealt before.
    fn turn_of(&self, number: u64) -> u64 {
        number / (self.burst * self.users()) * self.burst + number % self.burst
    }

    /// For the part of a run that another process sees: its name, all of its users, and its schedule:
    /// records a second, the first of them at `starts_at_us` since the Unix epoch.
    pub fn of_run(run: String, users: u32, schedule: Option<(u32, u64)>) -> Self {
        let audit = Self { run, ..Self::new(users, schedule.map(|(rate, _)| rate)) };
        if let Some((_, starts_at_us)) = schedule {
            let (now, starts_at) = (unix_time(), Duration::from_micros(starts_at_us));
            let (early, late) = (starts_at.saturating_sub(now), now.saturating_sub(starts_at));
            let at = Instant::now() + early;
            let _ = audit.started.set((at.checked_sub(late).unwrap_or(at), starts_at_us / 1000));
        }
        audit
    }

    /// The schedule, for other processes: records a second, and when the first is due, µs since the Unix
    /// epoch. None: there is none, or nobody knows yet when it begins.
    pub fn schedule(&self) -> Option<(u32, u64)> {
        let (_, started_ms) = self.started.get()?;
        Some((self.rate?, started_ms * 1000))
    }

    /// What names the run in its messages' ids.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// So many records were shown or passed over in other processes.
    pub fn settled_elsewhere(&self, records: u64) {
        self.elsewhere.store(records, Ordering::Relaxed);
    }

    /// How many users there are.
    pub fn users(&self) -> u64 {
        self.turns.len() as u64
    }

    /// The schedule begins, at a whole millisecond of the clock: Kafka's timestamps have no others.
    pub fn start(&self) {
        self.started.get_or_init(|| {
            loop {
                let now = unix_time();
                if now.subsec_micros() % 1000 < 20 {
                    return (Instant::now(), u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
                }
                std::hint::spin_loop();
            }
        });
    }

    /// The schedule will begin in `wait`, at a whole millisecond: so long others have to be told.
    pub fn start_in(&self, wait: Duration) {
        let now = unix_time();
        let starts_at_ms = u64::try_from((now + wait).as_millis()).unwrap_or(u64::MAX);
        let rest = Duration::from_millis(starts_at_ms).saturating_sub(now);
        let _ = self.started.set((Instant::now() + rest, starts_at_ms));
    }

    /// How long until the schedule begins.
    pub fn early(&self) -> Duration {
        let starts = self.started.get().map(|(at, _)| at.saturating_duration_since(Instant::now()));
        starts.unwrap_or_default()
    }

    /// The timestamp of record `number`, ms since the Unix epoch: when it was due.
    pub fn timestamp_ms(&self, number: u64) -> Option<u64> {
        let due = u64::try_from(self.due(number)?.as_millis()).ok()?;
        self.started.get().map(|(_, started_ms)| started_ms + due)
    }

    /// Time since [`Self::start`].
    pub fn elapsed(&self) -> Duration {
        self.started.get().map_or(Duration::ZERO, |(at, _)| at.elapsed())
    }

    /// The id of record `number`. It names the run, so that a second one against the same mailboxes
    /// meets no duplicates.
    pub fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.run)
    }

    /// When record `number` is due, from [`Self::start`] on.
    pub fn due(&self, number: u64) -> Option<Duration> {
        let rate = u64::from(self.rate?);
        Some(Duration::from_nanos(number.saturating_mul(1_000_000_000) / rate))
    }

    /// `total` records were, or will be, produced.
    pub fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// A device was shown the message `id`.
    pub fn shown(&self, user: u32, id: &str) {
        let Some(turns) = self.turns.get(user as usize) else { return };
        let number = id
            .split_once('-')
            .filter(|(run, _)| *run == self.run)
            .and_then(|(_, number)| number.parse::<u64>().ok())
            .filter(|number| self.user_of(*number) == u64::from(user));
        let Some(number) = number else {
            self.foreign.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let shown = turns.lock().shown(self.turn_of(number));
        match shown {
            Shown::InOrder { passed_over } => {
                self.passed_over.fetch_add(passed_over, Ordering::Relaxed);
            }
            Shown::OutOfOrder => {
                self.passed_over.fetch_sub(1, Ordering::Relaxed);
                self.repeats.fetch_add(1, Ordering::Relaxed);
            }
            Shown::Repeated => {
                self.repeats.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        if let Some(due) = self.due(number) {
            let late = self.elapsed().saturating_sub(due).as_micros();
            let late = u64::try_from(late).unwrap_or(u64::MAX).max(1);
            self.latencies_us.lock().saturating_record(late);
        }
        self.shown.fetch_add(1, Ordering::Relaxed);
    }

    /// Records shown in their turn or passed over, up to now.
    pub fn settled(&self) -> u64 {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        of(&self.shown) + of(&self.passed_over) + of(&self.elsewhere)
    }

    /// Waits until everything was shown or passed over, at most for `timeout`.
    pub async fn all_settled(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            if self.settled() >= self.total.load(Ordering::Relaxed) {
                // A repeat would follow closely.
                tokio::time::sleep(Duration::from_millis(200)).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What the books say now.
    pub fn totals(&self) -> Totals {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            total: of(&self.total),
            shown: of(&self.shown),
            repeats: of(&self.repeats),
            passed_over: of(&self.passed_over),
            foreign: of(&self.foreign),
        }
    }

    /// From when records were due to when they were shown, microseconds; empty without a rate.
    pub fn latencies_us(&self) -> Histogram<u64> {
        self.latencies_us.lock().clone()
    }
}

fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What became of a run's records, in every report. Field names are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Records shown.
    pub shown: u64,
    /// Records never shown.
    pub lost: u64,
    /// Records passed over, and not shown since.
    pub passed_over: u64,
    /// Records shown after a later one, or twice.
    pub repeats: u64,
}

impl Outcome {
    /// Whether everything was shown once and in order.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.passed_over == 0 && self.repeats == 0
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shown, lost, passed_over, repeats } = self;
        write!(f, "shown {shown}: lost {lost}, passed over {passed_over}, repeated {repeats}")
    }
}

impl Totals {
    /// Records never shown.
    pub fn lost(&self) -> u64 {
        self.total.saturating_sub(self.shown)
    }

    /// In short.
    pub fn outcome(&self) -> Outcome {
        let Self { shown, passed_over, repeats, .. } = *self;
        Outcome { shown, lost: self.lost(), passed_over, repeats }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::quantile_ms;

    #[test]
    fn every_kind_of_fault_is_counted() {
        let audit = Audit::new(2, Some(1000));
        audit.expect(8);
        audit.start();
        let shown = |user, number| audit.shown(user, &audit.id(number));
        for (user, number) in [(0, 0), (1, 1), (0, 2), (1, 3)] {
            shown(user, number);
        }
        assert_eq!((audit.totals().shown, audit.totals().passed_over), (4, 0));
        shown(0, 2); // a repeat
        shown(0, 6); // 4 was passed over
        shown(0, 4); // and comes late
        shown(1, 4); // another user's
        audit.shown(1, "other-5"); // of another run
        let totals = audit.totals();
        assert_eq!((totals.repeats, totals.passed_over, totals.foreign), (2, 0, 2));
        assert_eq!((totals.shown, totals.lost(), audit.settled()), (6, 2, 6));
        assert!(!totals.outcome().is_clean());
    }

    #[test]
    fn bursts_are_dealt_in_turn_as_well() {
        let audit = Audit::new(3, None).in_bursts_of(2);
        let dealt: Vec<_> =
            (0..12).map(|number| (audit.user_of(number), audit.turn_of(number))).collect();
        let first = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)];
        let second = first.map(|(user, turn)| (user, turn + 2));
        assert_eq!(dealt, [first, second].concat());
        (0..12).for_each(|number| audit.shown(audit.user_of(number) as u32, &audit.id(number)));
        audit.expect(12);
        assert!(audit.totals().outcome().is_clean());
        audit.shown(0, &audit.id(2));
        assert_eq!(audit.totals().foreign, 1);
    }

    #[tokio::test]
    async fn another_process_measures_from_the_same_schedule() {
        let audit = Audit::new(1, Some(10));
        assert_eq!(audit.schedule(), None);
        audit.start_in(Duration::from_millis(30));
        assert!(audit.early() > Duration::from_millis(1));
        let elsewhere = Audit::of_run(audit.run().to_owned(), 1, audit.schedule());
        tokio::time::sleep(audit.early() + Duration::from_millis(250)).await;
        for audit in [&audit, &elsewhere] {
            // Due 100 ms after the first, and shown 250 ms after it.
            audit.shown(0, &elsewhere.id(0));
            audit.shown(0, &elsewhere.id(1));
            let latencies = audit.latencies_us();
            assert_eq!((audit.totals().shown, latencies.len(), audit.settled()), (2, 2, 2));
            let (least, most) = (quantile_ms(&latencies, 0.0), quantile_ms(&latencies, 1.0));
            assert!((140.0..240.0).contains(&least) && most >= 240.0, "{least} {most}");
        }
    }
}
