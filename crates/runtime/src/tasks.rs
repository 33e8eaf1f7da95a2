//! The tasks that a role consists of. Each has a name, and none may end while the role works.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::future::{Future, pending};
use std::time::Duration;

use tokio::task::{Id, JoinSet};
use tokio::time::{interval, sleep_until};

use crate::{Condition, Context, Stopped};

/// A role's tasks. They end with it.
pub struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
    /// Fails for good when a task ends early: only a restart helps.
    whole: Condition,
}

impl Tasks {
    /// No tasks yet. Adds the condition `tasks`, which holds until one of them ends early.
    pub fn new(context: &Context) -> Self {
        let whole = context.health.condition("tasks").vital();
        Self { running: JoinSet::new(), names: HashMap::new(), whole }
    }

    /// Starts a task. `name` is a noun phrase for logs and `/readyz`: `the heartbeat wheel`.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.running.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Reports each task that ends or panics. Never returns. Cancel-safe.
    pub async fn supervise(&mut self) -> Infallible {
        while let Some(ended) = self.running.join_next_with_id().await {
            let (id, problem) = match ended {
                Ok((id, ())) => (id, String::new()),
                Err(error) => (error.id(), error.to_string()),
            };
            let task = self.names.remove(&id).unwrap_or("a task");
            tracing::error!(task, problem, "a task ended early");
            self.whole.failing(format!("{task} ended"));
        }
        pending().await
    }

    /// Waits until all tasks have ended by themselves. Cancel-safe.
    pub async fn finished(&mut self) {
        while self.running.join_next().await.is_some() {}
    }

    /// Waits for [`Self::finished`] until the deadline of draining. What is cut off then is `count` of `what`.
    pub async fn drained(
        &mut self,
        context: &Context,
        what: &str,
        count: impl FnOnce() -> u64,
    ) -> Stopped {
        let deadline = context.shutdown.deadline().unwrap_or_else(tokio::time::Instant::now);
        tokio::select! {
            () = self.finished() => Stopped::Clean,
            () = sleep_until(deadline) => Stopped::Cut { what: what.into(), count: count() },
        }
    }

    /// Ends all tasks, and waits until they have ended.
    pub async fn shutdown(mut self) {
        self.running.shutdown().await;
    }
}

impl Context {
    /// Keeps `condition` true while `ask` answers, asked every `every`; an error is the reason why it fails. Never
    /// returns.
    pub async fn probe<E: Display, F: Future<Output = Result<(), E>>>(
        condition: Condition,
        every: Duration,
        mut ask: impl FnMut() -> F,
    ) {
        let mut turn = interval(every);
        turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            match ask().await {
                Ok(()) => condition.ready(),
                Err(error) => condition.failing(error.to_string()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn reason_after(task: impl Future<Output = ()> + Send + 'static) -> String {
        let context = Context::new();
        let mut tasks = Tasks::new(&context);
        tasks.spawn("the wheel", task);
        tasks.spawn("the guard", pending());
        assert_eq!(context.health.not_ready(), []);
        let late = Duration::from_secs(60);
        tokio::time::timeout(late, tasks.supervise()).await.expect_err("it never returns");
        assert_eq!(context.health.dying().len(), 1, "only a restart helps");
        context.health.not_ready().remove(0).1
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_or_panics_is_named() {
        assert_eq!(reason_after(async {}).await, "the wheel ended");
        assert_eq!(reason_after(async { panic!("as planned") }).await, "the wheel ended");
    }

    #[tokio::test(start_paused = true)]
    async fn draining_waits_for_tasks_until_the_deadline() {
        let context = Context::new();
        let mut tasks = Tasks::new(&context);
        tasks.spawn("a lane", tokio::time::sleep(Duration::from_secs(2)));
        context.shutdown.begin(Duration::from_secs(1));
        let cut = Stopped::Cut { what: "claims".into(), count: 7 };
        assert_eq!(tasks.drained(&context, "claims", || 7).await, cut);
        let context = Context::new();
        context.shutdown.begin(Duration::from_secs(5));
        assert_eq!(tasks.drained(&context, "claims", || 7).await, Stopped::Clean);
    }
}
