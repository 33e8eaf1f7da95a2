//! Requests to Redis and their outcomes.

use std::sync::Arc;

use barid_core::{
    AppId, Attempt, AudienceKey, DeviceId, Epoch, IdHash, Incarnation, NodeId, Owner, Position,
    Seq, SessionRef, Shard,
};
use bytes::Bytes;

pub use barid_core::LogPosition;
pub use barid_core::mailbox::*;

/// A partition of a topic. A topic that is recreated is another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// Kafka's topic id (base64url), or the topic's name where the broker gives none.
    pub topic_id: Arc<str>,
    /// Kafka's number of the partition.
    pub partition: i32,
}

/// Messages of one partition for one shard, in log order.
#[derive(Debug, Clone)]
pub struct AcceptGroup {
    /// Shard of all its messages.
    pub shard: Shard,
    /// The partition of its messages.
    pub source: Source,
    /// The last position of this source that the shard has confirmed to any purger; `None`: unknown.
    pub prev: Option<LogPosition>,
    /// Raises the shard's stored position to this one. Only for a group without messages: the log no longer holds what
    /// lay between.
    pub raise: Option<LogPosition>,
    /// In log order; sensible are up to [`crate::RedisConfig::accept_batch_max`].
    pub messages: Vec<AcceptMessage>,
}

/// One message for one mailbox.
#[derive(Debug, Clone)]
pub struct AcceptMessage {
    /// Position in the log.
    pub position: LogPosition,
    /// The app of the mailbox.
    pub app: AppId,
    /// The owner of the mailbox.
    pub owner: Owner,
    /// Hashes of the message id.
    pub id: IdHash,
    /// Replaces an undelivered message that has the same key.
    pub collapse_key: Option<Arc<str>>,
    /// The encoded envelope without its first five fields.
    pub body: Bytes,
}

/// The outcome of an [`AcceptGroup`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupOutcome {
    /// Executed: one outcome per message, in order.
    Done(Vec<AcceptOutcome>),
    /// Nothing was written, because an earlier group was never executed. Read the log again from just after this
    /// position (`None`: the shard has no position of this source).
    Gap(Option<LogPosition>),
}

/// The outcome of an [`AcceptMessage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AcceptOutcome {
    /// Appended to the mailbox.
    Accepted {
        /// Its position in the mailbox.
        seq: Seq,
        /// The entry as stored (header and body).
        envelope: Bytes,
        /// Whether the user has a route: then a dispatcher delivers the message. Always false for an audience.
        online: bool,
        /// The access nodes with members of the audience, to which a dispatcher delivers the message. Empty for a user.
        nodes: Arc<[NodeId]>,
        /// Older entries that were evicted (count, bytes or age).
        evicted: u32,
    },
    /// This log position was executed before; Kafka redelivered it.
    AcceptedBefore,
    /// Another record with the same message id was accepted before.
    Duplicate,
    /// The script failed on this message and wrote nothing for it; it becomes a dead letter.
    Failed(String),
}

/// A node's membership of an audience begins, goes on, or ends.
#[derive(Debug, Clone)]
pub struct JoinRequest {
    /// The audience.
    pub audience: AudienceKey,
    /// The access node.
    pub node: NodeId,
    /// The node's incarnation.
    pub incarnation: Incarnation,
    /// The node's number of this request. It rises with each request of an incarnation, for whatever audience: a request
    /// that arrives late, with a lower one, changes nothing.
    pub number: u64,
    /// Whether the node has members; if not, it leaves.
    pub has_members: bool,
}

/// Reads the entries of an audience's mailbox after a position.
#[derive(Debug, Clone)]
pub struct AudienceReadRequest {
    /// The audience.
    pub audience: AudienceKey,
    /// Seq before the first entry to read.
    pub after: Seq,
    /// Maximum number of entries.
    pub entries_max: u32,
    /// Maximum bytes of all entries; the first one is returned whatever its size.
    pub bytes_max: u32,
}

/// Reads which audiences of a shard have new messages.
#[derive(Debug, Clone)]
pub struct JournalRequest {
    /// The shard.
    pub shard: Shard,
    /// Only messages with higher numbers. Numbers rise by one a message in the shard, and are never below the time of
    /// acceptance, µs since the Unix epoch.
    pub after: u64,
    /// Maximum number of audiences.
    pub audiences_max: u32,
}

/// The outcome of a [`JournalRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    /// Messages up to this number may be missing, because the journal is bounded.
    pub trimmed: u64,
    /// The highest number of all; below the one that was asked for, Redis has gone back.
    pub highest: u64,
    /// Audiences, each with the number of its newest message.
    pub changed: Vec<(AudienceKey, u64)>,
}

