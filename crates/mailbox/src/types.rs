//! What the scripts are asked and what they answer.

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
    /// The partition.
    pub partition: i32,
}

/// Messages of one partition for one shard, in log order.
#[derive(Debug, Clone)]
pub struct AcceptGroup {
    /// The shard of every message in it.
    pub shard: Shard,
    /// Where they come from.
    pub source: Source,
    /// The last position that this shard has confirmed, whoever sent it; `None`: none is known.
    pub prev: Option<LogPosition>,
    /// Moves the shard's position up to here, where nothing is accepted: the log no longer holds
    /// what lay between.
    pub raise: Option<LogPosition>,
    /// What to accept; at most [`crate::RedisConfig::accept_batch_max`] per group are sensible.
    pub messages: Vec<AcceptMessage>,
}

/// One message for one user's mailbox.
#[derive(Debug, Clone)]
pub struct AcceptMessage {
    /// Its place in the log.
    pub position: LogPosition,
    /// The app.
    pub app: AppId,
    /// The user.
    pub user: UserId,
    /// The hashes of its id.
    pub id: IdHash,
    /// Replaces an older waiting message with the same key.
    pub collapse_key: Option<Arc<str>>,
    /// The encoded envelope without its first five fields.
    pub body: Bytes,
}

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupOutcome {
    /// Executed: one outcome a message, in order.
    Done(Vec<AcceptOutcome>),
    /// Nothing was written: a group in between was never executed. Go back to just after this
    /// position (`None`: the shard knows nothing of this source).
    Gap(Option<LogPosition>),
}

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AcceptOutcome {
    /// In the mailbox.
    Accepted {
        /// Its position.
        seq: Seq,
        /// The entry as stored (header and body).
        envelope: Bytes,
        /// Whether the user has a route: hand it to a dispatcher.
        online: bool,
        /// Entries that had to leave for it (length or age).
        evicted: u32,
    },
    /// This log position was executed before (Kafka redelivered it): it is accepted.
    AcceptedBefore,
    /// Another record with the same id was accepted before.
    Duplicate,
    /// The script failed on this message and wrote nothing for it: dead letter.
    Failed(String),
}

/// A user of an app.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UserKey {
    /// The app.
    pub app: AppId,
    /// The user.
    pub user: UserId,
}

/// A device that says Hello.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// Whose mailbox.
    pub user: UserKey,
    /// The device.
    pub device: DeviceId,
    /// The session that asks.
    pub session: SessionRef,
    /// The client's connection attempt: fences late and early calls.
    pub attempt: Attempt,
    /// Free text for people: `ios`, `android`, `pos`, …
    pub platform: Arc<str>,
    /// Where the device says it stands; `None`: where the server last saw it.
    pub position: Option<Position>,
}

/// The answer to Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectOutcome {
    /// The route is written.
    Connected {
        /// Where the device now stands: read from here. Its chain is always there.
        cursor: Position,
        /// The newest entry.
        newest: Seq,
        /// The session that this one took over from, to be closed with 4502.
        replaced: Option<SessionRef>,
        /// The position that the device named was void (another epoch, or a fork): it was reset.
        reset: bool,
        /// The device named a position whose next entry is not kept any more: it was evicted, though the
        /// device's cursor is beyond it now.
        evicted: bool,
    },
    /// A newer attempt of this device is connected, or came and went.
    Superseded {
        /// That attempt: a higher one connects.
        by: Attempt,
    },
    /// The user has as many devices as it may have, all of them online.
    TooManyDevices,
    /// The call reached Redis after its deadline.
    TooLate,
}

/// A session that says that it lives.
#[derive(Debug, Clone)]
pub struct ConfirmRequest {
    /// Whose mailbox.
    pub user: UserKey,
    /// The device.
    pub device: DeviceId,
    /// The session.
    pub session: SessionRef,
    /// Its attempt.
    pub attempt: Attempt,
    /// Its platform.
    pub platform: Arc<str>,
    /// Where it stands, so that a head that was forgotten or expired is noticed.
    pub position: Position,
}

/// The answer to a confirmation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfirmOutcome {
    /// The route stands (again).
    Confirmed {
        /// The route had been forgotten.
        restored: bool,
        /// The mailbox's epoch; another one than the session's means: read again from its start.
        epoch: Epoch,
        /// The newest entry.
        newest: Seq,
    },
    /// A newer session of the device is there: close this one with 4502.
    Superseded,
}

/// Asks for the entries after a position.
#[derive(Debug, Clone)]
pub struct ReadRequest {
    /// Whose mailbox.
    pub user: UserKey,
    /// Read what comes after this.
    pub after: Seq,
    /// At most so many entries.
    pub entries_max: u32,
    /// Stop after so many bytes (at least one entry comes).
    pub bytes_max: u32,
    /// The device whose cursor the page returns where entries behind `after` are gone.
    pub device: Option<DeviceId>,
}

