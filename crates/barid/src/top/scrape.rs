//! Reads an admin endpoint: the role's metrics, and why it is not ready.

use std::io;
use std::time::{Duration, Instant};

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

/// Why an endpoint cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unread {
    /// The connection fails.
    Network(io::ErrorKind),
    /// It does not answer in time.
    Silent,
    /// It is not Barid's.
    Foreign,
    /// None was given, and none answers at the usual places.
    Nowhere,
}

/// An endpoint cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ScrapeError {
    pub why: Unread,
    text: String,
}

impl ScrapeError {
    pub fn new(why: Unread, text: impl Into<String>) -> Self {
        Self { why, text: text.into() }
    }

    fn foreign(text: impl Into<String>) -> Self {
        Self::new(Unread::Foreign, text)
    }
}

impl From<io::Error> for ScrapeError {
    fn from(error: io::Error) -> Self {
        let text = match error.kind() {
            io::ErrorKind::ConnectionRefused => "connection refused: no role listens there".into(),
            _ => error.to_string(),
        };
        Self::new(Unread::Network(error.kind()), text)
    }
}

/// Reads an endpoint.
///
/// # Errors
/// Returns an error if it does not answer in time, or is not Barid's.
pub async fn scrape(address: &str) -> Result<Scrape, ScrapeError> {
    let asked = async {
        let (status, text) = get(address, "/metrics").await?;
        if status != 200 {
            return Err(ScrapeError::foreign(format!("/metrics answers {status}")));
        }
        let metrics = Metrics::parse(&text);
        if metrics.role().is_none() {
            return Err(ScrapeError::foreign("not an admin endpoint of Barid"));
        }
        let (status, reasons) = get(address, "/readyz").await?;
        let not_ready = match status {
            200 => Vec::new(),
            _ => reasons.lines().map(str::to_owned).collect(),
        };
        Ok(Scrape { at: Instant::now(), metrics, not_ready })
    };
    let silent = || {
        let text = format!("no answer within {} s", LIMIT.as_secs());
        Err(ScrapeError::new(Unread::Silent, text))
    };
    timeout(LIMIT, asked).await.unwrap_or_else(|_| silent())
}

async fn get(address: &str, path: &str) -> Result<(u16, String), ScrapeError> {
    let mut stream = TcpStream::connect(address).await?;
    // HTTP/1.0: the body is not chunked and ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let parsed = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    });
    parsed.ok_or_else(|| ScrapeError::foreign("not an HTTP answer; name a role's admin port"))
}
