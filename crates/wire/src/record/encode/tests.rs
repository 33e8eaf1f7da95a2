use std::collections::BTreeSet;
use std::sync::Arc;

use barid_core::{AppId, DeviceId, MessageId, ReceiptSet, UserId};
use proptest::prelude::*;
use serde_json::Value;

use super::super::decode_push;
use super::*;

const FORMATS: [Format; 2] = [Format::Json, Format::Protobuf];

fn least() -> Push {
    let (id, app) = (MessageId::new("order-7").unwrap(), AppId::new("demo").unwrap());
    Push::new(id, app, UserId::new("alice").unwrap(), BodyKind::Text, "hello")
}

fn user() -> impl Strategy<Value = UserId> {
    "\\PC{1,12}".prop_map(|name| UserId::new(&name).unwrap())
}

/// Several times one user would not be decoded as it was encoded.
fn users() -> impl Strategy<Value = Vec<UserId>> {
    prop::collection::vec(user(), 1..5).prop_map(|users| {
        let mut seen = BTreeSet::new();
        users.into_iter().filter(|user| seen.insert(user.clone())).collect()
    })
}

fn recipients() -> impl Strategy<Value = Recipients> {
    let device = "\\PC{1,12}".prop_map(|name| DeviceId::new(&name).unwrap());
    prop_oneof![
        (user(), prop::option::of(device))
            .prop_map(|(user, device)| Recipients::User { user, device }),
        users().prop_map(Recipients::Users),
        "\\PC{1,12}".prop_map(|name| Audience::new(&name).unwrap().into()),
        Just(Audience::Everyone.into()),
    ]
}

/// JSON texts, of which some are strings that hold a JSON text, or have space around them.
fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,4}", inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    });
    (value, 0..3usize, "[ \n\t\r]{0,2}").prop_map(|(value, quotes, space)| {
        let quoted = |text: String, _| Value::from(text).to_string();
        format!("{space}{}{space}", (0..quotes).fold(value.to_string(), quoted))
    })
}

fn kind_and_payload() -> impl Strategy<Value = (BodyKind, Bytes)> {
    prop_oneof![
        ".{0,20}".prop_map(|text| (BodyKind::Text, text.into())),
        json().prop_map(|text| (BodyKind::Json, text.into())),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|data| (BodyKind::Data, data.into())),
    ]
}

/// Records of valid names; `ttl_ms`, `key` and `receipts` may be invalid.
fn push(
    ttl_ms: impl Strategy<Value = u64>,
    key: impl Strategy<Value = String>,
    receipts: impl Strategy<Value = u32>,
) -> impl Strategy<Value = Push> {
    let names = ("\\PC{1,20}", "[A-Za-z0-9._-]{1,20}");
    (names, recipients(), kind_and_payload(), ttl_ms, prop::option::of(key), receipts).prop_map(
        |((id, app), to, (kind, payload), ttl_ms, key, receipts)| Push {
            id: MessageId::new(&id).unwrap(),
            app: AppId::new(&app).unwrap(),
            to,
            kind,
            payload,
            ttl_ms,
            collapse_key: key.map(Arc::from),
            receipts: ReceiptSet(receipts),
        },
    )
}

fn valid() -> impl Strategy<Value = Push> {
    let ttl_ms = (0..10_000u64).prop_map(|s| s * 1000);
    push(ttl_ms, "\\PC{1,16}", (0..64u32).prop_map(|set| set << 1)).prop_map(|mut push| {
        if matches!(push.to, Recipients::Audience(_)) {
            push.receipts.0 &= ReceiptSet::ACCEPTED.with(ReceiptSet::DUPLICATE).0;
        }
        push
    })
}

fn any_push() -> impl Strategy<Value = Push> {
    push((0..200u64).prop_map(|s| s * 1000), ".{0,24}", 0..512u32)
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded_unchanged(push in valid()) {
        let limits = RecordLimits::HIGHEST;
        for format in FORMATS {
            let value = encode_push(&push, format, &limits).unwrap();
            for header in [Some(format.content_type().as_bytes()), None] {
                let decoded = decode_push(&value, header, &limits).unwrap();
                prop_assert_eq!(&decoded, &push, "{:?} {:?}", format, value);
            }
        }
    }

    #[test]
    fn what_the_decoder_refuses_is_refused_with_the_same_code(push in any_push()) {
        let limits = RecordLimits {
            payload_bytes_max: 20,
            users_max: 2,
            fanout_bytes_max: 30,
            json_depth_max: 2,
            ttl_seconds_max: 100,
        };
        // The protobuf of the record, written without a check.
        let mut record = addressed(&push);
        fill(&push, Format::Protobuf, &mut record).unwrap();
        let decoded = decode_push(&record.encode_to_vec().into(), None, &limits);
        for format in FORMATS {
            let encoded = encode_push(&push, format, &limits);
            prop_assert_eq!(encoded.err(), decoded.clone().err(), "{:?}", format);
        }
    }
}

#[test]
fn json_is_written_without_empty_fields_and_bodies_as_they_are() {
    let json = |push: &Push| {
        let value = encode_push(push, Format::Json, &RecordLimits::default()).unwrap();
        String::from_utf8(value.to_vec()).unwrap()
    };
    assert_eq!(
        json(&least()),
        r#"{"id":"order-7","app":"demo","to":{"user":"alice"},"text":"hello"}"#
    );
    let body = |text: &'static str| {
        let push = Push { kind: BodyKind::Json, payload: text.into(), ..least() };
        json(&push).split_once("\"json\":").unwrap().1.trim_end_matches('}').to_owned()
    };
    assert_eq!(body(r#"[1, "a"]"#), r#"[1, "a"]"#);
    assert_eq!(body(r#""text""#), r#""text""#);
    // Written as they are, these would be read as no body, as 12, and without the space.
    assert_eq!(body("null"), r#""null""#);
    assert_eq!(body(r#""12""#), r#""\"12\"""#);
    assert_eq!(body(" 1 "), r#"" 1 ""#);
}

#[test]
fn what_no_record_can_say_is_refused() {
    let code =
        |push: Push, format| encode_push(&push, format, &RecordLimits::default()).unwrap_err().code;
    for format in FORMATS {
        let not_utf8 = match format {
            Format::Json => RefusalCode::BadJson,
            Format::Protobuf => RefusalCode::BadProtobuf,
        };
        for kind in [BodyKind::Text, BodyKind::Json] {
            let push = Push { kind, payload: Bytes::from_static(b"\xff"), ..least() };
            assert_eq!(code(push, format), not_utf8);
        }
        assert_eq!(code(Push { ttl_ms: 1500, ..least() }, format), RefusalCode::BadValue);
        let nobody = Recipients::Users(Vec::new());
        assert_eq!(code(Push { to: nobody, ..least() }, format), RefusalCode::NoAudience);
    }
    let refusal = encode_push(
        &Push { payload: "x".repeat(70_000).into(), ..least() },
        Format::Json,
        &RecordLimits::default(),
    )
    .unwrap_err();
    assert_eq!((&*refusal.id, &*refusal.app, &*refusal.user), ("order-7", "demo", "alice"));
}
