//! The frames between devices and access nodes, in both encodings and both directions.
//!
//! A node writes messages directly from their envelopes ([`encode_deliver`]): the payload is copied once, into
//! the frame.

mod body;
mod error;
mod json;
mod proto;
mod types;

use std::collections::HashSet;

use barid_core::limits::{GENERATION_MAX, POSITIONS_MAX, WIRE_NUMBER_MAX};
use barid_core::{Chain, Epoch, Generation, Position, Seq};
use bytes::Bytes;

pub use self::body::body;
pub use self::error::FrameError;
pub use self::types::{Body, ClientFrame, Decoded, Deliver, Encoding, Ignored, ServerFrame};
pub use crate::envelope::BODY_BYTES_MAX;
use crate::envelope::{Envelope, EnvelopeError};
use crate::v1;

/// The format of deliveries. Devices with the same format share frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Protobuf, bodies decompressed.
    Proto,
    /// Protobuf, bodies as they are stored.
    ProtoZstd,
    /// JSON, bodies decompressed.
    Json,
}

impl Format {
    /// Number of formats.
    pub const COUNT: usize = 3;

    /// The format of a device that uses `encoding` and, if `zstd`, decompresses bodies itself.
    pub fn new(encoding: Encoding, zstd: bool) -> Self {
        match (encoding, zstd) {
            (Encoding::Proto, false) => Self::Proto,
            (Encoding::Proto, true) => Self::ProtoZstd,
            (Encoding::Json, _) => Self::Json,
        }
    }

    /// The encoding of the frames.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Proto | Self::ProtoZstd => Encoding::Proto,
            Self::Json => Encoding::Json,
        }
    }

    /// Encodes one entry as a Deliver frame of generation 0.
    ///
    /// # Errors
    /// Returns an error if the payload is invalid.
    pub fn encode(self, envelope: &Envelope) -> Result<Bytes, EnvelopeError> {
        let zstd = self == Self::ProtoZstd;
        encode_deliver(self.encoding(), 0, [envelope], zstd).map_err(|(_, error)| error)
    }
}

impl v1::Position {
    /// A position in the mailbox of that name; an empty name is the user's own mailbox.
    pub fn new(mailbox: &str, position: Position) -> Self {
        Self {
            mailbox: mailbox.into(),
            epoch: position.epoch.0,
            generation: position.generation.0,
            seq: position.seq.0,
            chain: position.chain.map(|chain| chain.0),
        }
    }
}

impl From<&v1::Position> for Position {
    fn from(position: &v1::Position) -> Self {
        Self {
            epoch: Epoch(position.epoch),
            generation: Generation(position.generation),
            seq: Seq(position.seq),
            chain: position.chain.map(Chain),
        }
    }
}

/// Decodes a device's frame. Optional fields may be missing, and unknown fields of a newer client are ignored.
///
/// # Errors
/// Returns an error whose text is sent to the client, for its developer.
pub fn decode_client(encoding: Encoding, bytes: &[u8]) -> Result<Decoded, FrameError> {
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

/// Encodes a device's frame.
pub fn encode_client(encoding: Encoding, frame: &ClientFrame) -> Bytes {
    match encoding {
        Encoding::Proto => proto::encode_client(frame),
        Encoding::Json => json::encode_client(frame),
    }
}

/// Decodes a node's frame. Unknown fields and kinds of a newer node are ignored.
///
/// # Errors
/// Returns an error if it is not a valid frame.
pub fn decode_server(encoding: Encoding, bytes: Bytes) -> Result<ServerFrame, FrameError> {
    let frame = match encoding {
        Encoding::Proto => proto::decode_server(bytes)?,
        Encoding::Json => json::decode_server(&bytes)?,
    };
    check_server(&frame)?;
    Ok(frame)
}

/// Clients add to the numbers of a node's frame, so they must be far below the maximum of their type.
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

/// Encodes a node's frame. [`ServerFrame::Unknown`] becomes an empty frame.
///
/// # Errors
/// Returns an error if a message in JSON has no body, or an invalid one.
pub fn encode_server(encoding: Encoding, frame: &ServerFrame) -> Result<Bytes, FrameError> {
    match encoding {
        Encoding::Proto => Ok(proto::encode_server(frame)),
        Encoding::Json => json::encode_server(frame),
    }
}

/// Encodes entries of the user's own mailbox as one Deliver frame. Protobuf devices that `accept_zstd` get
/// compressed bodies as they are stored.
///
/// # Errors
/// Returns the index of an entry whose payload is invalid.
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

/// Joins frames of [`encode_deliver`], all in this encoding and of this generation, into one of `mailbox`
/// (empty: the user's own).
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

#[cfg(test)]
mod tests;
