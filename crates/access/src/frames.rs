//! A codec for WebSocket frames (RFC 6455, sections 5 and 7), for a server's side. Pure: bytes in, messages out.
//! Between two messages it holds no buffer, so that an idle connection takes no memory for one.

use std::io::Cursor;

use barid_wire::frames::Encoding;
use bytes::{BufMut as _, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::frame::{FrameHeader, Utf8Bytes};
use tokio_tungstenite::tungstenite::{Error, Message};

/// Bytes of messages that share a frame; one alone may be larger.
pub const JOINED_BYTES_MAX: usize = 16 << 10;

/// Bound of a control frame's payload (RFC 6455, 5.5).
const CONTROL_BYTES_MAX: u64 = 125;

/// Decodes a device's messages.
#[derive(Debug)]
pub struct Decoder {
    /// Received bytes that are not decoded yet: part of a frame, or several frames.
    kept: Vec<u8>,
    /// How many bytes of `kept` are decoded already.
    begin: usize,
    /// The payloads so far of a fragmented message.
    fragments: Option<Box<Fragments>>,
    /// Bound of a frame's payload, and of a message's.
    bytes_max: u32,
    /// Bound of a message's fragments.
    fragments_max: u32,
}

#[derive(Debug)]
struct Fragments {
    is_text: bool,
    bytes: Vec<u8>,
    count: u32,
    /// How many bytes of a fragmented text are known to be valid UTF-8.
    checked: usize,
}

impl Decoder {
    /// Creates the decoder of a connection on which `kept` was received already.
    pub fn new(kept: Vec<u8>, bytes_max: usize, fragments_max: u32) -> Self {
        let bytes_max = u32::try_from(bytes_max).unwrap_or(u32::MAX);
        Self { kept, begin: 0, fragments: None, bytes_max, fragments_max }
    }

    /// Bytes that are not decoded yet.
    pub fn undecoded(&self) -> usize {
        self.kept.len() - self.begin
    }

    /// Decodes the next message out of earlier bytes and `fresh`; `None` if it is not complete. Adds the decoded frames
    /// to `frames`.
    ///
    /// # Errors
    /// The bytes violate RFC 6455 or exceed a bound. The connection cannot be read any further.
    pub fn next(&mut self, fresh: &[u8], frames: &mut u32) -> Result<Option<Message>, Error> {
        if self.kept.is_empty() {
            let mut left = fresh;
            let message = self.read(&mut left, frames)?;
            self.keep(left);
            return Ok(message);
        }
        let mut kept = std::mem::take(&mut self.kept);
        if !fresh.is_empty() {
            kept.drain(..std::mem::take(&mut self.begin));
            kept.extend_from_slice(fresh);
        }
        let mut left = &kept[self.begin..];
        let message = self.read(&mut left, frames)?;
        if left.is_empty() {
            self.begin = 0;
        } else {
            self.begin = kept.len() - left.len();
            self.kept = kept;
        }
        Ok(message)
    }

    /// Reserves room for the whole frame at once, so that a slow one does not grow the buffer step by step.
    fn keep(&mut self, left: &[u8]) {
        if left.is_empty() {
            return;
        }
        let mut cursor = Cursor::new(left);
        let whole = match FrameHeader::parse(&mut cursor) {
            // A frame that is too large is refused when it is decoded.
            Ok(Some((_, length))) if length <= self.bytes_max.into() => {
                cursor.position() as usize + length as usize
            }
            _ => 0,
        };
        self.kept = Vec::with_capacity(whole.max(left.len()));
        self.kept.extend_from_slice(left);
    }

    /// Decodes frames from the front of `input` until one completes a message.
    fn read(&mut self, input: &mut &[u8], frames: &mut u32) -> Result<Option<Message>, Error> {
        while let Some((header, payload)) = self.frame(input)? {
            *frames += 1;
            let message = match header.opcode {
                OpCode::Control(Control::Ping) => Some(Message::Ping(payload.into())),
                OpCode::Control(Control::Pong) => Some(Message::Pong(payload.into())),
                OpCode::Control(_) => Some(Message::Close(close_frame(&payload)?)),
                OpCode::Data(kind) => self.data(kind, header.is_final, payload)?,
            };
            if message.is_some() {
                return Ok(message);
            }
        }
        Ok(None)
    }

    /// Decodes one frame. Its head is checked before its payload has arrived.
    fn frame(&self, input: &mut &[u8]) -> Result<Option<(FrameHeader, Vec<u8>)>, Error> {
        let mut cursor = Cursor::new(*input);
        let Some((header, length)) = FrameHeader::parse(&mut cursor)? else { return Ok(None) };
        let begin = cursor.position() as usize;
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return Err(ProtocolError::NonZeroReservedBits.into());
        }
        let Some(mask) = header.mask else {
            return Err(ProtocolError::UnmaskedFrameFromClient.into());
        };
        if let OpCode::Control(_) = header.opcode {
            if !header.is_final {
                return Err(ProtocolError::FragmentedControlFrame.into());
            }
            if length > CONTROL_BYTES_MAX {
                return Err(ProtocolError::ControlFrameTooBig.into());
            }
        }
        let before = match header.opcode {
            OpCode::Data(_) => self.fragments.as_ref().map_or(0, |begun| begun.bytes.len()),
            OpCode::Control(_) => 0,
        };
        let size = length.saturating_add(before as u64);
        if size > self.bytes_max.into() {
            let (size, max_size) = (size as usize, self.bytes_max as usize);
            return Err(CapacityError::MessageTooLong { size, max_size }.into());
        }
        let end = begin + length as usize;
        let Some(masked) = input.get(begin..end) else { return Ok(None) };
        let payload = unmasked(masked, mask);
        *input = &input[end..];
        Ok(Some((header, payload)))
    }

    fn data(
        &mut self,
        kind: Data,
        is_final: bool,
        payload: Vec<u8>,
    ) -> Result<Option<Message>, Error> {
        let mut message = match (kind, self.fragments.take()) {
            (Data::Continue, None) => return Err(ProtocolError::UnexpectedContinueFrame.into()),
            (Data::Continue, Some(mut begun)) => {
                begun.count += 1;
                if begun.count > self.fragments_max {
                    // tungstenite has no error of its own for this.
                    return Err(Error::AttackAttempt);
                }
                begun.bytes.extend_from_slice(&payload);
                begun
            }
            (_, Some(_)) => return Err(ProtocolError::ExpectedFragment(kind).into()),
            (_, None) if is_final => return whole(kind == Data::Text, payload).map(Some),
            (_, None) => {
                let is_text = kind == Data::Text;
                Box::new(Fragments { is_text, bytes: payload, count: 1, checked: 0 })
            }
        };
        if is_final {
            return whole(message.is_text, message.bytes).map(Some);
        }
        message.check()?;
        self.fragments = Some(message);
        Ok(None)
    }
}

