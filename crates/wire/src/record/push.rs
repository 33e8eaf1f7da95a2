//! A push record with checked types.

use std::sync::Arc;

use barid_core::{AppId, DeviceId, MessageId, ReceiptSet, UserId};
use bytes::Bytes;

use crate::v1::BodyKind;

/// A push record. [`super::decode_push`] gives only valid ones; [`super::encode_push`] refuses others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// Message id.
    pub id: MessageId,
    /// Tenant.
    pub app: AppId,
    /// Recipients.
    pub audience: Audience,
    /// Type of the payload.
    pub kind: BodyKind,
    /// The body, not compressed; text and JSON are UTF-8.
    pub payload: Bytes,
    /// Time to live from acceptance, milliseconds, in whole seconds; 0: as long as the mailbox keeps it.
    pub ttl_ms: u64,
    /// Replaces an undelivered message that has the same key; not empty.
    pub collapse_key: Option<Arc<str>>,
    /// Receipts to produce.
    pub receipts: ReceiptSet,
}

impl Push {
    /// A record without options.
    pub fn new(
        id: MessageId,
        app: AppId,
        audience: impl Into<Audience>,
        kind: BodyKind,
        payload: impl Into<Bytes>,
    ) -> Self {
        Self {
            id,
            app,
            audience: audience.into(),
            kind,
            payload: payload.into(),
            ttl_ms: 0,
            collapse_key: None,
            receipts: ReceiptSet::default(),
        }
    }

    /// The key to produce the record with: its first user, so that a user's records stay in order.
    pub fn key(&self) -> &str {
        self.audience.users().first().map_or("", UserId::as_str)
    }
}

/// Recipients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audience {
    /// One user.
    User {
        /// The user.
        user: UserId,
        /// Only this device of the user.
        device: Option<DeviceId>,
    },
    /// Several users, each once, in the order in which they were first named; at least one.
    Users(Vec<UserId>),
}

impl From<UserId> for Audience {
    fn from(user: UserId) -> Self {
        Self::User { user, device: None }
    }
}

impl Audience {
    /// The users, in order.
    pub fn users(&self) -> &[UserId] {
        match self {
            Self::User { user, .. } => std::slice::from_ref(user),
            Self::Users(users) => users,
        }
    }

    /// The only device that receives the message, if one was named.
    pub fn device(&self) -> Option<&DeviceId> {
        match self {
            Self::User { device, .. } => device.as_ref(),
            Self::Users(_) => None,
        }
    }
}
