//! Errors of frames.

use barid_core::limits::{GENERATION_MAX, POSITIONS_MAX};

/// The kinds of a device's frames.
const KINDS: &str = "hello, ack, refresh, pong, subscribe and unsubscribe";

/// An invalid frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not protobuf of a frame.
    #[error("not a protobuf frame: {0}")]
    Proto(String),
    /// Not JSON of a frame.
    #[error("not a JSON frame: {0}")]
    Json(String),
    /// The frame has no kind.
    #[error("the frame has no kind; expected one of {KINDS}")]
    Kind,
    /// Hello has more positions than a device can follow mailboxes.
    #[error("hello.positions has {0} entries, the limit is {POSITIONS_MAX}")]
    Positions(usize),
    /// A generation above [`GENERATION_MAX`].
    #[error("{0} is above {GENERATION_MAX}")]
    Generation(&'static str),
    /// Hello has two positions of one mailbox.
    #[error("hello.positions has two positions of one mailbox")]
    PositionTwice,
    /// A number that is not below 2^53, which JSON readers would round.
    #[error("{0} is not below 2^53")]
    Number(&'static str),
    /// A message without a body.
    #[error("message {0} has no body")]
    NoBody(u64),
    /// A compressed body that cannot be decompressed within the bound.
    #[error("the body of message {0} cannot be decompressed: {1}")]
    Unpack(u64, String),
}
