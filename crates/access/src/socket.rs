//! A device's WebSocket (RFC 6455): reading, writing and closing. It knows nothing of authentication and frames of the
//! protocol.
//!
//! It is public so that conformance suites can test the code that serves devices: they talk to `examples/echo.rs`.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use barid_core::CloseCode;
use bytes::Bytes;
use tokio::io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _, ReadBuf};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use crate::config::LimitsConfig;
use crate::frames::{Decoder, close_answer, encode};
use crate::stream::Stream;

pub use barid_session::Close;
pub use tokio_tungstenite::tungstenite::{Error, Message};

/// Bytes read at once. They are read onto the stack, so that no connection has a read buffer.
const READ_BYTES: usize = 4 << 10;
/// Approximate size of one flush, bytes.
pub(crate) const WRITE_BUFFER_BYTES: usize = 128 << 10;
/// Bound of a close's reason: a control frame has at most 125 bytes, two of which are the code.
const REASON_BYTES_MAX: usize = 123;

/// Bytes that are read from a device that is sent a close. It has that much under way at most, unless it ignores the
/// close.
const CLOSING_BYTES_MAX: usize = 256 << 10;

/// WebSocket frames that a device has sent, and bytes, those of incomplete frames included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Received {
    /// Frames of any kind; each fragment of a message is one.
    pub frames: u32,
    /// Bytes, with the heads of frames.
    pub bytes: usize,
}

/// An open WebSocket.
pub struct Socket {
    stream: Stream,
    decoder: Decoder,
    /// Frames that are not written yet. It has no capacity while it is empty.
    unsent: Vec<u8>,
    /// Bytes were written since the last flush.
    is_dirty: bool,
    /// Cleared by the peer's close and by an error.
    reads: bool,
    /// Cleared once a close was sent.
    writes: bool,
}

impl Socket {
    /// Creates the WebSocket after a handshake. `rest` are bytes that were received after the request.
    pub(crate) fn new(stream: Stream, rest: Vec<u8>, limits: &LimitsConfig) -> Self {
        let decoder = Decoder::new(rest, limits.frame_bytes_max, limits.fragments_max);
        Self { stream, decoder, unsent: Vec::new(), is_dirty: false, reads: true, writes: true }
    }

    /// Bytes that arrived with the request; [`Self::poll_next`] does not report them.
    pub fn received(&self) -> Received {
        Received { frames: 0, bytes: self.decoder.undecoded() }
    }

