//! Frames in protobuf.

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::{DecodeContext, decode_key, encode_varint, encoded_len_varint, skip_field};
use prost::{DecodeError, Message as _};

use super::body::checked_payload;
use super::error::FrameError;
use super::types::{ClientFrame, Decoded, Deliver, Ignored, ServerFrame};
use crate::envelope::{Envelope, EnvelopeError};
use crate::v1::server_frame::Control;
use crate::v1::{self, BodyKind};

pub(super) fn decode_client(bytes: &[u8]) -> Result<Decoded, FrameError> {
    let broken = |e: DecodeError| FrameError::Proto(e.to_string());
    if kinds(bytes).map_err(broken)? > 1 {
        return Err(FrameError::Proto("it has more than one kind".into()));
    }
    match v1::ClientFrame::decode(bytes).map_err(broken)?.kind {
        Some(kind) => Ok(Decoded { frame: Some(kind), ignored: None }),
        None if bytes.is_empty() => Err(FrameError::Kind),
        // It has unknown fields only.
        None => {
            let (field, _) = decode_key(&mut &*bytes).map_err(broken)?;
            Ok(Decoded { frame: None, ignored: Some(Ignored::Kind(format!("field {field}"))) })
        }
    }
}

/// The number of kinds in a frame. Protobuf takes the last one and ignores the others.
fn kinds(mut bytes: &[u8]) -> Result<usize, DecodeError> {
    let mut kinds = 0;
    while !bytes.is_empty() {
        let (field, wire_type) = decode_key(&mut bytes)?;
        kinds += usize::from((1..=9).contains(&field));
        skip_field(wire_type, field, &mut bytes, DecodeContext::default())?;
    }
    Ok(kinds)
}

pub(super) fn encode_client(frame: &ClientFrame) -> Bytes {
    let mut out = BytesMut::with_capacity(frame.encoded_len());
    frame.encode(&mut out);
    out.freeze()
}

pub(super) fn decode_server(bytes: Bytes) -> Result<ServerFrame, FrameError> {
    let frame = v1::ServerFrame::decode(bytes).map_err(|e| FrameError::Proto(e.to_string()))?;
    if !frame.deliver.is_empty() {
        return Ok(ServerFrame::Deliver(Deliver {
            mailbox: frame.mailbox,
            generation: frame.generation,
            messages: frame.deliver,
        }));
    }
    Ok(match frame.control {
        Some(Control::Welcome(welcome)) => ServerFrame::Welcome(welcome),
        Some(Control::Skip(skip)) => ServerFrame::Skip(skip),
        Some(Control::GoAway(go_away)) => ServerFrame::GoAway(go_away),
        Some(Control::Error(error)) => ServerFrame::Error(error),
        Some(Control::Ping(ping)) => ServerFrame::Ping(ping),
        Some(Control::Subscribed(subscribed)) => ServerFrame::Subscribed(subscribed),
        Some(Control::Unsubscribed(unsubscribed)) => ServerFrame::Unsubscribed(unsubscribed),
        None => ServerFrame::Unknown,
    })
}

pub(super) fn encode_server(frame: &ServerFrame) -> Bytes {
    let control = |control| v1::ServerFrame { control: Some(control), ..Default::default() };
    let frame = match frame.clone() {
        ServerFrame::Deliver(Deliver { mailbox, generation, messages }) => {
            v1::ServerFrame { deliver: messages, mailbox, generation, control: None }
        }
        ServerFrame::Welcome(welcome) => control(Control::Welcome(welcome)),
        ServerFrame::Skip(skip) => control(Control::Skip(skip)),
        ServerFrame::GoAway(go_away) => control(Control::GoAway(go_away)),
        ServerFrame::Error(error) => control(Control::Error(error)),
        ServerFrame::Ping(ping) => control(Control::Ping(ping)),
        ServerFrame::Subscribed(subscribed) => control(Control::Subscribed(subscribed)),
        ServerFrame::Unsubscribed(unsubscribed) => control(Control::Unsubscribed(unsubscribed)),
        ServerFrame::Unknown => v1::ServerFrame::default(),
    };
    frame.encode_to_vec().into()
}

// Tags (field number << 3 | wire type) of the fields that are encoded by hand.
const FRAME_DELIVER: u8 = 1 << 3 | 2;
const FRAME_MAILBOX: u8 = 2 << 3 | 2;
const FRAME_GENERATION: u8 = 3 << 3;
const MESSAGE_SEQ: u8 = 1 << 3;
const MESSAGE_ID: u8 = 2 << 3 | 2;

pub(super) fn encode_deliver<'a>(
    generation: u32,
    entries: impl IntoIterator<Item = &'a Envelope>,
    accept_zstd: bool,
) -> Result<Bytes, (usize, EnvelopeError)> {
    let mut out = BytesMut::new();
    for (index, entry) in entries.into_iter().enumerate() {
        put_message(&mut out, entry, accept_zstd).map_err(|error| (index, error))?;
    }
    if generation != 0 {
        out.reserve(6);
        out.put_u8(FRAME_GENERATION);
        encode_varint(u64::from(generation), &mut out);
    }
    Ok(out.freeze())
}

/// Concatenated protobuf messages decode as one merged message.
pub(super) fn join_delivers(mailbox: &str, frames: &[Bytes]) -> Bytes {
    let messages: usize = frames.iter().map(Bytes::len).sum();
    let mut out = BytesMut::with_capacity(messages + mailbox.len() + 2);
    frames.iter().for_each(|frame| out.put_slice(frame));
    if !mailbox.is_empty() {
        out.put_u8(FRAME_MAILBOX);
        encode_varint(mailbox.len() as u64, &mut out);
        out.put_slice(mailbox.as_bytes());
    }
    out.freeze()
}

fn put_message(
    out: &mut BytesMut,
    entry: &Envelope,
    accept_zstd: bool,
) -> Result<(), EnvelopeError> {
    let packed = accept_zstd && entry.raw_bytes != 0;
    let body = if packed { (&entry.payload[..]).into() } else { checked_payload(entry)? };
    let id = entry.id.as_bytes();
    let length = |bytes: &[u8]| 1 + encoded_len_varint(bytes.len() as u64) + bytes.len();
    let message = 1 + encoded_len_varint(entry.seq) + length(id) + length(&body);
    out.reserve(6 + message);
    out.put_u8(FRAME_DELIVER);
    encode_varint(message as u64, out);
    out.put_u8(MESSAGE_SEQ);
    encode_varint(entry.seq, out);
    out.put_u8(MESSAGE_ID);
    encode_varint(id.len() as u64, out);
    out.put_slice(id);
    out.put_u8(body_tag(entry.kind(), packed));
    encode_varint(body.len() as u64, out);
    out.put_slice(&body);
    Ok(())
}

fn body_tag(kind: BodyKind, packed: bool) -> u8 {
    let field = match kind {
        BodyKind::Text => 3,
        BodyKind::Json => 4,
        BodyKind::Data => 5,
    };
    (if packed { field + 3 } else { field }) << 3 | 2
}
