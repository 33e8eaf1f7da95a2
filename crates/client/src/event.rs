//! Events for the application, beside messages.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{Position, Seq};

/// An event of the connection or the mailbox.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A connection attempt begins.
    Connecting {
        /// Its number, which increases with every attempt of this device.
        attempt: u64,
    },
    /// The server sent Welcome.
    Connected {
        /// The server's name for this session.
        session: String,
        /// The position; messages after it follow.
        position: Position,
    },
    /// The connection ended, or could not be opened.
    Disconnected {
        /// Why.
        why: Disconnect,
        /// The wait before the next attempt; `None`: there is none.
        retry_in: Option<Duration>,
    },
    /// The node asked the device to reconnect (GoAway).
    GoingAway {
        /// The node's reason.
        why: String,
        /// The wait before the reconnect.
        reconnect_after: Duration,
    },
    /// Positions whose messages will not be shown. If a message is evicted while the application has it, and the
    /// application then gives it back, its position is reported as skipped at that time.
    Skipped {
        /// The first position.
        first: Seq,
        /// The last position.
        last: Seq,
        /// The reason.
        why: SkipReason,
    },
    /// The positions started anew, because the mailbox's history forked or began again. Messages that the application
    /// has handled are not shown again, as far as the SDK remembers their ids.
    Reset {
        /// The position before.
        before: Position,
        /// The new position.
        now: Position,
    },
    /// The server sent a message again, which was not shown again.
    Duplicate {
        /// Its position.
        seq: Seq,
        /// Its id.
        id: String,
    },
    /// The server confirmed a subscription.
    Subscribed {
        /// The group.
        group: String,
    },
    /// A subscription has ended or was refused, until the client reconnects or subscribes again.
    Unsubscribed {
        /// The group.
        group: String,
        /// 0: as asked; 4500: the token does not list the group; 4504: too many subscriptions.
        code: u32,
        /// The server's words.
        text: String,
    },
    /// Messages of a group were lost, or dropped because the application is too slow.
    Missed {
        /// The group, or `everyone`.
        group: Arc<str>,
        /// How many; at most that many if the group's history has begun anew and its first messages are gone.
        count: u64,
    },
    /// A fresh token was sent to the server.
    TokenRefreshed,
    /// The token callback failed; it will be called again.
    TokenFailed {
        /// Its words.
        reason: String,
    },
    /// The server reported an error; a close follows if the code is not 0.
    ServerError {
        /// The close code, or 0.
        code: u32,
        /// The server's words.
        text: String,
    },
    /// The position store failed. After a restart of the program, some messages may be shown again.
    PositionNotSaved {
        /// Its words.
        reason: String,
    },
}

/// Why positions are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SkipReason {
    /// The message expired.
    Expired,
    /// The mailbox was full, or the entry too old.
    Evicted,
    /// The message is for another device of this user.
    OtherDevice,
    /// A newer message with the same collapse key replaced it.
    Collapsed,
    /// The business recalled the message.
    Recalled,
    /// This device acknowledged the message in an earlier connection.
    Acknowledged,
    /// A reason that this SDK does not know.
    Other,
}

impl SkipReason {
    /// A stable name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Evicted => "evicted",
            Self::OtherDevice => "other_device",
            Self::Collapsed => "collapsed",
            Self::Recalled => "recalled",
            Self::Acknowledged => "acknowledged",
            Self::Other => "other",
        }
    }

    /// Maps the `why` of a Skip frame; a reason that this SDK does not know is `Other`.
    pub fn from_wire(reason: i32) -> Self {
        use barid_wire::v1::SkipReason as Wire;
        match Wire::try_from(reason) {
            Ok(Wire::Expired) => Self::Expired,
            Ok(Wire::Evicted) => Self::Evicted,
            Ok(Wire::OtherDevice) => Self::OtherDevice,
            Ok(Wire::Collapsed) => Self::Collapsed,
            Ok(Wire::Recalled) => Self::Recalled,
            Ok(Wire::Acknowledged) => Self::Acknowledged,
            Ok(Wire::Unspecified) | Err(_) => Self::Other,
        }
    }
}

/// Why a connection ended, or could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disconnect {
    /// The server closed the connection.
    #[error("closed by the server: {code} {reason}")]
    Closed {
        /// The WebSocket close code.
        code: u16,
        /// The server's words.
        reason: String,
    },
    /// The server answered the handshake with an HTTP error.
    #[error("the server answered {status}{}{text}", if text.is_empty() { "" } else { ": " })]
    Http {
        /// The status.
        status: u16,
        /// The beginning of the body.
        text: String,
        /// `Retry-After`, if the server sent it.
        retry_after: Option<Duration>,
    },
    /// The network failed.
    #[error("{0}")]
    Network(String),
    /// A step timed out.
    #[error("no {0} in time")]
    Timeout(&'static str),
    /// The server violated the protocol.
    #[error("protocol violation: {0}")]
    Violation(String),
    /// The token callback failed.
    #[error("no token: {0}")]
    Token(String),
    /// The node had asked the device to reconnect (GoAway).
    #[error("the node is going away")]
    GoAway,
}

/// Why a client has ended for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    /// The application shut it down or dropped it.
    Shutdown,
    /// The server refuses this device: bad token, replaced, kicked, or a limit.
    Refused(Disconnect),
    /// A handler or the SDK panicked.
    Failed(String),
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("shut down"),
            Self::Refused(why) => why.fmt(f),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}
