//! What a session asks of the connection that runs it.

use std::borrow::Cow;

use barid_core::{Attempt, Chain, CloseCode, Epoch, Generation, Seq};
use barid_wire::envelope::{Envelope, SkipReason};
use barid_wire::v1;

/// A place in the history that the session follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The position.
    pub seq: Seq,
    /// The chain there.
    pub chain: Chain,
}

/// What the session wants done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write these entries.
    Deliver(Vec<Envelope>),
    /// Tell that there is nothing up to a position.
    Skip {
        /// The position, with its chain.
        to: Mark,
        /// Why.
        why: SkipReason,
    },
    /// Tell where the device now stands: positions start anew.
    Welcome,
    /// Tell the business.
    Receipt(Box<v1::Receipt>),
    /// End the connection.
    Close(Close),
}

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// The WebSocket close code.
    pub code: CloseCode,
    /// For people; goes into an Error frame.
    pub text: Cow<'static, str>,
}

impl Close {
    /// Ends a connection with a code and a text for people.
    pub fn new(code: CloseCode, text: impl Into<Cow<'static, str>>) -> Self {
        Self { code, text: text.into() }
    }
}

/// Why a device may not connect now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Close code and text.
    pub close: Close,
    /// The known attempt of this device, if its own is lower; else 0.
    pub attempt: Attempt,
}

impl From<Close> for Refusal {
    fn from(close: Close) -> Self {
        Self { close, attempt: Attempt(0) }
    }
}

/// A page that the session wants to read: what comes after `after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadFrom {
    /// Read behind this.
    pub after: Seq,
    /// At most so many entries.
    pub entries_max: u32,
    /// About so many bytes.
    pub bytes_max: u32,
}

/// An acknowledgement that the session wants recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckPoint {
    /// In this epoch,
    pub epoch: Epoch,
    /// under this generation,
    pub generation: Generation,
    /// everything up to here.
    pub mark: Mark,
}

/// What made a session read its mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncCause {
    /// It connected behind the newest entry.
    Connect,
    /// A position is missing between what was written and what was pushed.
    Gap,
    /// The push did not follow on what was written: another epoch or another chain.
    Fork,
    /// More was unacknowledged than may be, and now is not.
    Window,
    /// The retry timer was due.
    Resend,
    /// A confirmation told of newer entries.
    Confirm,
    /// The node dropped pushes before they reached the session.
    Overflow,
}

impl SyncCause {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Connect,
        Self::Gap,
        Self::Fork,
        Self::Window,
        Self::Resend,
        Self::Confirm,
        Self::Overflow,
    ];

    /// A word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Gap => "gap",
            Self::Fork => "fork",
            Self::Window => "window",
            Self::Resend => "resend",
            Self::Confirm => "confirm",
            Self::Overflow => "overflow",
        }
    }
}
