//! A socket that sends any bytes, well formed or not, and reads what an access node answers.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use barid_testkit::device::PATIENCE;
use barid_wire::frames::{Encoding, ServerFrame, decode_server};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A handshake as clients send it, with further headers.
pub fn request(path: &str, headers: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
}

/// What is answered to these bytes: all of it, or up to the end of the handshake's head.
pub async fn http(address: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    // An answer may come, and the connection end, before everything was taken.
    let _ = stream.write_all(request).await;
    read_head(&mut stream).await
}

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

/// Opcodes, with the bit of a last fragment.
pub const CONTINUATION: u8 = 0x80;
pub const TEXT: u8 = 0x81;
pub const BINARY: u8 = 0x82;
pub const CLOSE: u8 = 0x88;
pub const PING: u8 = 0x89;
/// What to take away from an opcode for a fragment that is not the last.
pub const LAST: u8 = 0x80;
/// What to add for a frame that an extension compressed.
pub const COMPRESSED: u8 = 0x40;

/// A frame as clients send it, masked (with zeros).
pub fn frame(first: u8, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let mut bytes = announced(first, payload.len() as u64);
    bytes.extend_from_slice(payload);
    bytes
}

/// The head of a frame whose payload does not come.
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
    /// The close code; 1006 where none came.
    pub code: u16,
    /// The text of the Error frame before it; where there was none, its reason.
    pub text: String,
}

/// A WebSocket of one subprotocol.
pub struct Raw {
    stream: TcpStream,
    encoding: Encoding,
}

impl Raw {
    pub async fn open(address: SocketAddr, encoding: Encoding, token: &str) -> Result<Self> {
        let mut stream = TcpStream::connect(address).await?;
        let protocol = format!(
            "Sec-WebSocket-Protocol: {}\r\nAuthorization: Bearer {token}\r\n",
            encoding.subprotocol()
        );
        stream.write_all(request("/v1/connect", &protocol).as_bytes()).await?;
        let head = read_head(&mut stream).await?;
        anyhow::ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
        Ok(Self { stream, encoding })
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // A node that has read enough need not take the rest.
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next frame of a node: its opcode and payload.
    async fn next(&mut self) -> Result<(u8, Bytes)> {
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

    /// Waits for Welcome.
    pub async fn welcomed(&mut self) -> Result<()> {
        let (_, frame) = timeout(PATIENCE, self.next()).await??;
        match decode_server(self.encoding, frame)? {
            ServerFrame::Welcome(_) => Ok(()),
            other => bail!("{other:?} instead of a welcome"),
        }
    }

    /// Reads to the end of the connection; answers the close as a client does.
    pub async fn ended(mut self) -> Result<Ended> {
        let mut ended = Ended { code: 1006, text: String::new() };
        let reading = async {
            while let Ok((opcode, payload)) = self.next().await {
                if opcode == CLOSE {
                    ended.code = payload.first_chunk().map_or(1005, |c| u16::from_be_bytes(*c));
                    if ended.text.is_empty() {
                        ended.text =
                            String::from_utf8_lossy(payload.get(2..).unwrap_or_default()).into();
                    }
                    self.send(&frame(CLOSE, &payload)).await;
                } else if opcode & 0x0f < 8
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
}