/// The outcome of a [`JoinRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinOutcome {
    /// Done. Every message that is accepted from now on names the node, if it has joined; the others are in the mailbox
    /// up to `newest`.
    Joined {
        /// The mailbox's newest entry, with its chain; of epoch 0 if there is no mailbox.
        newest: Position,
        /// Seq of the oldest entry; `newest + 1` if there is none.
        oldest: Seq,
    },
    /// A later request of this node was executed before.
    Superseded,
}

/// A claimed timer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueUser {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// The score that the claim wrote (the next due time), which [`DeferRequest`] names.
    pub claimed_score: u64,
    /// How long the timer had been due, ms.
    pub late_ms: u64,
    /// Number of due devices that were put off, because their node is gone.
    pub put_off: u32,
    /// The other due devices.
    pub devices: Vec<DueDevice>,
}

/// A device that has a route, has not acknowledged everything, and is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueDevice {
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The session to which its route leads.
    pub session: SessionRef,
    /// Re-sends so far, including this one. Above 5 the node closes the session.
    pub resends: u32,
    /// The oldest unacknowledged entry, if its trace is sampled; else empty.
    pub sampled: Bytes,
}

/// Takes a claim back for devices that the re-send did not reach.
#[derive(Debug, Clone)]
pub struct DeferRequest {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// As in [`DueUser`]; a timer that has moved since is left alone.
    pub claimed_score: u64,
    /// The devices whose re-sends do not count, and why.
    pub devices: Vec<(DeviceId, Unreached)>,
}

/// Why a re-send did not reach a device's node; it determines how long the next one waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreached {
    /// The node cannot be reached: the wait doubles from [`DeferWaits::base_ms`].
    Down,
    /// The node accepts no more now: the wait doubles from [`DeferWaits::full_ms`].
    Full,
    /// The node is gone in this incarnation: the longest backoff at once.
    Void,
    /// No dispatcher could be asked: [`DeferWaits::base_ms`] each time.
    Away,
}

/// First waits of deferred re-sends.
#[derive(Debug, Clone, Copy)]
pub struct DeferWaits {
    /// Unless the node is full, ms.
    pub base_ms: u32,
    /// For a node that is full, ms.
    pub full_ms: u32,
}

/// A device's route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The session that holds the device's socket.
    pub session: SessionRef,
    /// The connection attempt that wrote the route.
    pub attempt: Attempt,
    /// As in [`ConnectRequest`].
    pub platform: Arc<str>,
}

/// A mailbox, for operators.
#[derive(Debug, Clone)]
pub struct Contents {
    /// Its shard.
    pub shard: Shard,
    /// The mailbox's epoch; 0: the mailbox does not exist.
    pub epoch: Epoch,
    /// Seq of the oldest entry; `newest + 1` if there is none.
    pub oldest: Seq,
    /// Seq of the newest entry.
    pub newest: Seq,
    /// Memory that the entries take in Redis.
    pub bytes: u64,
    /// The newest entries (up to 100), encoded envelopes in order.
    pub entries: Vec<Bytes>,
    /// Redis's time, ms since the Unix epoch.
    pub now_ms: u64,
}

/// Everything that Redis holds about an audience, for operators.
#[derive(Debug, Clone)]
pub struct AudienceInspection {
    /// The audience's mailbox.
    pub mailbox: Contents,
    /// The access nodes that are listed as having members, and when each has confirmed it, ms since the Unix epoch.
    pub nodes: Vec<(NodeId, u64)>,
}

/// Everything that Redis holds about a user, for operators.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The user's mailbox.
    pub mailbox: Contents,
    /// The known devices.
    pub devices: Vec<DeviceState>,
    /// The routes of connected devices.
    pub routes: Vec<Route>,
    /// When the retry timer is due, ms since the Unix epoch; `None`: not armed.
    pub timer_due_ms: Option<u64>,
}

impl std::ops::Deref for Inspection {
    type Target = Contents;

    fn deref(&self) -> &Contents {
        &self.mailbox
    }
}

/// A device as a mailbox's head stores it. Times are ms since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The last position that it acknowledged.
    pub cursor: Position,
    /// When the next re-send is due; 0: none.
    pub due_ms: u64,
    /// Re-sends so far.
    pub resends: u32,
    /// Re-sends in a row that did not reach its node.
    pub defers: u32,
    /// When it was last seen.
    pub used_ms: u64,
}

/// A new connection to Redis: earlier writes may be lost. Access nodes confirm the sessions of these shards, purgers
/// probe them.
#[derive(Debug, Clone)]
pub struct Reconnected {
    /// The shards that the connection serves.
    pub shards: Arc<[Shard]>,
}
