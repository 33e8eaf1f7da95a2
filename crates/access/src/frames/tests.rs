//! Held against tungstenite: what it reads out of the same bytes is what has to come out here.

use std::io::{Cursor, Read, Write};

use proptest::prelude::*;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig, WebSocketContext};

use super::*;

const BYTES_MAX: usize = 300;

/// A frame of a device.
#[derive(Debug, Clone)]
struct Frame {
    /// Opcode, reserved bits and the final one.
    first: u8,
    masked: bool,
    payload: Vec<u8>,
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let mask = [0x12, 0x34, 0x00, 0xff];
        let length = self.payload.len();
        let flag = if self.masked { 0x80 } else { 0 };
        let mut bytes = match length {
            0..=125 => vec![self.first, flag | length as u8],
            _ => vec![self.first, flag | 126, (length >> 8) as u8, length as u8],
        };
        if self.masked {
            bytes.extend(mask);
            bytes.extend(unmasked(&self.payload, mask));
        } else {
            bytes.extend(&self.payload);
        }
        bytes
    }
}

/// Mostly what is allowed, so that something is behind what is not.
fn frame() -> impl Strategy<Value = Frame> {
    let first = prop_oneof![
        20 => prop::sample::select(vec![0x81_u8, 0x82, 0x01, 0x02, 0x00, 0x80, 0x89, 0x8a]),
        1 => any::<u8>(),
        1 => Just(0x88),
    ];
    let text = "[a-zé€𝄞]{0,40}".prop_map(String::into_bytes);
    let bytes = prop::collection::vec(any::<u8>(), 0..160);
    (first, prop::bool::weighted(0.98), prop_oneof![8 => text, 1 => bytes])
        .prop_map(|(first, masked, payload)| Frame { first, masked, payload })
}

/// A message in one frame or several, cut anywhere, a ping among them; it may be too large in all.
fn message() -> impl Strategy<Value = Vec<Frame>> {
    let text = prop_oneof![3 => "[a-zé€𝄞]{0,60}", 1 => "[a-zé€𝄞]{0,500}"];
    let text = text.prop_map(String::into_bytes);
    let cuts = prop::collection::vec(any::<prop::sample::Index>(), 0..4);
    (text, cuts, prop::option::weighted(0.1, any::<u8>())).prop_map(|(mut text, cuts, broken)| {
        if let (Some(broken), false) = (broken, text.is_empty()) {
            let at = usize::from(broken) % text.len();
            text[at] = broken;
        }
        let mut ends: Vec<_> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        ends.push(text.len());
        ends.sort_unstable();
        let (mut begin, last) = (0, ends.len() - 1);
        let mut frames = Vec::new();
        for (index, end) in ends.into_iter().enumerate() {
            let kind = if index == 0 { 0x01 } else { 0x00 };
            let first = kind | if index == last { 0x80 } else { 0 };
            frames.push(Frame { first, masked: true, payload: text[begin..end].to_vec() });
            begin = end;
        }
        frames.insert(1, Frame { first: 0x89, masked: true, payload: b"p".to_vec() });
        frames
    })
}

/// The messages read, and whether reading ended in an error.
type Outcome = (Vec<Message>, bool);

/// Until a close, an error, or the end of the bytes; they come in pieces of up to `piece`.
fn read_here(bytes: &[u8], piece: usize) -> Outcome {
    let mut decoder = Decoder::new(Vec::new(), BYTES_MAX, 99);
    let (mut messages, mut pieces) = (Vec::new(), bytes.chunks(piece));
    let mut next = decoder.next(&[], &mut 0);
    loop {
        match next {
            Ok(Some(message)) => {
                messages.push(message);
                if messages.last().is_some_and(Message::is_close) {
                    return (messages, false);
                }
                next = decoder.next(&[], &mut 0);
            }
            Ok(None) => match pieces.next() {
                Some(piece) => next = decoder.next(piece, &mut 0),
                None => {
                    let kept = decoder.kept.capacity();
                    assert!(kept > 0 || decoder.begin == 0);
                    return (messages, false);
                }
            },
            Err(_) => return (messages, true),
        }
    }
}

