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
    APP_BYTES_MAX, COLLAPSE_KEY_BYTES_MAX, EVERYONE, GROUP_BYTES_MAX, MESSAGE_ID_BYTES_MAX,
    USER_BYTES_MAX, WIRE_NUMBER_MAX,
};
use barid_core::{AppId, Audience, DeviceId, GroupId, MessageId, ReceiptSet, UserId};
use bytes::Bytes;
use prost::Message as _;

pub use self::encode::encode_push;
pub use self::format::{CONTENT_TYPE, Format};
pub use self::json::decode_base64;
pub use self::limits::RecordLimits;
pub use self::push::{Push, Recipients};
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
        mailbox: record.to.as_ref().map_or_else(String::new, mailbox).into(),
    }
}

/// The audience's name in frames; empty if none is named.
fn mailbox(to: &crate::v1::Audience) -> String {
    if to.everyone { EVERYONE.to_owned() } else { cut(&to.group, GROUP_BYTES_MAX) }
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
    let to = recipients(record, limits)?;
    let (kind, payload) = body(record, limits)?;
    let fanout = payload.len().saturating_mul(to.mailboxes());
    if to.mailboxes() > 1 && fanout > limits.fanout_bytes_max {
        return flaw(
            RefusalCode::FanoutTooLarge,
            format!(
                "users times payload are {fanout} bytes, the limit is {}",
                limits.fanout_bytes_max
            ),
        );
    }
    let receipts = receipts(&record.receipts)?;
    if matches!(to, Recipients::Audience(_)) {
        check_receipts_for_many(receipts)?;
    }
    Ok(Push {
        id,
        app,
        to,
        kind,
        payload,
        ttl_ms: ttl_ms(record.ttl_seconds, limits)?,
        collapse_key: collapse_key(&record.collapse_key)?,
        receipts,
    })
}

fn recipients(record: &PushRecord, limits: &RecordLimits) -> Result<Recipients, Flaw> {
    const NOBODY: &str = "`to` names none of `user`, `users`, `group` and `everyone`";
    let Some(to) = &record.to else { return flaw(RefusalCode::NoAudience, NOBODY) };
    let named = [
        (!to.user.is_empty(), "user"),
        (!to.users.is_empty(), "users"),
        (!to.group.is_empty(), "group"),
        (to.everyone, "everyone"),
    ];
    let named: Vec<&str> = named.iter().filter(|(is_named, _)| *is_named).map(|n| n.1).collect();
    if !to.device.is_empty() && !matches!(named[..], [] | ["user"]) {
        return flaw(RefusalCode::BadDevice, "`to.device` is allowed only with `user`");
    }
    match named[..] {
        [] => flaw(RefusalCode::NoAudience, NOBODY),
        [first, second, ..] => {
            let reason = format!("`to` names both `{first}` and `{second}`; give only one");
            flaw(RefusalCode::TwoAudiences, reason)
        }
        ["user"] => {
            let device = (!to.device.is_empty())
                .then(|| DeviceId::new(&to.device))
                .transpose()
                .map_err(|e| (RefusalCode::BadDevice, format!("`to.device`: {e}")))?;
            Ok(Recipients::User { user: user("to.user", &to.user)?, device })
        }
        ["users"] => users(&to.users, limits).map(Recipients::Users),
        ["group"] => GroupId::new(&to.group)
            .map(|group| Recipients::Audience(Audience::Group(group)))
            .map_err(|e| (RefusalCode::BadGroup, format!("`to.group`: {e}"))),
        [_] => Ok(Recipients::Audience(Audience::Everyone)),
    }
}

fn user(field: &str, name: &str) -> Result<UserId, Flaw> {
    UserId::new(name).map_err(|e| (RefusalCode::BadUser, format!("`{field}`: {e}")))
}

/// Each user once.
fn users(names: &[String], limits: &RecordLimits) -> Result<Vec<UserId>, Flaw> {
    let mut seen = HashSet::new();
    let mut users = Vec::new();
    for (i, name) in names.iter().enumerate() {
        if seen.insert(name.as_str()) {
            limits.check_users(seen.len())?;
            users.push(user(&format!("to.users[{i}]"), name)?);
        }
    }
    Ok(users)
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

/// Of a message for a group or everyone, one receipt each of these: devices are too many for one receipt each.
fn check_receipts_for_many(asked: ReceiptSet) -> Result<(), Flaw> {
    let allowed = ReceiptSet::ACCEPTED.with(ReceiptSet::DUPLICATE);
    if allowed.wants(asked) {
        return Ok(());
    }
    flaw(
        RefusalCode::ReceiptForMany,
        "`receipts` of a message for `group` or `everyone` may name only accepted and duplicate",
    )
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
