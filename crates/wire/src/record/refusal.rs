//! Refusals of records.

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $word:literal),* $(,)?) => {
        /// Why a record was refused: the `code` of its receipt and of its dead letter. Words are stable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum RefusalCode {
            $($(#[$doc])* $code),*
        }

        impl RefusalCode {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$code),*];

            /// The stable word.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$code => $word),*
                }
            }
        }
    };
}

codes! {
    /// The record has no value (a tombstone).
    EmptyRecord = "empty_record",
    /// Not a push record in protobuf.
    BadProtobuf = "bad_protobuf",
    /// Not JSON, or not a JSON object.
    BadJson = "bad_json",
    /// JSON with an unknown field.
    UnknownField = "unknown_field",
    /// JSON with a repeated field.
    RepeatedField = "repeated_field",
    /// A field has a value of the wrong type.
    BadValue = "bad_value",
    /// `id` or `app` is missing.
    MissingField = "missing_field",
    /// The id is too long or has control characters.
    BadId = "bad_id",
    /// The app is invalid.
    BadApp = "bad_app",
    /// A user is invalid.
    BadUser = "bad_user",
    /// A group is invalid.
    BadGroup = "bad_group",
    /// The device is invalid, or given without `user`.
    BadDevice = "bad_device",
    /// None of `user`, `users`, `group` and `everyone` is given.
    NoAudience = "no_audience",
    /// More than one of `user`, `users`, `group` and `everyone` is given.
    TwoAudiences = "two_audiences",
    /// Too many users.
    TooManyUsers = "too_many_users",
    /// The number of users times the size of the payload is too large.
    FanoutTooLarge = "fanout_too_large",
    /// None of `text`, `json` and `data` is given.
    NoBody = "no_body",
    /// More than one of `text`, `json` and `data` is given.
    TwoBodies = "two_bodies",
    /// `data` is not base64.
    BadBase64 = "bad_base64",
    /// `json` is not JSON.
    BadJsonBody = "bad_json_body",
    /// The JSON body is nested too deeply.
    TooDeep = "too_deep",
    /// The payload is too large.
    PayloadTooLarge = "payload_too_large",
    /// The time to live is negative.
    NegativeTtl = "negative_ttl",
    /// The time to live is too long.
    TtlTooLong = "ttl_too_long",
    /// The collapse key is too long or has control characters.
    BadCollapseKey = "bad_collapse_key",
    /// A receipt that cannot be asked for.
    UnknownReceipt = "unknown_receipt",
    /// A receipt of single devices, for a group or everyone.
    ReceiptForMany = "receipt_for_many",
}

/// The refusal of a record, with the names that its receipt needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", code.as_str())]
pub struct Refusal {
    /// The stable word.
    pub code: RefusalCode,
    /// The field, and what is wrong with it.
    pub reason: String,
    /// The record's id, cut to the longest allowed; empty if it could not be decoded.
    pub id: String,
    /// The record's app, likewise.
    pub app: String,
    /// The record's user, likewise.
    pub user: String,
    /// The record's group, likewise, or `everyone`.
    pub mailbox: Box<str>,
}

/// The code and the reason of a refusal.
pub(super) type Flaw = (RefusalCode, String);

pub(super) fn flaw<T>(code: RefusalCode, reason: impl Into<String>) -> Result<T, Flaw> {
    Err((code, reason.into()))
}
