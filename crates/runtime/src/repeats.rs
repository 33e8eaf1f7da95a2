//! Logs once what repeats: an outage is met by many tasks, many times a second, and each attempt fails alike.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// A condition that persists is logged this often.
const EVERY: Duration = Duration::from_secs(10);
/// Conditions that are remembered. The one logged longest ago is forgotten, and may be logged again too early.
const CONDITIONS_MAX: usize = 128;

static OF_PROCESS: LazyLock<Repeats> = LazyLock::new(Repeats::default);

/// Whether this process logs `condition` now: once in ten seconds. Returns how often it was met since it was last
/// logged. `condition` names what fails and why (`redis 127.0.0.1:6379: connection refused`), and contains nothing that
/// differs at each attempt.
pub fn due(condition: &str) -> Option<u64> {
    OF_PROCESS.due(condition)
}

#[derive(Default)]
struct Repeats(Mutex<HashMap<String, Seen>>);

struct Seen {
    logged: Instant,
    since: u64,
}

impl Repeats {
    fn due(&self, condition: &str) -> Option<u64> {
        let now = Instant::now();
        let mut all = self.0.lock();
        if let Some(seen) = all.get_mut(condition) {
            if now.duration_since(seen.logged) < EVERY {
                seen.since = seen.since.saturating_add(1);
                return None;
            }
            seen.logged = now;
            return Some(std::mem::take(&mut seen.since));
        }
        if all.len() >= CONDITIONS_MAX
            && let Some(oldest) = all.iter().min_by_key(|(_, seen)| seen.logged)
        {
            let oldest = oldest.0.clone();
            all.remove(&oldest);
        }
        all.insert(condition.to_owned(), Seen { logged: now, since: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn hazard_118_what_repeats_is_logged_every_ten_seconds_with_its_count() {
        let repeats = Repeats::default();
        let mut logged = Vec::new();
        // Eight attempts a second for half a minute.
        for _ in 0..240 {
            logged.extend(repeats.due("redis h:1: connection refused"));
            advance(Duration::from_millis(125)).await;
        }
        assert_eq!(logged, [0, 79, 79]);
        assert_eq!(repeats.due("redis h:2: connection refused"), Some(0), "another condition");
        assert_eq!(repeats.due("redis h:2: connection refused"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn hazard_118_conditions_are_bounded() {
        let repeats = Repeats::default();
        for number in 0..CONDITIONS_MAX + 1 {
            assert_eq!(repeats.due(&number.to_string()), Some(0));
            advance(Duration::from_millis(1)).await;
        }
        assert_eq!(repeats.0.lock().len(), CONDITIONS_MAX);
        assert_eq!(repeats.due(&CONDITIONS_MAX.to_string()), None, "the newest is remembered");
        assert_eq!(repeats.due("0"), Some(0), "the oldest is forgotten");
    }
}
