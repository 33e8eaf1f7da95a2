//! Bounds and times of the streams between roles.

use std::time::Duration;

use barid_core::Backoff;
use barid_core::limits::PAYLOAD_BYTES_MAX;
use barid_runtime::bounds::{self, Bound, Bounded, HOUR_MS, whole};
use serde::{Deserialize, Serialize};

/// Bounds and timeouts of one stream to one peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    /// Maximum unanswered batches.
    pub window_batches: usize,
    /// Maximum items of a batch.
    pub batch_items_max: usize,
    /// Maximum bytes of a batch; a larger item is sent alone.
    pub batch_bytes_max: usize,
    /// Maximum queued items.
    pub queue_items_max: usize,
    /// Maximum bytes of queued items.
    pub queue_bytes_max: usize,
    /// Timeout of a batch, ms; the stream is closed after it.
    pub reply_timeout_ms: u64,
    /// Timeout for connecting and opening the stream, ms.
    pub connect_timeout_ms: u64,
    /// Idle time before an HTTP/2 ping is sent, ms; it detects half-open connections.
    pub keepalive_interval_ms: u64,
    /// Timeout of a ping, ms; the connection is closed after it.
    pub keepalive_timeout_ms: u64,
    /// First wait before a reconnect, ms; doubles with each failure.
    pub reconnect_base_ms: u64,
    /// Maximum wait before a reconnect, ms.
    pub reconnect_max_ms: u64,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            window_batches: 8,
            batch_items_max: 512,
            batch_bytes_max: 1 << 20,
            queue_items_max: 8192,
            queue_bytes_max: 32 << 20,
            reply_timeout_ms: 5000,
            connect_timeout_ms: 2000,
            keepalive_interval_ms: 2000,
            keepalive_timeout_ms: 3000,
            reconnect_base_ms: 50,
            reconnect_max_ms: 2000,
        }
    }
}

/// The largest message that a peer takes by default (gRPC's 4 MiB), less room for one more item.
const BATCH_BYTES_LIMIT: u64 = 3 << 20;
/// Maximum of a timeout, ms.
const WAIT_MS_MAX: u64 = HOUR_MS / 6;

impl Bounded for LinkConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("window_batches", 1..=10_000, ""),
            whole("batch_items_max", 1..=100_000, ""),
            whole("batch_bytes_max", 1..=BATCH_BYTES_LIMIT, "bytes"),
            whole("queue_items_max", 1..=10_000_000, ""),
            whole("queue_bytes_max", PAYLOAD_BYTES_MAX as u64..=u32::MAX.into(), "bytes"),
            whole("reply_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("connect_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("keepalive_interval_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("keepalive_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("reconnect_base_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("reconnect_max_ms", 1..=WAIT_MS_MAX, "ms"),
        ]
    }
}

impl Bounded for MeshConfig {
    fn bounds() -> Vec<Bound> {
        let own = vec![whole("push_wait_ms", 0..=WAIT_MS_MAX, "ms")];
        [own, bounds::within::<LinkConfig>("link")].concat()
    }
}

impl LinkConfig {
    /// # Errors
    /// Returns the first violated bound, with its key.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        if self.batch_bytes_max > self.queue_bytes_max {
            return Err("batch_bytes_max must be at most queue_bytes_max".into());
        }
        self.reconnect().map(drop)
    }

    /// The backoff between reconnects.
    ///
    /// # Errors
    /// Returns an error if the two waits contradict each other.
    pub fn reconnect(&self) -> Result<Backoff, String> {
        let base = Duration::from_millis(self.reconnect_base_ms);
        Backoff::new(base, Duration::from_millis(self.reconnect_max_ms), 0.5)
            .map_err(|e| format!("reconnect_base_ms and reconnect_max_ms: {e}"))
    }

    pub(crate) fn reply_timeout(&self) -> Duration {
        Duration::from_millis(self.reply_timeout_ms)
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }
}

/// The purgers' and delayers' streams to the dispatchers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MeshConfig {
    /// Maximum wait of a push for room in its dispatcher's queue, or for any dispatcher, ms. Then it is dropped, and
    /// the retry timer re-sends the message.
    pub push_wait_ms: u64,
    /// Each stream.
    pub link: LinkConfig,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self { push_wait_ms: 1000, link: LinkConfig::default() }
    }
}

impl MeshConfig {
    /// # Errors
    /// Returns the first violated bound, with its key.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        self.link.check().map_err(|e| format!("link.{e}"))
    }

    pub(crate) fn push_wait(&self) -> Duration {
        Duration::from_millis(self.push_wait_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_that_make_no_sense_are_named() {
        assert_eq!(MeshConfig::default().check(), Ok(()));
        let config = LinkConfig { window_batches: 0, ..Default::default() };
        assert_eq!(
            config.check().unwrap_err(),
            "window_batches: 0 is out of range; write 1 to 10000"
        );
        let config = LinkConfig { reconnect_max_ms: 1, ..Default::default() };
        assert_eq!(
            config.check().unwrap_err(),
            "reconnect_base_ms and reconnect_max_ms: max must not be below base"
        );
    }
}
