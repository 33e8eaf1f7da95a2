//! Redis: mailboxes, routes, retry timers, leases. Every change of a user's state is one atomic
//! script on one hash slot; callers never see a key.

mod types;

pub use types::*;

use std::time::Duration;

use barid_core::{Backoff, Shard, ShardCount};

/// Bounds of a mailbox and of the scripts' batches.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries a mailbox keeps.
    pub entries_max: u32,
    /// How long it keeps them.
    pub ttl: Duration,
    /// Devices it knows; the one unused for longest is forgotten first.
    pub devices_max: u32,
    /// Messages in one accept call.
    pub accept_batch_max: usize,
}

/// The door to Redis, cheap to clone. Single calls are coalesced into batches inside: what is
/// there is sent as soon as the call before is on its way.
#[derive(Clone)]
pub struct Mailbox {}

/// A call did not come through. Nothing is known of its effect unless it says so.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Redis, or the master of this shard, cannot be reached or does not answer in time.
    #[error("redis is away: {0}")]
    Away(String),
    /// Redis is full (OOM): only accept is refused so.
    #[error("redis is full: {0}")]
    Full(String),
    /// Redis answered what it should not: a bug, or somebody else writes there.
    #[error("redis answered unexpectedly: {0}")]
    Unexpected(String),
    /// Start-up refused this Redis (it evicts, or it belongs to a cluster with another shard count).
    #[error("this redis cannot be used: {0}")]
    Unusable(String),
}

#[allow(missing_docs, unused_variables, clippy::todo)]
impl Mailbox {
    pub fn shards(&self) -> ShardCount {
        todo!()
    }
    /// Which lane (master) a shard belongs to, and how many lanes there are: one master that is away stops its own shards only.
    pub fn lane_of(&self, shard: Shard) -> usize {
        todo!()
    }
    pub fn lanes(&self) -> usize {
        todo!()
    }
    /// All groups must belong to one lane. One result a group, in order.
    pub async fn accept(&self, groups: &[AcceptGroup]) -> Vec<Result<GroupOutcome, Error>> {
        todo!()
    }
    pub async fn connect(&self, request: ConnectRequest) -> Result<ConnectOutcome, Error> {
        todo!()
    }
    pub async fn confirm(&self, request: ConfirmRequest) -> Result<ConfirmOutcome, Error> {
        todo!()
    }
    pub async fn read(&self, request: ReadRequest) -> Result<Page, Error> {
        todo!()
    }
    pub async fn ack(&self, request: AckRequest) -> Result<AckOutcome, Error> {
        todo!()
    }
    pub async fn disconnect(&self, request: DisconnectRequest) -> Result<(), Error> {
        todo!()
    }
    /// Claims up to `max` due users of these shards (all of one lane).
    pub async fn fire(
        &self,
        shards: &[Shard],
        max: u32,
        retry: &Backoff,
    ) -> Result<Vec<DueUser>, Error> {
        todo!()
    }
    pub async fn defer(&self, requests: &[DeferRequest]) -> Result<(), Error> {
        todo!()
    }
    pub async fn inspect(&self, user: &UserKey) -> Result<Inspection, Error> {
        todo!()
    }
    /// Answers when Redis does, for readiness.
    pub async fn ping(&self) -> Result<(), Error> {
        todo!()
    }
}
