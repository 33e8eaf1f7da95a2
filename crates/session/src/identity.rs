//! The identity of a session, from its token and its Hello.

use std::sync::Arc;

use barid_core::mailbox::UserKey;
use barid_core::{Attempt, DeviceId, GroupId};

/// The claims of a valid token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The user, from the claims `app` and `sub`.
    pub user: UserKey,
    /// The only device that may use the token; `None`: any device of the user.
    pub device: Option<DeviceId>,
    /// When the token expires, seconds since the Unix epoch.
    pub expires_s: u64,
    /// The groups that the session may subscribe to.
    pub groups: Vec<GroupId>,
    /// Fingerprint of the token, for revocations.
    pub token: TokenFingerprint,
    /// An `iat` that is too far ahead of the node's clock, seconds since the Unix epoch. The fingerprint has none then.
    pub issued_ahead_s: Option<u32>,
}

/// What revocations match a token by, in 24 bytes, because each session keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokenFingerprint {
    /// When it was issued (`iat`), seconds since the Unix epoch; 0: it has no `iat`, or one in the future.
    pub issued_s: u32,
    /// Hash of its app and its id (`jti`); 0: it has none.
    pub id: u64,
    /// Hash of the id of the key that has verified it; 0: the key has none.
    pub key: u64,
}

/// The identity of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: UserKey,
    /// The device.
    pub device: DeviceId,
    /// The connection attempt.
    pub attempt: Attempt,
    /// The platform in Hello.
    pub platform: Arc<str>,
}
