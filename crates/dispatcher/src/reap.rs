//! Removes void routes: of sessions that their node does not have, and of lives of nodes that have
//! been over for long. The script removes a route only if it is still that session's, so a reaper
//! that is late, or one of several, harms nobody.

use std::sync::Arc;

use barid_core::{DeviceId, SessionRef};
use barid_mailbox::{DisconnectRequest, Error, UserKey};
use tokio::sync::{Semaphore, mpsc};

use crate::metrics::Metrics;
use crate::resolve::Routes;

/// A route to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Void {
    /// Whose.
    pub user: UserKey,
    /// Which device's; `None`: whichever has this session.
    pub device: Option<DeviceId>,
    /// The session that is not.
    pub session: SessionRef,
}

/// The way to the reaper; cheap to clone.
#[derive(Clone)]
pub struct Reaper {
    queue: mpsc::Sender<Void>,
    metrics: Metrics,
}

impl Reaper {
    /// Starts the reaper; it ends with its last clone. Up to `queue_max` routes wait, `concurrency`
    /// are being removed.
    pub fn start<R: Routes>(
        routes: Arc<R>,
        queue_max: usize,
        concurrency: usize,
        metrics: Metrics,
    ) -> Self {
        let (queue, mut queued) = mpsc::channel::<Void>(queue_max);
        let places = Arc::new(Semaphore::new(concurrency));
        let counts = metrics.clone();
        tokio::spawn(async move {
            while let Some(void) = queued.recv().await {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                let (routes, counts) = (Arc::clone(&routes), counts.clone());
                tokio::spawn(async move {
                    let outcome = match remove(&*routes, void).await {
                        Ok(true) => "removed",
                        Ok(false) => "unknown",
                        Err(_) => "failed",
                    };
                    counts.reaped.with_label_values(&[outcome]).inc();
                    drop(place);
                });
            }
        });
        Self { queue, metrics }
    }

    /// Takes note of a void route; never waits. What does not fit will be met again.
    pub fn offer(&self, void: Void) {
        if self.queue.try_send(void).is_err() {
            self.metrics.reaped.with_label_values(&["dropped"]).inc();
        }
    }
}

async fn remove<R: Routes>(routes: &R, void: Void) -> Result<bool, Error> {
    let Void { user, device, session } = void;
    let device = match device {
        Some(device) => Some(device),
        None => {
            let routes = routes.untracked(&user).await?;
            routes.into_iter().find(|route| route.session == session).map(|route| route.device)
        }
    };
    let Some(device) = device else { return Ok(false) };
    routes.remove(DisconnectRequest { user, device, session }).await?;
    Ok(true)
}
