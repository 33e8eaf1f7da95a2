//! Receipts: the records of `barid.receipts`.

use barid_core::ReceiptSet;
use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::format::Format;
use crate::v1::{Receipt, ReceiptKind};

/// An invalid receipt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a receipt: {0}")]
pub struct ReceiptError(String);

/// A receipt in JSON: names in lowerCamelCase, short kinds, no empty fields.
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
    mailbox: String,
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

/// Encodes the value of a receipt's record.
pub fn encode_receipt(receipt: &Receipt, format: Format) -> Bytes {
    match format {
        Format::Protobuf => receipt.encode_to_vec().into(),
        Format::Json => {
            let json = ReceiptJson {
                kind: name_of_number(receipt.kind),
                id: receipt.id.clone(),
                app: receipt.app.clone(),
                user: receipt.user.clone(),
                mailbox: receipt.mailbox.clone(),
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

/// Decodes the value of a receipt's record, in either format. Unknown fields of a newer version are ignored.
///
/// # Errors
/// Returns an error if it is not a receipt.
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
        mailbox: json.mailbox,
        device: json.device,
        seq: json.seq,
        at_ms: json.at_ms,
        code: json.code,
        reason: json.reason,
        traceparent: json.traceparent,
    })
}

impl ReceiptKind {
    /// The kind's name in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Accepted => "accepted",
            Self::Duplicate => "duplicate",
            Self::Sent => "sent",
            Self::Acked => "acked",
            Self::Expired => "expired",
            Self::Exhausted => "exhausted",
            Self::Refused => "refused",
        }
    }
}

impl From<ReceiptKind> for ReceiptSet {
    fn from(kind: ReceiptKind) -> Self {
        Self(1 << kind as u32)
    }
}

const PREFIX: &str = "RECEIPT_KIND_";

/// `acked` for 4; the number itself if it has no name.
pub(super) fn name_of_number(number: i32) -> String {
    match ReceiptKind::try_from(number) {
        Ok(kind) => kind.word().to_owned(),
        Err(_) => number.to_string(),
    }
}

/// 4 for `acked`, `ACKED` and `RECEIPT_KIND_ACKED`.
pub(super) fn number_of_name(name: &str) -> Option<i32> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with(PREFIX) { upper } else { format!("{PREFIX}{upper}") };
    ReceiptKind::from_str_name(&full).map(|kind| kind as i32)
}
