//! Reads an admin endpoint: the role's metrics, and why it is not ready.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_runtime::exposition::Metrics;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// For both requests to an endpoint.
const LIMIT: Duration = Duration::from_secs(2);
/// Largest answer; a role's metrics take about 50 KB.
const ANSWER_BYTES_MAX: u64 = 8 << 20;

/// The answers of an endpoint.
#[derive(Debug, Clone)]
pub struct Scrape {
    pub at: Instant,
    pub metrics: Metrics,
    /// `condition: reason` for each failing condition; empty if the role is ready.
    pub not_ready: Vec<String>,
}

/// Reads an endpoint.
///
/// # Errors
/// Returns an error if it does not answer in time, or is not Barid's.
pub async fn scrape(address: &str) -> anyhow::Result<Scrape> {
    let asked = async {
        let (status, text) = get(address, "/metrics").await?;
        if status != 200 {
            bail!("/metrics answers {status}");
        }
        let metrics = Metrics::parse(&text);
        if metrics.role().is_none() {
            bail!("not an admin endpoint of Barid");
        }
        let (status, reasons) = get(address, "/readyz").await?;
        let not_ready = match status {
            200 => Vec::new(),
            _ => reasons.lines().map(str::to_owned).collect(),
        };
        Ok(Scrape { at: Instant::now(), metrics, not_ready })
    };
    timeout(LIMIT, asked).await.unwrap_or_else(|_| bail!("no answer within {} s", LIMIT.as_secs()))
}

async fn get(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    // HTTP/1.0: the body is not chunked and ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.context("not an HTTP answer")?, body.to_owned()))
}
