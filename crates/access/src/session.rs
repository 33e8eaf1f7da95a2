//! A connection's life as types that consume each other: [`Unidentified`] → [`Connecting`] →
//! [`Connected`] → [`Closing`]. Pure: inputs and the time go in, effects come out. No socket, no
//! encoding, no Redis; `connection.rs` does the I/O.

mod closing;
mod connected;
mod heartbeat;
mod unidentified;
mod window;

use std::borrow::Cow;
use std::sync::Arc;

use barid_core::{Attempt, Chain, CloseCode, DeviceId, Epoch, Generation, Seq};
use barid_mailbox::UserKey;
use barid_wire::envelope::{Envelope, SkipReason};
use barid_wire::v1;

pub use closing::Closing;
pub use connected::{AckUrgency, Connected, Dropped, Pushed};
pub use heartbeat::{Beat, Heartbeat, Seconds};
pub use unidentified::{Connecting, Unidentified};
pub use window::Sent;

/// Who is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Whose mailbox.
    pub user: UserKey,
    /// Which device.
    pub device: DeviceId,
    /// Its connection attempt.
    pub attempt: Attempt,
    /// What it says it runs on.
    pub platform: Arc<str>,
}

/// A place in the history that the session follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The position.
    pub seq: Seq,
    /// The chain there.
    pub chain: Chain,
}

/// Bounds of a session.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Messages that may be on their way to a device without its acknowledgement.
    pub unacked_max: usize,
    /// Entries read from a mailbox at once.
    pub page_entries_max: u32,
    /// Bytes read from a mailbox at once.
    pub page_bytes_max: u32,
    /// How long the next acknowledgement waits for others after the last one, ms.
    pub ack_interval_ms: u32,
    /// From the claim of a retry timer until its re-send is here, ms at most: what a busy machine takes, and
    /// less than lies between two re-sends.
    pub crossing_ms: u32,
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

#[cfg(test)]
mod tests;
