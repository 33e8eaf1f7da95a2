//! Membership of the consumer group. An assigned partition is joined once its start offset is known. A revoked one is
//! given back once its records in flight are finished and committed, or a deadline has passed.

use std::time::Duration;

use barid_bus::Error;
use barid_bus::consumer::{Assigned, Consumer, Partition};
use tokio::time::Instant;

use crate::errands::Errand;
use crate::metrics::Metrics;
use crate::pipeline::Pipeline;
use crate::ports::Mailboxes;

/// Pause before a failed assignment is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Bound of the last commit when a partition is given back or the process ends.
pub const COMMIT_TIMEOUT: Duration = Duration::from_secs(3);

/// Assignments and revocations under way.
pub struct Membership {
    joining: Option<Joining>,
    revocations: Vec<Revocation>,
    /// How long a revoked partition may take to finish its records in flight.
    drain: Duration,
    metrics: Metrics,
}

/// Partitions that are assigned and not joined yet.
struct Joining {
    partitions: Vec<Partition>,
    /// When to request their committed offsets (again).
    due: Instant,
    errand: Option<Errand<Vec<Assigned>>>,
}

/// Revoked partitions that are not given back yet.
struct Revocation {
    partitions: Vec<Partition>,
    deadline: Instant,
    /// The last commit, once it has begun.
    commit: Option<Errand<usize>>,
    /// The revocation's label: `drained` or `cut`.
    how: &'static str,
}

impl Membership {
    /// Creates a membership without partitions. `drain`: how long a revoked partition may take to finish its records in
    /// flight.
    pub fn new(drain: Duration, metrics: Metrics) -> Self {
        Self { joining: None, revocations: Vec::new(), drain, metrics }
    }

    /// Notes that the group has assigned partitions. [`Self::join`] answers.
    pub fn assigned(&mut self, partitions: Vec<Partition>) {
        self.joining = Some(Joining { partitions, due: Instant::now(), errand: None });
    }

    /// Notes that the group has revoked partitions. [`Self::give_back`] answers.
    pub fn revoked<S, M: Mailboxes>(
        &mut self,
        consumer: &mut Consumer<S>,
        pipeline: &mut Pipeline<M>,
        partitions: Vec<Partition>,
    ) {
        self.decline(consumer, &partitions);
        partitions.iter().for_each(|partition| pipeline.stop(partition));
        let deadline = Instant::now() + self.drain;
        self.revocations.push(Revocation { partitions, deadline, commit: None, how: "cut" });
    }

    /// Gives up partitions that already belong to another member, so that nothing can be committed for them.
    pub fn lost<S, M: Mailboxes>(
        &mut self,
        consumer: &mut Consumer<S>,
        pipeline: &mut Pipeline<M>,
        partitions: &[Partition],
    ) {
        self.decline(consumer, partitions);
        tracing::warn!(partitions = partitions.len(), "partitions lost");
        self.metrics.revoked.with_label_values(&["lost"]).inc_by(partitions.len() as u64);
        for partition in partitions {
            pipeline.stop(partition);
            pipeline.partitions.remove(partition);
        }
        for revocation in &mut self.revocations {
            revocation.partitions.retain(|partition| !partitions.contains(partition));
        }
        self.revocations.retain(|revocation| !revocation.partitions.is_empty());
        if let Err(error) = consumer.release(partitions) {
            tracing::warn!(%error, "cannot release lost partitions");
        }
    }

    /// Removes revoked partitions from an assignment that is not joined yet. librdkafka waits for answers to both.
    fn decline<S>(&mut self, consumer: &mut Consumer<S>, partitions: &[Partition]) {
        let Some(joining) = &mut self.joining else { return };
        let (gone, left): (Vec<_>, Vec<_>) = std::mem::take(&mut joining.partitions)
            .into_iter()
            .partition(|partition| partitions.contains(partition));
        joining.partitions = left;
        if joining.partitions.is_empty() {
            self.joining = None;
        }
        if gone.is_empty() {
            return;
        }
        if let Err(error) = consumer.decline(&gone) {
            tracing::warn!(%error, "cannot decline partitions");
        }
    }

    /// Joins assigned partitions once their committed offsets are known. `None`: there is nothing to do yet.
    ///
    /// # Errors
    /// Kafka refused a request. The next call tries again.
    pub fn join<S, M: Mailboxes>(
        &mut self,
        consumer: &mut Consumer<S>,
        pipeline: &mut Pipeline<M>,
    ) -> Option<Result<(), Error>> {
        let joining = self.joining.as_mut()?;
        if joining.errand.is_none() && joining.due <= Instant::now() {
            let plan = consumer.plan(&joining.partitions);
            joining.errand = Some(Errand::new(plan, consumer.bell()));
        }
        let joined = Errand::take(&mut joining.errand)?.and_then(|mut assigned| {
            assigned.retain(|assigned| joining.partitions.contains(&assigned.partition));
            consumer.take_up(&assigned).map(|()| assigned)
        });
        match joined {
            Ok(assigned) => {
                self.joining = None;
                tracing::info!(partitions = assigned.len(), "partitions assigned");
                for assigned in assigned {
                    let priority = pipeline.priority(&assigned.partition.topic);
                    pipeline.partitions.assign(assigned, priority);
                }
                Some(Ok(()))
            }
            Err(error) => {
                joining.due = Instant::now() + RETRY;
                Some(Err(error))
            }
        }
    }

    /// Gives revoked partitions back once they are finished, or their deadline has passed.
    pub fn give_back<S, M: Mailboxes>(
        &mut self,
        consumer: &mut Consumer<S>,
        pipeline: &mut Pipeline<M>,
    ) {
        let now = Instant::now();
        for at in (0..self.revocations.len()).rev() {
            let revocation = &mut self.revocations[at];
            let drained = pipeline.is_drained(&revocation.partitions);
            if revocation.commit.is_none() && (drained || revocation.deadline <= now) {
                let commits = pipeline.partitions.commits_of(&revocation.partitions);
                let commit = consumer.commit_and_wait(commits, COMMIT_TIMEOUT);
                revocation.commit = Some(Errand::new(commit, consumer.bell()));
                revocation.how = if drained { "drained" } else { "cut" };
            }
            let Some(committed) = Errand::take(&mut revocation.commit) else { continue };
            if let Err(error) = committed {
                tracing::warn!(%error, "cannot commit revoked partitions: their next owner reads uncommitted records again");
            }
            let Revocation { partitions, how, .. } = self.revocations.swap_remove(at);
            tracing::info!(partitions = partitions.len(), how, "partitions given back");
            self.metrics.revoked.with_label_values(&[how]).inc_by(partitions.len() as u64);
            for partition in &partitions {
                pipeline.partitions.remove(partition);
            }
            if let Err(error) = consumer.release(&partitions) {
                tracing::warn!(%error, "cannot release partitions");
            }
        }
    }
}
