//! Requests to Kafka that may take seconds. The loop polls for their answers and never waits, so a slow
//! answer for one partition stops no other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_bus::Error;
use barid_bus::consumer::{Assigned, Partition, Pending, Reach};
use futures::FutureExt as _;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// After an answer that was an error.
const PAUSE: Duration = Duration::from_millis(500);

/// How often topics' ids are asked for while a partition waits for them.
const URGENT: Duration = Duration::from_millis(500);

/// When topics' ids are asked for.
#[derive(Debug)]
pub struct Refresh {
    due: Instant,
    asked: Option<Instant>,
}

impl Refresh {
    /// Due at once.
    pub fn new(now: Instant) -> Self {
        Self { due: now, asked: None }
    }

    /// Not later than in `wait`.
    pub fn within(&mut self, wait: Duration, now: Instant) {
        self.due = self.due.min(now + wait);
    }

    /// Whether to ask now, and then in `every`. `urgent`: a partition stands still until the answer comes.
    /// An answer may not help, so that the next question waits a while even then.
    pub fn is_due(&mut self, now: Instant, every: Duration, urgent: bool) -> bool {
        let rested = self.asked.is_none_or(|asked| asked + URGENT <= now);
        let due = self.due <= now || (urgent && rested);
        if due {
            (self.due, self.asked) = (now + every, Some(now));
        }
        due
    }
}

/// An answer on its way.
pub struct Errand<T>(JoinHandle<Result<T, Error>>);

impl<T: Send + 'static> Errand<T> {
    /// Starts a request; `bell` is notified when its answer is there.
    pub fn new(answer: Pending<T>, bell: Arc<Notify>) -> Self {
        Self(tokio::spawn(async move {
            let answer = answer.await;
            bell.notify_one();
            answer
        }))
    }

    /// The answer, if it is there. Do not call it again after it returned one.
    pub fn answer(&mut self) -> Option<Result<T, Error>> {
        if !self.0.is_finished() {
            return None;
        }
        let gone = || Error::Away("a task ended early".into());
        (&mut self.0).now_or_never().map(|answer| answer.unwrap_or_else(|_| Err(gone())))
    }
}

/// Partitions that are to be taken up.
pub struct Plan {
    /// Which; without those that were revoked meanwhile.
    pub partitions: Vec<Partition>,
    /// When to ask (again).
    pub due: Instant,
    /// Where they stand.
    pub errand: Option<Errand<Vec<Assigned>>>,
}

/// A request for a partition and one of its assignments. It is repeated a while after an error.
pub struct Sent<T> {
    assignment: u64,
    about: i64,
    errand: Errand<T>,
    /// The last answer was an error: not before then.
    pause: Option<Instant>,
}

/// Errands by partition.
pub struct ByPartition<T>(HashMap<Partition, Sent<T>>);

/// Seeks under way.
pub type Seeks = ByPartition<()>;
/// Requests for the bounds of logs.
pub type Reaches = ByPartition<Reach>;

impl<T> Default for ByPartition<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Send + 'static> ByPartition<T> {
    /// The answer for a partition's assignment, if it is there; else starts the request, unless it is under
    /// way. `about` tells requests apart: the answer to another one is dropped.
    pub fn answer(
        &mut self,
        partition: &Partition,
        (assignment, about): (u64, i64),
        bell: &Arc<Notify>,
        ask: impl FnOnce() -> Pending<T>,
    ) -> Option<T> {
        if let Some(sent) = self.0.get_mut(partition) {
            if let Some(pause) = sent.pause {
                if pause > Instant::now() {
                    return None;
                }
            } else {
                match sent.errand.answer()? {
                    Ok(answer) if (sent.assignment, sent.about) == (assignment, about) => {
                        self.0.remove(partition);
                        return Some(answer);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        let (topic, partition) = (&*partition.topic, partition.number);
                        tracing::debug!(%error, topic, partition, "asked in vain, asking again");
                        sent.pause = Some(Instant::now() + PAUSE);
                        return None;
                    }
                }
            }
        }
        let errand = Errand::new(ask(), Arc::clone(bell));
        self.0.insert(partition.clone(), Sent { assignment, about, errand, pause: None });
        None
    }

    /// Drops the requests for these partitions.
    pub fn forget(&mut self, partitions: &[Partition]) {
        self.0.retain(|partition, _| !partitions.contains(partition));
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
        // What is asked in ten seconds of a loop that turns each 50 ms and has each answer at once.
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
