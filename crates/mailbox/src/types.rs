//! Requests to Redis and their outcomes.

use std::sync::Arc;

use barid_core::{
    AppId, Attempt, Chain, DeviceId, Epoch, Generation, IdHash, Position, Seq, SessionRef, Shard,
    UserId,
};
use bytes::Bytes;

pub use barid_core::LogPosition;

/// One partition of one life of a topic.
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

/// A user of an app.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UserKey {
    /// The tenant.
    pub app: AppId,
    /// The name within the app.
    pub user: UserId,
}

/// A device sent Hello.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The session to which the route leads.
    pub session: SessionRef,
    /// The client's connection attempt; a higher one supersedes a lower one, in whatever order they arrive.
    pub attempt: Attempt,
    /// Free text, such as `ios`, `android` or `pos`; shown to operators.
    pub platform: Arc<str>,
    /// The position that the device names; `None`: its stored cursor.
    pub position: Option<Position>,
}

/// The outcome of a [`ConnectRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectOutcome {
    /// The route is written.
    Connected {
        /// The device's cursor: read from here. Its chain is always set.
        cursor: Position,
        /// Seq of the newest entry.
        newest: Seq,
        /// The session that this one replaces, to be closed with 4502.
        replaced: Option<SessionRef>,
        /// The device was reset, because the position that it named is of another epoch or of a forked history.
        reset: bool,
        /// Entries after the position that the device named were evicted; its stored cursor is beyond them.
        evicted: bool,
    },
    /// A newer attempt of this device is connected, or was.
    Superseded {
        /// The newer attempt: only a higher one can connect.
        by: Attempt,
    },
    /// The user has the maximum of devices, all of them online.
    TooManyDevices,
    /// The call reached Redis after its deadline.
    TooLate,
}

/// A session is alive.
#[derive(Debug, Clone)]
pub struct ConfirmRequest {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The session to which the route leads.
    pub session: SessionRef,
    /// The attempt with which the session connected.
    pub attempt: Attempt,
    /// As in [`ConnectRequest`].
    pub platform: Arc<str>,
    /// The last position that it acknowledged, for a head that was lost or has expired.
    pub position: Position,
}

/// The outcome of a [`ConfirmRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfirmOutcome {
    /// The route is stored.
    Confirmed {
        /// The route was missing.
        restored: bool,
        /// The mailbox's epoch; if it is not the session's, read the mailbox from its start.
        epoch: Epoch,
        /// Seq of the newest entry.
        newest: Seq,
    },
    /// A newer session of the device is connected, or was: close this one with 4502.
    Superseded,
}

/// Reads the entries after a position.
#[derive(Debug, Clone)]
pub struct ReadRequest {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// Seq before the first entry to read.
    pub after: Seq,
    /// Maximum number of entries.
    pub entries_max: u32,
    /// Maximum bytes of all entries; the first one is returned whatever its size.
    pub bytes_max: u32,
    /// The device whose cursor the page contains if entries after `after` are gone.
    pub device: Option<DeviceId>,
}

/// The outcome of a [`ReadRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The mailbox's epoch; 0: the mailbox does not exist.
    pub epoch: Epoch,
    /// Seq of the oldest entry; `newest + 1` if there is none.
    pub oldest: Seq,
    /// The chain before `oldest`.
    pub chain_before_oldest: Chain,
    /// Seq of the newest entry.
    pub newest: Seq,
    /// Encoded envelopes, in order, from `max(after + 1, oldest)`.
    pub entries: Vec<Bytes>,
    /// The device's cursor, if `oldest` is above `after + 1` and the device is known: entries up to there are gone
    /// because it acknowledged them, perhaps in an earlier session, and were not evicted.
    pub cursor: Option<Position>,
}

/// A device has received everything up to a position.
#[derive(Debug, Clone)]
pub struct AckRequest {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The session that received the ack; only its own retries are started over.
    pub session: SessionRef,
    /// The epoch under which the entries were sent.
    pub epoch: Epoch,
    /// The generation under which the entries were sent.
    pub generation: Generation,
    /// The acknowledged seq, at most what the node has sent.
    pub seq: Seq,
    /// The chain there.
    pub chain: Chain,
}

/// The outcome of an [`AckRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckOutcome {
    /// The cursor is at the acknowledged seq or beyond.
    Advanced {
        /// Seq of the stored cursor.
        cursor: Seq,
    },
    /// The position is of another epoch or of a forked history: the cursor was reset to before the oldest entry, with a
    /// new generation.
    Reset {
        /// The new cursor, from which the session starts over. Its chain is set.
        cursor: Position,
    },
    /// Sent under an older generation; ignored.
    Stale,
}

/// A session has ended.
#[derive(Debug, Clone)]
pub struct DisconnectRequest {
    /// The owner of the mailbox.
    pub user: UserKey,
    /// The device, by its name within the user.
    pub device: DeviceId,
    /// The route is removed only if it names this session.
    pub session: SessionRef,
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
