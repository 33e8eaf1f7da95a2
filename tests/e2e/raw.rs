//! Devices that are no more than a socket.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Handshakes at once.
const AT_ONCE: usize = 50;

/// One for each token, in any order.
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

/// A device that is welcomed and says no more; of its side, a socket.
pub async fn device(mut stream: TcpStream, token: &str) -> Result<TcpStream> {
    let address = stream.peer_addr()?;
    let request = format!(
        "GET /v1/connect HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: barid.v1.json\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    // One frame of text, masked with zeros.
    let hello = br#"{"hello":{"device":"phone"}}"#;
    let head = [0x81, 0x80 | hello.len() as u8, 0, 0, 0, 0];
    stream.write_all(&[&head[..], hello].concat()).await?;
    let mut answer = Vec::new();
    while !String::from_utf8_lossy(&answer).contains("welcome") {
        let read = stream.read_buf(&mut answer).await?;
        ensure!(read > 0, "{}", String::from_utf8_lossy(&answer));
    }
    Ok(stream)
}
