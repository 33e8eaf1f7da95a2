//! Push records in JSON: the proto3 JSON mapping, and two extensions: a `json` body may be any JSON value, and
//! receipts may have short names.

use std::fmt;
use std::ops::Range;

use barid_core::IdHash;
use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserializer as _, Serialize};
use serde_json::value::RawValue;

use super::limits::RecordLimits;
use super::receipt;
use super::refusal::{Flaw, RefusalCode, flaw};
use crate::cut;
use crate::v1::{Audience, PushRecord, push_record::Body};

/// Decodes the fields of a record into `record`. Even if a field is invalid, `id`, `app` and `to` are set as
/// far as they are valid, for the receipt of the refusal.
pub(super) fn read_push(
    value: &[u8],
    limits: &RecordLimits,
    record: &mut PushRecord,
) -> Result<(), Flaw> {
    let (fields, mut sound) = Fields::parse(value, "");
    let (names, others): (Vec<_>, Vec<_>) =
        fields.into_iter().partition(|(name, _)| matches!(name.as_str(), "id" | "app" | "to"));
    let mut bodies = 0;
    for (name, raw) in &names {
        sound = sound.and(read_field(name, raw, limits, record, &mut bodies));
    }
    sound?;
    others.iter().try_for_each(|(name, raw)| read_field(name, raw, limits, record, &mut bodies))
}

fn read_field(
    name: &str,
    raw: &RawValue,
    limits: &RecordLimits,
    record: &mut PushRecord,
    bodies: &mut u32,
) -> Result<(), Flaw> {
    match name {
        "id" => record.id = string(name, raw, RefusalCode::BadId)?,
        "app" => record.app = string(name, raw, RefusalCode::BadApp)?,
        "to" => read_audience(raw, limits, record.to.get_or_insert_default())?,
        "text" | "json" | "data" => {
            *bodies += 1;
            if *bodies > 1 {
                return flaw(RefusalCode::TwoBodies, "more than one of `text`, `json` and `data`");
            }
            record.body = Some(body(name, raw, limits)?);
        }
        "ttlSeconds" => record.ttl_seconds = integer(name, raw)?,
        "collapseKey" => record.collapse_key = string(name, raw, RefusalCode::BadCollapseKey)?,
        "receipts" => record.receipts = receipts(raw)?,
        _ => return unknown(name),
    }
    Ok(())
}

fn read_audience(raw: &RawValue, limits: &RecordLimits, to: &mut Audience) -> Result<(), Flaw> {
    let (fields, mut sound) = Fields::parse(raw.get().as_bytes(), "to");
    for (name, raw) in &fields {
        sound = sound.and(match name.as_str() {
            "user" => string("to.user", raw, RefusalCode::BadUser).map(|user| to.user = user),
            "device" => string("to.device", raw, RefusalCode::BadDevice).map(|d| to.device = d),
            "users" => users(raw, limits).map(|users| to.users = users),
            "group" => string("to.group", raw, RefusalCode::BadGroup).map(|group| to.group = group),
            "everyone" => boolean("to.everyone", raw).map(|everyone| to.everyone = everyone),
            other => unknown(&format!("to.{other}")),
        });
    }
    sound
}

fn unknown(name: &str) -> Result<(), Flaw> {
    flaw(RefusalCode::UnknownField, format!("unknown field `{name}`"))
}

/// A bound on the memory that a hostile record takes; more than any object has.
const FIELDS_MAX: usize = 32;

/// An object's fields, whose values are not decoded: names in lowerCamelCase, each once.
#[derive(Default)]
struct Fields<'a> {
    seen: Vec<(String, &'a RawValue)>,
    repeated: Option<String>,
}

