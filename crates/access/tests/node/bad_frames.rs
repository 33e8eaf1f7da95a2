//! Frames that are none, or out of place: each ends its own connection with a code and a reason.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use barid_core::CloseCode;
use barid_testkit::Device;
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::raw::*;
use barid_wire::frames::{ClientFrame, Encoding, encode_client};
use barid_wire::v1;
use serde_json::{Value, json};

use crate::support::*;

/// Bytes of a frame, as the node of these tests has it.
const FRAME_BYTES_MAX: usize = 16 << 10;

struct Bad {
    what: &'static str,
    encoding: Encoding,
    /// Whether the session is welcomed before.
    welcomed: bool,
    bytes: Vec<u8>,
    code: CloseCode,
    text: &'static str,
}

fn text(json: &str) -> Vec<u8> {
    frame(TEXT, json)
}

fn hello(change: Value) -> Vec<u8> {
    let mut hello = json!({ "device": "phone" });
    for (name, value) in change.as_object().into_iter().flatten() {
        hello[name] = value.clone();
    }
    text(&json!({ "hello": hello }).to_string())
}

fn proto(client: ClientFrame) -> Vec<u8> {
    encode_client(Encoding::Proto, &client).to_vec()
}

fn ack() -> Vec<u8> {
    proto(ClientFrame::Ack(v1::Ack { seq: 1, ..Default::default() }))
}

/// Fragments that together are too much, each small.
fn fragments() -> Vec<u8> {
    let mut bytes = frame(TEXT - LAST, "");
    for _ in 0..FRAME_BYTES_MAX / 100 + 1 {
        bytes.extend(frame(CONTINUATION - LAST, [b'x'; 100]));
    }
    bytes
}

