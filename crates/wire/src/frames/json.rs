//! Frames in JSON: `{"ack":{"seq":5}}`. As in the proto3 JSON mapping, numbers may be quoted, names may be in
//! camelCase or snake_case, null means absent, and base64 may use either alphabet.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::{self, DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::body::{body, checked_payload};
use super::error::FrameError;
use super::types::{Body, ClientFrame, Decoded, Deliver, Ignored, ServerFrame};
use crate::cut;
use crate::envelope::{BODY_BYTES_MAX, Envelope, EnvelopeError};
use crate::record::decode_base64;
use crate::v1::{self, BodyKind, SkipReason, message};

pub(super) fn decode_client(bytes: &[u8]) -> Result<Decoded, FrameError> {
    let OneKey { kind, value } = parse(bytes)?;
    let Some(fields) = fields_of(&kind) else {
        return Ok(Decoded { frame: None, ignored: Some(Ignored::Kind(cut(&kind, 32))) });
    };
    // serde would accept an array of values instead of an object.
    if !value.get().starts_with('{') {
        return Err(FrameError::Json(format!("{}: not an object of its fields", cut(&kind, 32))));
    }
    let strict = decode_kind(&kind, value.get().as_bytes());
    // If a required field is missing as well, the unknown one is probably a typo: the error names it.
    if let Err(FrameError::Json(_)) = strict
        && let Some((known, Some(ignored))) = without_unknown(value, fields)
        && let Ok(frame) = decode_kind(&kind, &known)
    {
        let ignored = Some(Ignored::Field(cut(&format!("{kind}.{ignored}"), 64)));
        return Ok(Decoded { frame: Some(frame), ignored });
    }
    Ok(Decoded { frame: Some(strict?), ignored: None })
}

const POSITION_FIELDS: [&str; 5] = ["mailbox", "epoch", "generation", "seq", "chain"];

/// The names of a kind's fields, in all spellings; `None` if the kind is unknown.
fn fields_of(kind: &str) -> Option<&'static [&'static str]> {
    const HELLO: [&str; 11] = [
        "device",
        "platform",
        "sdk",
        "attempt",
        "positions",
        "acceptsZstd",
        "accepts_zstd",
        "visiblePings",
        "visible_pings",
        "pingIntervalMs",
        "ping_interval_ms",
    ];
    Some(match kind {
        "hello" => &HELLO,
        "ack" => &["mailbox", "generation", "seq"],
        "refresh" => &["token"],
        "pong" => &[],
        "subscribe" | "unsubscribe" => &["group"],
        _ => return None,
    })
}

/// An object without its unknown fields and those of its positions, and the first of them. `None`: not an object.
fn without_unknown(value: &RawValue, known: &[&str]) -> Option<(Vec<u8>, Option<String>)> {
    let Fields(fields) = serde_json::from_str(value.get()).ok()?;
    let mut first = None;
    let mut out = vec![b'{'];
    for (name, value) in fields {
        if !known.contains(&&*name) {
            first.get_or_insert(name.into_owned());
            continue;
        }
        if out.len() > 1 {
            out.push(b',');
        }
        put_text(&mut out, &name);
        out.push(b':');
        match (name == "positions").then(|| positions_without_unknown(value)).flatten() {
            Some((positions, unknown)) => {
                out.extend_from_slice(&positions);
                first = first.or(unknown);
            }
            None => out.extend_from_slice(value.get().as_bytes()),
        }
    }
    out.push(b'}');
    Some((out, first))
}

/// As [`without_unknown`], for a list of positions.
fn positions_without_unknown(list: &RawValue) -> Option<(Vec<u8>, Option<String>)> {
    let list: Vec<&RawValue> = serde_json::from_str(list.get()).ok()?;
    let mut first = None;
    let mut out = vec![b'['];
    for position in list {
        let (position, unknown) = without_unknown(position, &POSITION_FIELDS)?;
        if out.len() > 1 {
            out.push(b',');
        }
        out.extend_from_slice(&position);
        first = first.or_else(|| Some(format!("positions.{}", unknown?)));
    }
    out.push(b']');
    Some((out, first))
}

/// An object's fields, whose values are not decoded.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        from.deserialize_map(Reader)
    }
}

