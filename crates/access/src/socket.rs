//! A device's socket: how a WebSocket (RFC 6455) is opened, read, written and hung up. Who may connect,
//! and what is said, is decided above it.
//!
//! Public for one purpose: that conformance suites can be run against exactly the code that serves
//! devices. `examples/echo.rs` is what they talk to.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use barid_core::CloseCode;
use futures::{Sink as _, SinkExt as _, Stream as _, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use crate::stream::Stream;

pub use crate::handshake::accept_anybody;
pub use crate::session::Close;
pub use tokio_tungstenite::tungstenite::{Error, Message};

/// Small on purpose: it is there for every connection. Larger frames make it grow.
const READ_BUFFER_BYTES: usize = 512;
/// What is written goes out in one flush of about this size.
pub(crate) const WRITE_BUFFER_BYTES: usize = 128 << 10;
/// What RFC 6455 leaves for a close's reason: a control frame has 125 bytes, its code takes two.
const REASON_BYTES_MAX: usize = 123;

/// An open WebSocket.
pub struct Socket {
    inner: WebSocketStream<Stream>,
    /// Bytes given to it since it was last flushed.
    fed: usize,
}

impl Socket {
    /// The WebSocket of a handshake that was answered; `rest` is what came behind the request.
    /// Frames, and messages of several, have up to `frame_bytes_max` bytes.
    pub(crate) async fn open(stream: Stream, rest: Vec<u8>, frame_bytes_max: usize) -> Self {
        let mut config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(WRITE_BUFFER_BYTES);
        config.max_message_size = Some(frame_bytes_max);
        config.max_frame_size = Some(frame_bytes_max);
        let opened =
            WebSocketStream::from_partially_read(stream, rest, Role::Server, Some(config)).await;
        Self { inner: opened, fed: 0 }
    }

    /// The next message; `None`: the other end is gone. Pings and closes are answered here, and
    /// shown.
    ///
    /// # Errors
    /// What [`refusal`] tells apart. The socket is good for nothing but [`Self::hang_up`] then.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        Pin::new(&mut self.inner).poll_next(cx)
    }

    /// [`Self::poll_next`], awaited.
    ///
    /// # Errors
    /// Its errors.
    pub(crate) async fn next(&mut self) -> Option<Result<Message, Error>> {
        self.inner.next().await
    }

    /// Bytes that were fed and have not left.
    pub fn fed(&self) -> usize {
        self.fed
    }

    /// Whether more should be fed before the next flush.
    pub fn has_room(&self) -> bool {
        self.fed < WRITE_BUFFER_BYTES
    }

    /// Takes a message to write; [`Self::poll_flush`] sends it.
    ///
    /// # Errors
    /// As [`Self::poll_next`].
    pub fn feed(&mut self, message: Message) -> Result<(), Error> {
        // Two are a frame's least head, so that no message goes without a flush.
        self.fed += message.len().max(2);
        Pin::new(&mut self.inner).start_send(message)
    }

    /// Writes what was fed; ready at once if that is nothing.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.fed > 0 {
            ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
            self.fed = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Ends the connection politely: the last message, a close (none if the other end closed or is
    /// gone), and then its end is waited for. False if all that took longer than `limit`.
    pub async fn hang_up(
        self,
        last: Option<Message>,
        close: Option<&Close>,
        limit: Duration,
    ) -> bool {
        // Whoever is gone is not told.
        timeout(limit, self.close(last, close)).await.is_ok()
    }

    async fn close(self, last: Option<Message>, close: Option<&Close>) -> Result<(), Error> {
        let mut socket = self.inner;
        if let Some(message) = last {
            socket.feed(message).await?;
        }
        match close {
            Some(close) => {
                let code = close.code.code().into();
                socket.close(Some(CloseFrame { code, reason: reason(close).into() })).await?;
            }
            None => socket.flush().await?,
        }
        // Until it has answered: a socket closed with unread bytes becomes a reset, and the other end
        // never learns why.
        let mut answered = false;
        while let Some(Ok(message)) = socket.next().await {
            answered |= message.is_close();
        }
        if !answered {
            // What does not speak WebSocket is not read as such.
            let stream = socket.get_mut();
            stream.shutdown().await?;
            let mut rest = [0; 512];
            while stream.read(&mut rest).await? > 0 {}
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
