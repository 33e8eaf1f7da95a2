//! The kinds of receipts that a business can request.

/// A set of receipt kinds, with the bits `1 << ReceiptKind` of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReceiptSet(pub u32);

/// An unknown receipt kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "receipt {0:?} cannot be asked for; accepted, duplicate, sent, acked, expired and exhausted can"
)]
pub struct UnknownReceipt(pub String);

impl ReceiptSet {
    /// The message is in the mailbox.
    pub const ACCEPTED: Self = Self(1 << 1);
    /// A message with this id was accepted before.
    pub const DUPLICATE: Self = Self(1 << 2);
    /// The message was written to a device.
    pub const SENT: Self = Self(1 << 3);
    /// A device acknowledged the message.
    pub const ACKED: Self = Self(1 << 4);
    /// The message expired before a device received it.
    pub const EXPIRED: Self = Self(1 << 5);
    /// No acknowledgement after the last re-send.
    pub const EXHAUSTED: Self = Self(1 << 6);

    /// Every kind that can be asked for.
    pub const ALL: Self = Self(0b0111_1110);

    /// The union of two sets.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the set contains every kind of `other`.
    pub fn wants(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}