fn decode_kind(kind: &str, value: &[u8]) -> Result<ClientFrame, FrameError> {
    let within = |error: FrameError| match error {
        FrameError::Json(why) => FrameError::Json(format!("{kind}: {why}")),
        other => other,
    };
    Ok(match kind {
        "hello" => ClientFrame::Hello(parse::<Hello>(value).map_err(within)?.into()),
        "ack" => {
            let Ack { mailbox, generation, seq } = parse(value).map_err(within)?;
            let mailbox = mailbox.unwrap_or_default();
            ClientFrame::Ack(v1::Ack { mailbox, generation, seq })
        }
        "refresh" => {
            let Refresh { token } = parse(value).map_err(within)?;
            ClientFrame::Refresh(v1::Refresh { token })
        }
        "pong" => {
            let Empty {} = parse(value).map_err(within)?;
            ClientFrame::Pong(v1::Pong {})
        }
        "subscribe" => {
            let Group { group } = parse(value).map_err(within)?;
            ClientFrame::Subscribe(v1::Subscribe { group })
        }
        "unsubscribe" => {
            let Group { group } = parse(value).map_err(within)?;
            ClientFrame::Unsubscribe(v1::Unsubscribe { group })
        }
        _ => return Err(FrameError::Kind),
    })
}

pub(super) fn encode_client(frame: &ClientFrame) -> Bytes {
    to_bytes(&match frame.clone() {
        ClientFrame::Hello(hello) => Client::Hello(hello.into()),
        ClientFrame::Ack(ack) => Client::Ack(Ack {
            mailbox: some(ack.mailbox),
            generation: ack.generation,
            seq: ack.seq,
        }),
        ClientFrame::Refresh(refresh) => Client::Refresh(Refresh { token: refresh.token }),
        ClientFrame::Pong(_) => Client::Pong(Empty {}),
        ClientFrame::Subscribe(v1::Subscribe { group }) => Client::Subscribe(Group { group }),
        ClientFrame::Unsubscribe(v1::Unsubscribe { group }) => Client::Unsubscribe(Group { group }),
    })
}

/// Unknown kinds and fields are ignored.
pub(super) fn decode_server(bytes: &[u8]) -> Result<ServerFrame, FrameError> {
    let OneKey { kind, value } = parse(bytes)?;
    let value = value.get().as_bytes();
    Ok(match &*kind {
        "deliver" => ServerFrame::Deliver(parse::<DeliverIn>(value)?.try_into()?),
        "welcome" => ServerFrame::Welcome(parse::<Welcome>(value)?.into()),
        "skip" => ServerFrame::Skip(parse::<Skip>(value)?.into()),
        "goAway" | "go_away" => ServerFrame::GoAway(parse::<GoAway>(value)?.into()),
        "error" => ServerFrame::Error(parse::<ErrorText>(value)?.into()),
        "ping" => ServerFrame::Ping(v1::Ping {}),
        "subscribed" => ServerFrame::Subscribed(parse::<Subscribed>(value)?.into()),
        "unsubscribed" => ServerFrame::Unsubscribed(parse::<Unsubscribed>(value)?.into()),
        _ => ServerFrame::Unknown,
    })
}

pub(super) fn encode_server(frame: &ServerFrame) -> Result<Bytes, FrameError> {
    Ok(match frame.clone() {
        ServerFrame::Deliver(deliver) => return encode_messages(deliver),
        ServerFrame::Welcome(welcome) => to_bytes(&Server::Welcome(welcome.into())),
        ServerFrame::Skip(skip) => to_bytes(&Server::Skip(skip.into())),
        ServerFrame::GoAway(go_away) => to_bytes(&Server::GoAway(GoAway {
            why: go_away.why,
            reconnect_after_ms: go_away.reconnect_after_ms,
        })),
        ServerFrame::Error(error) => {
            let v1::Error { code, text, attempt } = error;
            to_bytes(&Server::Error(ErrorText { code, text, attempt }))
        }
        ServerFrame::Ping(_) => to_bytes(&Server::Ping(Empty {})),
        ServerFrame::Subscribed(v1::Subscribed { group, position }) => {
            let position = position.map(Into::into);
            to_bytes(&Server::Subscribed(Subscribed { group, position }))
        }
        ServerFrame::Unsubscribed(v1::Unsubscribed { group, code, text }) => {
            to_bytes(&Server::Unsubscribed(Unsubscribed { group, code, text }))
        }
        ServerFrame::Unknown => Bytes::from_static(b"{}"),
    })
}

