//! Why a record is refused.

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $word:literal),* $(,)?) => {
        /// Why a record was refused: the `code` of its receipt and of its dead letter. A word keeps
        /// its meaning for ever.
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
    /// No bytes at all (a tombstone).
    EmptyRecord = "empty_record",
    /// Not protobuf of a push record.
    BadProtobuf = "bad_protobuf",
    /// Not JSON, or not a JSON object.
    BadJson = "bad_json",
    /// JSON names a field that does not exist.
    UnknownField = "unknown_field",
    /// JSON names a field twice.
    RepeatedField = "repeated_field",
    /// A field has a value of another type.
    BadValue = "bad_value",
    /// `id` or `app` is not there.
    MissingField = "missing_field",
    /// The id is too long or has control characters.
    BadId = "bad_id",
    /// The app's name is no name.
    BadApp = "bad_app",
    /// A user's name is no name.
    BadUser = "bad_user",
    /// The device's name is no name, or stands beside `users`.
    BadDevice = "bad_device",
    /// Nobody is named.
    NoAudience = "no_audience",
    /// Both `user` and `users`.
    TwoAudiences = "two_audiences",
    /// More users than a record may have.
    TooManyUsers = "too_many_users",
    /// Users times payload is too much.
    FanoutTooLarge = "fanout_too_large",
    /// None of `text`, `json`, `data`.
    NoBody = "no_body",
    /// More than one of `text`, `json`, `data`.
    TwoBodies = "two_bodies",
    /// `data` is not base64.
    BadBase64 = "bad_base64",
    /// `json` is not JSON.
    BadJsonBody = "bad_json_body",
    /// The JSON body nests too deep.
    TooDeep = "too_deep",
    /// The payload is larger than the operator allows.
    PayloadTooLarge = "payload_too_large",
    /// A time to live below zero.
    NegativeTtl = "negative_ttl",
    /// A time to live longer than the operator allows.
    TtlTooLong = "ttl_too_long",
    /// The collapse key is too long or has control characters.
    BadCollapseKey = "bad_collapse_key",
    /// A receipt that cannot be asked for.
    UnknownReceipt = "unknown_receipt",
}

/// A record that was refused, and as much of it as could be read, so that its receipt finds home.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", code.as_str())]
pub struct Refusal {
    /// The stable word.
    pub code: RefusalCode,
    /// For people: which field, and what was wrong with it.
    pub reason: String,
    /// The record's id where it could be read, else empty; cut to the longest allowed.
    pub id: String,
    /// Its app, likewise.
    pub app: String,
    /// Its user, likewise.
    pub user: String,
}

/// A code and a reason, before it is known whose.
pub(super) type Flaw = (RefusalCode, String);

pub(super) fn flaw<T>(code: RefusalCode, reason: impl Into<String>) -> Result<T, Flaw> {
    Err((code, reason.into()))
}
