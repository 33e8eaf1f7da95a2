//! Errands: requests to Kafka that may take seconds. Each runs in a task, and the loop polls for its answer, so that a
//! slow answer for one partition does not delay the others.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_bus::Error;
use barid_bus::consumer::{Partition, Pending};
use futures::FutureExt as _;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Pause after an error before the request is repeated.
const PAUSE: Duration = Duration::from_millis(500);

/// A request under way.
pub struct Errand<T>(JoinHandle<Result<T, Error>>);

impl<T: Send + 'static> Errand<T> {
    /// Starts a request; `bell` is notified when it is answered.
    pub fn new(answer: Pending<T>, bell: Arc<Notify>) -> Self {
        Self(tokio::spawn(async move {
            let answer = answer.await;
            bell.notify_one();
            answer
        }))
    }

    /// Takes the errand out of its slot if it is answered, and returns the answer.
    pub fn take(slot: &mut Option<Self>) -> Option<Result<T, Error>> {
        let errand = slot.take_if(|errand| errand.0.is_finished())?;
        let gone = || Error::Away("a task ended early".into());
        errand.0.now_or_never().map(|answer| answer.unwrap_or_else(|_| Err(gone())))
    }
}

/// A request for one assignment of a partition. After an error it is repeated.
struct Sent<T> {
    assignment: u64,
    about: i64,
    errand: Option<Errand<T>>,
    /// When to repeat the request, after an error.
    pause: Option<Instant>,
}

/// Errands by partition.
pub struct ByPartition<T>(HashMap<Partition, Sent<T>>);

impl<T> Default for ByPartition<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Send + 'static> ByPartition<T> {
    /// Returns the answer for a partition's assignment, if it has arrived; otherwise starts the request, unless it is
    /// under way. `about` identifies the request: the answer to another one is dropped.
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
                match Errand::take(&mut sent.errand)? {
                    Ok(answer) if (sent.assignment, sent.about) == (assignment, about) => {
                        self.0.remove(partition);
                        return Some(answer);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        let (topic, partition) = (&*partition.topic, partition.number);
                        tracing::debug!(%error, topic, partition, "request to kafka failed, repeating it");
                        sent.pause = Some(Instant::now() + PAUSE);
                        return None;
                    }
                }
            }
        }
        let errand = Some(Errand::new(ask(), Arc::clone(bell)));
        self.0.insert(partition.clone(), Sent { assignment, about, errand, pause: None });
        None
    }

    /// Drops the requests for these partitions.
    pub fn forget(&mut self, partitions: &[Partition]) {
        self.0.retain(|partition, _| !partitions.contains(partition));
    }
}