/// A part of a mailbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The mailbox's epoch (0: there is none).
    pub epoch: Epoch,
    /// The oldest kept position; `after + 1` below it was evicted. `newest + 1` where nothing is kept.
    pub oldest: Seq,
    /// The chain before `oldest`.
    pub chain_before_oldest: Chain,
    /// The newest position.
    pub newest: Seq,
    /// Encoded envelopes, in order, from `max(after + 1, oldest)`.
    pub entries: Vec<Bytes>,
    /// The device's cursor, where `oldest` is above `after + 1` and the device is known: up to there it
    /// acknowledged by itself what is gone, perhaps in an earlier session a moment ago.
    pub cursor: Option<Position>,
}

/// Everything up to a position is done.
#[derive(Debug, Clone)]
pub struct AckRequest {
    /// Whose mailbox.
    pub user: UserKey,
    /// Which device.
    pub device: DeviceId,
    /// The session that heard it, so that its due time moves.
    pub session: SessionRef,
    /// The epoch in which it was sent.
    pub epoch: Epoch,
    /// The generation in which it was sent.
    pub generation: Generation,
    /// The last position; the node has clamped it to what it sent.
    pub seq: Seq,
    /// The chain there.
    pub chain: Chain,
}

/// What became of an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckOutcome {
    /// The cursor stands at least there.
    Advanced {
        /// The cursor.
        cursor: Seq,
    },
    /// The history forked, or the epoch changed: the device's cursor was reset to before the oldest
    /// kept entry, with a new generation. The session starts over from here.
    Reset {
        /// The new cursor, with its chain.
        cursor: Position,
    },
    /// Sent under an older generation: ignored.
    Stale,
}

/// A session that is over.
#[derive(Debug, Clone)]
pub struct DisconnectRequest {
    /// Whose route.
    pub user: UserKey,
    /// Which device's.
    pub device: DeviceId,
    /// Removed only if the route still names this session.
    pub session: SessionRef,
}

/// A timer that was claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueUser {
    /// The user.
    pub user: UserKey,
    /// The score that the claim wrote (the next due time): what `defer` compares.
    pub claimed_score: u64,
    /// How long it had been due, ms.
    pub late_ms: u64,
    /// Devices that were due and were put off, because their node is gone.
    pub put_off: u32,
    /// The others that are behind and due.
    pub devices: Vec<DueDevice>,
}

/// A device that has a route, is behind, and was due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueDevice {
    /// The device.
    pub device: DeviceId,
    /// Its session.
    pub session: SessionRef,
    /// Which re-send this is, from 1. Above five: the node closes the session.
    pub attempt: u32,
    /// The oldest entry that it has not acknowledged, if its trace is sampled; else empty.
    pub sampled: Bytes,
}

/// A claim to give back: nobody could be reached.
#[derive(Debug, Clone)]
pub struct DeferRequest {
    /// The user.
    pub user: UserKey,
    /// What `fire` returned.
    pub claimed_score: u64,
    /// The devices whose attempts are taken back, and why.
    pub devices: Vec<(DeviceId, Unreached)>,
}

/// Why a re-send did not reach a device's node: how long the next one waits follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreached {
    /// The node cannot be reached: doubles from the first wait.
    Down,
    /// It takes no more now: doubles from a longer one.
    Full,
    /// That life of it is over: the longest backoff at once.
    Void,
    /// Nobody could be asked: the first wait, each time.
    Away,
}

/// The waits of claims that are given back.
#[derive(Debug, Clone, Copy)]
pub struct DeferWaits {
    /// The first, ms.
    pub base_ms: u32,
    /// The first for a node that is full, ms.
    pub full_ms: u32,
}

/// One entry of a user's routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The device.
    pub device: DeviceId,
    /// Where its socket is.
    pub session: SessionRef,
    /// The attempt that wrote it.
    pub attempt: Attempt,
    /// The platform it named.
    pub platform: Arc<str>,
}

/// Everything that Redis holds about a user, for people.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The shard.
    pub shard: Shard,
    /// The mailbox's epoch (0: none).
    pub epoch: Epoch,
    /// Oldest kept and newest position.
    pub oldest: Seq,
    /// The newest position.
    pub newest: Seq,
    /// Bytes that the entries take.
    pub bytes: u64,
    /// The newest entries (up to 100), encoded envelopes in order.
    pub entries: Vec<Bytes>,
    /// Known devices.
    pub devices: Vec<DeviceState>,
    /// Live routes.
    pub routes: Vec<Route>,
    /// When the retry timer is due, ms since the Unix epoch; `None`: not armed.
    pub timer_due_ms: Option<u64>,
    /// Redis's time, ms since the Unix epoch.
    pub now_ms: u64,
}

/// What a mailbox's head knows of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// The device.
    pub device: DeviceId,
    /// Its cursor.
    pub cursor: Position,
    /// When it is due for a re-send, ms; 0: not.
    pub due_ms: u64,
    /// Re-sends so far.
    pub attempt: u32,
    /// How often in a row a re-send was given back because it did not reach its node.
    pub defers: u32,
    /// When it was last seen, ms.
    pub used_ms: u64,
}

/// A connection to Redis was made anew: what was written before may have been forgotten. Sessions
/// of these shards are confirmed, purgers probe them.
#[derive(Debug, Clone)]
pub struct Reconnected {
    /// The shards that lie behind it.
    pub shards: Arc<[Shard]>,
}