impl<'a> Fields<'a> {
    /// The fields of the record (`place` is empty) or of one of its fields without those that are `null`, and
    /// whether the object is valid: if not, those before the error.
    fn parse(text: &'a [u8], place: &str) -> (Vec<(String, &'a RawValue)>, Result<(), Flaw>) {
        let mut fields = Self::default();
        let mut json = serde_json::Deserializer::from_slice(text);
        let read = json.deserialize_map(&mut fields).and_then(|()| json.end());
        let (what, code, prefix) = match place {
            "" => ("the record".to_owned(), RefusalCode::BadJson, String::new()),
            name => (format!("`{name}`"), RefusalCode::BadValue, format!("{name}.")),
        };
        let sound = match (read, fields.repeated) {
            (Err(e), _) => flaw(code, format!("{what} is not a JSON object: {e}")),
            (Ok(()), Some(name)) => {
                flaw(RefusalCode::RepeatedField, format!("`{prefix}{name}` is given twice"))
            }
            (Ok(()), None) => Ok(()),
        };
        let mut seen = fields.seen;
        seen.retain(|(_, raw)| raw.get() != "null");
        (seen, sound)
    }
}

impl<'de> Visitor<'de> for &mut Fields<'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            let name = camel_case(name);
            let value = map.next_value()?;
            if self.seen.iter().any(|(earlier, _)| *earlier == name) {
                self.repeated.get_or_insert(name);
            } else if self.seen.len() == FIELDS_MAX {
                return Err(serde::de::Error::custom("too many fields"));
            } else {
                self.seen.push((name, value));
            }
        }
        Ok(())
    }
}

/// The lowerCamelCase name of a field: `ttlSeconds` for `ttl_seconds`.
fn camel_case(name: String) -> String {
    if !matches!(name.as_str(), "ttl_seconds" | "collapse_key") {
        return name;
    }
    let mut parts = name.split('_');
    let mut camel = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        camel.push_str(&part[..1].to_ascii_uppercase());
        camel.push_str(&part[1..]);
    }
    camel
}

fn string(name: &str, raw: &RawValue, code: RefusalCode) -> Result<String, Flaw> {
    let read = serde_json::from_str(raw.get());
    read.map_err(|e| match raw.get().starts_with('"') {
        // The syntax was checked before, so the string has an unpaired surrogate.
        true => (code, format!("`{name}` is not a string of Unicode: {e}")),
        false => (code, format!("`{name}` must be a string, is {}", kind_of(raw))),
    })
}

fn kind_of(raw: &RawValue) -> &'static str {
    match raw.get().as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

fn boolean(name: &str, raw: &RawValue) -> Result<bool, Flaw> {
    let bad = |_| (RefusalCode::BadValue, format!("`{name}` must be true or false"));
    serde_json::from_str(raw.get()).map_err(bad)
}

/// The mapping allows integers that are plain, quoted, or written with a point or an exponent.
fn integer(name: &str, raw: &RawValue) -> Result<i64, Flaw> {
    let quoted: Option<String> = serde_json::from_str(raw.get()).ok();
    let text = quoted.as_deref().unwrap_or(raw.get());
    if let Ok(number) = text.parse::<i64>() {
        return Ok(number);
    }
    match serde_json::from_str::<f64>(text) {
        // Exact up to 2^53, which is above every limit; larger numbers saturate.
        Ok(number) if number.fract() == 0.0 => Ok(number as i64),
        _ => Err(not_an_integer(name)),
    }
}

pub(super) fn not_an_integer(name: &str) -> Flaw {
    (RefusalCode::BadValue, format!("`{name}` must be an integer"))
}

/// Decodes at most one user more than allowed, so that a long list takes no memory.
fn users(raw: &RawValue, limits: &RecordLimits) -> Result<Vec<String>, Flaw> {
    struct Reader {
        max: usize,
    }
    impl<'de> Visitor<'de> for Reader {
        type Value = Option<Vec<String>>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of strings")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut seen = std::collections::HashSet::new();
            let mut users = Vec::new();
            while let Some(user) = seq.next_element::<String>()? {
                if seen.insert(user.clone()) {
                    users.push(user);
                }
                if users.len() > self.max {
                    while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                    return Ok(None);
                }
            }
            Ok(Some(users))
        }
    }
    let mut reader = serde_json::Deserializer::from_str(raw.get());
    let read = reader.deserialize_seq(Reader { max: limits.users_max });
    match read {
        Ok(Some(users)) => Ok(users),
        Ok(None) => limits.check_users(limits.users_max + 1).map(|()| Vec::new()),
        Err(e) => {
            flaw(RefusalCode::BadUser, format!("`to.users` must be an array of strings: {e}"))
        }
    }
}

