//! The limits of a record.

use barid_core::limits::{PAYLOAD_BYTES_MAX, TTL_SECONDS_MAX};

use super::refusal::{Flaw, RefusalCode, flaw};

/// Bounds of a record, set by the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordLimits {
    /// Bytes of a payload before compression.
    pub payload_bytes_max: usize,
    /// Users of one record, after repeated ones are dropped.
    pub users_max: usize,
    /// Users times payload bytes of one record.
    pub fanout_bytes_max: usize,
    /// Depth of a JSON body: arrays and objects inside each other.
    pub json_depth_max: usize,
    /// The longest time to live in seconds; below 2^43, so that milliseconds stay below 2^53.
    pub ttl_seconds_max: u64,
}

impl Default for RecordLimits {
    fn default() -> Self {
        Self {
            payload_bytes_max: 64 * 1024,
            users_max: 1000,
            fanout_bytes_max: 8 * 1024 * 1024,
            json_depth_max: 60,
            ttl_seconds_max: 366 * 24 * 3600,
        }
    }
}

impl RecordLimits {
    /// The highest limits that a cluster can be configured with: what they refuse, every cluster refuses.
    pub const HIGHEST: Self = Self {
        payload_bytes_max: PAYLOAD_BYTES_MAX,
        users_max: 100_000,
        fanout_bytes_max: 1 << 30,
        json_depth_max: 10_000,
        ttl_seconds_max: TTL_SECONDS_MAX,
    };

    /// # Errors
    /// Returns a flaw if a record names too many users.
    pub(super) fn check_users(&self, users: usize) -> Result<(), Flaw> {
        if users > self.users_max {
            let reason = format!("`to.users` names more than {} users", self.users_max);
            return flaw(RefusalCode::TooManyUsers, reason);
        }
        Ok(())
    }
}
