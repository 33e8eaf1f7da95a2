//! Conversion between frames and WebSocket messages, and the frames that precede a close.

use std::time::Duration;

use barid_core::CloseCode;
use barid_session::Close;
use barid_wire::frames::{ClientFrame, Decoded, Encoding, ServerFrame, decode_client};
use barid_wire::v1;
use bytes::Bytes;
use tokio_tungstenite::tungstenite::error::CapacityError;

use crate::labels::{Frame, Limit};
use crate::metrics::Metrics;
use crate::socket::{self, Message};

/// Devices that are closed with 4006 are told to reconnect within this time, at random, ms.
const RETURN_SPREAD_MS: u32 = 10_000;

/// How a session's frames are encoded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Codec {
    pub encoding: Encoding,
    pub zstd: bool,
    pub visible_pings: bool,
    /// Seconds.
    pub ping_interval: u16,
}

/// Decodes a device's frame; `None` for WebSocket control frames.
pub(super) fn decode(
    metrics: &Metrics,
    encoding: Encoding,
    message: &Message,
) -> Result<Option<Decoded>, Close> {
    let bytes: &[u8] = match (message, encoding) {
        (Message::Text(text), Encoding::Json) => text.as_bytes(),
        (Message::Binary(bytes), Encoding::Proto) => bytes,
        (Message::Text(_) | Message::Binary(_), _) => {
            let text = "barid.v1.json frames are text messages, barid.v1.proto frames binary ones";
            return Err(Close::new(CloseCode::BadFrame, text));
        }
        _ => return Ok(None),
    };
    let heard = decode_client(encoding, bytes)
        .map_err(|error| Close::new(CloseCode::BadFrame, error.to_string()))?;
    let Some(frame) = &heard.frame else { return Ok(Some(heard)) };
    metrics.frame_in(match frame {
        ClientFrame::Hello(_) => Frame::Hello,
        ClientFrame::Ack(_) => Frame::Ack,
        ClientFrame::Refresh(_) => Frame::Refresh,
        ClientFrame::Pong(_) => Frame::Pong,
        ClientFrame::Subscribe(_) => Frame::Subscribe,
        ClientFrame::Unsubscribe(_) => Frame::Unsubscribe,
    });
    Ok(Some(heard))
}

/// The close for an error of the socket; `None` if the device is gone.
pub(super) fn refusal(metrics: &Metrics, error: &socket::Error) -> Option<Close> {
    if let socket::Error::Capacity(CapacityError::MessageTooLong { .. }) = error {
        metrics.limit(Limit::FrameBytes);
    }
    if let socket::Error::AttackAttempt = error {
        metrics.limit(Limit::Fragments);
    }
    socket::refusal(error)
}

/// The frames before a close frame: an error, and GoAway before 4006. A draining node has announced the close by GoAway
/// already, and sends no frame here; neither does it after a violation of RFC 6455.
pub(super) fn last_frames(close: &Close, attempt: u64) -> Vec<ServerFrame> {
    if close.code == CloseCode::Draining || close.code.is_websockets() {
        return Vec::new();
    }
    let (code, text) = (close.code.code().into(), close.text.to_string());
    let error = ServerFrame::Error(v1::Error { code, text, attempt });
    if close.code != CloseCode::HistoryChanged {
        return vec![error];
    }
    // One failover closes thousands of sessions; clients without jitter would all reconnect at once.
    let why = close.code.as_str().to_owned();
    let reconnect_after_ms = rand::random_range(0..=RETURN_SPREAD_MS);
    vec![ServerFrame::GoAway(v1::GoAway { why, reconnect_after_ms }), error]
}

/// The frames before the close of a refused handshake. `after`: when a retry may succeed.
pub(super) fn refusal_frames(close: &Close, after: Option<Duration>) -> Vec<ServerFrame> {
    let go_away = after.map(|after| {
        let why = close.code.as_str().to_owned();
        let reconnect_after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        ServerFrame::GoAway(v1::GoAway { why, reconnect_after_ms })
    });
    go_away.into_iter().chain(last_frames(close, 0)).collect()
}

/// A frame as a WebSocket message of its encoding.
pub(super) fn message(encoding: Encoding, frame: Bytes) -> Message {
    match encoding {
        Encoding::Proto => Message::Binary(frame),
        Encoding::Json => match frame.try_into() {
            Ok(text) => Message::Text(text),
            // The JSON encoder writes valid UTF-8.
            Err(_) => Message::Text(Default::default()),
        },
    }
}