/// Swallows answers.
struct Wire<'a>(Cursor<&'a [u8]>);

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn read_by_tungstenite(bytes: &[u8]) -> Outcome {
    let config = WebSocketConfig::default()
        .max_frame_size(Some(BYTES_MAX))
        .max_message_size(Some(BYTES_MAX));
    let mut context = WebSocketContext::new(Role::Server, Some(config));
    let (mut messages, mut wire) = (Vec::new(), Wire(Cursor::new(bytes)));
    loop {
        match context.read(&mut wire) {
            Ok(message) => messages.push(message),
            Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)) => {
                return (messages, false);
            }
            Err(_) => return (messages, true),
        }
        if messages.last().is_some_and(Message::is_close) {
            return (messages, false);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn bytes_mean_what_they_mean_to_tungstenite(
        frames in prop::collection::vec(
            prop_oneof![frame().prop_map(|frame| vec![frame]), message()], 0..8
        ),
        cut in prop::option::weighted(0.1, 0_usize..40),
        piece in 1_usize..200,
    ) {
        let mut bytes = frames.iter().flatten().flat_map(Frame::bytes).collect::<Vec<_>>();
        bytes.truncate(bytes.len() - cut.unwrap_or(0).min(bytes.len()));
        let (mut messages, failed) = read_here(&bytes, piece);
        let (mut theirs, they_failed) = read_by_tungstenite(&bytes);
        // A close with a code that may not be on the wire is shown as one that may.
        let codeless = |messages: &mut Vec<Message>| {
            if let Some(Message::Close(close)) = messages.last_mut() {
                *close = close_answer(close.take());
            }
        };
        codeless(&mut messages);
        codeless(&mut theirs);
        prop_assert_eq!(messages, theirs);
        // Here a bad frame is refused at its head, even if the rest of it never comes.
        prop_assert!(failed == they_failed || failed && cut.is_some(), "{} {}", failed, they_failed);
    }

    #[test]
    fn what_is_written_is_read_the_same(payload in prop::collection::vec(any::<u8>(), 0..70_000)) {
        let mut out = Vec::new();
        let message = Message::Binary(payload.clone().into());
        encode(&message, &mut out);
        let mut context = WebSocketContext::new(Role::Client, None);
        prop_assert_eq!(context.read(&mut Wire(Cursor::new(&out))).unwrap(), message);
    }
}

#[test]
fn nothing_is_held_between_messages() {
    let mut decoder = Decoder::new(Vec::new(), BYTES_MAX, 99);
    let one = Frame { first: 0x82, masked: true, payload: vec![7; 200] }.bytes();
    for piece in [1, 7, one.len()] {
        let pieces = one.chunks(piece);
        let read =
            pieces.filter_map(|piece| decoder.next(piece, &mut 0).unwrap()).collect::<Vec<_>>();
        assert_eq!(read, [Message::Binary(vec![7; 200].into())]);
        assert_eq!((decoder.kept.capacity(), decoder.begin), (0, 0));
    }
    // Of several at once the others wait, and are all that is held.
    let several = [&one[..], &one, &one[..9]].concat();
    assert!(decoder.next(&several, &mut 0).unwrap().is_some());
    assert!(decoder.next(&[], &mut 0).unwrap().is_some());
    assert!(decoder.next(&[], &mut 0).unwrap().is_none());
    assert!(decoder.next(&one[9..], &mut 0).unwrap().is_some());
    assert_eq!((decoder.kept.capacity(), decoder.begin), (0, 0));
}

#[test]
fn what_is_too_large_is_refused_at_its_head_and_takes_no_memory() {
    let huge = |first| [&[first, 0xff][..], &(1_u64 << 40).to_be_bytes(), &[1, 2, 3, 4]].concat();
    let mut decoder = Decoder::new(Vec::new(), BYTES_MAX, 99);
    let ping = Frame { first: 0x89, masked: true, payload: Vec::new() }.bytes();
    assert!(decoder.next(&[ping, huge(0x82)].concat(), &mut 0).unwrap().is_some());
    assert!(decoder.kept.capacity() < 64);
    let error = decoder.next(&[], &mut 0).unwrap_err();
    assert!(matches!(error, Error::Capacity(CapacityError::MessageTooLong { .. })), "{error}");
    let error = Decoder::new(huge(0x89), BYTES_MAX, 99).next(&[], &mut 0).unwrap_err();
    assert!(matches!(error, Error::Protocol(ProtocolError::ControlFrameTooBig)), "{error}");
}

#[test]
fn hazard_91_every_frame_counts_and_a_message_has_so_many_fragments() {
    let fragment = |first: u8| [&[first, 0x80][..], &[0; 4]].concat();
    let mut decoder = Decoder::new(Vec::new(), BYTES_MAX, 3);
    let mut frames = 0;
    let begun = [fragment(0x01), fragment(0x00), fragment(0x89)].concat();
    assert!(decoder.next(&begun, &mut frames).unwrap().is_some_and(|message| message.is_ping()));
    assert_eq!(frames, 3, "two fragments and a ping");
    assert!(decoder.next(&fragment(0x80), &mut frames).unwrap().is_some());
    assert_eq!(frames, 4);
    let endless = [fragment(0x02), fragment(0x00).repeat(3)].concat();
    let error = decoder.next(&endless, &mut frames).unwrap_err();
    assert!(matches!(error, Error::AttackAttempt), "{error}");
}
