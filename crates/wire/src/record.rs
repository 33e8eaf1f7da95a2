//! What businesses produce to `barid.push`, and what Barid produces to `barid.receipts`: protobuf or
//! JSON on the wire, checked types inside. A record is refused with a word that never changes and a
//! reason for people; whatever the bytes are, nothing here panics or allocates beyond its limits.

mod json;
mod receipt;

use std::collections::HashSet;
use std::sync::Arc;

use barid_core::{AppId, DeviceId, MessageId, ReceiptSet, UserId, limits};
use bytes::Bytes;
use prost::Message as _;

pub use self::receipt::{ReceiptError, decode_receipt, encode_receipt};
use crate::cut;
pub use crate::v1::{BodyKind, ReceiptKind};
use crate::v1::{PushRecord, push_record::Body};

/// How a record is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JSON text, in the proto3 JSON mapping.
    Json,
    /// Protobuf.
    Protobuf,
}

/// The header that names a record's format.
pub const CONTENT_TYPE: &str = "content-type";

impl Format {
    /// The value of the `content-type` header.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Protobuf => "application/x-protobuf",
        }
    }

    /// What a `content-type` header says; `None` where it names neither format, as `text/plain`.
    pub fn of_content_type(value: &[u8]) -> Option<Self> {
        let value = std::str::from_utf8(value).ok()?;
        let media = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match media.as_str() {
            "application/x-protobuf"
            | "application/protobuf"
            | "application/vnd.google.protobuf" => Some(Self::Protobuf),
            "application/json" => Some(Self::Json),
            other => other.ends_with("+json").then_some(Self::Json),
        }
    }
}

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
type Flaw = (RefusalCode, String);

fn flaw<T>(code: RefusalCode, reason: impl Into<String>) -> Result<T, Flaw> {
    Err((code, reason.into()))
}

/// Decodes and checks a record's value. `content_type` is the header of that name, if there is one.
///
/// # Errors
/// What is wrong with it, by the first flaw found.
pub fn decode_push(
    value: &Bytes,
    content_type: Option<&[u8]>,
    limits: &RecordLimits,
) -> Result<Push, Refusal> {
    // Whatever was read before the flaw names the record in its receipt.
    let mut record = PushRecord::default();
    let result =
        read(value, content_type, limits, &mut record).and_then(|()| check(&record, limits));
    result.map_err(|(code, reason)| Refusal {
        code,
        reason: cut(&reason, 512),
        id: cut(&record.id, limits::MESSAGE_ID_BYTES_MAX),
        app: cut(&record.app, limits::APP_BYTES_MAX),
        user: record
            .to
            .as_ref()
            .map_or_else(String::new, |to| cut(&to.user, limits::USER_BYTES_MAX)),
    })
}

fn read(
    value: &Bytes,
    content_type: Option<&[u8]>,
    limits: &RecordLimits,
    record: &mut PushRecord,
) -> Result<(), Flaw> {
    if value.is_empty() {
        return flaw(RefusalCode::EmptyRecord, "the record has no value");
    }
    let named = content_type.and_then(Format::of_content_type);
    match named.unwrap_or_else(|| guess(value)) {
        Format::Json => json::read_push(without_mark(value), limits, record),
        // What stands before a flaw stays in the record.
        Format::Protobuf => record.merge(value.clone()).map_err(|e| {
            let guessed = if named.is_some() { "" } else { "; JSON would begin with {" };
            (RefusalCode::BadProtobuf, format!("not a protobuf PushRecord: {e}{guessed}"))
        }),
    }
}

/// RFC 8259, 8.1: a byte order mark before JSON may be ignored. It begins no protobuf.
fn without_mark(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\xef\xbb\xbf").unwrap_or(value)
}

/// JSON begins with `{`, which begins no protobuf of ours (field 15 as a group). Of the characters
/// that may precede it, a line feed is also the tag of `id`, and `{` then the length of an id of
/// 123 bytes: protobuf is what decodes as such.
fn guess(value: &Bytes) -> Format {
    let text = without_mark(value).trim_ascii_start();
    if text.first() != Some(&b'{') {
        return Format::Protobuf;
    }
    if value[0] == b'\n' && PushRecord::decode(value.clone()).is_ok_and(|r| !r.id.is_empty()) {
        return Format::Protobuf;
    }
    Format::Json
}

fn check(record: &PushRecord, limits: &RecordLimits) -> Result<Push, Flaw> {
    for (field, value) in [("id", &record.id), ("app", &record.app)] {
        if value.is_empty() {
            return flaw(RefusalCode::MissingField, format!("`{field}` is missing"));
        }
    }
    let id = MessageId::new(&record.id).map_err(|e| (RefusalCode::BadId, e.to_string()))?;
    let app = AppId::new(&record.app).map_err(|e| (RefusalCode::BadApp, e.to_string()))?;
    let audience = audience(record, limits)?;
    let (kind, payload) = body(record, limits)?;
    let fanout = payload.len().saturating_mul(audience.users().len());
    if audience.users().len() > 1 && fanout > limits.fanout_bytes_max {
        return flaw(
            RefusalCode::FanoutTooLarge,
            format!(
                "users times payload are {fanout} bytes, the limit is {}",
                limits.fanout_bytes_max
            ),
        );
    }
    Ok(Push {
        id,
        app,
        audience,
        kind,
        payload,
        ttl_ms: ttl_ms(record.ttl_seconds, limits)?,
        collapse_key: collapse_key(&record.collapse_key)?,
        receipts: receipts(&record.receipts)?,
    })
}