const DELIVER_OPENS: &[u8] = b"{\"deliver\":{\"messages\":[";

pub(super) fn encode_deliver<'a>(
    generation: u32,
    entries: impl IntoIterator<Item = &'a Envelope>,
) -> Result<Bytes, (usize, EnvelopeError)> {
    let mut out = DELIVER_OPENS.to_vec();
    for (index, entry) in entries.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        let payload = checked_payload(entry).map_err(|error| (index, error))?;
        put_message(&mut out, entry.seq, &entry.id, entry.kind(), &payload)
            .map_err(|why| (index, EnvelopeError::Payload(why)))?;
    }
    Ok(close_deliver(out, "", generation))
}

pub(super) fn join_delivers(mailbox: &str, generation: u32, frames: &[Bytes]) -> Bytes {
    let around = DELIVER_OPENS.len() + close_deliver(Vec::new(), "", generation).len();
    let mut out = Vec::with_capacity(frames.iter().map(Bytes::len).sum());
    out.extend_from_slice(DELIVER_OPENS);
    for (index, frame) in frames.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        let messages = frame.len().saturating_sub(around);
        out.extend_from_slice(&frame[DELIVER_OPENS.len()..][..messages]);
    }
    close_deliver(out, mailbox, generation)
}

fn encode_messages(deliver: Deliver) -> Result<Bytes, FrameError> {
    let mut out = DELIVER_OPENS.to_vec();
    for (index, message) in deliver.messages.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        let (seq, id) = (message.seq, message.id.clone());
        let body = body(message, BODY_BYTES_MAX as usize)?;
        let (kind, payload) = match &body {
            Body::Text(text) => (BodyKind::Text, text.as_bytes()),
            Body::Json(json) => (BodyKind::Json, json.as_bytes()),
            Body::Data(data) => (BodyKind::Data, &data[..]),
        };
        put_message(&mut out, seq, &id, kind, payload).map_err(FrameError::Json)?;
    }
    Ok(close_deliver(out, &deliver.mailbox, deliver.generation))
}

fn put_message(
    out: &mut Vec<u8>,
    seq: u64,
    id: &str,
    kind: BodyKind,
    payload: &[u8],
) -> Result<(), String> {
    out.reserve(payload.len() + id.len() + 48);
    out.extend_from_slice(format!("{{\"seq\":{seq},\"id\":").as_bytes());
    put_text(out, id);
    match kind {
        BodyKind::Text => {
            let text = std::str::from_utf8(payload).map_err(|error| error.to_string())?;
            out.extend_from_slice(b",\"text\":");
            put_text(out, text);
        }
        BodyKind::Json => {
            // An invalid value would make the whole frame invalid, and end the session.
            serde_json::from_slice::<&RawValue>(payload).map_err(|error| error.to_string())?;
            out.extend_from_slice(b",\"json\":");
            out.extend_from_slice(payload);
        }
        BodyKind::Data => {
            out.extend_from_slice(b",\"data\":\"");
            out.extend_from_slice(STANDARD.encode(payload).as_bytes());
            out.push(b'"');
        }
    }
    out.push(b'}');
    Ok(())
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("text is JSON, and a Vec takes it");
}

