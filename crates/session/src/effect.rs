//! The effects of a session, which its connection carries out.

use std::borrow::Cow;

use barid_core::{Attempt, Chain, CloseCode, Epoch, Generation, Seq};
use barid_wire::envelope::{Envelope, SkipReason};
use barid_wire::v1;

/// A position in the session's history, with its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The position.
    pub seq: Seq,
    /// The chain there.
    pub chain: Chain,
}

/// An effect. Effects are carried out in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write these entries.
    Deliver(Vec<Envelope>),
    /// Send a skip up to a position.
    Skip {
        /// The position, with its chain.
        to: Mark,
        /// Why.
        why: SkipReason,
    },
    /// Send Welcome again, with the device's new position.
    Welcome,
    /// Send a receipt.
    Receipt(Box<v1::Receipt>),
    /// Close the connection.
    Close(Close),
}

/// The close of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// The WebSocket close code.
    pub code: CloseCode,
    /// Text for the Error frame.
    pub text: Cow<'static, str>,
}

impl Close {
    /// Creates a close with a code and a text.
    pub fn new(code: CloseCode, text: impl Into<Cow<'static, str>>) -> Self {
        Self { code, text: text.into() }
    }
}

/// Refusal of a Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Close code and text.
    pub close: Close,
    /// The known attempt of this device, if that is higher than the Hello's; otherwise 0.
    pub attempt: Attempt,
}

impl From<Close> for Refusal {
    fn from(close: Close) -> Self {
        Self { close, attempt: Attempt(0) }
    }
}

/// A page to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadFrom {
    /// The position before the first entry.
    pub after: Seq,
    /// Bound of the entries.
    pub entries_max: u32,
    /// Approximate bound of the bytes.
    pub bytes_max: u32,
}

/// An acknowledgement to store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckPoint {
    /// The epoch.
    pub epoch: Epoch,
    /// The generation.
    pub generation: Generation,
    /// The acknowledged position; all earlier ones are acknowledged as well.
    pub mark: Mark,
}

/// Why a session reads its mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncCause {
    /// The device connected with a position below the newest entry.
    Connect,
    /// A position is missing between the last written entry and a pushed one.
    Gap,
    /// A pushed entry has another epoch or does not match the chain.
    Fork,
    /// The window of unacknowledged messages was full, and has room again.
    Window,
    /// The retry timer fired.
    Resend,
    /// A confirmation reported newer entries.
    Confirm,
    /// The node dropped pushes before they reached the session.
    Overflow,
}

impl SyncCause {
    /// All reasons.
    pub const ALL: [Self; 7] = [
        Self::Connect,
        Self::Gap,
        Self::Fork,
        Self::Window,
        Self::Resend,
        Self::Confirm,
        Self::Overflow,
    ];

    /// The label in metrics.
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