fn audience(record: &PushRecord, limits: &RecordLimits) -> Result<Audience, Flaw> {
    let nobody = || flaw(RefusalCode::NoAudience, "`to` names neither `user` nor `users`");
    let Some(to) = &record.to else { return nobody() };
    let user = |at: String, name: &str| {
        UserId::new(name).map_err(|e| (RefusalCode::BadUser, format!("`{at}`: {e}")))
    };
    match (to.user.is_empty(), to.users.is_empty()) {
        (true, true) => nobody(),
        (false, false) => {
            flaw(RefusalCode::TwoAudiences, "`to` names both `user` and `users`: one of them")
        }
        (false, true) => {
            let device = (!to.device.is_empty())
                .then(|| DeviceId::new(&to.device))
                .transpose()
                .map_err(|e| (RefusalCode::BadDevice, format!("`to.device`: {e}")))?;
            Ok(Audience::User { user: user("to.user".into(), &to.user)?, device })
        }
        (true, false) if !to.device.is_empty() => {
            flaw(RefusalCode::BadDevice, "`to.device` goes with `user`, not with `users`")
        }
        (true, false) => {
            let mut seen = HashSet::new();
            let mut users = Vec::new();
            for (i, name) in to.users.iter().enumerate() {
                if seen.insert(name.as_str()) {
                    too_many_users(seen.len(), limits)?;
                    users.push(user(format!("to.users[{i}]"), name)?);
                }
            }
            Ok(Audience::Users(users))
        }
    }
}

fn too_many_users(users: usize, limits: &RecordLimits) -> Result<(), Flaw> {
    if users > limits.users_max {
        let reason = format!("`to.users` names more than {} users", limits.users_max);
        return flaw(RefusalCode::TooManyUsers, reason);
    }
    Ok(())
}

fn body(record: &PushRecord, limits: &RecordLimits) -> Result<(BodyKind, Bytes), Flaw> {
    let (kind, payload) = match &record.body {
        None => return flaw(RefusalCode::NoBody, "none of `text`, `json` and `data` is there"),
        Some(Body::Text(text)) => (BodyKind::Text, Bytes::from(text.clone())),
        Some(Body::Json(text)) => (BodyKind::Json, Bytes::from(text.clone())),
        Some(Body::Data(data)) => (BodyKind::Data, data.clone()),
    };
    if payload.len() > limits.payload_bytes_max {
        return flaw(
            RefusalCode::PayloadTooLarge,
            format!(
                "the payload has {} bytes, the limit is {}",
                payload.len(),
                limits.payload_bytes_max
            ),
        );
    }
    if kind == BodyKind::Json {
        json::check_body(&payload, limits.json_depth_max)?;
    }
    Ok((kind, payload))
}

fn ttl_ms(seconds: i64, limits: &RecordLimits) -> Result<u64, Flaw> {
    let Ok(positive) = u64::try_from(seconds) else {
        let reason =
            format!("`ttlSeconds` is {seconds}; zero means as long as the mailbox keeps it");
        return flaw(RefusalCode::NegativeTtl, reason);
    };
    if positive > limits.ttl_seconds_max {
        return flaw(
            RefusalCode::TtlTooLong,
            format!("`ttlSeconds` is {seconds}, the limit is {}", limits.ttl_seconds_max),
        );
    }
    Ok(positive.saturating_mul(1000).min(limits::WIRE_NUMBER_MAX))
}

fn collapse_key(key: &str) -> Result<Option<Arc<str>>, Flaw> {
    if key.len() > limits::COLLAPSE_KEY_BYTES_MAX {
        let max = limits::COLLAPSE_KEY_BYTES_MAX;
        let reason = format!("`collapseKey` has {} bytes, the limit is {max}", key.len());
        return flaw(RefusalCode::BadCollapseKey, reason);
    }
    if let Some(bad) = key.chars().find(|c| c.is_control()) {
        let reason = format!("`collapseKey` contains {bad:?}: no control characters");
        return flaw(RefusalCode::BadCollapseKey, reason);
    }
    Ok((!key.is_empty()).then(|| Arc::from(key)))
}

/// Those that a business may ask for; refusals are always told.
fn receipts(asked: &[i32]) -> Result<ReceiptSet, Flaw> {
    asked.iter().try_fold(ReceiptSet::default(), |set, number| {
        let kind = ReceiptKind::try_from(*number).unwrap_or(ReceiptKind::Unspecified);
        match kind {
            ReceiptKind::Unspecified | ReceiptKind::Refused => {
                let unknown = barid_core::UnknownReceipt(receipt::name_of_number(*number));
                flaw(RefusalCode::UnknownReceipt, unknown.to_string())
            }
            kind => Ok(set.with(ReceiptSet(1 << kind as u32))),
        }
    })
}

#[cfg(test)]
mod tests;
