//! The signal to drain, with a deadline.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// The beginning and the deadline of draining. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Sender<Option<Instant>>);

impl Shutdown {
    /// Creates a signal; draining has not begun.
    pub fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Begins draining. Later calls have no effect.
    pub fn begin(&self, grace: Duration) {
        self.0.send_if_modified(|deadline| {
            let first = deadline.is_none();
            if first {
                *deadline = Some(Instant::now() + grace);
            }
            first
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

    /// The deadline of draining; `None`: it has not begun.
    pub fn deadline(&self) -> Option<Instant> {
        *self.0.borrow()
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

    #[tokio::test]
    async fn the_first_deadline_holds() {
        let shutdown = Shutdown::new();
        assert!(!shutdown.is_draining());
        shutdown.begin(Duration::from_secs(1));
        let deadline = shutdown.deadline();
        shutdown.begin(Duration::from_secs(9));
        assert_eq!(shutdown.deadline(), deadline);
        shutdown.draining().await;
    }
}
