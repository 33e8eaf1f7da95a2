//! Which milestones of a message the business wants to hear of.

/// A set of receipt kinds; the bits are `1 << ReceiptKind` of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReceiptSet(pub u32);

/// No receipt of this name can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "receipt {0:?} cannot be asked for; accepted, duplicate, sent, acked, expired and exhausted can"
)]
pub struct UnknownReceipt(pub String);

impl ReceiptSet {
    /// It is in the mailbox.
    pub const ACCEPTED: Self = Self(1 << 1);
    /// Its id was accepted before.
    pub const DUPLICATE: Self = Self(1 << 2);
    /// Written to a device.
    pub const SENT: Self = Self(1 << 3);
    /// A device acknowledged it.
    pub const ACKED: Self = Self(1 << 4);
    /// A device was told to skip it, its time being over.
    pub const EXPIRED: Self = Self(1 << 5);
    /// No acknowledgement after the last re-send.
    pub const EXHAUSTED: Self = Self(1 << 6);

    /// Every kind that can be asked for.
    pub const ALL: Self = Self(0b0111_1110);

    /// Both sets' kinds.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every kind of `other` is asked for.
    pub fn wants(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}
