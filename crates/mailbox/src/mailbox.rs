//! Everything that other crates ask of Redis.

use std::sync::Arc;
use std::time::Instant;

use barid_core::{AppId, Backoff, Incarnation, NodeId, Shard, ShardCount};
use prometheus::Registry;
use tokio::sync::broadcast;

use crate::calls;
use crate::metrics::Metrics;
use crate::other_layouts::refuse_other_layouts;
use crate::redis_clock::RedisTime;
use crate::topology::Topology;
use crate::{
    AcceptGroup, AckOutcome, AckRequest, ConfirmOutcome, ConfirmRequest, ConnectOutcome,
    ConnectRequest, DeferRequest, DeferWaits, DisconnectRequest, DueUser, Error, GroupOutcome,
    Inspection, Page, ReadRequest, Reconnected, RedisConfig, Route, UserKey,
};

/// A client of the mailboxes in Redis, cheap to clone. Single calls are batched inside: those that wait are
/// sent as soon as the call before is on its way. Every call ends within the response time-out.
#[derive(Clone)]
pub struct Mailbox {
    topology: Arc<Topology>,
}

impl Mailbox {
    /// Connects and checks that this Redis may be used. One mailbox a registry.
    ///
    /// # Errors
    /// [`Error::Unusable`]: the configuration is wrong, Redis evicts, or it was set up with another
    /// shard count or key layout. [`Error::Away`]: it cannot be reached; try again.
    pub async fn open(config: &RedisConfig, registry: &Registry) -> Result<Self, Error> {
        config.check().map_err(Error::Unusable)?;
        let shards = config.shard_count().map_err(|e| Error::Unusable(e.to_string()))?;
        let metrics = Metrics::new()?;
        let topology = Topology::open(config.clone(), shards, metrics.clone()).await?;
        refuse_other_layouts(&topology).await?;
        topology.found().await?;
        metrics.register(registry)?;
        Ok(Self { topology })
    }

    /// How many shards there are.
    pub fn shards(&self) -> ShardCount {
        self.topology.shards()
    }

    /// Where a user lives.
    pub fn shard_of(&self, user: &UserKey) -> Shard {
        self.topology.shard_of(user)
    }

    /// Where the mailbox of an app's group lives, or of everyone, by the name that frames call it.
    pub fn shard_of_group(&self, app: &AppId, group: &str) -> Shard {
        self.topology.shard_of_group(app, group)
    }

    /// Which lane (master) a shard belongs to. One that is away stops its own shards only.
    pub fn lane_of(&self, shard: Shard) -> usize {
        self.topology.lane_of(shard)
    }

    /// How many lanes there are; in a Redis Cluster it may change.
    pub fn lanes(&self) -> usize {
        self.topology.lanes()
    }

    /// Appends messages to mailboxes: one result a group, in order. Groups of one shard keep their
    /// order. An error says nothing of the effect: sent again, the group is told what was passed.
    pub async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, Error>> {
        calls::accept(&self.topology, groups).await
    }

    /// A device said Hello. Executed before the response time-out, or not at all.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn connect(&self, request: ConnectRequest) -> Result<ConnectOutcome, Error> {
        let shard = self.shard_of(&request.user);
        let began = Instant::now();
        let outcome = self.topology.lane(shard).connect.call(request.clone(), shard).await?;
        let in_time = began.elapsed() < self.topology.config().response_timeout() / 2;
        if outcome == ConnectOutcome::TooLate && in_time {
            // Redis's clock went ahead; its answer has told us.
            return self.topology.lane(shard).connect.call(request, shard).await;
        }
        Ok(outcome)
    }

    /// A session says that it lives.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn confirm(&self, request: ConfirmRequest) -> Result<ConfirmOutcome, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).confirm.call(request, shard).await
    }

    /// The entries after a position.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn read(&self, request: ReadRequest) -> Result<Page, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).read.call(request, shard).await
    }

    /// A device has everything up to a position.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn ack(&self, request: AckRequest) -> Result<AckOutcome, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).ack.call(request, shard).await
    }

    /// The same, for which nobody waits: for `redis.ack_linger_ms` others may join its script call.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn ack_soon(&self, request: AckRequest) -> Result<AckOutcome, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).ack.call_soon(request, shard).await
    }

    /// A session is over: its route goes, if it is still its own.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn disconnect(&self, request: DisconnectRequest) -> Result<(), Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).disconnect.call(request, shard).await
    }

    /// Claims up to `max` due users of each call's shards; `shards` are of one lane. Those that are
    /// not behind or have no route are dropped on the way.
    ///
    /// # Errors
    /// [`Error::Away`]; claims of shards that did answer are returned rather than an error.
    pub async fn fire(
        &self,
        shards: &[Shard],
        max: u32,
        retry: &Backoff,
    ) -> Result<Vec<DueUser>, Error> {
        self.fire_past(shards, max, retry, &[]).await
    }

    /// As [`Self::fire`]; devices whose routes name one of these lives of nodes, which are gone, are put
    /// off for the longest backoff.
    ///
    /// # Errors
    /// As [`Self::fire`].
    pub async fn fire_past(
        &self,
        shards: &[Shard],
        max: u32,
        retry: &Backoff,
        gone: &[(NodeId, Incarnation)],
    ) -> Result<Vec<DueUser>, Error> {
        calls::fire(&self.topology, shards, max, retry, gone).await
    }

    /// Gives claims back, where nobody has moved the timer since. `retry` bounds the waits.
    ///
    /// # Errors
    /// [`Error::Away`]: the claims stand, and are due again at their claimed score.
    pub async fn defer(
        &self,
        requests: &[DeferRequest],
        waits: DeferWaits,
        retry: &Backoff,
    ) -> Result<(), Error> {
        calls::defer(&self.topology, requests, waits, retry).await
    }

    /// A user's routes as they are in Redis, for a re-send.
    ///
    /// # Errors
    /// [`Error::Away`].
    pub async fn read_routes(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        calls::read_routes(&self.topology, user).await
    }

    /// Everything that Redis holds about a user, for people.
    ///
    /// # Errors
    /// [`Error::Away`], [`Error::Unexpected`].
    pub async fn inspect(&self, user: &UserKey) -> Result<Inspection, Error> {
        calls::inspect(&self.topology, user).await
    }

    /// Redis's time at a shard, ms since the Unix epoch, or a little less; `None` before its master
    /// has answered anything. Machines' clocks differ; this one is shared by all.
    pub fn redis_now_ms(&self, shard: Shard) -> Option<u64> {
        self.topology.link(shard).clock().at(Instant::now())
    }

    /// The same clock for moments of messages: neither early nor late by intent, and finer.
    pub fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        self.topology.redis_time(shard)
    }

    /// Tells of every connection to Redis that is made from now on.
    pub fn reconnections(&self) -> broadcast::Receiver<Reconnected> {
        self.topology.reconnections()
    }

    pub(crate) fn topology(&self) -> &Arc<Topology> {
        &self.topology
    }

    /// Answers when every master does, for readiness.
    ///
    /// # Errors
    /// [`Error::Away`].
    pub async fn ping(&self) -> Result<(), Error> {
        self.topology.ping().await
    }
}