fn table() -> Vec<Bad> {
    let bad = |encoding, welcomed, what, bytes, text| {
        let code = CloseCode::BadFrame;
        Bad { what, encoding, welcomed, bytes, code, text }
    };
    let session = |what, bytes, text| bad(Encoding::Json, true, what, bytes, text);
    let first = |what, bytes, text| bad(Encoding::Json, false, what, bytes, text);
    let broken = |what, bytes, text| {
        let code = CloseCode::ProtocolError;
        Bad { code, ..session(what, bytes, text) }
    };
    let garbled = |what, bytes| {
        let code = CloseCode::InvalidPayload;
        Bad { code, ..session(what, bytes, "UTF-8") }
    };
    let packed =
        |what, bytes: Vec<u8>, text| bad(Encoding::Proto, true, what, frame(BINARY, bytes), text);
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let unmasked = [&[TEXT, 2][..], b"{}"].concat();
    let many: Vec<Value> = (0..257).map(|n| json!({ "mailbox": n.to_string() })).collect();
    vec![
        // Frames that a session does not understand.
        session("a binary message", frame(BINARY, "{}"), "json frames are text messages"),
        session("nothing", text(""), "EOF"),
        session("half a frame", text("{\"ack\":"), "EOF"),
        session("two frames in one", text("{\"pong\":{}}{\"pong\":{}}"), "trailing characters"),
        session("two kinds", text(r#"{"ack":{"seq":1},"pong":{}}"#), "one key, the kind"),
        session("a kind twice", text(r#"{"pong":{},"pong":{}}"#), "one key, the kind"),
        session("no kind", text("{}"), "one key, the kind"),
        session("an array", text("[]"), "one key, the kind"),
        session("a number", text("7"), "one key, the kind"),
        session("an unknown field", text(r#"{"ack":{"sequence":1}}"#), "ack: unknown field"),
        session("no seq", text(r#"{"ack":{}}"#), "ack: missing field `seq`"),
        session("null for a seq", text(r#"{"ack":{"seq":null}}"#), "ack: missing field `seq`"),
        session("a negative seq", text(r#"{"ack":{"seq":-1}}"#), "a whole number"),
        session("a broken seq", text(r#"{"ack":{"seq":1.5}}"#), "a whole number"),
        session("a seq of words", text(r#"{"ack":{"seq":"all"}}"#), "a whole number"),
        session("a huge seq", text(r#"{"ack":{"seq":9007199254740992}}"#), "below 2^53"),
        session("infinity", text(r#"{"ack":{"seq":1e400}}"#), "number out of range"),
        session("not a number", text(r#"{"ack":{"seq":NaN}}"#), "expected value"),
        session("a field twice", text(r#"{"ack":{"seq":1,"seq":2}}"#), "duplicate field"),
        session(
            "a huge generation",
            text(r#"{"ack":{"seq":1,"generation":4294967296}}"#),
            "4294967296",
        ),
        session("depth", text(&format!(r#"{{"ack":{{"seq":{deep}}}}}"#)), "a whole number"),
        session("a second hello", hello(json!({})), "a second hello"),
        session("a token of another type", text(r#"{"refresh":{"token":7}}"#), "a string"),
        session("half a character", text("{\"refresh\":{\"token\":\"\\ud800\"}}"), "hex escape"),
        // Violations of WebSocket itself.
        garbled("no UTF-8", frame(TEXT, b"{\"ack\xff")),
        session("a long frame", frame(TEXT, vec![b' '; FRAME_BYTES_MAX + 1]), "the limit is 16384"),
        session("an absurdly long frame", announced(TEXT, 1 << 62), "the limit is 16384"),
        session("too many fragments", fragments(), "the limit is 16384"),
        broken("the end of nothing", frame(CONTINUATION, "x"), "nothing to continue"),
        broken(
            "a frame in a frame",
            [frame(TEXT - LAST, "{"), text("{}")].concat(),
            "waiting for more fragments",
        ),
        broken("half a ping", frame(PING - LAST, ""), "Fragmented control frame"),
        broken("a long ping", frame(PING, [b'x'; 126]), "125 bytes or less"),
        broken("an unmasked frame", unmasked, "unmasked frame"),
        broken("a compressed frame", frame(TEXT | COMPRESSED, "{}"), "Reserved bits"),
        broken("an unknown opcode", frame(0x83, "x"), "invalid opcode"),
        broken("an unknown control frame", frame(0x8b, ""), "invalid opcode"),
        broken("half a close code", frame(CLOSE, [3]), "close sequence"),
        garbled("a close without reason", frame(CLOSE, b"\x03\xe8\xff\xff")),
        broken("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), "not WebSocket"),
        // Protobuf.
        bad(Encoding::Proto, true, "a text message", text("{}"), "proto frames binary"),
        packed("nothing in protobuf", Vec::new(), "no kind; expected one of hello, ack"),
        packed("half a protobuf frame", ack()[..3].to_vec(), "not a protobuf frame"),
        packed("two kinds in protobuf", [ack(), ack()].concat(), "more than one kind"),
        packed("another wire type", vec![0x10, 1], "not a protobuf frame"),
        packed("groups in groups", vec![0x0b; 1000], "not a protobuf frame"),
        packed("a length without end", vec![0x12, 0xff, 0xff, 0xff, 0xff, 0x0f], "not a protobuf"),
        // First frames.
        first("an ack for a hello", text(r#"{"ack":{"seq":1}}"#), "the first frame is hello"),
        first("a pong for a hello", text(r#"{"pong":{}}"#), "the first frame is hello"),
        first(
            "a refresh for a hello",
            text(r#"{"refresh":{"token":"x"}}"#),
            "first frame is hello",
        ),
        first("a kind of later for a hello", text(r#"{"helo":{}}"#), "the first frame is hello"),
        first("words for a hello", text(r#"{"hello":"phone"}"#), "hello: not an object"),
        first("a list for a hello", text(r#"{"hello":["phone"]}"#), "hello: not an object"),
        first("no device", hello(json!({ "device": "" })), "hello names no device"),
        first(
            "a long device",
            hello(json!({ "device": "d".repeat(65) })),
            "65 bytes, the limit is 64",
        ),
        first("a device of controls", hello(json!({ "device": "a\0b" })), "device contains '\\0'"),
        first("a long platform", hello(json!({ "platform": "p".repeat(33) })), "the limit is 32"),
        first("a long sdk", hello(json!({ "sdk": "s".repeat(65) })), "the limit is 64"),
        first("a huge attempt", hello(json!({ "attempt": 1_u64 << 53 })), "below 2^53"),
        first(
            "too many positions",
            hello(json!({ "positions": many })),
            "257 entries, the limit is 256",
        ),
        first(
            "a mailbox twice",
            hello(json!({ "positions": [{}, {}] })),
            "positions of one mailbox",
        ),
        first(
            "a huge chain",
            hello(json!({ "positions": [{ "chain": 1_u64 << 32 }] })),
            "4294967296",
        ),
        first(
            "an endless history",
            hello(json!({ "positions": [{ "generation": u32::MAX }] })),
            "generation is above",
        ),
        first(
            "positions in depth",
            text(&format!(r#"{{"hello":{{"positions":{deep}}}}}"#)),
            "hello: invalid type: sequence",
        ),
        Bad { welcomed: false, ..broken("an early close", frame(CLOSE, [3]), "close sequence") },
    ]
}

#[tokio::test]
async fn bad_frames_end_their_own_connection_with_a_code_and_a_reason() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.limits.frame_bytes_max = FRAME_BYTES_MAX).await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut healthy = node.device("bob", "phone").await?;
    let mut counts = HashMap::new();
    for (number, bad) in (1..).zip(table()) {
        let mut raw = Raw::open(node.addresses["ws"], bad.encoding, &token_of("alice")).await?;
        if bad.welcomed {
            let hello = v1::Hello { device: "phone".into(), ..Default::default() };
            let hello = encode_client(bad.encoding, &ClientFrame::Hello(hello));
            let opcode = if bad.encoding == Encoding::Json { TEXT } else { BINARY };
            raw.send(&frame(opcode, hello)).await;
            raw.welcomed().await?;
        }
        raw.send(&bad.bytes).await;
        let ended = raw.ended().await?;
        assert_eq!(ended.code, bad.code.code(), "{}: {ended:?}", bad.what);
        assert!(ended.text.contains(bad.text), "{}: {ended:?}", bad.what);
        assert!(ended.text.len() < 400, "{}: {ended:?}", bad.what);
        let count = counts.entry(bad.code).or_insert(0);
        *count += 1;
        eventually(bad.what, async || {
            Ok(node.metric("barid_access_closes_total", bad.code.as_str()) == f64::from(*count))
        })
        .await?;
        let id = format!("m{number}");
        let (entry, _) = world.accept("bob", &id).await?;
        dispatcher.push(&world, "bob", entry).await?;
        assert_eq!(healthy.receive(1).await?, [id], "after {}", bad.what);
    }
    world.routes_become("alice", 0).await
}

#[tokio::test]
async fn hazard_72_a_long_name_that_is_ignored_is_repeated_in_part() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let hello = json!({ "device": "phone" });
    let (mut phone, _) = Device::connect_with(&node.url(), &token_of("alice"), hello).await?;
    // Escaped, each character of two bytes takes six.
    let mailbox = "\u{85}".repeat(4000);
    phone.send(&json!({ "ack": { "seq": 9, "mailbox": mailbox } })).await?;
    let Incoming::Other(kind, error) = phone.next(PATIENCE).await? else { bail!("no other frame") };
    let text = error["text"].as_str().context("a text")?;
    assert_eq!(kind, "error");
    assert!(
        text.starts_with(r#"mailbox "\u{85}\u{85}"#) && text.len() <= 300,
        "{} bytes",
        text.len()
    );
    Ok(())
}

#[tokio::test]
async fn hazard_41_what_only_a_newer_client_says_is_ignored_and_counted() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let hello = json!({ "device": "phone", "positions": [{ "seq": 0, "city": "thr" }] });
    let (mut phone, _) = Device::connect_with(&node.url(), &token_of("alice"), hello).await?;
    // A client's author is told once what was ignored.
    let text = "field \"hello.positions.city\" is not known here and was ignored";
    let told = Incoming::Other("error".into(), json!({ "code": 0, "text": text }));
    assert_eq!(phone.next(PATIENCE).await?, told);
    for later in [
        json!({ "probe": { "bytes": 7 } }),
        json!({ "ack": { "seq": 9, "mailbox": "news" } }),
        json!({ "ack": { "seq": 0, "generation": 0, "at": 1 } }),
        json!({ "welcome": {} }),
    ] {
        phone.send(&later).await?;
    }
    let (entry, _) = world.accept("alice", "m1").await?;
    dispatcher.push(&world, "alice", entry).await?;
    assert_eq!(phone.receive(1).await?, ["m1"]);
    world.cursor_becomes("alice", "phone", 1).await?;
    let ignored = |what| node.metric("barid_access_ignored_total", what);
    assert_eq!((ignored("kind"), ignored("field"), ignored("mailbox")), (2.0, 2.0, 1.0));

    let mut raw = Raw::open(node.addresses["ws"], Encoding::Proto, &token_of("bob")).await?;
    let hello = v1::Hello { device: "phone".into(), ..Default::default() };
    let hello = [proto(ClientFrame::Hello(hello)), vec![0xa2, 0x06, 1, 7]].concat();
    raw.send(&frame(BINARY, hello)).await;
    raw.welcomed().await?;
    let ack = v1::Ack { mailbox: "news".into(), seq: 7, generation: Some(1) };
    for later in [vec![0x4a, 0], vec![0xa2, 0x06, 1, 7], proto(ClientFrame::Ack(ack))] {
        raw.send(&frame(BINARY, later)).await;
    }
    eventually("counted", async || Ok((ignored("kind"), ignored("mailbox")) == (4.0, 2.0))).await?;
    raw.send(&frame(CLOSE, 1000_u16.to_be_bytes())).await;
    assert_eq!(raw.ended().await?.code, 1000);
    Ok(())
}

#[tokio::test]
async fn frames_that_are_odd_but_harmless_are_taken() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let hello = json!({
        "device": "phone",
        "platform": "a b 1 2\n3",
        "attempt": 1,
        // Of a mailbox that this device does not follow (any more).
        "positions": [{ "mailbox": "g:news", "epoch": 7, "seq": 9 }],
    });
    let (mut phone, _) = Device::connect_with(&node.url(), &token_of("alice"), hello).await?;
    let (entry, _) = world.accept("alice", "m1").await?;
    dispatcher.push(&world, "alice", entry).await?;
    assert_eq!(phone.message().await?.id, "m1");
    phone.send(&json!({ "pong": {} })).await?;
    phone.send(&json!({ "ack": { "seq": 1, "generation": 77 } })).await?;
    phone.send(&json!({ "ack": { "seq": 0 } })).await?;
    // Hazard 8: what was not sent is not acknowledged.
    phone.send(&json!({ "ack": { "seq": 1_000_000_000 } })).await?;
    world.cursor_becomes("alice", "phone", 1).await?;
    let (entry, _) = world.accept("alice", "m2").await?;
    dispatcher.push(&world, "alice", entry).await?;
    assert_eq!(phone.receive(1).await?, ["m2"]);
    assert_eq!(&*world.inspect("alice").await?.routes[0].platform, "a-b-1-2-3");
    // A close code that nobody may send is answered as RFC 6455 has it.
    let mut raw = Raw::open(node.addresses["ws"], Encoding::Json, &token_of("alice")).await?;
    raw.send(&frame(CLOSE, 999_u16.to_be_bytes())).await;
    assert_eq!(raw.ended().await?.code, 1002);
    Ok(())
}
