//! What a device and an access node say to each other, in both encodings and both directions.
//!
//! A node writes messages straight from their envelopes ([`encode_deliver`]): the payload is copied
//! once, into the frame.

mod json;
mod proto;

use std::collections::HashSet;

use barid_core::limits::{GENERATION_MAX, POSITIONS_MAX, WIRE_NUMBER_MAX};
use bytes::Bytes;

use crate::envelope::{self, Envelope, EnvelopeError};
pub use crate::v1::client_frame::Kind as ClientFrame;
use crate::v1::{
    BodyKind, Error, GoAway, Message, Ping, Skip, Subscribed, Unsubscribed, Welcome, message,
};

pub use crate::envelope::BODY_BYTES_MAX;

/// Of a device's frames, for people.
const KINDS: &str = "hello, ack, refresh, pong, subscribe and unsubscribe";

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

/// How a device's deliveries are written: its encoding, and whether compressed bodies stay compressed. Devices of
/// one format can share frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Protobuf, bodies unpacked.
    Proto,
    /// Protobuf, compressed bodies as they are stored.
    ProtoZstd,
    /// JSON, bodies unpacked.
    Json,
}

impl Format {
    /// Number of formats.
    pub const COUNT: usize = 3;

    /// The format of a device that speaks `encoding` and, if `zstd`, unpacks zstd itself.
    pub fn new(encoding: Encoding, zstd: bool) -> Self {
        match (encoding, zstd) {
            (Encoding::Proto, false) => Self::Proto,
            (Encoding::Proto, true) => Self::ProtoZstd,
            (Encoding::Json, _) => Self::Json,
        }
    }

    /// The encoding of its frames.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Proto | Self::ProtoZstd => Encoding::Proto,
            Self::Json => Encoding::Json,
        }
    }

    /// Encodes one entry as a Deliver frame of generation 0.
    ///
    /// # Errors
    /// Returns an error if the entry's body is broken.
    pub fn encode(self, envelope: &Envelope) -> Result<Bytes, EnvelopeError> {
        let zstd = self == Self::ProtoZstd;
        encode_deliver(self.encoding(), 0, [envelope], zstd).map_err(|(_, error)| error)
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

/// Reads a device's frame. Both encodings take whatever a client may reasonably leave out, and pass over
/// what a newer client may add.
///
/// # Errors
/// [`FrameError`], in words for the client's developer.
pub fn decode_client(encoding: Encoding, bytes: &[u8]) -> Result<Heard, FrameError> {
    let heard = match encoding {
        Encoding::Proto => proto::decode_client(bytes)?,
        Encoding::Json => json::decode_client(bytes)?,
    };
    heard.frame.as_ref().map_or(Ok(()), check)?;
    Ok(heard)
}

fn check(frame: &ClientFrame) -> Result<(), FrameError> {
    match frame {
        ClientFrame::Hello(hello) => {
            number("hello.attempt", hello.attempt)?;
            if hello.positions.len() > POSITIONS_MAX {
                return Err(FrameError::Positions(hello.positions.len()));
            }
            let mut mailboxes = HashSet::new();
            for position in &hello.positions {
                number("hello.positions.epoch", position.epoch)?;
                number("hello.positions.seq", position.seq)?;
                if position.generation > GENERATION_MAX {
                    return Err(FrameError::Generation("hello.positions.generation"));
                }
                if !mailboxes.insert(position.mailbox.as_str()) {
                    return Err(FrameError::PositionTwice);
                }
            }
            Ok(())
        }
        ClientFrame::Ack(ack) => {
            if ack.generation.is_some_and(|generation| generation > GENERATION_MAX) {
                return Err(FrameError::Generation("ack.generation"));
            }
            number("ack.seq", ack.seq)
        }
        ClientFrame::Subscribe(_) | ClientFrame::Unsubscribe(_) => Ok(()),
        ClientFrame::Refresh(_) | ClientFrame::Pong(_) => Ok(()),
    }
}

/// Writes a device's frame.
pub fn encode_client(encoding: Encoding, frame: &ClientFrame) -> Bytes {
    match encoding {
        Encoding::Proto => proto::encode_client(frame),
        Encoding::Json => json::encode_client(frame),
    }
}

/// Reads a node's frame. Fields and kinds of a newer version are passed over.
///
/// # Errors
/// [`FrameError`].
pub fn decode_server(encoding: Encoding, bytes: Bytes) -> Result<ServerFrame, FrameError> {
    let frame = match encoding {
        Encoding::Proto => proto::decode_server(bytes)?,
        Encoding::Json => json::decode_server(&bytes)?,
    };
    check_server(&frame)?;
    Ok(frame)
}

/// Numbers of a node's frame must leave room: clients add to them.
fn check_server(frame: &ServerFrame) -> Result<(), FrameError> {
    match frame {
        ServerFrame::Deliver(deliver) => {
            deliver.messages.iter().try_for_each(|m| number("deliver.messages.seq", m.seq))
        }
        ServerFrame::Welcome(welcome) => {
            number("welcome.server_time_ms", welcome.server_time_ms)?;
            welcome.positions.iter().try_for_each(|position| {
                number("welcome.positions.epoch", position.epoch)?;
                number("welcome.positions.seq", position.seq)
            })
        }
        ServerFrame::Skip(skip) => number("skip.to", skip.to),
        ServerFrame::GoAway(_) | ServerFrame::Error(_) | ServerFrame::Ping(_) => Ok(()),
        ServerFrame::Subscribed(_) | ServerFrame::Unsubscribed(_) => Ok(()),
        ServerFrame::Unknown => Ok(()),
    }
}

fn number(name: &'static str, number: u64) -> Result<(), FrameError> {
    match number {
        0..=WIRE_NUMBER_MAX => Ok(()),
        _ => Err(FrameError::Number(name)),
    }
}

/// Writes a node's frame. ([`ServerFrame::Unknown`] is an empty frame.)
///
/// # Errors
/// A JSON message has no body, or a broken one.
pub fn encode_server(encoding: Encoding, frame: &ServerFrame) -> Result<Bytes, FrameError> {
    match encoding {
        Encoding::Proto => Ok(proto::encode_server(frame)),
        Encoding::Json => json::encode_server(frame),
    }
}

/// Writes entries of the user's own mailbox into one Deliver frame. Compressed bodies stay so for
/// devices that `accept_zstd` in protobuf; JSON never carries them.
///
/// # Errors
/// The payload of an entry is broken, with the entry's index; nothing of the frame is usable.
pub fn encode_deliver<'a>(
    encoding: Encoding,
    generation: u32,
    entries: impl IntoIterator<Item = &'a Envelope>,
    accept_zstd: bool,
) -> Result<Bytes, (usize, EnvelopeError)> {
    match encoding {
        Encoding::Proto => proto::encode_deliver(generation, entries, accept_zstd),
        Encoding::Json => json::encode_deliver(generation, entries),
    }
}

