//! Requests to Redis and their outcomes.

use std::sync::Arc;

use barid_core::{
    AppId, Attempt, DeviceId, Epoch, IdHash, Position, Seq, SessionRef, Shard, UserId,
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

/// One message for one user's mailbox.
#[derive(Debug, Clone)]
pub struct AcceptMessage {
    /// Position in the log.
    pub position: LogPosition,
    /// Recipient's app.
    pub app: AppId,
    /// Recipient user.
    pub user: UserId,
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
        /// Whether the user has a route: then a dispatcher delivers the message.
        online: bool,
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

/// Everything that Redis holds about a user, for operators.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The user's shard.
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
    /// The known devices.
    pub devices: Vec<DeviceState>,
    /// The routes of connected devices.
    pub routes: Vec<Route>,
    /// When the retry timer is due, ms since the Unix epoch; `None`: not armed.
    pub timer_due_ms: Option<u64>,
    /// Redis's time, ms since the Unix epoch.
    pub now_ms: u64,
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
