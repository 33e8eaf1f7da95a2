//! Receipts on the wire.

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::format::Format;
use crate::v1::{Receipt, ReceiptKind};

/// Bytes that are no receipt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a receipt: {0}")]
pub struct ReceiptError(String);

/// The receipt as JSON has it: lowerCamelCase names, short kinds, what is empty left out.
#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ReceiptJson {
    kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    app: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    device: String,
    #[serde(skip_serializing_if = "is_zero")]
    seq: u64,
    #[serde(alias = "at_ms")]
    at_ms: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    code: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    traceparent: String,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Encodes a receipt as the value of a record.
pub fn encode_receipt(receipt: &Receipt, format: Format) -> Bytes {
    match format {
        Format::Protobuf => receipt.encode_to_vec().into(),
        Format::Json => {
            let json = ReceiptJson {
                kind: name_of_number(receipt.kind),
                id: receipt.id.clone(),
                app: receipt.app.clone(),
                user: receipt.user.clone(),
                device: receipt.device.clone(),
                seq: receipt.seq,
                at_ms: receipt.at_ms,
                code: receipt.code.clone(),
                reason: receipt.reason.clone(),
                traceparent: receipt.traceparent.clone(),
            };
            // Strings and numbers always serialize.
            serde_json::to_vec(&json).unwrap_or_default().into()
        }
    }
}

/// Reads what [`encode_receipt`] wrote, in either format; unknown fields are passed over, so that
/// readers of receipts outlive newer writers.
///
/// # Errors
/// It is neither.
pub fn decode_receipt(value: &[u8]) -> Result<Receipt, ReceiptError> {
    if value.first() != Some(&b'{') {
        return Receipt::decode(value).map_err(|e| ReceiptError(e.to_string()));
    }
    let json: ReceiptJson =
        serde_json::from_slice(value).map_err(|e| ReceiptError(e.to_string()))?;
    let kind = number_of_name(&json.kind)
        .ok_or_else(|| ReceiptError(format!("unknown kind {:?}", json.kind)))?;
    Ok(Receipt {
        kind,
        id: json.id,
        app: json.app,
        user: json.user,
        device: json.device,
        seq: json.seq,
        at_ms: json.at_ms,
        code: json.code,
        reason: json.reason,
        traceparent: json.traceparent,
    })
}

const PREFIX: &str = "RECEIPT_KIND_";

/// `acked` for 4; the number itself where it has no name.
pub(super) fn name_of_number(number: i32) -> String {
    match ReceiptKind::try_from(number) {
        Ok(kind) => kind.as_str_name().trim_start_matches(PREFIX).to_ascii_lowercase(),
        Err(_) => number.to_string(),
    }
}

/// 4 for `acked`, `ACKED` and `RECEIPT_KIND_ACKED`.
pub(super) fn number_of_name(name: &str) -> Option<i32> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with(PREFIX) { upper } else { format!("{PREFIX}{upper}") };
    ReceiptKind::from_str_name(&full).map(|kind| kind as i32)
}
