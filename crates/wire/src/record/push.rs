//! A push record with checked types.

use std::sync::Arc;

use barid_core::{AppId, Audience, DeviceId, MessageId, Owner, ReceiptSet, UserId};
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
    pub to: Recipients,
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
        to: impl Into<Recipients>,
        kind: BodyKind,
        payload: impl Into<Bytes>,
    ) -> Self {
        Self {
            id,
            app,
            to: to.into(),
            kind,
            payload: payload.into(),
            ttl_ms: 0,
            collapse_key: None,
            receipts: ReceiptSet::default(),
        }
    }

    /// The key to produce the record with: its first user, or its audience, so that the records of each stay in order.
    pub fn key(&self) -> &str {
        match &self.to {
            Recipients::User { user, .. } => user.as_str(),
            Recipients::Users(users) => users.first().map_or("", UserId::as_str),
            Recipients::Audience(audience) => audience.as_str(),
        }
    }
}

/// Recipients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipients {
    /// One user.
    User {
        /// The user.
        user: UserId,
        /// Only this device of the user.
        device: Option<DeviceId>,
    },
    /// Several users, each once, in the order in which they were first named; at least one.
    Users(Vec<UserId>),
    /// A group, or everyone of the app: one mailbox for all of its members.
    Audience(Audience),
}

impl From<UserId> for Recipients {
    fn from(user: UserId) -> Self {
        Self::User { user, device: None }
    }
}

impl From<Audience> for Recipients {
    fn from(audience: Audience) -> Self {
        Self::Audience(audience)
    }
}

impl Recipients {
    /// The owners of the mailboxes that the message is stored in, in order.
    pub fn owners(&self) -> Vec<Owner> {
        match self {
            Self::User { user, .. } => vec![Owner::User(user.clone())],
            Self::Users(users) => users.iter().cloned().map(Owner::User).collect(),
            Self::Audience(audience) => vec![Owner::Audience(audience.clone())],
        }
    }

    /// The number of mailboxes that the message is stored in.
    pub fn mailboxes(&self) -> usize {
        match self {
            Self::Users(users) => users.len(),
            Self::User { .. } | Self::Audience(_) => 1,
        }
    }

    /// The only device that receives the message, if one was named.
    pub fn device(&self) -> Option<&DeviceId> {
        match self {
            Self::User { device, .. } => device.as_ref(),
            Self::Users(_) | Self::Audience(_) => None,
        }
    }
}