fn close_deliver(mut out: Vec<u8>, mailbox: &str, generation: u32) -> Bytes {
    out.push(b']');
    if !mailbox.is_empty() {
        out.extend_from_slice(b",\"mailbox\":");
        put_text(&mut out, mailbox);
    }
    if generation != 0 {
        out.extend_from_slice(format!(",\"generation\":{generation}").as_bytes());
    }
    out.extend_from_slice(b"}}");
    out.into()
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FrameError> {
    serde_json::from_slice(bytes).map_err(|error| FrameError::Json(cut(&error.to_string(), 256)))
}

fn to_bytes<T: Serialize>(frame: &T) -> Bytes {
    serde_json::to_vec(frame).expect("frames hold nothing that JSON cannot").into()
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// A frame whose fields are not decoded.
struct OneKey<'a> {
    kind: Cow<'a, str>,
    value: &'a RawValue,
}

impl<'de> Deserialize<'de> for OneKey<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = OneKey<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one key, the kind")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OneKey<'de>, A::Error> {
                let wrong = |keys| de::Error::invalid_length(keys, &self);
                let (kind, value) = map.next_entry()?.ok_or_else(|| wrong(0))?;
                match map.next_key::<IgnoredAny>()? {
                    None => Ok(OneKey { kind, value }),
                    Some(_) => Err(wrong(2)),
                }
            }
        }
        from.deserialize_map(Reader)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum Client {
    Hello(Hello),
    Ack(Ack),
    Refresh(Refresh),
    Pong(Empty),
    Subscribe(Group),
    Unsubscribe(Group),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum Server {
    Welcome(Welcome),
    Skip(Skip),
    GoAway(GoAway),
    Error(ErrorText),
    Ping(Empty),
    Subscribed(Subscribed),
    Unsubscribed(Unsubscribed),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
struct Hello {
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sdk: Option<String>,
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    attempt: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    positions: Option<Vec<Handled>>,
    #[serde(alias = "accepts_zstd", skip_serializing_if = "Option::is_none")]
    accepts_zstd: Option<bool>,
    #[serde(alias = "visible_pings", skip_serializing_if = "Option::is_none")]
    visible_pings: Option<bool>,
    #[serde(alias = "ping_interval_ms")]
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    ping_interval_ms: u32,
}

/// A position in Hello.
#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Handled {
    #[serde(skip_serializing_if = "Option::is_none")]
    mailbox: Option<String>,
    #[serde(deserialize_with = "number")]
    epoch: u64,
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    generation: u32,
    #[serde(deserialize_with = "number")]
    seq: u64,
    #[serde(deserialize_with = "optional", skip_serializing_if = "Option::is_none")]
    chain: Option<u32>,
}

/// A position in Welcome, a frame of a node, so unknown fields are ignored.
#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Position {
    #[serde(skip_serializing_if = "Option::is_none")]
    mailbox: Option<String>,
    #[serde(deserialize_with = "number")]
    epoch: u64,
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    generation: u32,
    #[serde(deserialize_with = "number")]
    seq: u64,
    #[serde(deserialize_with = "optional", skip_serializing_if = "Option::is_none")]
    chain: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ack {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mailbox: Option<String>,
    #[serde(default, deserialize_with = "optional", skip_serializing_if = "Option::is_none")]
    generation: Option<u32>,
    #[serde(deserialize_with = "seq")]
    seq: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    group: String,
}

/// A frame of a node, so unknown fields are ignored.
#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Subscribed {
    group: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<Position>,
}

