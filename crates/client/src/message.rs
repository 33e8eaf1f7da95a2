//! A message, as the application receives it.

use std::io::Read as _;
use std::sync::Arc;

use barid_core::Seq;
use barid_wire::v1;
use bytes::Bytes;

/// A message of the device's mailbox or of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The group, or `everyone` for all users of the app; `None`: the user. Messages of groups are not acknowledged
    /// and not sent again.
    pub group: Option<Arc<str>>,
    /// Its position in the mailbox.
    pub seq: Seq,
    /// Its id, chosen by the business.
    pub id: String,
    /// Its body.
    pub body: Body,
}

/// The body of a message, in the form in which the business produced it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Plain text.
    Text(String),
    /// One JSON value, as text.
    Json(String),
    /// Binary data.
    Data(Bytes),
}

impl Body {
    /// The body's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) | Self::Json(text) => text.as_bytes(),
            Self::Data(data) => data,
        }
    }
}

/// Why a body cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadBody {
    #[error("it does not decompress: {0}")]
    Zstd(String),
    #[error("it unpacks to more than {0} bytes")]
    TooLarge(usize),
    #[error("it is not UTF-8")]
    Utf8,
}

/// Decodes a message. A decompressed body has at most `body_bytes_max` bytes.
pub(crate) fn unpack(wire: v1::Message, body_bytes_max: usize) -> Result<Message, BadBody> {
    use v1::message::Body as Wire;
    let body = match wire.body {
        Some(Wire::Text(text)) => Body::Text(text),
        Some(Wire::Json(json)) => Body::Json(json),
        Some(Wire::Data(data)) => Body::Data(data),
        Some(Wire::ZstdText(packed)) => Body::Text(text(inflate(&packed, body_bytes_max)?)?),
        Some(Wire::ZstdJson(packed)) => Body::Json(text(inflate(&packed, body_bytes_max)?)?),
        Some(Wire::ZstdData(packed)) => Body::Data(inflate(&packed, body_bytes_max)?.into()),
        None => Body::Data(Bytes::new()),
    };
    Ok(Message { group: None, seq: Seq(wire.seq), id: wire.id, body })
}

fn inflate(packed: &[u8], max: usize) -> Result<Vec<u8>, BadBody> {
    let broken = |error: std::io::Error| BadBody::Zstd(error.to_string());
    let decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(broken)?;
    let mut raw = Vec::new();
    decoder.take(max as u64 + 1).read_to_end(&mut raw).map_err(broken)?;
    if raw.len() > max { Err(BadBody::TooLarge(max)) } else { Ok(raw) }
}

fn text(bytes: Vec<u8>) -> Result<String, BadBody> {
    String::from_utf8(bytes).map_err(|_| BadBody::Utf8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(text: &[u8]) -> v1::Message {
        let body = zstd::bulk::compress(text, 3).unwrap().into();
        v1::Message { seq: 1, id: "a".into(), body: Some(v1::message::Body::ZstdText(body)) }
    }

    #[test]
    fn compressed_bodies_are_unpacked_up_to_the_bound() {
        let text = "barid ".repeat(1000);
        let message = unpack(packed(text.as_bytes()), 6000).unwrap();
        assert_eq!(message.body, Body::Text(text));
        assert_eq!(unpack(packed(&[b'a'; 6001]), 6000), Err(BadBody::TooLarge(6000)));
    }

    #[test]
    fn broken_bodies_are_refused() {
        assert_eq!(unpack(packed(b"\xff\xfe"), 100), Err(BadBody::Utf8));
        let junk = v1::message::Body::ZstdData(Bytes::from_static(b"junk"));
        let message = v1::Message { body: Some(junk), ..Default::default() };
        assert!(matches!(unpack(message, 100), Err(BadBody::Zstd(_))));
    }
}
