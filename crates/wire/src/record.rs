//! Records of Kafka: those that businesses produce to `barid.push`, and the receipts that Barid produces to
//! `barid.receipts`, in protobuf or JSON.
//!
//! A push record is refused with a stable code and a reason. No input makes the decoder panic, or allocate more
//! than its limits.

mod encode;
mod format;
mod json;
mod limits;
mod push;
mod receipt;
mod refusal;

use std::collections::HashSet;
use std::sync::Arc;

use barid_core::limits::{
    APP_BYTES_MAX, COLLAPSE_KEY_BYTES_MAX, MESSAGE_ID_BYTES_MAX, USER_BYTES_MAX, WIRE_NUMBER_MAX,
};
use barid_core::{AppId, DeviceId, MessageId, ReceiptSet, UserId};
use bytes::Bytes;
use prost::Message as _;

pub use self::encode::encode_push;
pub use self::format::{CONTENT_TYPE, Format};
pub use self::json::decode_base64;
pub use self::limits::RecordLimits;
pub use self::push::{Audience, Push};
pub use self::receipt::{ReceiptError, decode_receipt, encode_receipt};
use self::refusal::{Flaw, flaw};
pub use self::refusal::{Refusal, RefusalCode};
use crate::cut;
pub use crate::v1::{BodyKind, ReceiptKind};
use crate::v1::{PushRecord, push_record::Body};

/// Decodes and checks the value of a push record. `content_type` is the header of that name, if there is one.
///
/// # Errors
/// Returns the first flaw found.
pub fn decode_push(
    value: &Bytes,
    content_type: Option<&[u8]>,
    limits: &RecordLimits,
) -> Result<Push, Refusal> {
    // The fields decoded before a flaw name the record in its receipt.
    let mut record = PushRecord::default();
    let result =
        read(value, content_type, limits, &mut record).and_then(|()| check(&record, limits));
    result.map_err(|flaw| refuse(flaw, &record))
}

fn refuse((code, reason): Flaw, record: &PushRecord) -> Refusal {
    Refusal {
        code,
        reason: cut(&reason, 512),
        id: cut(&record.id, MESSAGE_ID_BYTES_MAX),
        app: cut(&record.app, APP_BYTES_MAX),
        user: record.to.as_ref().map_or_else(String::new, |to| cut(&to.user, USER_BYTES_MAX)),
    }
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
        // Fields before a flaw stay in the record.
        Format::Protobuf => record.merge(value.clone()).map_err(|e| {
            let guessed = if named.is_some() { "" } else { "; JSON would begin with {" };
            (RefusalCode::BadProtobuf, format!("not a protobuf PushRecord: {e}{guessed}"))
        }),
    }
}

/// RFC 8259, 8.1: a byte order mark before JSON may be ignored. No protobuf record begins with one.
fn without_mark(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\xef\xbb\xbf").unwrap_or(value)
}

/// Guesses the format. JSON begins with `{`, with which no protobuf record begins (it would be field 15 as a
/// group). A line feed may precede it, which is also the tag of `id`, followed by `{` if the id has 123 bytes:
/// then the record is protobuf if it decodes as such.
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
            flaw(RefusalCode::TwoAudiences, "`to` names both `user` and `users`; give only one")
        }
        (false, true) => {
            let device = (!to.device.is_empty())
                .then(|| DeviceId::new(&to.device))
                .transpose()
                .map_err(|e| (RefusalCode::BadDevice, format!("`to.device`: {e}")))?;
            Ok(Audience::User { user: user("to.user".into(), &to.user)?, device })
        }
        (true, false) if !to.device.is_empty() => {
            flaw(RefusalCode::BadDevice, "`to.device` is allowed only with `user`")
        }
        (true, false) => {
            let mut seen = HashSet::new();
            let mut users = Vec::new();
            for (i, name) in to.users.iter().enumerate() {
                if seen.insert(name.as_str()) {
                    limits.check_users(seen.len())?;
                    users.push(user(format!("to.users[{i}]"), name)?);
                }
            }
            Ok(Audience::Users(users))
        }
    }
}

fn body(record: &PushRecord, limits: &RecordLimits) -> Result<(BodyKind, Bytes), Flaw> {
    let (kind, payload) = match &record.body {
        None => return flaw(RefusalCode::NoBody, "none of `text`, `json` and `data` is given"),
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
    Ok(positive.saturating_mul(1000).min(WIRE_NUMBER_MAX))
}

fn collapse_key(key: &str) -> Result<Option<Arc<str>>, Flaw> {
    if key.len() > COLLAPSE_KEY_BYTES_MAX {
        let max = COLLAPSE_KEY_BYTES_MAX;
        let reason = format!("`collapseKey` has {} bytes, the limit is {max}", key.len());
        return flaw(RefusalCode::BadCollapseKey, reason);
    }
    if let Some(bad) = key.chars().find(|c| c.is_control()) {
        let reason = format!("`collapseKey` contains {bad:?}; control characters are not allowed");
        return flaw(RefusalCode::BadCollapseKey, reason);
    }
    Ok((!key.is_empty()).then(|| Arc::from(key)))
}

/// The receipts that a business asks for. Refusals always produce one.
fn receipts(asked: &[i32]) -> Result<ReceiptSet, Flaw> {
    asked.iter().try_fold(ReceiptSet::default(), |set, number| {
        let kind = ReceiptKind::try_from(*number).unwrap_or(ReceiptKind::Unspecified);
        match kind {
            ReceiptKind::Unspecified | ReceiptKind::Refused => {
                let unknown = barid_core::UnknownReceipt(receipt::name_of_number(*number));
                flaw(RefusalCode::UnknownReceipt, unknown.to_string())
            }
            kind => Ok(set.with(kind.into())),
        }
    })
}

#[cfg(test)]
mod tests;
