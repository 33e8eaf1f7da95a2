//! Logs once what repeats: an outage is met by many tasks, many times a second, and each attempt fails alike.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts, Registry};
use tokio::time::Instant;

use crate::config::LogConfig;

static OF_PROCESS: LazyLock<Mutex<Repeats>> =
    LazyLock::new(|| Mutex::new(Repeats::new(&LogConfig::default())));

/// Whether this process logs `condition` now: once in `log.repeat_seconds`. Returns how often it was met since it was
/// last logged. `condition` names what fails and why (`redis 127.0.0.1:6379: connection refused`), and contains nothing
/// that differs at each attempt.
pub fn due(condition: &str) -> Option<u64> {
    OF_PROCESS.lock().due(condition)
}

/// Sets interval and bound.
pub(crate) fn configure(config: &LogConfig) {
    OF_PROCESS.lock().configure(config);
}

/// Registers `barid_log_repeats_total`.
///
/// # Errors
/// It is registered already.
pub(crate) fn register(registry: &Registry) -> prometheus::Result<()> {
    let name = "barid_log_repeats_total";
    let help = "Failures that were met again: suppressed, not logged because the last line is too \
                recent; forgotten, they made room for others and may be logged too often";
    let counter = IntCounterVec::new(Opts::new(name, help), &["outcome"])?;
    registry.register(Box::new(Counts(counter)))
}

struct Repeats {
    /// How often a condition that persists is logged.
    every: Duration,
    /// Conditions that are remembered. The one logged longest ago is forgotten, and may be logged again too early.
    conditions_max: usize,
    seen: HashMap<String, Seen>,
    suppressed: u64,
    forgotten: u64,
}

struct Seen {
    logged: Instant,
    since: u64,
}

impl Repeats {
    fn new(config: &LogConfig) -> Self {
        let (every, conditions_max) = (Duration::ZERO, 0);
        let mut new =
            Self { every, conditions_max, seen: HashMap::new(), suppressed: 0, forgotten: 0 };
        new.configure(config);
        new
    }

    fn configure(&mut self, config: &LogConfig) {
        self.every = Duration::from_secs(config.repeat_seconds);
        self.conditions_max = config.conditions_max;
    }

    fn due(&mut self, condition: &str) -> Option<u64> {
        let now = Instant::now();
        if let Some(seen) = self.seen.get_mut(condition) {
            if now.duration_since(seen.logged) < self.every {
                seen.since = seen.since.saturating_add(1);
                self.suppressed += 1;
                return None;
            }
            seen.logged = now;
            return Some(std::mem::take(&mut seen.since));
        }
        if self.seen.len() >= self.conditions_max
            && let Some(oldest) = self.seen.iter().min_by_key(|(_, seen)| seen.logged)
        {
            // One that has ended needs no memory.
            if now.duration_since(oldest.1.logged) < self.every {
                self.forgotten += 1;
            }
            let oldest = oldest.0.clone();
            self.seen.remove(&oldest);
        }
        self.seen.insert(condition.to_owned(), Seen { logged: now, since: 0 });
        Some(0)
    }
}

/// Reads the counts of the process at each scrape.
struct Counts(IntCounterVec);

impl Collector for Counts {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let (suppressed, forgotten) = {
            let all = OF_PROCESS.lock();
            (all.suppressed, all.forgotten)
        };
        for (outcome, now) in [("suppressed", suppressed), ("forgotten", forgotten)] {
            let shown = self.0.with_label_values(&[outcome]);
            shown.inc_by(now.saturating_sub(shown.get()));
        }
        self.0.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn hazard_118_what_repeats_is_logged_every_ten_seconds_with_its_count() {
        let mut repeats = Repeats::new(&LogConfig::default());
        let mut logged = Vec::new();
        // Eight attempts a second for half a minute.
        for _ in 0..240 {
            logged.extend(repeats.due("redis h:1: connection refused"));
            advance(Duration::from_millis(125)).await;
        }
        assert_eq!(logged, [0, 79, 79]);
        assert_eq!(repeats.suppressed, 237);
        assert_eq!(repeats.due("redis h:2: connection refused"), Some(0), "another condition");
        assert_eq!(repeats.due("redis h:2: connection refused"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn hazard_155_interval_and_number_of_conditions_are_configured_and_counted() {
        let config = LogConfig { repeat_seconds: 60, conditions_max: 3, ..Default::default() };
        let mut repeats = Repeats::new(&config);
        for number in 0..4 {
            assert_eq!(repeats.due(&number.to_string()), Some(0));
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!((repeats.seen.len(), repeats.forgotten), (3, 1));
        assert_eq!(repeats.due("3"), None, "the newest is remembered");
        assert_eq!(repeats.due("0"), Some(0), "the oldest is forgotten");
        assert_eq!((repeats.suppressed, repeats.forgotten), (1, 2));
        advance(Duration::from_secs(60)).await;
        assert_eq!(repeats.due("3"), Some(1), "a minute has passed");
        assert_eq!(repeats.due("4"), Some(0));
        assert_eq!(repeats.forgotten, 2, "one that was due anyway is no loss");
    }
}
