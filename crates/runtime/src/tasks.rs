//! The tasks that a role consists of. Each has a name; one that panics, or ends while the role works, fails the
//! condition `tasks`.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use crate::{Condition, Context, Shutdown, Stopped};

/// A role's tasks. They are aborted when it is dropped.
pub struct Tasks {
    running: Arc<Mutex<JoinSet<()>>>,
    spawner: Spawner,
}

/// Starts tasks of a [`Tasks`], none once that is dropped. Cheap to clone; a task may hold one.
#[derive(Clone)]
pub struct Spawner {
    running: Weak<Mutex<JoinSet<()>>>,
    /// Fails for good when a task ends early: only a restart helps.
    whole: Condition,
    shutdown: Shutdown,
}

impl Tasks {
    /// Creates an empty set, and adds the condition `tasks`, which fails when a task ends early.
    pub fn new(context: &Context) -> Self {
        let running = Arc::default();
        let spawner = Spawner {
            running: Arc::downgrade(&running),
            whole: context.health.condition("tasks").vital(),
            shutdown: context.shutdown.clone(),
        };
        Self { running, spawner }
    }

    /// Starts a task as [`Spawner::spawn`] does.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawner.spawn(name, task);
    }

    /// A handle with which tasks are started later.
    pub fn spawner(&self) -> Spawner {
        self.spawner.clone()
    }

    /// Waits until all tasks have ended by themselves. Cancel-safe.
    pub async fn finished(&self) {
        while poll_fn(|cx| self.running.lock().poll_join_next(cx)).await.is_some() {}
    }

    /// Waits for [`Self::finished`] until the deadline of draining. What is cut off then is `count` of `what`.
    pub async fn drained(&self, what: &str, count: impl FnOnce() -> u64) -> Stopped {
        match self.spawner.shutdown.cut(Duration::ZERO, self.finished()).await {
            Some(()) => Stopped::Clean,
            None => Stopped::Cut { what: what.into(), count: count() },
        }
    }

    /// Aborts all tasks, and waits until they have ended.
    pub async fn shutdown(self) {
        let mut running = std::mem::take(&mut *self.running.lock());
        // A task that is just being polled starts no further ones.
        drop(self);
        running.shutdown().await;
    }
}

impl Spawner {
    /// Starts a task that may end only once the role drains. `name` is a noun phrase for logs and `/readyz`:
    /// `the heartbeat wheel`.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, task, false);
    }

    /// Starts a task that may end at any time, but not panic.
    pub fn spawn_finite(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.start(name, task, true);
    }

    fn start(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
        may_end: bool,
    ) {
        let Some(running) = self.running.upgrade() else { return };
        let (whole, shutdown) = (self.whole.clone(), self.shutdown.clone());
        let supervised = async move {
            let panicked = AssertUnwindSafe(task).catch_unwind().await.is_err();
            let draining = shutdown.is_draining();
            if panicked || !(may_end || draining) {
                tracing::error!(task = name, panicked, "a task ended early");
            }
            if !draining && (panicked || !may_end) {
                whole.failing(format!("{name} ended"));
            }
        };
        let mut running = running.lock();
        while running.try_join_next().is_some() {}
        running.spawn(supervised.in_current_span());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    /// The reasons for which a role whose task `start` begins must be restarted.
    async fn reasons(start: impl FnOnce(&Spawner)) -> Vec<String> {
        let context = Context::new();
        let tasks = Tasks::new(&context);
        tasks.spawn("the guard", pending());
        start(&tasks.spawner());
        assert_eq!(context.health.not_ready(), []);
        let _ = tokio::time::timeout(Duration::from_secs(60), tasks.finished()).await;
        context.health.dying().into_iter().map(|(_, reason)| reason).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_or_panics_is_named() {
        let early = ["the wheel ended"];
        assert_eq!(reasons(|spawner| spawner.spawn("the wheel", async {})).await, early);
        let panics = async { panic!("as planned") };
        assert_eq!(reasons(|spawner| spawner.spawn("the wheel", panics)).await, early);
        let panics = async { panic!("as planned") };
        assert_eq!(reasons(|spawner| spawner.spawn_finite("the wheel", panics)).await, early);
        assert!(reasons(|spawner| spawner.spawn_finite("the wheel", async {})).await.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_end_when_they_are_dropped() {
        let tasks = Tasks::new(&Context::new());
        let held = Arc::new(());
        let (spawner, inside) = (tasks.spawner(), (tasks.spawner(), Arc::clone(&held)));
        tasks.spawn("a lane", async move {
            let _inside = inside;
            pending().await
        });
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&held), 2);
        drop(tasks);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(Arc::strong_count(&held), 1);
        let late = Arc::clone(&held);
        spawner.spawn("a late one", async move { drop(late) });
        assert_eq!(Arc::strong_count(&held), 1, "it was not started");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_task_that_starts_others_while_all_are_shut_down_does_not_outlive_them() {
        for _ in 0..200 {
            let context = Context::new();
            let tasks = Tasks::new(&context);
            let spawner = tasks.spawner();
            tasks.spawn("the starter", async move {
                loop {
                    spawner.spawn_finite("a child", pending());
                    tokio::task::yield_now().await;
                }
            });
            tokio::task::yield_now().await;
            let shutdown = tokio::time::timeout(Duration::from_secs(10), tasks.shutdown());
            assert!(shutdown.await.is_ok(), "it waits for a task that nobody aborts");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn draining_waits_for_tasks_until_the_deadline() {
        let cut = Stopped::Cut { what: "claims".into(), count: 7 };
        for (drain, stopped) in [(1, cut), (5, Stopped::Clean)] {
            let context = Context::new();
            let tasks = Tasks::new(&context);
            tasks.spawn("a lane", tokio::time::sleep(Duration::from_secs(2)));
            context.shutdown.begin(Duration::from_secs(drain));
            assert_eq!(tasks.drained("claims", || 7).await, stopped);
        }
    }
}
