//! Compares what was produced with what devices received: latency, order, loss, repeats.

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

/// Audits created in this process; part of a run's name.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// The deliveries of one run. Shared by all devices of a process.
#[derive(Debug)]
pub struct Audit {
    /// Turns shown so far, indexed by user. Only that user's device locks it during a run.
    turns: Vec<Mutex<Order>>,
    /// Consecutive records of one user.
    burst: u64,
    start: OnceLock<Start>,
    run: String,
    total: AtomicU64,
    rate: Option<u32>,
    shown: AtomicU64,
    repeats: AtomicU64,
    passed_over: AtomicU64,
    foreign: AtomicU64,
    /// Records shown or passed over in other processes.
    elsewhere: AtomicU64,
    /// From when a record was due until it was shown; empty without a rate.
    latencies_us: Mutex<Histogram<u64>>,
}

/// The start of a schedule: a whole millisecond of the system clock, because Kafka's timestamps have no
/// fractions.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    at: Instant,
    unix_ms: u64,
}

impl Start {
    pub fn after(wait: Duration) -> Self {
        let unix_ms = (unix_time() + wait).as_millis() + 1;
        Self::at_unix_ms(u64::try_from(unix_ms).unwrap_or(u64::MAX))
    }

    pub fn at_unix_ms(unix_ms: u64) -> Self {
        let (now, start) = (unix_time(), Duration::from_millis(unix_ms));
        let at = Instant::now() + start.saturating_sub(now);
        Self { at: at.checked_sub(now.saturating_sub(start)).unwrap_or(at), unix_ms }
    }

    pub fn unix_ms(self) -> u64 {
        self.unix_ms
    }

    /// Time that is left until the start.
    pub fn wait(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

/// Counts of a run.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    /// Records produced, or to be produced.
    pub total: u64,
    /// Records shown.
    pub shown: u64,
    /// Records shown after a later one, or twice.
    pub repeats: u64,
    /// Records passed over, and not shown since.
    pub passed_over: u64,
    /// Messages of other runs, left in the mailbox.
    pub foreign: u64,
}

impl Audit {
    /// For records to `users` users in turn, `rate` per second. Without a rate records are not due at any
    /// time and have no latency.
    pub fn new(users: u32, rate: Option<u32>) -> Self {
        Self {
            turns: (0..users).map(|_| Mutex::default()).collect(),
            burst: 1,
            start: OnceLock::new(),
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

    /// The part of a run that this process sees. `schedule`: records per second, and their start.
    pub fn of_run(run: String, users: u32, burst: u32, schedule: Option<(u32, Start)>) -> Self {
        let audit = Self { run, ..Self::new(users, schedule.map(|(rate, _)| rate)) };
        schedule.into_iter().for_each(|(_, start)| audit.start(start));
        audit.in_bursts_of(burst)
    }

    /// Gives each user this many records in a row (at least one).
    #[must_use]
    pub fn in_bursts_of(self, burst: u32) -> Self {
        Self { burst: u64::from(burst.max(1)), ..self }
    }

    pub fn burst(&self) -> u64 {
        self.burst
    }

    /// The user of record `number`.
    pub fn user_of(&self, number: u64) -> u64 {
        number / self.burst % self.users()
    }

    /// How many records that user got before.
    fn turn_of(&self, number: u64) -> u64 {
        number / (self.burst * self.users()) * self.burst + number % self.burst
    }

    /// Records per second.
    pub fn rate(&self) -> Option<u32> {
        self.rate
    }

    /// The run's name, which all ids of its messages begin with.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Reports records that were shown or passed over in other processes.
    pub fn settled_elsewhere(&self, records: u64) {
        self.elsewhere.store(records, Ordering::Relaxed);
    }

    pub fn users(&self) -> u64 {
        self.turns.len() as u64
    }

    /// Sets the start of the schedule; only the first call has an effect.
    pub fn start(&self, start: Start) {
        let _ = self.start.set(start);
    }

    /// Time that is left until the schedule starts.
    pub fn wait(&self) -> Duration {
        self.start.get().map_or(Duration::ZERO, |start| start.wait())
    }

    /// The timestamp of record `number`, ms since the Unix epoch: when it is due.
    pub fn timestamp_ms(&self, number: u64) -> Option<u64> {
        let due = u64::try_from(self.due(number)?.as_millis()).ok()?;
        self.start.get().map(|start| start.unix_ms + due)
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.start.get().map_or(Duration::ZERO, |start| start.at.elapsed())
    }

    /// The id of record `number`. It contains the run's name, so that a second run on the same mailboxes
    /// meets no duplicates.
    pub fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.run)
    }

