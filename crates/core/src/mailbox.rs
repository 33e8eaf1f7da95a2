//! A session's calls to its mailbox, and their outcomes. Plain data, so that a session needs no Redis client.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    AppId, Attempt, Chain, DeviceId, Epoch, Generation, Position, Seq, SessionRef, UserId,
};

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
        /// The user had no mailbox.
        created: bool,
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
    /// The user has neither a mailbox nor a route, and gets none: Redis is full, or the caller wished so.
    NotCreated,
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
