//! Records that are refused: each becomes a dead letter, byte for byte, and a receipt, while good ones
//! in front of and behind it in the same partition pass.

use std::collections::{BTreeMap, HashMap};

use barid_core::{AppId, ReceiptSet};
use barid_mailbox::UserKey;
use barid_runtime::Stopped;
use barid_testkit::records;
use barid_wire::record::{Push, ReceiptKind, RefusalCode};
use barid_wire::v1::{Audience, PushRecord, push_record::Body};
use bytes::Bytes;
use prost::Message as _;

use crate::support::*;

struct Bad {
    what: &'static str,
    value: Bytes,
    headers: Vec<(String, Vec<u8>)>,
    code: &'static str,
    /// The message id, if it could be read.
    id: String,
}

const ID: &str = "the-id";

/// A record of alice's with other fields beside its names.
fn with(fields: &str) -> String {
    format!(r#"{{"id":"{ID}","app":"demo","to":{{"user":"alice"}},{fields}}}"#)
}

/// A record with another audience.
fn to(audience: &str) -> String {
    format!(r#"{{"id":"{ID}","app":"demo","to":{audience},"text":"x"}}"#)
}

fn protobuf() -> PushRecord {
    PushRecord {
        id: ID.into(),
        app: "demo".into(),
        to: Some(Audience { user: "alice".into(), ..Default::default() }),
        body: Some(Body::Text("hello".into())),
        ..Default::default()
    }
}

/// A record with other bytes at its end.
fn with_tail(tail: &[u8]) -> Vec<u8> {
    [&protobuf().encode_to_vec()[..], tail].concat()
}

/// The gzip of `{}`.
const GZIP: &[u8] = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab\xae\x05\0\x43\xbf\xa6\xa3\x02\0\0\0";
const PROTOBUF_TYPE: &str = "application/x-protobuf";

fn table() -> Vec<Bad> {
    use RefusalCode as C;
    let bad = |code: C, id: &str, what, value: Vec<u8>| Bad {
        what,
        value: value.into(),
        headers: Vec::new(),
        code: code.as_str(),
        id: id.to_owned(),
    };
    let named = |code, what, value: String| bad(code, ID, what, value.into_bytes());
    let nameless = |code, what, value: &[u8]| bad(code, "", what, value.to_vec());
    let typed = |content_type: &str, bad: Bad| {
        let header = ("Content-Type".to_owned(), content_type.as_bytes().to_vec());
        Bad { headers: vec![header], ..bad }
    };
    let deep =
        |open: &str, close: &str, depth| format!("{}{}", open.repeat(depth), close.repeat(depth));
    let users = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("\"u{n}\"")).collect();
        format!(r#"{{"users":[{}]}}"#, names.join(","))
    };
    let of_app = |app: &str| with(r#""text":"x""#).replace("demo", app);
    let long_id = "i".repeat(500);
    let bomb = (0..2000).map(|n| (format!("h{n}"), vec![b'x'; 100])).collect();
    let receipt = barid_wire::v1::Receipt { kind: 4, id: "r".into(), ..Default::default() };
    let body = |body| PushRecord { body: Some(body), ..protobuf() }.encode_to_vec();
    vec![
        nameless(C::EmptyRecord, "nothing", b""),
        // Not what it seems to be.
        nameless(C::BadProtobuf, "garbage", &[0xff; 40]),
        nameless(C::BadProtobuf, "another message", &receipt.encode_to_vec()),
        nameless(C::BadProtobuf, "a list of records", b"[{\"id\":\"1\"}]"),
        nameless(C::BadProtobuf, "gzip", GZIP),
        nameless(C::BadProtobuf, "UTF-16", b"\xff\xfe{\0\"\0i\0d\0\"\0"),
        bad(C::BadProtobuf, ID, "half a record", with_tail(b"")[..27].to_vec()),
        bad(C::BadProtobuf, ID, "a field of another type", with_tail(b"\x38\xff")),
        bad(C::BadProtobuf, ID, "no UTF-8", with_tail(b"\x42\x02\xff\xff")),
        bad(C::BadProtobuf, ID, "groups in groups", with_tail(&[0xa3; 5000])),
        typed(PROTOBUF_TYPE, nameless(C::BadProtobuf, "JSON that is called protobuf", b"{}")),
        typed("application/json", nameless(C::BadJson, "gzip that is called JSON", GZIP)),
        typed(
            "application/json; charset=utf-8",
            bad(C::BadJson, "", "protobuf that is called JSON", protobuf().encode_to_vec()),
        ),
        named(C::BadJson, "half of JSON", with(r#""text":"hel"#)),
        named(C::BadJson, "more behind it", with(r#""text":"x""#) + "{}"),
        named(C::BadJson, "NaN", with(r#""text":"x","ttlSeconds":NaN"#)),
        named(C::BadJson, "a comment", with("\"text\":\"x\" // hello")),
        named(C::BadJson, "a raw control character", with("\"text\":\"\u{1}\"")),
        bad(
            C::BadJson,
            ID,
            "a broken character",
            [with("\"text\":\"").trim_end_matches('}').as_bytes(), b"\xc3\x28\"}"].concat(),
        ),
        // Fields.
        named(C::UnknownField, "a field that is none", with(r#""text":"x","nonsense":1"#)),
        named(C::UnknownField, "another language's case", with(r#""text":"x","TTLSeconds":1"#)),
        named(C::UnknownField, "a segment", to(r#"{"segment":"g"}"#)),
        named(C::RepeatedField, "a field twice", with(r#""text":"x","text":"y""#)),
        named(C::RepeatedField, "two ids", with(r#""text":"x","id":"2""#)),
        named(
            C::RepeatedField,
            "two spellings",
            with(r#""text":"","ttlSeconds":1,"ttl_seconds":2"#),
        ),
        named(C::BadValue, "a number for text", with(r#""text":5"#)),
        named(C::BadValue, "a name for an audience", to("\"alice\"")),
        named(C::BadValue, "brackets for an audience", to(&deep("[", "]", 100_000))),
        named(C::BadValue, "words for a number", with(r#""text":"x","ttlSeconds":"soon""#)),
        named(C::BadValue, "infinity", with(r#""text":"x","ttlSeconds":1e999"#)),
        named(C::BadValue, "half a character", with(r#""text":"\ud800""#)),
        nameless(C::MissingField, "no field", b"{}"),
        named(C::MissingField, "no app", format!(r#"{{"id":"{ID}","text":"x"}}"#)),
        nameless(C::MissingField, "no id", br#"{"app":"demo","to":{"user":"alice"},"text":"x"}"#),
        // Names.
        nameless(C::BadId, "a number for an id", br#"{"id":7,"app":"demo"}"#),
        bad(
            C::BadId,
            &long_id[..128],
            "a long id",
            with("\"text\":\"\"").replace(ID, &long_id).into(),
        ),
        bad(
            C::BadId,
            "a\nb",
            "a line's end in an id",
            with("\"text\":\"\"").replace(ID, "a\\nb").into(),
        ),
        named(C::BadApp, "a colon in an app", of_app("demo:u")),
        named(C::BadApp, "a space in an app", of_app("demo ")),
        named(C::BadApp, "a Cyrillic app", of_app("dеmo")),
        named(C::BadUser, "NUL in a user", to(r#"{"user":"a\u0000b"}"#)),
        named(C::BadUser, "a long user", to(&format!(r#"{{"user":"{}"}}"#, "u".repeat(129)))),
        named(C::BadUser, "a user without a name", to(r#"{"users":["alice",""]}"#)),
        named(
            C::BadDevice,
            "a long device",
            to(&format!(r#"{{"user":"alice","device":"{long_id}"}}"#)),
        ),
        named(C::BadDevice, "a device of many", to(r#"{"users":["alice"],"device":"phone"}"#)),
        named(C::BadDevice, "a device of a group", to(r#"{"group":"eng","device":"phone"}"#)),
        named(C::BadGroup, "a long group", to(&format!(r#"{{"group":"{}"}}"#, "g".repeat(65)))),
        named(C::BadGroup, "the reserved group", to(r#"{"group":"everyone"}"#)),
        named(C::NoAudience, "nobody", to("{}")),
        named(C::NoAudience, "nobody's device", to(r#"{"device":"phone"}"#)),
        named(C::NoAudience, "null", to("null")),
        bad(
            C::NoAudience,
            ID,
            "an audience of later",
            PushRecord { to: Some(Audience::default()), ..protobuf() }.encode_to_vec(),
        ),
        named(C::TwoAudiences, "one and many", to(r#"{"user":"alice","users":["bob"]}"#)),
        named(C::TwoAudiences, "a group and everyone", to(r#"{"group":"eng","everyone":true}"#)),
        named(
            C::ReceiptForMany,
            "receipts of many devices",
            to(r#"{"group":"eng"}"#).replace("\"text\"", r#""receipts":["acked"],"text""#),
        ),
        named(C::TooManyUsers, "too many users", to(&users(1001))),
        named(
            C::FanoutTooLarge,
            "much for many",
            to(&users(1000)).replace("\"x\"", &format!("\"{}\"", "x".repeat(9000))),
        ),
        // Bodies.
        named(C::NoBody, "no body", with(r#""ttlSeconds":1"#)),
        named(C::NoBody, "null for a body", with(r#""text":null"#)),
        named(C::TwoBodies, "two bodies", with(r#""text":"x","data":"eA==""#)),
        named(C::BadBase64, "no base64", with(r#""data":"@@@@""#)),
        bad(C::BadJsonBody, ID, "no JSON", body(Body::Json("{]".into()))),
        bad(C::BadJsonBody, ID, "no JSON at all", body(Body::Json(String::new()))),
        named(C::TooDeep, "depth", with(&format!(r#""json":{}"#, deep("[", "]", 30_000)))),
        named(
            C::TooDeep,
            "deep objects",
            with(&format!(r#""json":{}"#, deep("{\"a\":", "}", 10_000).replace(":}", ":1}"))),
        ),
        named(
            C::PayloadTooLarge,
            "a byte too much",
            with(&format!(r#""text":"{}""#, "x".repeat(65_537))),
        ),
        named(
            C::PayloadTooLarge,
            "10 MB",
            with(&format!(r#""text":"{}""#, "x".repeat(10_000_000))),
        ),
        bad(
            C::PayloadTooLarge,
            ID,
            "10 MB of protobuf",
            body(Body::Data(vec![7; 10_000_000].into())),
        ),
        named(
            C::PayloadTooLarge,
            "10 MB of base64",
            with(&format!(r#""data":"{}""#, "AAAA".repeat(2_500_000))),
        ),
        // The rest.
        named(C::NegativeTtl, "a negative life", with(r#""text":"x","ttlSeconds":-1"#)),
        bad(
            C::NegativeTtl,
            ID,
            "the least life",
            PushRecord { ttl_seconds: i64::MIN, ..protobuf() }.encode_to_vec(),
        ),
        named(C::TtlTooLong, "an absurd life", with(r#""text":"x","ttlSeconds":1e18"#)),
        named(
            C::TtlTooLong,
            "a life beyond numbers",
            with(r#""text":"x","ttlSeconds":"99999999999999999999""#),
        ),
        named(
            C::BadCollapseKey,
            "a long key",
            with(&format!(r#""text":"x","collapseKey":"{long_id}""#)),
        ),
        named(C::BadCollapseKey, "a key of controls", with(r#""text":"x","collapseKey":"\u0007""#)),
        named(
            C::UnknownReceipt,
            "a receipt that is none",
            with(r#""text":"x","receipts":["read"]"#),
        ),
        bad(
            C::UnknownReceipt,
            ID,
            "a receipt of later",
            PushRecord { receipts: vec![99], ..protobuf() }.encode_to_vec(),
        ),
        Bad {
            headers: bomb,
            ..named(C::UnknownReceipt, "thousands of headers", with(r#""text":"x","receipts":5"#))
        },
        Bad {
            code: "accept_failed",
            ..named(C::NoBody, "a mailbox that is broken", to(r#"{"user":"broken"}"#))
        },
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_becomes_a_dead_letter_and_a_receipt_and_harms_nobody_else() {
    let world = World::new(false).await;
    world.raise_limit(12_000_000).await;
    let shard = world.mailbox.shard_of(&key("broken"));
    let head = format!("{{{shard}}}:h:u:demo:broken");
    let _: () = world.redis.query(&["SET", &head, "no hash"]).await.unwrap();
    let purger = world.start().await;
    let (table, mut places) = (table(), HashMap::new());
    let producer = world.raw_producer();
    for (n, bad) in table.iter().enumerate() {
        let good = record(&format!("good{n}"), "alice");
        world.produce_raw(&producer, Some("good"), Some(&good), &[]).await;
        // The key tells each letter to its record.
        let key = n.to_string();
        let offset = world.produce_raw(&producer, Some(&key), Some(&bad.value), &bad.headers).await;
        places.insert(key, offset);
    }
    world.produce_raw(&producer, None, None, &[]).await;
    // A trace that is none is not passed on.
    let last = asking("last", "alice", ReceiptSet::ACCEPTED);
    let hostile = [("traceparent".to_owned(), b"00-x\r\nSet-Cookie: a=b".to_vec())];
    world.produce_raw(&producer, None, Some(&last), &hostile).await;
    let shop = Push { app: AppId::new("shop").unwrap(), ..message("last", "alice") };
    let shop = records::json(&shop);
    world.produce_raw(&producer, None, Some(&shop), &[]).await;

    let dead = world.letters(table.len() + 1).await;
    let mut refused = BTreeMap::new();
    for letter in dead {
        let header = |name: &str| {
            let found = letter.headers.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
        };
        assert_eq!(header("barid-topic").unwrap(), world.config.kafka.topics.push);
        assert!(header("barid-reason").is_some_and(|reason| reason.len() > 10), "{letter:?}");
        assert_eq!(header("barid-truncated"), None);
        let code = header("barid-code").unwrap();
        *refused.entry(code.clone()).or_insert(0.0) += 1.0;
        let Some(key) = letter.key else {
            assert_eq!((&*code, letter.value.len()), ("empty_record", 0), "no key stays no key");
            continue;
        };
        let key = String::from_utf8_lossy(&key).into_owned();
        let bad = &table[key.parse::<usize>().unwrap()];
        assert_eq!(code, bad.code, "{}: {:?}", bad.what, header("barid-reason"));
        assert!(letter.value == bad.value, "{}: not byte for byte", bad.what);
        let place = (header("barid-partition").unwrap(), header("barid-offset").unwrap());
        let offset = places.remove(&key).unwrap().to_string();
        assert_eq!(place, ("0".to_owned(), offset), "{}", bad.what);
        for (name, value) in &bad.headers {
            assert!(letter.headers.iter().any(|(n, v)| n == name && **v == value[..]), "{name}");
        }
    }
    let silent: Vec<&str> =
        places.keys().map(|n| table[n.parse::<usize>().unwrap()].what).collect();
    assert!(silent.is_empty(), "without a letter: {silent:?}");
    let mut known: Vec<&str> = RefusalCode::ALL.iter().map(|code| code.as_str()).collect();
    known.push("accept_failed");
    for code in known {
        let count = *refused.get(code).unwrap_or_else(|| panic!("no record shows {code}"));
        assert_eq!(purger.metric_of("records_refused_total", code), count, "{code}");
    }

    let mut told: Vec<(String, String)> = Vec::new();
    for receipt in world.receipts(table.len() + 2).await {
        match receipt.kind() {
            ReceiptKind::Refused => told.push((receipt.code, receipt.id)),
            kind => {
                assert_eq!((kind, &*receipt.id), (ReceiptKind::Accepted, "last"));
                assert_eq!(receipt.traceparent, "", "a hostile trace");
            }
        }
    }
    let mut expected: Vec<(String, String)> =
        table.iter().map(|bad| (bad.code.to_owned(), bad.id.clone())).collect();
    expected.push(("empty_record".into(), String::new()));
    told.sort();
    expected.sort();
    assert_eq!(told, expected);

    world.has("alice", table.len() + 1).await;
    let mut good: Vec<String> = (0..table.len()).map(|n| format!("good{n}")).collect();
    good.push("last".into());
    assert_eq!(world.ids("alice").await, good, "in order, all of them");
    let shop = UserKey { app: AppId::new("shop").unwrap(), user: key("alice").user };
    let inspection = world.mailbox.inspect(&shop).await.unwrap();
    assert_eq!(inspection.newest.0, 1, "the app in the record decides");
    assert_eq!(purger.stop().await, Stopped::Clean);
}
