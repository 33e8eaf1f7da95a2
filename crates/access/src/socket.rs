//! A device's socket: how a WebSocket (RFC 6455) is opened, read, written and hung up. Who may connect,
//! and what is said, is decided above it.
//!
//! Public for one purpose: that conformance suites can be run against exactly the code that serves
//! devices. `examples/echo.rs` is what they talk to.

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

use crate::frames::{Decoder, close_answer, encode};
use crate::stream::Stream;

pub use barid_session::Close;
pub use tokio_tungstenite::tungstenite::{Error, Message};

/// Read at once, into the stack: no connection has a buffer of its own.
const READ_BYTES: usize = 4 << 10;
/// What is written goes out in one flush of about this size.
pub(crate) const WRITE_BUFFER_BYTES: usize = 128 << 10;
/// What RFC 6455 leaves for a close's reason: a control frame has 125 bytes, its code takes two.
const REASON_BYTES_MAX: usize = 123;

/// An open WebSocket.
pub struct Socket {
    stream: Stream,
    decoder: Decoder,
    /// Frames that have not left; without any, no memory.
    unsent: Vec<u8>,
    /// Something was written since it was last flushed.
    is_dirty: bool,
    /// Until the other end's close has come, or what cannot be read.
    reads: bool,
    /// Until a close was sent.
    writes: bool,
}

impl Socket {
    /// The WebSocket of a handshake that was answered; `rest` is what came behind the request.
    /// Frames, and messages of several, have up to `frame_bytes_max` bytes.
    pub(crate) fn new(stream: Stream, rest: Vec<u8>, frame_bytes_max: usize) -> Self {
        let decoder = Decoder::new(rest, frame_bytes_max);
        Self { stream, decoder, unsent: Vec::new(), is_dirty: false, reads: true, writes: true }
    }

    /// The next message; `None`: the other end is gone. Pings and closes are answered here, and
    /// shown.
    ///
    /// # Errors
    /// What [`refusal`] tells apart. The socket is good for nothing but [`Self::hang_up`] then.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        // An answer does not wait for something to be fed.
        if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
            self.reads = false;
            return Poll::Ready(Some(Err(error)));
        }
        if !self.reads {
            return Poll::Ready(None);
        }
        let next = ready!(self.poll_read(cx));
        match &next {
            // A device that does not read gets no more answers: they would queue without a bound.
            Ok(Message::Ping(bytes)) if self.writes && self.has_room() => {
                self.queue(&Message::Pong(bytes.clone()));
            }
            Ok(Message::Close(close)) => {
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

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Message, Error>> {
        if let Some(message) = self.decoder.next(&[])? {
            return Poll::Ready(Ok(message));
        }
        loop {
            let mut space = [MaybeUninit::uninit(); READ_BYTES];
            let mut bytes = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut bytes))?;
            if bytes.filled().is_empty() {
                return Poll::Ready(Err(ProtocolError::ResetWithoutClosingHandshake.into()));
            }
            if let Some(message) = self.decoder.next(bytes.filled())? {
                return Poll::Ready(Ok(message));
            }
        }
    }

    /// [`Self::poll_next`], awaited.
    ///
    /// # Errors
    /// Its errors.
    pub(crate) async fn next(&mut self) -> Option<Result<Message, Error>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Bytes that were fed, or are answers, and have not left.
    pub fn fed(&self) -> usize {
        self.unsent.len().max(self.is_dirty.into())
    }

    /// Whether more should be fed before the next flush.
    pub fn has_room(&self) -> bool {
        self.fed() < WRITE_BUFFER_BYTES
    }

    /// Takes a message to write; [`Self::poll_flush`] sends it.
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

    /// Writes what was fed; ready at once if that is nothing.
    ///
    /// # Errors
    /// The other end is gone.
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

    /// Writes a whole frame ([`crate::frames::framed`]) that others share, without a copy of it; only where nothing is fed.
    /// What the other end does not take at once is fed then.
    ///
    /// # Errors
    /// The other end is gone, or the socket is closing.
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
        // TLS may hold back what it took.
        self.is_dirty = true;
        match self.poll_flush(cx) {
            Poll::Ready(flushed) => flushed,
            Poll::Pending => Ok(()),
        }
    }

    /// Ends the connection politely: the last messages, a close (none if the other end closed or is
    /// gone), and then its end is waited for. False if all that took longer than `limit`.
    pub async fn hang_up(
        self,
        last: impl IntoIterator<Item = Message>,
        close: Option<&Close>,
        limit: Duration,
    ) -> bool {
        // An error of the socket means that the device has gone: only the time-out counts.
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
        // Until it has answered: a socket closed with unread bytes becomes a reset, and the other end
        // never learns why.
        let mut answered = false;
        while let Some(Ok(message)) = self.next().await {
            answered |= message.is_close();
        }
        if !answered {
            // What does not speak WebSocket is not read as such.
            self.stream.shutdown().await?;
            let mut rest = [0; 512];
            while self.stream.read(&mut rest).await? > 0 {}
        }
        Ok(())
    }
}

/// Barid's codes are explained in an Error frame before. Where WebSocket itself was broken, no frame may
/// follow but the close: it carries the text.
fn reason(close: &Close) -> &str {
    if !close.code.is_websockets() {
        return close.code.as_str();
    }
    &close.text[..close.text.floor_char_boundary(REASON_BYTES_MAX)]
}

/// What a broken socket is closed with; `None`: there is nobody to tell.
pub fn refusal(error: &Error) -> Option<Close> {
    let text = match error {
        Error::Capacity(CapacityError::MessageTooLong { size, max_size }) => {
            let text = format!("a frame of {size} bytes, the limit is {max_size}");
            return Some(Close::new(CloseCode::BadFrame, text));
        }
        Error::Utf8(_) => {
            return Some(Close::new(CloseCode::InvalidPayload, "a text message is not UTF-8"));
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
