//! What the connection tells the application beside messages.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{Position, Seq};

/// Something happened to the connection or to the mailbox.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A connection attempt begins.
    Connecting {
        /// Its number: grows with every attempt of this device.
        attempt: u64,
    },
    /// The server said welcome.
    Connected {
        /// The server's name of this session.
        session: String,
        /// Messages after this position follow.
        position: Position,
    },
    /// There is no connection.
    Disconnected {
        /// What ended it, or kept it from beginning.
        why: Disconnect,
        /// The wait before the next attempt; `None`: there will be none.
        retry_in: Option<Duration>,
    },
    /// The node asked the device to move.
    GoingAway {
        /// The node's words.
        why: String,
        /// How long the device shall wait before it connects elsewhere.
        reconnect_after: Duration,
    },
    /// Positions that will never be shown.
    Skipped {
        /// The first of them.
        first: Seq,
        /// The last of them.
        last: Seq,
        /// Why.
        why: SkipReason,
    },
    /// The positions started anew: the mailbox's history forked or began again. What the
    /// application has seen, as far as the SDK remembers, is not shown again.
    Reset {
        /// Where the device stood.
        before: Position,
        /// Where it stands now.
        now: Position,
    },
    /// The server sent a message again that is here already; it was not shown again.
    Duplicate {
        /// Its position.
        seq: Seq,
        /// Its id.
        id: String,
    },
    /// A group's messages will come.
    Subscribed {
        /// The group.
        group: String,
    },
    /// None of a group's messages will come until the client connects again or asks again.
    Unsubscribed {
        /// The group.
        group: String,
        /// 0: as asked; 4500: the token does not list the group; 4504: too many subscriptions.
        code: u32,
        /// The server's words.
        text: String,
    },
    /// Messages of a group did not come, or found no room here: the application is not shown them.
    Missed {
        /// The group, or `everyone`.
        group: Arc<str>,
        /// How many.
        count: u64,
    },
    /// A fresh token was handed to the server.
    TokenRefreshed,
    /// The token callback failed; it will be asked again.
    TokenFailed {
        /// Its words.
        reason: String,
    },
    /// The server complained; a close follows if the code is not 0.
    ServerError {
        /// The close code, or 0.
        code: u32,
        /// The server's words.
        text: String,
    },
    /// The position store failed; after a restart of this program some messages may be shown again.
    PositionNotSaved {
        /// Its words.
        reason: String,
    },
}

/// Why a mailbox's positions are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SkipReason {
    /// The time to live was over.
    Expired,
    /// The mailbox was full, or the entry too old.
    Evicted,
    /// It is for another device of this user.
    OtherDevice,
    /// A newer message of the same collapse key took its place.
    Collapsed,
    /// The business took it back.
    Recalled,
    /// This device acknowledged it in an earlier connection.
    Acknowledged,
    /// A reason that this SDK does not know.
    Other,
}

impl SkipReason {
    /// A stable word.
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

/// What ended a connection, or kept it from beginning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disconnect {
    /// The server closed it.
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
        /// When to come back, if the server says so.
        retry_after: Option<Duration>,
    },
    /// The network failed.
    #[error("{0}")]
    Network(String),
    /// Nothing came in time.
    #[error("no {0} in time")]
    Timeout(&'static str),
    /// The server sent what the protocol does not allow.
    #[error("protocol violation: {0}")]
    Violation(String),
    /// The token callback failed.
    #[error("no token: {0}")]
    Token(String),
    /// The node had asked for it (GoAway).
    #[error("the node is going away")]
    GoAway,
}

/// Why a client is over for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    /// The application shut it down, or dropped its end.
    Shutdown,
    /// The server will not have this device back: a bad token, replaced, kicked, a limit.
    Refused(Disconnect),
    /// A part of the client ended that should not have: a handler panicked, or the SDK did.
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
