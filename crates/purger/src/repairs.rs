//! Execution of repairs: asks shards for their positions, seeks back in the log, and raises the shards' stored
//! positions in the end. The decisions are made in [`crate::partitions`].

use std::time::Duration;

use barid_bus::consumer::{Consumer, Partition, Reach};
use tokio::time::Instant;

use crate::errands::ByPartition;
use crate::metrics::Metrics;
use crate::pipeline::Pipeline;
use crate::ports::Mailboxes;

/// How long a partition waits for its shards to report their positions.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// Requests to Kafka for partitions under repair.
pub struct Repairs {
    seeks: ByPartition<()>,
    /// Requests for the bounds of the logs.
    reaches: ByPartition<Reach>,
    /// Time to live of mailboxes, ms. Older records are not read again.
    ttl_ms: u64,
    metrics: Metrics,
}

impl Repairs {
    /// Creates an empty set. `ttl_ms`: time to live of mailboxes.
    pub fn new(ttl_ms: u64, metrics: Metrics) -> Self {
        Self { seeks: ByPartition::default(), reaches: ByPartition::default(), ttl_ms, metrics }
    }

    /// Drops the requests for revoked partitions.
    pub fn forget(&mut self, partitions: &[Partition]) {
        self.seeks.forget(partitions);
        self.reaches.forget(partitions);
    }

    /// Advances every repair by the steps that are possible now.
    pub fn advance<S, M: Mailboxes>(&mut self, consumer: &Consumer<S>, pipeline: &mut Pipeline<M>) {
        ask_shards(pipeline);
        self.rewind(consumer, pipeline);
        self.seek(consumer, pipeline);
    }

    /// Rewinds partitions whose shards have forgotten messages, as far as the log and the mailboxes' time to live
    /// reach.
    fn rewind<S, M: Mailboxes>(&mut self, consumer: &Consumer<S>, pipeline: &mut Pipeline<M>) {
        let (now, bell) = (Instant::now(), consumer.bell());
        let Pipeline { partitions, lanes, .. } = pipeline;
        for open in partitions.iter_mut() {
            if !open.must_rewind(now) {
                continue;
            }
            let now_ms = lanes.shared().now_ms(open.forgetful(), now);
            let partition = open.assignment.partition.clone();
            let reach = self.reaches.answer(&partition, (open.assignment.id, 0), &bell, || {
                let since_ms = i64::try_from(now_ms.saturating_sub(self.ttl_ms));
                consumer.reach(&partition, since_ms.unwrap_or(i64::MAX))
            });
            if let Some(reach) = reach {
                open.rewind(reach);
                self.metrics.repairs.inc();
                tracing::warn!(
                    topic = &*partition.topic,
                    partition = partition.number,
                    shards = open.repairing(),
                    to = open.seek_to,
                    low = reach.low,
                    high = reach.high,
                    since = reach.since,
                    "redis has forgotten confirmed messages, reading the log again"
                );
            }
        }
    }

    fn seek<S, M: Mailboxes>(&mut self, consumer: &Consumer<S>, pipeline: &mut Pipeline<M>) {
        for open in pipeline.partitions.iter_mut() {
            // No record is taken of a partition that is being revoked.
            let Some(offset) = open.seek_to.filter(|_| !open.revoking) else { continue };
            let partition = &open.assignment.partition;
            let about = (open.assignment.id, offset);
            let ask = || consumer.seek(partition, offset);
            // A seek can fail shortly after the assignment; it is repeated.
            if self.seeks.answer(partition, about, &consumer.bell(), ask).is_some() {
                open.seek_to = None;
            }
        }
    }
}

/// Asks the shards of a partition for their positions, after an assignment or when one of them has forgotten messages.
fn ask_shards<M: Mailboxes>(pipeline: &mut Pipeline<M>) {
    let Pipeline { partitions, lanes, .. } = pipeline;
    let shards = lanes.mailboxes().shards();
    for open in partitions.iter_mut() {
        if let Some((round, asked)) = open.questions(shards) {
            let asked = asked.into_iter().map(|shard| (shard, None));
            let missing = lanes.ask(&open.assignment, round, asked);
            open.asked(missing, Instant::now() + ANSWER_PATIENCE);
        }
    }
}

/// Raises the stored positions of shards whose repair is over.
pub fn close<M: Mailboxes>(pipeline: &mut Pipeline<M>) {
    let Pipeline { partitions, lanes, .. } = pipeline;
    for open in partitions.iter_mut() {
        let Some(shards) = open.closing() else { continue };
        let shards = shards.into_iter().map(|(shard, at)| (shard, Some(at)));
        // The answers arrive through the loop, after this.
        let round = open.next_round();
        let missing = lanes.ask(&open.assignment, round, shards);
        open.close(round, missing);
    }
}
