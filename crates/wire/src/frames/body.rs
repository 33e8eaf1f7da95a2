//! The bodies of messages: decompressed for applications, and checked before a node writes them.

use std::borrow::Cow;

use super::error::FrameError;
use super::types::Body;
use crate::envelope::{self, Envelope, EnvelopeError};
use crate::v1::{BodyKind, Message, message};

/// The decompressed body of a message.
///
/// # Errors
/// Returns an error if there is no body, it cannot be decompressed, or it is larger than `bytes_max`.
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

/// An entry's decompressed payload; UTF-8 unless the kind is data.
pub(super) fn checked_payload(entry: &Envelope) -> Result<Cow<'_, [u8]>, EnvelopeError> {
    let payload = envelope::payload(entry)?;
    if entry.kind() != BodyKind::Data {
        std::str::from_utf8(&payload).map_err(|error| EnvelopeError::Payload(error.to_string()))?;
    }
    Ok(payload)
}