    /// When record `number` is due, from the start.
    pub fn due(&self, number: u64) -> Option<Duration> {
        let rate = u64::from(self.rate?);
        Some(Duration::from_nanos(number.saturating_mul(1_000_000_000) / rate))
    }

    /// Sets the number of records that were, or will be, produced.
    pub fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Records that a user's device was shown the message `id`.
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

    /// Records shown in their turn or passed over, in all processes.
    pub fn settled(&self) -> u64 {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        of(&self.shown) + of(&self.passed_over) + of(&self.elsewhere)
    }

    /// Waits until everything was shown or passed over, at most for `timeout`.
    pub async fn all_settled(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            if self.settled() >= self.total.load(Ordering::Relaxed) {
                // Repeats follow closely.
                tokio::time::sleep(Duration::from_millis(200)).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

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

    /// From when records were due until they were shown, µs; empty without a rate.
    pub fn latencies_us(&self) -> Histogram<u64> {
        self.latencies_us.lock().clone()
    }
}

fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Outcome of a run's records. Field names are stable.
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
    /// Whether every record was shown exactly once and in order.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.passed_over == 0 && self.repeats == 0
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shown, lost, passed_over, repeats } = self;
        write!(f, "{shown} delivered, {lost} lost, {passed_over} skipped, {repeats} repeated")
    }
}

impl Totals {
    pub fn outcome(&self) -> Outcome {
        let Self { total, shown, passed_over, repeats, .. } = *self;
        Outcome { shown, lost: total.saturating_sub(shown), passed_over, repeats }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_fault_is_counted() {
        let audit = Audit::new(2, Some(1000));
        audit.expect(8);
        audit.start(Start::after(Duration::ZERO));
        let shown = |user, number| audit.shown(user, &audit.id(number));
        for (user, number) in [(0, 0), (1, 1), (0, 2), (1, 3)] {
            shown(user, number);
        }
        assert_eq!((audit.totals().shown, audit.totals().passed_over), (4, 0));
        shown(0, 2); // a repeat
        shown(0, 6); // skips 4
        shown(0, 4); // which is late
        shown(1, 4); // another user's
        audit.shown(1, "other-5"); // of another run
        let totals = audit.totals();
        assert_eq!((totals.repeats, totals.passed_over, totals.foreign), (2, 0, 2));
        assert_eq!((totals.shown, totals.outcome().lost, audit.settled()), (6, 2, 6));
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
        let (audit, start) = (Audit::new(1, Some(10)), Start::after(Duration::from_millis(30)));
        audit.start(start);
        assert!(audit.wait() > Duration::from_millis(1));
        let same = Start::at_unix_ms(start.unix_ms());
        let elsewhere = Audit::of_run(audit.run().to_owned(), 1, 1, Some((10, same)));
        tokio::time::sleep(audit.wait() + Duration::from_millis(250)).await;
        for audit in [&audit, &elsewhere] {
            audit.shown(0, &elsewhere.id(0));
            let first = audit.elapsed().as_secs_f64() * 1e3;
            audit.shown(0, &elsewhere.id(1));
            let both = first + audit.elapsed().as_secs_f64() * 1e3;
            let latencies = audit.latencies_us();
            assert_eq!((audit.totals().shown, latencies.len(), audit.settled()), (2, 2, 2));
            // The second record is due 100 ms after the first.
            let sum = 2.0 * histogram::mean_ms(&latencies);
            assert!((398.0..=(both - 100.0) * 1.01).contains(&sum), "{sum} of {both}");
        }
    }
}
