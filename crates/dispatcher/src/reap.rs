//! The reaper removes void routes: of sessions that their node does not have, and of incarnations that have been over
//! for long. The script removes a route only if it still belongs to the same session, so that late or repeated
//! removals are harmless.

use std::sync::Arc;

use barid_core::{DeviceId, SessionRef};
use barid_mailbox::{DisconnectRequest, Error, UserKey};
use barid_runtime::Spawner;
use tokio::sync::{Semaphore, mpsc};

use crate::config::ReapConfig;
use crate::metrics::Metrics;
use crate::resolve::Routes;

/// A route to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Void {
    /// The user.
    pub user: UserKey,
    /// The device; `None`: the one that has this session.
    pub device: Option<DeviceId>,
    /// The session in the route.
    pub session: SessionRef,
}

/// The queue of the reaper. Cheap to clone.
#[derive(Clone)]
pub struct Reaper {
    queue: mpsc::Sender<Void>,
    metrics: Metrics,
}

impl Reaper {
    /// Starts the reaper in `tasks`.
    pub fn start<R: Routes>(
        routes: Arc<R>,
        config: &ReapConfig,
        metrics: Metrics,
        tasks: &Spawner,
    ) -> Self {
        let (queue, mut queued) = mpsc::channel::<Void>(config.queue_max);
        let places = Arc::new(Semaphore::new(config.concurrency));
        let counts = metrics.clone();
        let spawner = tasks.clone();
        tasks.spawn_finite("the reaper", async move {
            while let Some(void) = queued.recv().await {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                let (routes, counts) = (Arc::clone(&routes), counts.clone());
                spawner.spawn_finite("a removal of a route", async move {
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

    /// Queues a void route; drops it if the queue is full, because it will be found again. Never waits.
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
