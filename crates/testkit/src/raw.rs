//! Handshakes and frames as bytes, well formed or not, and a device that is only a socket: for tests that
//! need what [`crate::Device`] cannot send, and for crowds.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use barid_wire::frames::{Encoding, ServerFrame, decode_server};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::device::PATIENCE;

/// Handshakes of [`sessions`] at once.
const AT_ONCE: usize = 50;
/// For a handshake of [`sessions`], on a machine that runs other tests as well.
const SESSION_LIMIT: Duration = Duration::from_secs(60);

/// A client's handshake, with further headers.
pub fn request(path: &str, headers: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
}

/// Sends `request` and reads the answer: all of it, or the head if it is 101.
///
/// # Errors
/// Returns an error if the connection is refused, or the answer does not end in time.
pub async fn http(address: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    // An answer may come, and the connection end, before everything was taken.
    let _ = stream.write_all(request).await;
    read_head(&mut stream).await
}

/// Reads an answer as [`http`] does.
///
/// # Errors
/// Returns an error if the answer does not end in time.
pub async fn read_head(stream: &mut TcpStream) -> Result<String> {
    let mut answer = Vec::new();
    let mut byte = [0];
    let reading = async {
        while stream.read(&mut byte).await.is_ok_and(|read| read == 1) {
            answer.push(byte[0]);
            if answer.starts_with(b"HTTP/1.1 101") && answer.ends_with(b"\r\n\r\n") {
                break;
            }
        }
    };
    timeout(PATIENCE, reading).await.context("no answer")?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The first byte of a continuation frame that is the last of its message, as of those below.
pub const CONTINUATION: u8 = 0x80;
/// A text frame.
pub const TEXT: u8 = 0x81;
/// A binary frame.
pub const BINARY: u8 = 0x82;
/// A Close frame.
pub const CLOSE: u8 = 0x88;
/// A Ping frame.
pub const PING: u8 = 0x89;
/// A Pong frame.
pub const PONG: u8 = 0x8a;
/// The bit of a message's last frame (FIN).
pub const LAST: u8 = 0x80;
/// The bit of a compressed frame (RSV1).
pub const COMPRESSED: u8 = 0x40;

/// A client's frame, masked with zeros.
pub fn frame(first: u8, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let mut bytes = announced(first, payload.len() as u64);
    bytes.extend_from_slice(payload);
    bytes
}

/// The head of a client's frame of `length` bytes.
pub fn announced(first: u8, length: u64) -> Vec<u8> {
    let mut bytes = vec![first];
    match length {
        0..=125 => bytes.push(0x80 | length as u8),
        126..=0xffff => {
            bytes.push(0x80 | 126);
            bytes.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 127);
            bytes.extend_from_slice(&length.to_be_bytes());
        }
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

/// How a node ended a connection.
#[derive(Debug, PartialEq)]
pub struct Ended {
    /// The close code; 1006 if there was no Close frame.
    pub code: u16,
    /// The text of the Error frame before the Close frame, or the reason in the Close frame.
    pub text: String,
}

/// A WebSocket connection.
#[derive(Debug)]
pub struct Raw {
    /// The socket.
    pub stream: TcpStream,
    encoding: Encoding,
}

impl Raw {
    /// Opens a WebSocket.
    ///
    /// # Errors
    /// Returns an error if the node refuses the handshake.
    pub async fn open(address: SocketAddr, encoding: Encoding, token: &str) -> Result<Self> {
        let mut raw = Self { stream: TcpStream::connect(address).await?, encoding };
        raw.request(token).await?;
        let head = read_head(&mut raw.stream).await?;
        ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
        Ok(raw)
    }

    /// Asks for a WebSocket with JSON frames and says Hello, without waiting for an answer.
    ///
    /// # Errors
    /// Returns an error if the connection is broken.
    pub async fn unanswered(stream: TcpStream, token: &str) -> Result<Self> {
        let mut raw = Self { stream, encoding: Encoding::Json };
        raw.request(token).await?;
        raw.send(&frame(TEXT, r#"{"hello":{"device":"phone"}}"#)).await;
        Ok(raw)
    }

    /// As [`Self::unanswered`], and waits for Welcome.
    ///
    /// # Errors
    /// Returns an error if the node refuses the handshake.
    pub async fn session(stream: TcpStream, token: &str) -> Result<Self> {
        let mut raw = Self::unanswered(stream, token).await?;
        raw.read_until("welcome").await?;
        Ok(raw)
    }

    async fn request(&mut self, token: &str) -> Result<()> {
        let headers = format!(
            "Sec-WebSocket-Protocol: {}\r\nAuthorization: Bearer {token}\r\n",
            self.encoding.subprotocol()
        );
        Ok(self.stream.write_all(request("/v1/connect", &headers).as_bytes()).await?)
    }

    /// Sends bytes, as far as the node reads them: it need not read more once it has decided to close.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// The WebSocket of a socket whose handshake was accepted.
    pub fn upgraded(stream: TcpStream, encoding: Encoding) -> Self {
        Self { stream, encoding }
    }

    /// The same connection, and a second handle of its socket.
    ///
    /// # Errors
    /// Returns an error if the process has no room for another file.
    pub fn with_writer(self) -> Result<(Self, TcpStream)> {
        let stream = self.stream.into_std()?;
        let writer = TcpStream::from_std(stream.try_clone()?)?;
        Ok((Self { stream: TcpStream::from_std(stream)?, ..self }, writer))
    }

    /// Reads until `text` was sent, and drops what was read.
    ///
    /// # Errors
    /// Returns an error with what was read if the connection ends before.
    pub async fn read_until(&mut self, text: &str) -> Result<()> {
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains(text) {
            let count = self.stream.read_buf(&mut read).await?;
            ensure!(count > 0, "instead of {text}: {}", String::from_utf8_lossy(&read));
        }
        Ok(())
    }

    /// Reads a WebSocket frame: its first byte and its payload.
    async fn frame(&mut self) -> Result<(u8, Bytes)> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).await?;
        let length = match head[1] {
            126 => usize::from(self.stream.read_u16().await?),
            127 => usize::try_from(self.stream.read_u64().await?)?,
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await?;
        Ok((head[0], payload.into()))
    }

    /// Reads a frame of the protocol: its size in bytes and its content.
    ///
    /// # Errors
    /// Returns an error if none comes in time, or what comes is not one.
    pub async fn next(&mut self) -> Result<(usize, ServerFrame)> {
        let (first, payload) = timeout(PATIENCE, self.frame()).await.context("no frame")??;
        ensure!(first & 0x0f < 8, "a control frame: {first:#x}");
        Ok((payload.len(), decode_server(self.encoding, payload)?))
    }

    /// Reads Welcome.
    ///
    /// # Errors
    /// Returns an error if something else comes.
    pub async fn welcomed(&mut self) -> Result<()> {
        match self.next().await? {
            (_, ServerFrame::Welcome(_)) => Ok(()),
            (_, other) => bail!("{other:?} instead of a welcome"),
        }
    }

    /// Reads until the connection ends, and answers the node's Close frame.
    ///
    /// # Errors
    /// Returns an error if the connection does not end in time.
    pub async fn ended(mut self) -> Result<Ended> {
        let mut ended = Ended { code: 1006, text: String::new() };
        let reading = async {
            while let Ok((first, payload)) = self.frame().await {
                if first == CLOSE {
                    ended.code = payload.first_chunk().map_or(1005, |c| u16::from_be_bytes(*c));
                    if ended.text.is_empty() {
                        ended.text =
                            String::from_utf8_lossy(payload.get(2..).unwrap_or_default()).into();
                    }
                    self.send(&frame(CLOSE, &payload)).await;
                } else if first & 0x0f < 8
                    && let ServerFrame::Error(error) = decode_server(self.encoding, payload)?
                {
                    ended.text = error.text;
                }
            }
            Ok::<_, anyhow::Error>(())
        };
        timeout(PATIENCE + Duration::from_secs(5), reading).await.context("still open")??;
        Ok(ended)
    }

    /// Closes with 1000 and waits until the node has closed as well.
    ///
    /// # Errors
    /// Returns an error if the connection is broken.
    pub async fn close(mut self) -> Result<()> {
        self.send(&frame(CLOSE, 1000_u16.to_be_bytes())).await;
        self.stream.read_to_end(&mut Vec::new()).await?;
        Ok(())
    }
}

/// A session for each token, in any order.
///
/// # Errors
/// Returns an error if the node refuses one.
pub async fn sessions(
    address: SocketAddr,
    tokens: impl IntoIterator<Item = String>,
) -> Result<Vec<Raw>> {
    let (mut opening, mut sessions) = (JoinSet::new(), Vec::new());
    for token in tokens {
        opening.spawn(timeout(SESSION_LIMIT, async move {
            Raw::session(TcpStream::connect(address).await?, &token).await
        }));
        if opening.len() >= AT_ONCE {
            sessions.push(opening.join_next().await.context("none")????);
        }
    }
    while let Some(opened) = opening.join_next().await {
        sessions.push(opened???);
    }
    Ok(sessions)
}
