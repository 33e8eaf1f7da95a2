//! The formats of records, and the header that names the format.

/// The format of a record.
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

    /// The format that a `content-type` header names; `None` if it names neither.
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