fn body(name: &str, raw: &RawValue, limits: &RecordLimits) -> Result<Body, Flaw> {
    match name {
        "text" => string(name, raw, RefusalCode::BadValue).map(Body::Text),
        "data" => {
            let text = string(name, raw, RefusalCode::BadValue)?;
            Ok(Body::Data(base64(&text, limits)?))
        }
        _ => Ok(Body::Json(json_text(raw))),
    }
}

/// The JSON text of a body. A string that holds a JSON text is the mapping's form of that text; any other
/// value is the body itself.
fn json_text(raw: &RawValue) -> String {
    if raw.get().starts_with('"')
        && let Ok(text) = serde_json::from_str::<String>(raw.get())
        && serde_json::from_str::<&RawValue>(&text).is_ok()
    {
        return text;
    }
    raw.get().to_owned()
}

const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

fn base64(text: &str, limits: &RecordLimits) -> Result<Bytes, Flaw> {
    if text.len() / 4 * 3 > limits.payload_bytes_max.saturating_add(3) {
        let reason = format!("`data` decodes to more than {} bytes", limits.payload_bytes_max);
        return flaw(RefusalCode::PayloadTooLarge, reason);
    }
    decode_base64(text).map_err(|e| (RefusalCode::BadBase64, format!("`data` is not base64: {e}")))
}

/// Decodes base64 of either alphabet, with or without padding, as the proto3 JSON mapping allows.
///
/// # Errors
/// Returns an error if `text` is not base64.
pub fn decode_base64(text: &str) -> Result<Bytes, base64::DecodeError> {
    let engine = if text.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    engine.decode(text).map(Bytes::from)
}

fn receipts(raw: &RawValue) -> Result<Vec<i32>, Flaw> {
    let bad = |reason: String| (RefusalCode::UnknownReceipt, reason);
    let values: Vec<&RawValue> = serde_json::from_str(raw.get())
        .map_err(|_| bad(format!("`receipts` must be an array, is {}", kind_of(raw))))?;
    values
        .into_iter()
        .map(|value| match serde_json::from_str::<i32>(value.get()) {
            Ok(number) => Ok(number),
            Err(_) => {
                let name = string("receipts", value, RefusalCode::UnknownReceipt)?;
                receipt::number_of_name(&name)
                    .ok_or_else(|| bad(barid_core::UnknownReceipt(name).to_string()))
            }
        })
        .collect()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PushJson<'a> {
    id: &'a str,
    app: &'a str,
    to: Option<AudienceJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    json: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    #[serde(skip_serializing_if = "is_zero")]
    ttl_seconds: i64,
    #[serde(skip_serializing_if = "str::is_empty")]
    collapse_key: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    receipts: Vec<String>,
}

#[derive(Serialize)]
struct AudienceJson<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    device: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    users: &'a [String],
    #[serde(skip_serializing_if = "str::is_empty")]
    group: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    everyone: bool,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// Writes a record that was checked, without the fields that are empty.
pub(super) fn write_push(record: &PushRecord) -> Bytes {
    let (mut text, mut json, mut data) = (None, None, None);
    match &record.body {
        Some(Body::Text(body)) => text = Some(body.as_str()),
        Some(Body::Json(body)) => json = Some(json_value(body)),
        Some(Body::Data(body)) => data = Some(STANDARD.encode(body)),
        None => (),
    }
    let json = PushJson {
        id: &record.id,
        app: &record.app,
        to: record.to.as_ref().map(|to| AudienceJson {
            user: &to.user,
            device: &to.device,
            users: &to.users,
            group: &to.group,
            everyone: to.everyone,
        }),
        text,
        json,
        data,
        ttl_seconds: record.ttl_seconds,
        collapse_key: &record.collapse_key,
        receipts: record.receipts.iter().map(|kind| receipt::name_of_number(*kind)).collect(),
    };
    // Strings, numbers and raw values always serialize.
    serde_json::to_vec(&json).unwrap_or_default().into()
}

