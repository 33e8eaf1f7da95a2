//! What the pipeline needs of Kafka, Redis and the dispatchers, so that its tests can stand in for them.

use std::future::Future;

use barid_bus::consumer::{Consumer, Consuming, Partition, Record};
use barid_core::{NodeId, Shard, ShardCount};
use barid_mailbox::{AcceptGroup, Error, GroupOutcome, Mailbox, RedisTime};
use barid_mesh::DispatchPool;
use barid_wire::internal::Push;
use tokio::time::Instant;

/// Where records come from.
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

/// Where messages are accepted.
pub trait Mailboxes: Clone + Send + Sync + 'static {
    /// How many shards there are.
    fn shards(&self) -> ShardCount;
    /// How many masters.
    fn lanes(&self) -> usize;
    /// Which of them a shard belongs to now.
    fn lane_of(&self, shard: Shard) -> usize;
    /// The clock of a shard's master; `None`: it has not answered yet.
    fn redis_time(&self, shard: Shard) -> Option<RedisTime>;
    /// Accepts groups of one lane; one result a group.
    fn accept(
        &self,
        groups: &[AcceptGroup],
    ) -> impl Future<Output = Vec<Result<GroupOutcome, Error>>> + Send;
    /// Answers when Redis does.
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

/// Where messages of online users go at once. May drop what it likes: the timer is armed.
pub trait Handoff: Clone + Send + Sync + 'static {
    /// The dispatcher that gets messages of this shard now; `None`: not known. Messages of different dispatchers
    /// are pushed by tasks of their own.
    fn dispatcher_of(&self, _shard: Shard) -> Option<NodeId> {
        None
    }
    /// Hands a message on; waits for room for a bounded time.
    fn push(&self, shard: Shard, push: Push) -> impl Future<Output = ()> + Send;
    /// Whether anybody takes work.
    fn any_available(&self) -> impl Future<Output = bool> + Send;
    /// Waits until everything is answered; what is not at the deadline.
    fn flush(&self, deadline: Instant) -> impl Future<Output = usize> + Send;
}

impl Handoff for DispatchPool {
    fn dispatcher_of(&self, shard: Shard) -> Option<NodeId> {
        Self::dispatcher_of(self, shard)
    }
    async fn push(&self, shard: Shard, push: Push) {
        Self::push(self, shard, push).await;
    }
    async fn any_available(&self) -> bool {
        Self::any_available(self).await
    }
    async fn flush(&self, deadline: Instant) -> usize {
        Self::flush(self, deadline).await
    }
}
