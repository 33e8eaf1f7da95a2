//! Frames as this version understands them, whatever their encoding.

use bytes::Bytes;

pub use crate::v1::client_frame::Kind as ClientFrame;
use crate::v1::{Error, GoAway, Message, Ping, Skip, Subscribed, Unsubscribed, Welcome};

/// How frames are encoded: agreed on by WebSocket subprotocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// `barid.v1.proto`: one protobuf message a binary WebSocket message.
    Proto,
    /// `barid.v1.json`: one JSON object a text WebSocket message, its one key the kind.
    Json,
}

impl Encoding {
    /// Its WebSocket subprotocol.
    pub fn subprotocol(self) -> &'static str {
        match self {
            Self::Proto => "barid.v1.proto",
            Self::Json => "barid.v1.json",
        }
    }

    /// The encoding of a subprotocol; `None` for others' subprotocols.
    pub fn from_subprotocol(name: &str) -> Option<Self> {
        [Self::Proto, Self::Json].into_iter().find(|encoding| encoding.subprotocol() == name)
    }
}

/// What a node says.
#[derive(Debug, Clone, PartialEq)]
pub enum ServerFrame {
    /// Messages of one mailbox, in order and contiguous.
    Deliver(Deliver),
    /// Answers Hello, or replaces the positions of a running session.
    Welcome(Welcome),
    /// Positions without a message.
    Skip(Skip),
    /// The node will close soon.
    GoAway(GoAway),
    /// What was wrong.
    Error(Error),
    /// Answer with Pong.
    Ping(Ping),
    /// A group's messages will come.
    Subscribed(Subscribed),
    /// None of a group's messages will come.
    Unsubscribed(Unsubscribed),
    /// A kind that only a newer version knows: ignore it.
    Unknown,
}

/// Messages of one mailbox.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Deliver {
    /// Whose: a group's name or `everyone`; empty: the user's own.
    pub mailbox: String,
    /// How often the device's cursor was reset.
    pub generation: u32,
    /// In order and contiguous.
    pub messages: Vec<Message>,
}

/// What an application reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Text.
    Text(String),
    /// One JSON value, as text.
    Json(String),
    /// Any bytes.
    Data(Bytes),
}

/// A device's frame, as far as this version understands it.
#[derive(Debug, Clone, PartialEq)]
pub struct Heard {
    /// The frame; `None` if this version does not know its kind.
    pub frame: Option<ClientFrame>,
    /// The part that was ignored. (Unknown protobuf fields are not reported.)
    pub ignored: Option<Ignored>,
}

/// A part of a frame that this version does not know: a client may be newer than its node while a cluster is
/// upgraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ignored {
    /// A kind of frame, by its name or number.
    Kind(String),
    /// A field, behind its frame's kind.
    Field(String),
}
