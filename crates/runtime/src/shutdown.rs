//! The signal to drain, with a deadline.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// The beginning and the deadline of draining. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Sender<Option<Instant>>);

impl Shutdown {
    /// Creates a signal; draining has not begun.
    pub fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Begins draining, or moves its deadline to an earlier time. The earliest deadline holds.
    pub fn begin(&self, grace: Duration) {
        let wanted = Instant::now() + grace;
        self.0.send_if_modified(|deadline| {
            let earlier = deadline.is_none_or(|deadline| wanted < deadline);
            if earlier {
                *deadline = Some(wanted);
            }
            earlier
        });
    }

    /// Waits until draining begins.
    pub async fn draining(&self) {
        // The sender lives in self, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(Option::is_some).await;
    }

    /// Whether draining has begun.
    pub fn is_draining(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// The deadline of draining, as it is now; the present time if draining has not begun.
    pub fn deadline(&self) -> Instant {
        self.0.borrow().unwrap_or_else(Instant::now)
    }

    /// Runs `work` until `reserve` before the deadline of draining, also if that is moved meanwhile. `None`: it was cut
    /// off. Without a time limit as long as draining has not begun.
    pub async fn cut<T>(&self, reserve: Duration, work: impl Future<Output = T>) -> Option<T> {
        let passed = async {
            let mut moved = self.0.subscribe();
            loop {
                let deadline = *moved.borrow_and_update();
                tokio::select! {
                    () = wait_until(deadline, reserve) => return,
                    // The sender lives in self, so waiting cannot fail.
                    _ = moved.changed() => {}
                }
            }
        };
        tokio::select! {
            biased;
            done = work => Some(done),
            () = passed => None,
        }
    }
}

async fn wait_until(deadline: Option<Instant>, reserve: Duration) {
    match deadline {
        Some(deadline) => sleep_until(deadline.checked_sub(reserve).unwrap_or(deadline)).await,
        None => std::future::pending().await,
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_earliest_deadline_holds() {
        let shutdown = Shutdown::new();
        assert!(!shutdown.is_draining());
        shutdown.begin(Duration::from_secs(9));
        let deadline = shutdown.deadline();
        shutdown.begin(Duration::from_secs(10));
        assert_eq!(shutdown.deadline(), deadline);
        shutdown.draining().await;
        shutdown.begin(Duration::from_secs(1));
        assert_eq!(shutdown.deadline(), deadline - Duration::from_secs(8));
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_moves_cuts_off_what_runs() {
        let shutdown = Shutdown::new();
        let (begun, second) = (Instant::now(), Duration::from_secs(1));
        let work = shutdown.cut(second, std::future::pending::<()>());
        let signals = async {
            tokio::time::sleep(second).await;
            shutdown.begin(20 * second);
            tokio::time::sleep(second).await;
            shutdown.begin(3 * second);
        };
        assert_eq!(tokio::join!(work, signals).0, None);
        assert_eq!(begun.elapsed(), 4 * second);
        assert_eq!(shutdown.cut(second, async { 7 }).await, Some(7), "work that is done counts");
        assert_eq!(shutdown.cut(second, std::future::pending::<()>()).await, None);
        assert_eq!(begun.elapsed(), 4 * second);
    }
}
