//! Why bytes are not a frame.

use barid_core::limits::{GENERATION_MAX, POSITIONS_MAX};

/// Of a device's frames, for people.
const KINDS: &str = "hello, ack, refresh, pong, subscribe and unsubscribe";

/// Why bytes are not a valid frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not protobuf, or not of this message.
    #[error("not a protobuf frame: {0}")]
    Proto(String),
    /// Not JSON, or not of this shape.
    #[error("not a JSON frame: {0}")]
    Json(String),
    /// The frame is empty, or has no known kind.
    #[error("the frame is of no kind; {KINDS} are")]
    Kind,
    /// Hello stands in more mailboxes than a device may follow.
    #[error("hello.positions has {0} entries, the limit is {POSITIONS_MAX}")]
    Positions(usize),
    /// A generation above [`GENERATION_MAX`].
    #[error("{0} is above {GENERATION_MAX}")]
    Generation(&'static str),
    /// Hello has two positions in one mailbox.
    #[error("hello.positions names a mailbox twice")]
    PositionTwice,
    /// A number that is not below 2^53: JSON readers would round it.
    #[error("{0} is not below 2^53")]
    Number(&'static str),
    /// A message without a body.
    #[error("message {0} has no body")]
    NoBody(u64),
    /// A compressed body that does not unpack within the bound.
    #[error("the body of message {0} does not unpack: {1}")]
    Unpack(u64, String),
}
