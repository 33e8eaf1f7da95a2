//! All calls to Redis that other crates make.

use std::sync::Arc;
use std::time::Instant;

use barid_core::{AppId, AudienceKey, Backoff, Incarnation, NodeId, Shard, ShardCount};
use prometheus::Registry;
use tokio::sync::broadcast;

use crate::batcher::Batcher;
use crate::calls;
use crate::metrics::Metrics;
use crate::operations::Connect;
use crate::other_layouts::refuse_other_layouts;
use crate::redis_clock::RedisTime;
use crate::topology::Topology;
use crate::{
    AcceptGroup, AckOutcome, AckRequest, AudienceInspection, AudienceReadRequest, ConfirmOutcome,
    ConfirmRequest, ConnectOutcome, ConnectRequest, DeferRequest, DeferWaits, DisconnectRequest,
    DueUser, Error, GroupOutcome, Inspection, JoinOutcome, JoinRequest, Journal, JournalRequest,
    Page, ReadRequest, Reconnected, RedisConfig, Route, UserKey,
};

/// A client of the mailboxes in Redis. Cheap to clone. Single calls are batched: queued ones are sent as soon as the
/// call before is on its way. Every call ends within the response timeout.
#[derive(Clone)]
pub struct Mailbox {
    topology: Arc<Topology>,
}

impl Mailbox {
    /// Connects and checks that this Redis can be used. A registry takes the metrics of one mailbox only.
    ///
    /// # Errors
    /// Returns [`Error::Unusable`] if the configuration is invalid, or Redis evicts or was set up with another shard
    /// count or layout; [`Error::Away`] if it cannot be reached.
    pub async fn open(config: &RedisConfig, registry: &Registry) -> Result<Self, Error> {
        config.check().map_err(Error::Unusable)?;
        let shards = config.shard_count().map_err(|e| Error::Unusable(e.to_string()))?;
        let metrics = Metrics::new()?;
        let topology = Topology::open(config.clone(), shards, metrics.clone()).await?;
        refuse_other_layouts(&topology).await?;
        topology.record_meta().await?;
        metrics.register(registry)?;
        Ok(Self { topology })
    }

    /// The number of shards.
    pub fn shards(&self) -> ShardCount {
        self.topology.shards()
    }

    /// The shard of a user.
    pub fn shard_of(&self, user: &UserKey) -> Shard {
        self.topology.shard_of(user)
    }

    /// The shard of an audience of an app, by its name in frames.
    pub fn shard_of_audience(&self, app: &AppId, audience: &str) -> Shard {
        self.topology.shard_of_audience(app, audience)
    }

    /// The lane of a shard: shards of one master share a lane, and a master that is away stops only its own.
    pub fn lane_of(&self, shard: Shard) -> usize {
        self.topology.lane_of(shard)
    }

    /// The number of lanes; in a Redis Cluster it may change.
    pub fn lanes(&self) -> usize {
        self.topology.lanes()
    }

    /// Appends messages to mailboxes; returns one result per group, in order. Groups of one shard keep their order.
    /// After an error it is unknown whether the group was executed: send it again, and what was accepted is reported
    /// as [`crate::AcceptOutcome::AcceptedBefore`].
    pub async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, Error>> {
        calls::accept(&self.topology, groups).await
    }

