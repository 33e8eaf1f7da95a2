//! Writes push records: the counterpart of [`super::decode_push`].

use barid_core::Audience;
use bytes::Bytes;
use prost::Message as _;

use super::format::Format;
use super::json;
use super::limits::RecordLimits;
use super::push::{Push, Recipients};
use super::refusal::{Flaw, Refusal, RefusalCode};
use crate::v1::{self, BodyKind, PushRecord, push_record::Body};

/// Encodes the value of a record; [`Format::content_type`] is its `content-type` header.
///
/// # Errors
/// Returns the refusal with which [`super::decode_push`] would answer the record under these limits.
pub fn encode_push(push: &Push, format: Format, limits: &RecordLimits) -> Result<Bytes, Refusal> {
    let mut record = addressed(push);
    fill(push, format, &mut record)
        .and_then(|()| super::check(&record, limits))
        .map_err(|flaw| super::refuse(flaw, &record))?;
    Ok(match format {
        Format::Protobuf => record.encode_to_vec().into(),
        Format::Json => json::write_push(&record),
    })
}

/// Address and id of a push, which name it in a refusal.
fn addressed(push: &Push) -> PushRecord {
    let to = match &push.to {
        Recipients::User { user, device } => v1::Audience {
            user: user.to_string(),
            device: device.as_ref().map(ToString::to_string).unwrap_or_default(),
            ..Default::default()
        },
        Recipients::Users(users) => v1::Audience {
            users: users.iter().map(ToString::to_string).collect(),
            ..Default::default()
        },
        Recipients::Audience(Audience::Group(group)) => {
            v1::Audience { group: group.to_string(), ..Default::default() }
        }
        Recipients::Audience(Audience::Everyone) => {
            v1::Audience { everyone: true, ..Default::default() }
        }
    };
    PushRecord {
        id: push.id.to_string(),
        app: push.app.to_string(),
        to: Some(to),
        ..Default::default()
    }
}

fn fill(push: &Push, format: Format, record: &mut PushRecord) -> Result<(), Flaw> {
    record.body = Some(body(push, format)?);
    record.ttl_seconds = match (push.ttl_ms % 1000, i64::try_from(push.ttl_ms / 1000)) {
        (0, Ok(seconds)) => seconds,
        _ => return Err(json::not_an_integer("ttlSeconds")),
    };
    record.collapse_key = push.collapse_key.as_deref().unwrap_or_default().to_owned();
    record.receipts = (0..32).filter(|kind| push.receipts.0 >> kind & 1 == 1).collect();
    Ok(())
}

fn body(push: &Push, format: Format) -> Result<Body, Flaw> {
    let text = || {
        let code = match format {
            Format::Json => RefusalCode::BadJson,
            Format::Protobuf => RefusalCode::BadProtobuf,
        };
        String::from_utf8(push.payload.to_vec())
            .map_err(|e| (code, format!("the body is not UTF-8: {e}")))
    };
    Ok(match push.kind {
        BodyKind::Text => Body::Text(text()?),
        BodyKind::Json => Body::Json(text()?),
        BodyKind::Data => Body::Data(push.payload.clone()),
    })
}

#[cfg(test)]
mod tests;