/// As [`Subscribed`].
#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Unsubscribed {
    group: String,
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    code: u32,
    #[serde(skip_serializing_if = "is_default")]
    text: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refresh {
    token: String,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Welcome {
    session: String,
    #[serde(alias = "ping_interval_ms", deserialize_with = "number")]
    ping_interval_ms: u32,
    #[serde(alias = "max_frame_bytes", deserialize_with = "number")]
    max_frame_bytes: u32,
    #[serde(alias = "max_unacked", deserialize_with = "number")]
    max_unacked: u32,
    #[serde(alias = "ack_interval_ms", deserialize_with = "number")]
    ack_interval_ms: u32,
    positions: Vec<Position>,
    #[serde(alias = "server_time_ms", deserialize_with = "number")]
    server_time_ms: u64,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Skip {
    #[serde(skip_serializing_if = "Option::is_none")]
    mailbox: Option<String>,
    #[serde(deserialize_with = "number")]
    to: u64,
    why: String,
    #[serde(deserialize_with = "number")]
    chain: u32,
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    generation: u32,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct GoAway {
    why: String,
    #[serde(alias = "reconnect_after_ms", deserialize_with = "number")]
    reconnect_after_ms: u32,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct ErrorText {
    #[serde(deserialize_with = "number")]
    code: u32,
    text: String,
    #[serde(deserialize_with = "number", skip_serializing_if = "is_default")]
    attempt: u64,
}

#[derive(Deserialize)]
struct DeliverIn {
    #[serde(default)]
    mailbox: Option<String>,
    #[serde(default, deserialize_with = "number")]
    generation: u32,
    messages: Vec<MessageIn>,
}

#[derive(Deserialize)]
struct MessageIn {
    #[serde(deserialize_with = "seq")]
    seq: u64,
    id: String,
    text: Option<String>,
    #[serde(default, deserialize_with = "present")]
    json: Option<Box<RawValue>>,
    data: Option<String>,
}

impl From<Hello> for v1::Hello {
    fn from(hello: Hello) -> Self {
        Self {
            device: hello.device.unwrap_or_default(),
            platform: hello.platform.unwrap_or_default(),
            sdk: hello.sdk.unwrap_or_default(),
            attempt: hello.attempt,
            positions: hello.positions.into_iter().flatten().map(Into::into).collect(),
            accepts_zstd: hello.accepts_zstd.unwrap_or_default(),
            visible_pings: hello.visible_pings.unwrap_or_default(),
            ping_interval_ms: hello.ping_interval_ms,
        }
    }
}

impl From<v1::Hello> for Hello {
    fn from(hello: v1::Hello) -> Self {
        let positions: Vec<_> = hello.positions.into_iter().map(Into::into).collect();
        Self {
            device: some(hello.device),
            platform: some(hello.platform),
            sdk: some(hello.sdk),
            attempt: hello.attempt,
            positions: (!positions.is_empty()).then_some(positions),
            accepts_zstd: hello.accepts_zstd.then_some(true),
            visible_pings: hello.visible_pings.then_some(true),
            ping_interval_ms: hello.ping_interval_ms,
        }
    }
}

impl From<Position> for v1::Position {
    fn from(position: Position) -> Self {
        Self {
            mailbox: position.mailbox.unwrap_or_default(),
            epoch: position.epoch,
            generation: position.generation,
            seq: position.seq,
            chain: position.chain,
        }
    }
}

impl From<v1::Position> for Position {
    fn from(position: v1::Position) -> Self {
        Self {
            mailbox: some(position.mailbox),
            epoch: position.epoch,
            generation: position.generation,
            seq: position.seq,
            chain: position.chain,
        }
    }
}

impl From<Handled> for v1::Position {
    fn from(position: Handled) -> Self {
        Self {
            mailbox: position.mailbox.unwrap_or_default(),
            epoch: position.epoch,
            generation: position.generation,
            seq: position.seq,
            chain: position.chain,
        }
    }
}

impl From<v1::Position> for Handled {
    fn from(position: v1::Position) -> Self {
        Self {
            mailbox: some(position.mailbox),
            epoch: position.epoch,
            generation: position.generation,
            seq: position.seq,
            chain: position.chain,
        }
    }
}

impl From<Welcome> for v1::Welcome {
    fn from(welcome: Welcome) -> Self {
        Self {
            session: welcome.session,
            ping_interval_ms: welcome.ping_interval_ms,
            max_frame_bytes: welcome.max_frame_bytes,
            max_unacked: welcome.max_unacked,
            ack_interval_ms: welcome.ack_interval_ms,
            positions: welcome.positions.into_iter().map(Into::into).collect(),
            server_time_ms: welcome.server_time_ms,
        }
    }
}

impl From<v1::Welcome> for Welcome {
    fn from(welcome: v1::Welcome) -> Self {
        Self {
            session: welcome.session,
            ping_interval_ms: welcome.ping_interval_ms,
            max_frame_bytes: welcome.max_frame_bytes,
            max_unacked: welcome.max_unacked,
            ack_interval_ms: welcome.ack_interval_ms,
            positions: welcome.positions.into_iter().map(Into::into).collect(),
            server_time_ms: welcome.server_time_ms,
        }
    }
}

impl From<Skip> for v1::Skip {
    fn from(skip: Skip) -> Self {
        Self {
            mailbox: skip.mailbox.unwrap_or_default(),
            to: skip.to,
            why: skip_reason(&skip.why).into(),
            chain: skip.chain,
            generation: skip.generation,
        }
    }
}

impl From<v1::Skip> for Skip {
    fn from(skip: v1::Skip) -> Self {
        Self {
            why: skip_word(skip.why()).into(),
            mailbox: some(skip.mailbox),
            to: skip.to,
            chain: skip.chain,
            generation: skip.generation,
        }
    }
}

impl From<GoAway> for v1::GoAway {
    fn from(go_away: GoAway) -> Self {
        Self { why: go_away.why, reconnect_after_ms: go_away.reconnect_after_ms }
    }
}

impl From<Subscribed> for v1::Subscribed {
    fn from(Subscribed { group, position }: Subscribed) -> Self {
        Self { group, position: position.map(Into::into) }
    }
}

impl From<Unsubscribed> for v1::Unsubscribed {
    fn from(Unsubscribed { group, code, text }: Unsubscribed) -> Self {
        Self { group, code, text }
    }
}

impl From<ErrorText> for v1::Error {
    fn from(error: ErrorText) -> Self {
        Self { code: error.code, text: error.text, attempt: error.attempt }
    }
}

impl TryFrom<DeliverIn> for Deliver {
    type Error = FrameError;

    fn try_from(deliver: DeliverIn) -> Result<Self, FrameError> {
        Ok(Self {
            mailbox: deliver.mailbox.unwrap_or_default(),
            generation: deliver.generation,
            messages: deliver.messages.into_iter().map(message).collect::<Result<_, _>>()?,
        })
    }
}

fn message(message: MessageIn) -> Result<v1::Message, FrameError> {
    let bad = |why: String| FrameError::Json(format!("data of message {}: {why}", message.seq));
    let body = match (message.text, message.json, message.data) {
        (Some(text), None, None) => message::Body::Text(text),
        (None, Some(json), None) => message::Body::Json(String::from(Box::<str>::from(json))),
        (None, None, Some(data)) => {
            message::Body::Data(decode_base64(&data).map_err(|e| bad(e.to_string()))?)
        }
        _ => return Err(FrameError::NoBody(message.seq)),
    };
    Ok(v1::Message { seq: message.seq, id: message.id, body: Some(body) })
}

fn skip_word(why: SkipReason) -> &'static str {
    match why {
        SkipReason::Unspecified => "unspecified",
        SkipReason::Expired => "expired",
        SkipReason::Evicted => "evicted",
        SkipReason::OtherDevice => "otherDevice",
        SkipReason::Collapsed => "collapsed",
        SkipReason::Recalled => "recalled",
        SkipReason::Acknowledged => "acknowledged",
    }
}

fn skip_reason(word: &str) -> SkipReason {
    match word {
        "expired" => SkipReason::Expired,
        "evicted" => SkipReason::Evicted,
        "otherDevice" | "other_device" => SkipReason::OtherDevice,
        "collapsed" => SkipReason::Collapsed,
        "recalled" => SkipReason::Recalled,
        "acknowledged" => SkipReason::Acknowledged,
        _ => SkipReason::Unspecified,
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A field whose `null` is a value: JSON null is a valid body.
fn present<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

/// A seq, which must be present: null would otherwise be position 0.
fn seq<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    optional(from)?.ok_or_else(|| de::Error::missing_field("seq"))
}

fn number<'de, D: Deserializer<'de>, T: TryFrom<u64> + Default>(from: D) -> Result<T, D::Error> {
    Ok(optional(from)?.unwrap_or_default())
}

/// A whole number, plain or quoted; null means absent.
fn optional<'de, D: Deserializer<'de>, T: TryFrom<u64>>(from: D) -> Result<Option<T>, D::Error> {
    struct Number<T>(PhantomData<T>);

    impl<T: TryFrom<u64>> Visitor<'_> for Number<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number, plain or quoted")
        }

        fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
            let bits = 8 * size_of::<T>();
            let too_large = || E::custom(format_args!("{value} is too large for {bits} bits"));
            T::try_from(value).ok().map(Some).ok_or_else(too_large)
        }

        fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
            // A whole float below 2^53 converts without loss.
            if value.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&value) {
                return self.visit_u64(value as u64);
            }
            // serde_json reads whole numbers from 2^64 as floats.
            if value.fract() == 0.0 && value >= 18_446_744_073_709_551_616.0 {
                return Err(E::custom("a number is too large for 64 bits"));
            }
            Err(E::invalid_value(de::Unexpected::Float(value), &self))
        }

        fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
            match value.parse() {
                Ok(value) => self.visit_u64(value),
                Err(_) => Err(E::invalid_value(de::Unexpected::Str(value), &self)),
            }
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
    }

    from.deserialize_any(Number(PhantomData))
}