    /// Connects a device that sent Hello. Executed before the response timeout, or not at all. When Redis is full,
    /// only users that have a mailbox or a route connect.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn connect(&self, request: ConnectRequest) -> Result<ConnectOutcome, Error> {
        let shard = self.shard_of(&request.user);
        let lane = self.topology.lane(shard);
        match self.unless_late(&lane.connect, request.clone()).await {
            Err(Error::Full(_)) => self.connect_known(request).await,
            outcome => outcome,
        }
    }

    /// As [`Self::connect`], for a user that must not get a mailbox.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_known(&self, request: ConnectRequest) -> Result<ConnectOutcome, Error> {
        let lane = self.topology.lane(self.shard_of(&request.user));
        self.unless_late(&lane.connect_known, request).await
    }

    /// Calls once more if Redis's clock was set forward: its reply has corrected our estimate.
    async fn unless_late<const CREATES: bool>(
        &self,
        connect: &Batcher<Connect<CREATES>>,
        request: ConnectRequest,
    ) -> Result<ConnectOutcome, Error> {
        let (began, shard) = (Instant::now(), self.shard_of(&request.user));
        let outcome = connect.call(request.clone(), shard).await;
        let in_time = began.elapsed() < self.topology.config().response_timeout() / 2;
        match outcome {
            Ok(ConnectOutcome::TooLate) if in_time => connect.call(request, shard).await,
            outcome => outcome,
        }
    }

    /// Confirms that a session is alive, and restores its route.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn confirm(&self, request: ConfirmRequest) -> Result<ConfirmOutcome, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).confirm.call(request, shard).await
    }

    /// Reads the entries after a position.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn read(&self, request: ReadRequest) -> Result<Page, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).read.call(request, shard).await
    }

    /// Acknowledges everything up to a position.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn ack(&self, request: AckRequest) -> Result<AckOutcome, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).ack.call(request, shard).await
    }

    /// As [`Self::ack`], but may wait `redis.ack_linger_ms` for others to share the script call.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn ack_soon(&self, request: AckRequest) -> Result<AckOutcome, Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).ack.call_soon(request, shard).await
    }

    /// Removes the route of an ended session, if the route still names it.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn disconnect(&self, request: DisconnectRequest) -> Result<(), Error> {
        let shard = self.shard_of(&request.user);
        self.topology.lane(shard).disconnect.call(request, shard).await
    }

    /// Lists a node as having members of an audience, or removes it, and returns where the audience's mailbox stands.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn join(&self, request: JoinRequest) -> Result<JoinOutcome, Error> {
        let AudienceKey { app, audience } = &request.audience;
        let shard = self.shard_of_audience(app, audience.as_str());
        self.topology.lane(shard).join.call(request, shard).await
    }

    /// Reads the entries of an audience's mailbox after a position.
    ///
    /// # Errors
    /// Returns [`Error::Away`], [`Error::Newer`] or [`Error::Unexpected`].
    pub async fn read_audience(&self, request: AudienceReadRequest) -> Result<Page, Error> {
        let AudienceKey { app, audience } = &request.audience;
        let shard = self.shard_of_audience(app, audience.as_str());
        self.topology.lane(shard).read_audience.call(request, shard).await
    }

    /// Claims up to `max` due users of these shards, which are of one lane (in a Redis Cluster, up to `max` per shard).
    /// Devices that have acknowledged everything or have no route are disarmed.
    ///
    /// # Errors
    /// Returns [`Error::Away`] if no user was claimed and a call failed.
    pub async fn fire(
        &self,
        shards: &[Shard],
        max: u32,
        retry: &Backoff,
    ) -> Result<Vec<DueUser>, Error> {
        self.fire_past(shards, max, retry, &[]).await
    }

    /// As [`Self::fire`]; devices whose routes name one of these nodes, which are gone in this incarnation, are put
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

    /// Defers claimed timers that have not moved since. `retry` bounds the waits.
    ///
    /// # Errors
    /// Returns [`Error::Away`]: the claims stay, and are due again at their claimed score.
    pub async fn defer(
        &self,
        requests: &[DeferRequest],
        waits: DeferWaits,
        retry: &Backoff,
    ) -> Result<(), Error> {
        calls::defer(&self.topology, requests, waits, retry).await
    }

    /// Reads a user's routes from Redis, for a re-send.
    ///
    /// # Errors
    /// Returns [`Error::Away`] if the shard's master does not answer.
    pub async fn read_routes(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        calls::read_routes(&self.topology, user).await
    }

    /// Reads everything that Redis holds about a user, for operators.
    ///
    /// # Errors
    /// Returns [`Error::Away`] or [`Error::Unexpected`].
    pub async fn inspect(&self, user: &UserKey) -> Result<Inspection, Error> {
        calls::inspect(&self.topology, user).await
    }

    /// Reads which audiences of a shard have messages after a number.
    ///
    /// # Errors
    /// Returns [`Error::Away`] or [`Error::Unexpected`].
    pub async fn journal(&self, request: JournalRequest) -> Result<Journal, Error> {
        let shard = request.shard;
        self.topology.lane(shard).read_journal.call(request, shard).await
    }

    /// Reads everything that Redis holds about an audience, for operators.
    ///
    /// # Errors
    /// Returns [`Error::Away`] or [`Error::Unexpected`].
    pub async fn inspect_audience(
        &self,
        audience: &AudienceKey,
    ) -> Result<AudienceInspection, Error> {
        calls::inspect_audience(&self.topology, audience).await
    }

    /// The time of a shard's master, ms since the Unix epoch, or a little less; `None` before the master has answered.
    /// All processes share this clock, while those of machines differ.
    pub fn redis_now_ms(&self, shard: Shard) -> Option<u64> {
        self.topology.link(shard).clock().at(Instant::now())
    }

    /// The best estimate of the time of a shard's master, for measuring: neither early nor late on purpose, in µs.
    pub fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        self.topology.redis_time(shard)
    }

    /// Reports every new connection to Redis from now on.
    pub fn reconnections(&self) -> broadcast::Receiver<Reconnected> {
        self.topology.reconnections()
    }

    pub(crate) fn topology(&self) -> &Arc<Topology> {
        &self.topology
    }

    /// Waits for an answer of every master, for readiness.
    ///
    /// # Errors
    /// Returns [`Error::Away`] if a master does not answer, [`Error::Unreplicated`] if it has too few replicas.
    pub async fn ping(&self) -> Result<(), Error> {
        self.topology.ping().await
    }
}
