//! The interfaces of the pipeline to Kafka, Redis and the dispatchers, which tests replace.

use std::future::Future;

use barid_bus::consumer::{Consumer, Consuming, Partition, Record};
use barid_core::{NodeId, Shard, ShardCount};
use barid_mailbox::{AcceptGroup, Error, GroupOutcome, Mailbox, RedisTime};
use barid_mesh::DispatchPool;
use barid_wire::internal::Push;
use tokio::time::Instant;

/// The source of records.
pub trait Log {
    /// As [`Consumer::take`].
    fn take(
        &mut self,
        topic: usize,
        max: usize,
        wanted: impl FnMut(&Partition) -> bool,
        out: &mut Vec<Record>,
    ) -> usize;
}

impl Log for Consumer<Consuming> {
    fn take(
        &mut self,
        topic: usize,
        max: usize,
        wanted: impl FnMut(&Partition) -> bool,
        out: &mut Vec<Record>,
    ) -> usize {
        Self::take(self, topic, max, wanted, out)
    }
}

/// The mailboxes that accept messages.
pub trait Mailboxes: Clone + Send + Sync + 'static {
    /// Number of shards.
    fn shards(&self) -> ShardCount;
    /// Number of masters.
    fn lanes(&self) -> usize;
    /// The master of a shard, as an index below [`Self::lanes`].
    fn lane_of(&self, shard: Shard) -> usize;
    /// The clock of a shard's master; `None`: it has not answered a call yet.
    fn redis_time(&self, shard: Shard) -> Option<RedisTime>;
    /// Accepts groups for one master; returns a result for each group.
    fn accept(
        &self,
        groups: &[AcceptGroup],
    ) -> impl Future<Output = Vec<Result<GroupOutcome, Error>>> + Send;
    /// Returns once Redis has answered.
    fn ping(&self) -> impl Future<Output = Result<(), Error>> + Send;
}

impl Mailboxes for Mailbox {
    fn shards(&self) -> ShardCount {
        Self::shards(self)
    }
    fn lanes(&self) -> usize {
        Self::lanes(self)
    }
    fn lane_of(&self, shard: Shard) -> usize {
        Self::lane_of(self, shard)
    }
    fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        Self::redis_time(self, shard)
    }
    async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, Error>> {
        Self::accept(self, groups).await
    }
    async fn ping(&self) -> Result<(), Error> {
        Self::ping(self).await
    }
}

/// The fast path for messages of online users. It may drop messages, because their retry timers are armed.
pub trait Handoff: Clone + Send + Sync + 'static {
    /// The dispatcher that messages of this shard go to now; `None`: unknown. Each dispatcher's messages are pushed
    /// by a task of their own.
    fn dispatcher_of(&self, _shard: Shard) -> Option<NodeId> {
        None
    }
    /// Pushes a message; waits for room for a bounded time.
    fn push(&self, shard: Shard, push: Push) -> impl Future<Output = ()> + Send;
    /// Whether a dispatcher is available.
    fn any_available(&self) -> bool;
    /// Waits until all pushes are answered. Returns how many are not at the deadline.
    fn flush(&self, deadline: Instant) -> impl Future<Output = usize> + Send;
}

impl Handoff for DispatchPool {
    fn dispatcher_of(&self, shard: Shard) -> Option<NodeId> {
        Self::dispatcher_of(self, shard)
    }
    async fn push(&self, shard: Shard, push: Push) {
        Self::push(self, shard, push).await;
    }
    fn any_available(&self) -> bool {
        Self::any_available(self)
    }
    async fn flush(&self, deadline: Instant) -> usize {
        Self::flush(self, deadline).await
    }
}
