//! Devices that are sockets: JSON text frames written and searched as bytes, so that thousands of them cost a test next
//! to nothing.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Handshakes at once.
const AT_ONCE: usize = 50;

/// Connects one device for each token, 50 at once; they come in any order.
///
/// # Errors
/// A handshake or Hello is refused, or takes more than 60 s.
pub async fn devices(
    address: SocketAddr,
    tokens: impl IntoIterator<Item = String>,
) -> Result<Vec<TcpStream>> {
    let (mut opening, mut devices) = (JoinSet::new(), Vec::new());
    for token in tokens {
        opening.spawn(timeout(Duration::from_secs(60), async move {
            device(TcpStream::connect(address).await?, &token).await
        }));
        if opening.len() >= AT_ONCE {
            devices.push(opening.join_next().await.context("none")????);
        }
    }
    while let Some(opened) = opening.join_next().await {
        devices.push(opened???);
    }
    Ok(devices)
}

/// Opens a session on a connected socket and waits for Welcome.
///
/// # Errors
/// The handshake or Hello is refused.
pub async fn device(mut stream: TcpStream, token: &str) -> Result<TcpStream> {
    open(&mut stream, token).await?;
    hear(&mut stream, "welcome").await?;
    Ok(stream)
}

/// Writes the handshake and Hello; waits for no answer.
///
/// # Errors
/// The connection is closed.
pub async fn open(stream: &mut TcpStream, token: &str) -> Result<()> {
    let address = stream.peer_addr()?;
    let request = format!(
        "GET /v1/connect HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: barid.v1.json\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    say(stream, r#"{"hello":{"device":"phone"}}"#).await
}

/// Writes a text frame of 125 bytes at most.
///
/// # Errors
/// It is longer, or the connection is closed.
pub async fn say(stream: &mut TcpStream, text: &str) -> Result<()> {
    write(stream, 0x81, text.as_bytes()).await
}

/// Reads until `text` has come. The rest of what was read with it is dropped.
///
/// # Errors
/// The connection ends first.
pub async fn hear(stream: &mut TcpStream, text: &str) -> Result<()> {
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains(text) {
        let read = stream.read_buf(&mut heard).await?;
        ensure!(read > 0, "instead of {text}: {}", String::from_utf8_lossy(&heard));
    }
    Ok(())
}

/// Writes a close frame with code 1000 and reads until the node closes.
///
/// # Errors
/// The connection breaks.
pub async fn close(mut stream: TcpStream) -> Result<()> {
    write(&mut stream, 0x88, &1000_u16.to_be_bytes()).await?;
    stream.read_to_end(&mut Vec::new()).await?;
    Ok(())
}

/// A frame masked with zeros.
async fn write(stream: &mut TcpStream, kind: u8, payload: &[u8]) -> Result<()> {
    ensure!(payload.len() <= 125, "{} bytes", payload.len());
    let head = [kind, 0x80 | payload.len() as u8, 0, 0, 0, 0];
    Ok(stream.write_all(&[&head[..], payload].concat()).await?)
}