impl Fragments {
    /// Refuses a fragmented text as soon as it is invalid UTF-8. A character may be split between two fragments.
    fn check(&mut self) -> Result<(), Error> {
        if !self.is_text {
            return Ok(());
        }
        match std::str::from_utf8(&self.bytes[self.checked..]) {
            Ok(_) => self.checked = self.bytes.len(),
            Err(error) if error.error_len().is_some() => return Err(error.into()),
            Err(error) => self.checked += error.valid_up_to(),
        }
        Ok(())
    }
}

fn whole(is_text: bool, bytes: Vec<u8>) -> Result<Message, Error> {
    let bytes = Bytes::from(bytes);
    Ok(if is_text { Message::Text(bytes.try_into()?) } else { Message::Binary(bytes) })
}

fn unmasked(masked: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let mut bytes = masked.to_vec();
    let key = u32::from_ne_bytes(mask);
    let (words, rest) = bytes.as_chunks_mut::<4>();
    for word in words {
        *word = (u32::from_ne_bytes(*word) ^ key).to_ne_bytes();
    }
    rest.iter_mut().zip(mask).for_each(|(byte, key)| *byte ^= key);
    bytes
}

fn close_frame(payload: &[u8]) -> Result<Option<CloseFrame>, Error> {
    match payload {
        [] => Ok(None),
        [_] => Err(ProtocolError::InvalidCloseSequence.into()),
        [high, low, reason @ ..] => {
            let code = CloseCode::from(u16::from_be_bytes([*high, *low]));
            let reason = Utf8Bytes::try_from(reason.to_vec())?;
            Ok(Some(CloseFrame { code, reason }))
        }
    }
}

/// The reply to a close: the same code, if it is one that may be sent.
pub fn close_answer(close: Option<CloseFrame>) -> Option<CloseFrame> {
    close.map(|close| match close.code.is_allowed() {
        true => close,
        false => CloseFrame {
            code: CloseCode::Protocol,
            reason: Utf8Bytes::from_static("Protocol violation"),
        },
    })
}

/// Appends a message as one frame.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    let closing;
    let (opcode, payload): (OpCode, &[u8]) = match message {
        Message::Text(text) => (OpCode::Data(Data::Text), text.as_bytes()),
        Message::Binary(bytes) => (OpCode::Data(Data::Binary), bytes),
        Message::Ping(bytes) => (OpCode::Control(Control::Ping), bytes),
        Message::Pong(bytes) => (OpCode::Control(Control::Pong), bytes),
        Message::Close(close) => {
            closing = close.as_ref().map_or_else(Vec::new, |close| {
                [&u16::from(close.code).to_be_bytes(), close.reason.as_bytes()].concat()
            });
            (OpCode::Control(Control::Close), &closing)
        }
        Message::Frame(frame) => (frame.header().opcode, frame.payload()),
    };
    let header = FrameHeader { opcode, ..FrameHeader::default() };
    let length = payload.len() as u64;
    out.reserve(header.len(length) + payload.len());
    // Writing to a vector cannot fail.
    let _ = header.format(length, out);
    out.extend_from_slice(payload);
}

/// A message as one unmasked frame with its header (RFC 6455, 5.2), which several connections can share.
pub fn framed(encoding: Encoding, payload: &[u8]) -> Bytes {
    const FINAL: u8 = 0x80;
    let opcode = match encoding {
        Encoding::Json => 1,
        Encoding::Proto => 2,
    };
    let mut frame = BytesMut::with_capacity(payload.len() + 10);
    frame.put_u8(FINAL | opcode);
    match payload.len() {
        length @ 0..=125 => frame.put_u8(length as u8),
        length @ 126..=0xffff => {
            frame.put_u8(126);
            frame.put_u16(length as u16);
        }
        length => {
            frame.put_u8(127);
            frame.put_u64(length as u64);
        }
    }
    frame.put_slice(payload);
    frame.freeze()
}

#[cfg(test)]
mod tests;
