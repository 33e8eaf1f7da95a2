//! A push record as the rest of Barid reads it.

use std::sync::Arc;

use barid_core::{AppId, DeviceId, MessageId, ReceiptSet, UserId};
use bytes::Bytes;

use crate::v1::BodyKind;

/// A record that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// The business's name of it.
    pub id: MessageId,
    /// The tenant.
    pub app: AppId,
    /// Who it is for.
    pub audience: Audience,
    /// How applications read the payload.
    pub kind: BodyKind,
    /// The payload, not compressed. JSON stands as it was written.
    pub payload: Bytes,
    /// Life from acceptance in milliseconds; 0: as long as the mailbox keeps it.
    pub ttl_ms: u64,
    /// A newer message with the same key takes its place while it waits.
    pub collapse_key: Option<Arc<str>>,
    /// Which receipts the business wants.
    pub receipts: ReceiptSet,
}

/// Who a message is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audience {
    /// One user.
    User {
        /// The user.
        user: UserId,
        /// Only this device of theirs.
        device: Option<DeviceId>,
    },
    /// Several users, each once, in the order in which they were first named; at least one.
    Users(Vec<UserId>),
}

impl Audience {
    /// The users, in order.
    pub fn users(&self) -> &[UserId] {
        match self {
            Self::User { user, .. } => std::slice::from_ref(user),
            Self::Users(users) => users,
        }
    }

    /// The only device that it is for.
    pub fn device(&self) -> Option<&DeviceId> {
        match self {
            Self::User { device, .. } => device.as_ref(),
            Self::Users(_) => None,
        }
    }
}
