//! Limits on the frames and bytes per second that a device sends, charged as they are read. They take eight bytes per
//! session.

use std::time::Duration;

use crate::admission::Rate;
use crate::config::LimitsConfig;
use crate::labels::Limit;
use crate::socket::Received;

/// The limits.
#[derive(Debug)]
pub struct Upstream {
    frames: Rate,
    bytes: Rate,
}

/// A session's token buckets.
#[derive(Debug, Default)]
pub struct Spent {
    frames_full_at_us: u32,
    bytes_full_at_us: u32,
}

/// A device has exceeded a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    /// The limit.
    pub limit: Limit,
    /// Reason for the Error frame.
    pub text: &'static str,
}

impl Upstream {
    /// Creates the limits from the configuration.
    pub fn new(limits: &LimitsConfig) -> Self {
        let burst = Duration::from_secs(limits.upstream_burst_seconds);
        Self {
            frames: Rate::new(limits.upstream_frames_per_second.into(), burst),
            bytes: Rate::new(limits.upstream_bytes_per_second.into(), burst),
        }
    }

    /// Charges what was received. `now_us` is called only if a limit is configured and something was received.
    ///
    /// # Errors
    /// The device exceeds a limit.
    pub fn charge(
        &self,
        spent: &mut Spent,
        received: Received,
        now_us: impl FnOnce() -> u64,
    ) -> Result<(), Exceeded> {
        let is_limited = self.frames.is_limited() || self.bytes.is_limited();
        if !is_limited || received == Received::default() {
            return Ok(());
        }
        let now_us = now_us();
        let (frames, bytes) = (received.frames.into(), received.bytes as u64);
        if !self.frames.acquire_packed(&mut spent.frames_full_at_us, now_us, frames) {
            let text = "the device exceeds its limit of frames per second";
            return Err(Exceeded { limit: Limit::UpstreamFrames, text });
        }
        if !self.bytes.acquire_packed(&mut spent.bytes_full_at_us, now_us, bytes) {
            let text = "the device exceeds its limit of bytes per second";
            return Err(Exceeded { limit: Limit::UpstreamBytes, text });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(frames: u32, bytes: u32) -> Upstream {
        Upstream::new(&LimitsConfig {
            upstream_frames_per_second: frames,
            upstream_bytes_per_second: bytes,
            upstream_burst_seconds: 2,
            ..Default::default()
        })
    }

    #[test]
    fn frames_and_bytes_each_have_a_limit() {
        let mut spent = Spent::default();
        let both = upstream(5, 1000);
        let sent =
            |spent: &mut Spent, bytes, at| both.charge(spent, Received { frames: 1, bytes }, || at);
        assert_eq!((0..50).filter(|_| sent(&mut spent, 1, 9).is_ok()).count(), 10);
        assert_eq!(sent(&mut spent, 1, 9).unwrap_err().limit, Limit::UpstreamFrames);
        let later = 60_000_000;
        assert_eq!(sent(&mut spent, 1500, later), Ok(()));
        assert_eq!(sent(&mut spent, 501, later).unwrap_err().limit, Limit::UpstreamBytes);
        let half = Received { frames: 0, bytes: 1500 };
        assert_eq!(
            both.charge(&mut spent, half, || later).unwrap_err().limit,
            Limit::UpstreamBytes
        );
        let clock = || panic!("no clock is asked");
        let (none, huge) = (upstream(0, 0), Received { frames: u32::MAX, bytes: usize::MAX });
        assert_eq!(none.charge(&mut spent, huge, clock), Ok(()));
        assert_eq!(both.charge(&mut spent, Received::default(), clock), Ok(()));
    }
}
