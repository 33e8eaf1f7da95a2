//! Requests for the topics' ids, which show that a topic was recreated and that a broker answers, and for topics
//! that do not exist.

use std::collections::HashMap;
use std::time::Duration;

use barid_bus::Error;
use barid_bus::consumer::Consumer;
use tokio::time::Instant;

use crate::errands::Errand;

/// Requests for the topics' ids and for missing topics.
pub struct TopicWatch {
    refresh: Refresh,
    every: Duration,
    /// All topics that the purger reads or writes.
    topics: Vec<String>,
    ids: Option<Errand<HashMap<String, String>>>,
    missing: Option<Errand<Vec<String>>>,
}

impl TopicWatch {
    /// Creates the watch. The first request is due at once, and the next ones every `every`.
    pub fn new(topics: Vec<String>, every: Duration, now: Instant) -> Self {
        Self { refresh: Refresh::new(now), every, topics, ids: None, missing: None }
    }

    /// Makes the next request due within `wait`.
    pub fn within(&mut self, wait: Duration, now: Instant) {
        self.refresh.within(wait, now);
    }

    /// Sends the requests that are due. `urgent`: a partition waits for the ids.
    pub fn ask<S>(&mut self, consumer: &Consumer<S>, urgent: bool, now: Instant) {
        if self.ids.is_none() && self.refresh.is_due(now, self.every, urgent) {
            self.ids = Some(Errand::new(consumer.topic_ids(), consumer.bell()));
            self.missing.get_or_insert_with(|| {
                Errand::new(consumer.missing_topics(self.topics.clone()), consumer.bell())
            });
        }
    }

    /// The topics' ids by name; each answer is returned once.
    pub fn ids(&mut self) -> Option<Result<HashMap<String, String>, Error>> {
        Errand::take(&mut self.ids)
    }

    /// The topics that do not exist; each answer is returned once.
    pub fn missing(&mut self) -> Option<Result<Vec<String>, Error>> {
        Errand::take(&mut self.missing)
    }
}

/// How often topics' ids are requested while a partition waits for them.
const URGENT: Duration = Duration::from_millis(500);

/// The schedule of these requests.
#[derive(Debug)]
struct Refresh {
    due: Instant,
    asked: Option<Instant>,
}

impl Refresh {
    /// Creates a schedule whose first request is due at once.
    fn new(now: Instant) -> Self {
        Self { due: now, asked: None }
    }

    /// Makes the next request due within `wait`.
    fn within(&mut self, wait: Duration, now: Instant) {
        self.due = self.due.min(now + wait);
    }

    /// Whether a request is due; the next one is due after `every`. `urgent`: a partition waits for the answer. Urgent
    /// requests are paced as well, because an answer may not help.
    fn is_due(&mut self, now: Instant, every: Duration, urgent: bool) -> bool {
        let rested = self.asked.is_none_or(|asked| asked + URGENT <= now);
        let due = self.due <= now || (urgent && rested);
        if due {
            (self.due, self.asked) = (now + every, Some(now));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_70_an_id_that_stays_absent_is_not_asked_for_at_each_turn() {
        let start = Instant::now();
        let mut refresh = Refresh::new(start);
        let every = Duration::from_secs(5);
        // Requests within ten seconds of a loop that turns every 50 ms and has each answer at once.
        let mut asked = |from: u64, urgent: bool| {
            let turns = (0..200).map(|turn| start + Duration::from_millis(from + 50 * turn));
            turns.filter(|now| refresh.is_due(*now, every, urgent)).count()
        };
        assert_eq!((asked(0, false), asked(10_000, true)), (2, 20));
        // The first question of a partition that stands still waits for nothing.
        assert!(!refresh.is_due(start + Duration::from_millis(20_100), every, false));
        assert!(refresh.is_due(start + Duration::from_millis(20_100), every, true));
        refresh.within(Duration::from_millis(100), start + Duration::from_millis(20_100));
        assert!(refresh.is_due(start + Duration::from_millis(20_200), every, false));
    }
}
