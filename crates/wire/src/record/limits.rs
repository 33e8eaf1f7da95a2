//! What an operator allows of a record.

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
    /// Arrays and objects inside each other in a JSON body.
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
    /// # Errors
    /// `users` are more than one record may name.
    pub(super) fn check_users(&self, users: usize) -> Result<(), Flaw> {
        if users > self.users_max {
            let reason = format!("`to.users` names more than {} users", self.users_max);
            return flaw(RefusalCode::TooManyUsers, reason);
        }
        Ok(())
    }
}
