//! An HTTP client for the admin endpoints of roles.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// GET `path`; gives the status and the body.
///
/// # Errors
/// Returns an error if there is no answer within 5 s.
pub async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let (status, _, body) = get_whole(address, path).await?;
    Ok((status, body))
}

/// GET `path`; gives the status, the head and the body.
///
/// # Errors
/// As [`get`].
pub async fn get_whole(address: SocketAddr, path: &str) -> Result<(u16, String, String)> {
    tokio::time::timeout(Duration::from_secs(5), exchange(address, path))
        .await
        .with_context(|| format!("http://{address}{path} does not answer"))?
}

async fn exchange(address: SocketAddr, path: &str) -> Result<(u16, String, String)> {
    let mut stream = TcpStream::connect(address).await?;
    // HTTP/1.0: the body ends with the connection, and comes in one piece.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    Ok((status.with_context(|| head.to_owned())?, head.to_owned(), body.to_owned()))
}
