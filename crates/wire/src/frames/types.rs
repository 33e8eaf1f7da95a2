//! Frames, independent of their encoding.

use bytes::Bytes;

pub use crate::v1::client_frame::Kind as ClientFrame;
use crate::v1::{Error, GoAway, Message, Ping, Skip, Subscribed, Unsubscribed, Welcome};

/// The encoding of frames, which the WebSocket subprotocol selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// `barid.v1.proto`: each binary WebSocket message is a protobuf message.
    Proto,
    /// `barid.v1.json`: each text WebSocket message is a JSON object whose only key is the kind.
    Json,
}

impl Encoding {
    /// The WebSocket subprotocol.
    pub fn subprotocol(self) -> &'static str {
        match self {
            Self::Proto => "barid.v1.proto",
            Self::Json => "barid.v1.json",
        }
    }

    /// The encoding of a subprotocol; `None` if the subprotocol is not Barid's.
    pub fn from_subprotocol(name: &str) -> Option<Self> {
        [Self::Proto, Self::Json].into_iter().find(|encoding| encoding.subprotocol() == name)
    }
}

/// A node's frame.
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
    /// Why the node closes the connection, or what it has ignored.
    Error(Error),
    /// The device must answer with Pong.
    Ping(Ping),
    /// The session receives the messages of a group.
    Subscribed(Subscribed),
    /// The session receives no messages of a group.
    Unsubscribed(Unsubscribed),
    /// A kind of a newer version, to be ignored.
    Unknown,
}

/// Messages of one mailbox.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Deliver {
    /// A group's name or `everyone`; empty for the user's own mailbox.
    pub mailbox: String,
    /// The number of times that the device's cursor was reset.
    pub generation: u32,
    /// The messages, in order and contiguous.
    pub messages: Vec<Message>,
}

/// The body of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Text.
    Text(String),
    /// One JSON value, as text.
    Json(String),
    /// Bytes.
    Data(Bytes),
}

/// A decoded frame of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The frame; `None` if its kind is unknown.
    pub frame: Option<ClientFrame>,
    /// An unknown part that was ignored. Unknown protobuf fields are not reported.
    pub ignored: Option<Ignored>,
}

/// An unknown part of a frame: a client may be newer than its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ignored {
    /// A kind of frame: its name or number.
    Kind(String),
    /// A field: the frame's kind and the field's name.
    Field(String),
}
