//! Requests to Kafka that may take seconds. The loop polls for their answers and never waits, so a slow
//! answer for one partition stops no other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_bus::Error;
use barid_bus::consumer::{Partition, Pending};
use futures::FutureExt as _;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// After an answer that was an error.
const PAUSE: Duration = Duration::from_millis(500);

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

/// A request for a partition and one of its assignments. It is repeated a while after an error.
struct Sent<T> {
    assignment: u64,
    about: i64,
    errand: Errand<T>,
    /// The last answer was an error: it is sent again then.
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