/// The value as it is, if [`json_text`] reads it back unchanged; else a string that holds the JSON text.
fn json_value(text: &str) -> Box<RawValue> {
    match RawValue::from_string(text.to_owned()) {
        Ok(raw) if raw.get() != "null" && json_text(&raw) == text => raw,
        // Strings always serialize.
        _ => serde_json::value::to_raw_value(text).unwrap_or_default(),
    }
}

/// Checks that a body is one JSON value, not deeper than `depth_max`, that every parser accepts: it is copied
/// into frames, and an invalid one would make the frame invalid. So it must be I-JSON (RFC 7493): no unpaired
/// surrogates, no repeated names in an object, no number beyond a double.
pub(super) fn check_body(text: &[u8], depth_max: usize) -> Result<(), Flaw> {
    if depth(text) > depth_max {
        let reason = format!("the JSON body nests deeper than {depth_max}");
        return flaw(RefusalCode::TooDeep, reason);
    }
    // Parsing a raw value does not recurse.
    match serde_json::from_slice::<&RawValue>(text) {
        Ok(value) => Scan::default()
            .value(value.get())
            .or_else(|problem| flaw(RefusalCode::BadJsonBody, format!("`json` {problem}"))),
        Err(e) => flaw(RefusalCode::BadJsonBody, format!("`json` is not a JSON value: {e}")),
    }
}

/// Checks the rules of I-JSON on a value whose syntax is valid.
#[derive(Default)]
struct Scan {
    /// The index of the first name of each open object; `None` for an array.
    open: Vec<Option<usize>>,
    /// Hashes of the names of the open objects, and their positions in the text.
    names: Vec<(u64, Range<u32>)>,
}

impl Scan {
    fn value(mut self, text: &str) -> Result<(), String> {
        let bytes = text.as_bytes();
        let (mut at, mut is_name) = (0, false);
        while let Some(byte) = bytes.get(at) {
            let mut end = at + 1;
            match byte {
                b'{' => {
                    self.open.push(Some(self.names.len()));
                    is_name = true;
                }
                b'[' => {
                    self.open.push(None);
                    is_name = false;
                }
                b'}' | b']' => {
                    self.close(text)?;
                    is_name = false;
                }
                b',' => is_name = matches!(self.open.last(), Some(Some(_))),
                b':' => is_name = false,
                b'"' => {
                    end = string_end(bytes, at);
                    let hash = string_hash(&text[at..end])?;
                    if is_name {
                        // A record is far smaller than 4 GiB.
                        self.names.push((hash, at as u32..end as u32));
                    }
                }
                b'-' | b'0'..=b'9' => {
                    let rest = &bytes[at..];
                    let of_number =
                        |b: &u8| matches!(b, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
                    end = at + rest.iter().take_while(|b| of_number(b)).count();
                    let number = &text[at..end];
                    if !number.parse::<f64>().is_ok_and(f64::is_finite) {
                        return Err(format!("has a number beyond a double: {}", cut(number, 32)));
                    }
                }
                _ => {}
            }
            at = end;
        }
        Ok(())
    }

    fn close(&mut self, text: &str) -> Result<(), String> {
        let Some(Some(first)) = self.open.pop() else { return Ok(()) };
        let names = &mut self.names[first..];
        names.sort_unstable_by_key(|(hash, _)| *hash);
        let twice = names.windows(2).find(|pair| pair[0].0 == pair[1].0);
        if let Some([(_, name), _]) = twice {
            let name = &text[name.start as usize..name.end as usize];
            return Err(format!("has the name {} twice in an object", cut(name, 64)));
        }
        self.names.truncate(first);
        Ok(())
    }
}

/// The index behind the closing quote of the string that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The hash of a string's content, after unescaping.
fn string_hash(quoted: &str) -> Result<u64, String> {
    if !quoted.contains('\\') {
        return Ok(IdHash::of(&quoted[1..quoted.len() - 1]).ring);
    }
    match serde_json::from_str::<String>(quoted) {
        Ok(text) => Ok(IdHash::of(&text).ring),
        // The syntax is valid, so the string has an unpaired surrogate.
        Err(_) => Err(format!("has a string that is not Unicode: {}", cut(quoted, 64))),
    }
}

/// The number of arrays and objects inside each other.
fn depth(text: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}