    /// Reads once, and adds what arrived to `received`. Returns the next message if it is complete; `None` outside: the
    /// peer has gone. Pings and closes are answered, and also returned.
    ///
    /// # Errors
    /// See [`refusal`]. Afterwards only [`Self::hang_up`] may be called.
    pub fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        received: &mut Received,
    ) -> Poll<Option<Result<Option<Message>, Error>>> {
        // An answer is flushed even if nothing else is written.
        if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
            self.reads = false;
            return Poll::Ready(Some(Err(error)));
        }
        if !self.reads {
            return Poll::Ready(None);
        }
        let next = ready!(self.poll_read(cx, received));
        match &next {
            // A device that does not read gets no more answers, so that their queue stays bounded.
            Ok(Some(Message::Ping(bytes))) if self.writes && self.has_room() => {
                self.queue(&Message::Pong(bytes.clone()));
            }
            Ok(Some(Message::Close(close))) => {
                if self.writes {
                    self.queue(&Message::Close(close_answer(close.clone())));
                }
                self.reads = false;
            }
            Ok(_) => (),
            Err(_) => self.reads = false,
        }
        Poll::Ready(Some(next))
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        received: &mut Received,
    ) -> Poll<Result<Option<Message>, Error>> {
        if let Some(message) = self.decoder.next(&[], &mut received.frames)? {
            return Poll::Ready(Ok(Some(message)));
        }
        let mut space = [MaybeUninit::uninit(); READ_BYTES];
        let mut bytes = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut bytes))?;
        if bytes.filled().is_empty() {
            return Poll::Ready(Err(ProtocolError::ResetWithoutClosingHandshake.into()));
        }
        received.bytes += bytes.filled().len();
        Poll::Ready(self.decoder.next(bytes.filled(), &mut received.frames))
    }

    /// Awaits [`Self::poll_next`].
    ///
    /// # Errors
    /// As [`Self::poll_next`].
    pub(crate) async fn next(
        &mut self,
        received: &mut Received,
    ) -> Option<Result<Option<Message>, Error>> {
        poll_fn(|cx| self.poll_next(cx, received)).await
    }

    /// Bytes that are buffered and not written yet.
    pub fn fed(&self) -> usize {
        self.unsent.len().max(self.is_dirty.into())
    }

    /// Whether the buffer has room for more messages before the next flush.
    pub fn has_room(&self) -> bool {
        self.fed() < WRITE_BUFFER_BYTES
    }

    /// Buffers a message; [`Self::poll_flush`] writes it.
    ///
    /// # Errors
    /// The socket is closing.
    pub fn feed(&mut self, message: Message) -> Result<(), Error> {
        if !self.writes {
            return Err(ProtocolError::SendAfterClosing.into());
        }
        self.queue(&message);
        Ok(())
    }

    fn queue(&mut self, message: &Message) {
        encode(message, &mut self.unsent);
        self.is_dirty = true;
        self.writes &= !message.is_close();
    }

    /// Writes the buffer; ready at once if it is empty.
    ///
    /// # Errors
    /// The peer has gone.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if !self.is_dirty {
            return Poll::Ready(Ok(()));
        }
        while !self.unsent.is_empty() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unsent))? {
                0 => return Poll::Ready(Err(Error::Io(ErrorKind::WriteZero.into()))),
                sent if sent == self.unsent.len() => self.unsent = Vec::new(),
                sent => drop(self.unsent.drain(..sent)),
            }
        }
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.is_dirty = false;
        Poll::Ready(Ok(()))
    }

    /// Writes a shared frame ([`crate::frames::framed`]) without copying it. Call it only while the buffer is empty.
    /// Buffers the bytes that the socket does not accept immediately.
    ///
    /// # Errors
    /// The peer has gone, or the socket is closing.
    pub fn write_shared(&mut self, cx: &mut Context<'_>, frame: &Bytes) -> Result<(), Error> {
        if !self.writes {
            return Err(ProtocolError::SendAfterClosing.into());
        }
        let mut sent = 0;
        while sent < frame.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &frame[sent..])? {
                Poll::Ready(0) => return Err(Error::Io(ErrorKind::WriteZero.into())),
                Poll::Ready(bytes) => sent += bytes,
                Poll::Pending => break,
            }
        }
        self.unsent.extend_from_slice(&frame[sent..]);
        // TLS buffers bytes until it is flushed.
        self.is_dirty = true;
        match self.poll_flush(cx) {
            Poll::Ready(flushed) => flushed,
            Poll::Pending => Ok(()),
        }
    }

    /// Closes the connection: writes the last messages and a close (unless the peer has closed or gone), and waits
    /// for the peer to end the connection. Returns false if `limit` passes first.
    pub async fn hang_up(
        self,
        last: impl IntoIterator<Item = Message>,
        close: Option<&Close>,
        limit: Duration,
    ) -> bool {
        // An error means that the device has gone, which is fine here: only the time-out is reported.
        timeout(limit, self.close(last, close)).await.is_ok()
    }

    async fn close(
        mut self,
        last: impl IntoIterator<Item = Message>,
        close: Option<&Close>,
    ) -> Result<(), Error> {
        if self.writes {
            last.into_iter().try_for_each(|message| self.feed(message))?;
        }
        if let Some(close) = close.filter(|_| self.writes) {
            let code = close.code.code().into();
            self.feed(Message::Close(Some(CloseFrame { code, reason: reason(close).into() })))?;
        }
        poll_fn(|cx| self.poll_flush(cx)).await?;
        // Read until the peer has answered: closing a socket with unread bytes resets it, and the peer would not see
        // the close.
        let (mut answered, mut received) = (false, Received::default());
        while let Some(Ok(message)) = self.next(&mut received).await {
            answered |= message.is_some_and(|message| message.is_close());
            if received.bytes > CLOSING_BYTES_MAX {
                return Ok(());
            }
        }
        if !answered {
            // After a violation of RFC 6455, bytes are discarded without decoding.
            self.stream.shutdown().await?;
            let (mut rest, mut bytes) = ([0; 512], received.bytes);
            while bytes <= CLOSING_BYTES_MAX {
                match self.stream.read(&mut rest).await? {
                    0 => break,
                    read => bytes += read,
                }
            }
        }
        Ok(())
    }
}

/// The close frame. Barid's own codes are explained in a preceding Error frame. After a violation of RFC 6455 only a
/// close frame may be sent, so it carries the text.
fn reason(close: &Close) -> &str {
    if !close.code.is_websockets() {
        return close.code.as_str();
    }
    &close.text[..close.text.floor_char_boundary(REASON_BYTES_MAX)]
}

/// The close for an error of the socket; `None` if the peer has gone.
pub fn refusal(error: &Error) -> Option<Close> {
    let text = match error {
        Error::Capacity(CapacityError::MessageTooLong { size, max_size }) => {
            let text = format!("a frame of {size} bytes, the limit is {max_size}");
            return Some(Close::new(CloseCode::BadFrame, text));
        }
        Error::AttackAttempt => {
            let text = "a message has too many fragments";
            return Some(Close::new(CloseCode::BadFrame, text));
        }
        Error::Utf8(_) => {
            let text = "a text message or the reason of a close is not UTF-8";
            return Some(Close::new(CloseCode::InvalidPayload, text));
        }
        Error::Protocol(
            ProtocolError::ResetWithoutClosingHandshake
            | ProtocolError::SendAfterClosing
            | ProtocolError::ReceivedAfterClosing,
        ) => return None,
        Error::Protocol(error) => format!("not WebSocket (RFC 6455): {error}"),
        _ => return None,
    };
    Some(Close::new(CloseCode::ProtocolError, text))
}
