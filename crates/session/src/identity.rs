//! Who connects: what a valid token grants, and whom a Hello names.

use std::sync::Arc;

use barid_core::{Attempt, DeviceId, GroupId};
use barid_mailbox::UserKey;

/// What a valid token grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Claims `app` and `sub`.
    pub user: UserKey,
    /// The only device that may use the token; `None`: any device of the user.
    pub device: Option<DeviceId>,
    /// When the token expires, seconds since the Unix epoch.
    pub expires_s: u64,
    /// The groups that the session may subscribe to.
    pub groups: Vec<GroupId>,
}

/// Who is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Whose mailbox.
    pub user: UserKey,
    /// Which device.
    pub device: DeviceId,
    /// Its connection attempt.
    pub attempt: Attempt,
    /// What it says it runs on.
    pub platform: Arc<str>,
}