/// Makes one frame of several that [`encode_deliver`] wrote in this encoding and for this generation,
/// with their messages in the frames' order, as those of `mailbox` (empty: the user's own).
pub fn join_delivers(
    encoding: Encoding,
    mailbox: &str,
    generation: u32,
    frames: &[Bytes],
) -> Bytes {
    match encoding {
        Encoding::Proto => proto::join_delivers(mailbox, frames),
        Encoding::Json => json::join_delivers(mailbox, generation, frames),
    }
}

/// A message's body, unpacked.
///
/// # Errors
/// It has none, or does not unpack to at most `bytes_max` bytes.
pub fn body(message: Message, bytes_max: usize) -> Result<Body, FrameError> {
    use message::Body as Wire;
    let seq = message.seq;
    let unpack = |packed: &[u8]| {
        zstd::bulk::decompress(packed, bytes_max)
            .map_err(|error| FrameError::Unpack(seq, error.to_string()))
    };
    let text = |raw: Vec<u8>| {
        String::from_utf8(raw).map_err(|error| FrameError::Unpack(seq, error.to_string()))
    };
    Ok(match message.body.ok_or(FrameError::NoBody(seq))? {
        Wire::Text(value) => Body::Text(value),
        Wire::Json(value) => Body::Json(value),
        Wire::Data(value) => Body::Data(value),
        Wire::ZstdText(packed) => Body::Text(text(unpack(&packed)?)?),
        Wire::ZstdJson(packed) => Body::Json(text(unpack(&packed)?)?),
        Wire::ZstdData(packed) => Body::Data(unpack(&packed)?.into()),
    })
}

/// An entry's payload as it goes into a frame, known to be what its kind promises.
fn checked_payload(entry: &Envelope) -> Result<std::borrow::Cow<'_, [u8]>, EnvelopeError> {
    let payload = envelope::payload(entry)?;
    if entry.kind() != BodyKind::Data {
        std::str::from_utf8(&payload).map_err(|error| EnvelopeError::Payload(error.to_string()))?;
    }
    Ok(payload)
}

#[cfg(test)]
mod tests;
