//! The validated settings of a client.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use barid_core::InvalidName;
use tokio_tungstenite::tungstenite::http::Uri;

use crate::event::Event;
use crate::store::PositionStore;
use crate::token::TokenSource;
use crate::trust::Trust;

/// Upper bound of all waits.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Upper bound of a decompressed body, bytes.
pub(crate) const BODY_BYTES_LIMIT: usize = 1 << 30;

/// The durations in a client's settings.
#[derive(Debug, Clone)]
pub(crate) struct Timing {
    pub(crate) reconnect_min: Duration,
    pub(crate) reconnect_max: Duration,
    pub(crate) connect: Duration,
    pub(crate) ack_delay: Duration,
    pub(crate) shutdown: Duration,
}

/// The settings of a running client.
pub(crate) struct Settings {
    pub(crate) uri: Uri,
    pub(crate) device: String,
    pub(crate) platform: String,
    pub(crate) token: TokenSource,
    pub(crate) store: Option<Arc<dyn PositionStore>>,
    pub(crate) on_event: Arc<dyn Fn(Event) + Send + Sync>,
    pub(crate) timing: Timing,
    pub(crate) body_bytes_max: usize,
    pub(crate) ping_interval_ms: u32,
    /// The zone whose nodes the server is asked for.
    pub(crate) zone: Option<String>,
    /// Replaces the public authorities.
    pub(crate) trust: Option<Trust>,
}

/// Why a client cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidBuilder {
    /// The URL does not name a server.
    #[error("url {url:?} is not one of ws://HOST:PORT or wss://HOST: {problem}")]
    Url {
        /// The URL.
        url: String,
        /// The reason.
        problem: String,
    },
    /// A setting is out of range.
    #[error("{what} is out of range: {allowed}")]
    OutOfRange {
        /// The builder's method.
        what: &'static str,
        /// The allowed range.
        allowed: &'static str,
    },
    /// The device's name is invalid.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The certificates to trust cannot be used.
    #[error("cannot use the root certificates: {0}")]
    Certificates(String),
    /// No token callback was given.
    #[error("no token: call Builder::token")]
    NoToken,
    /// The stored position cannot be read.
    #[error("cannot read the stored position: {0}")]
    Store(#[source] io::Error),
}

impl Timing {
    /// # Errors
    /// A duration is out of its bounds.
    pub(crate) fn check(&self) -> Result<(), InvalidBuilder> {
        let (what, allowed) = ("reconnect_between", "1 ms to a day, the lower one first");
        if self.reconnect_min > self.reconnect_max {
            return Err(InvalidBuilder::OutOfRange { what, allowed });
        }
        let (least, none) = (Duration::from_millis(1), Duration::ZERO);
        let day = "up to a day";
        let bounds = [
            (self.reconnect_min, least, what, allowed),
            (self.reconnect_max, least, what, allowed),
            (self.connect, least, "connect_timeout", "1 ms to a day"),
            (self.ack_delay, none, "ack_delay", day),
            (self.shutdown, none, "shutdown_timeout", day),
        ];
        match bounds.into_iter().find(|(time, min, ..)| time < min || *time > TIME_MAX) {
            Some((_, _, what, allowed)) => Err(InvalidBuilder::OutOfRange { what, allowed }),
            None => Ok(()),
        }
    }
}

/// Checks a URL, and completes its path.
pub(crate) fn address(url: &str) -> Result<Uri, InvalidBuilder> {
    let invalid = |problem: String| InvalidBuilder::Url { url: url.into(), problem };
    let uri: Uri = url.parse().map_err(|e| invalid(format!("{e}")))?;
    if !matches!(uri.scheme_str(), Some("ws" | "wss")) {
        return Err(invalid("the scheme is neither ws nor wss".into()));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(invalid("it names no host".into()));
    }
    if uri.path() != "/" {
        return Ok(uri);
    }
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut parts = uri.into_parts();
    let path = format!("/v1/connect{query}");
    parts.path_and_query = Some(path.parse().map_err(|e| invalid(format!("{e}")))?);
    Uri::from_parts(parts).map_err(|e| invalid(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_completed_or_refused_with_the_reason() {
        let complete = |url: &str| address(url).map(|uri| uri.to_string());
        assert_eq!(complete("ws://h:7080").unwrap(), "ws://h:7080/v1/connect");
        assert_eq!(complete("wss://h/?a=b").unwrap(), "wss://h/v1/connect?a=b");
        assert_eq!(complete("ws://h/other").unwrap(), "ws://h/other");
        let refused = complete("http://h").unwrap_err().to_string();
        assert!(refused.contains("neither ws nor wss"), "{refused}");
        assert!(complete("nonsense").is_err() && complete("").is_err());
    }
}
