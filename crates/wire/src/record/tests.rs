use super::*;
use barid_core::Owner;
use proptest::prelude::*;

fn limits() -> RecordLimits {
    RecordLimits {
        payload_bytes_max: 100,
        users_max: 3,
        fanout_bytes_max: 150,
        json_depth_max: 10,
        ..Default::default()
    }
}

fn decode(json: &str) -> Result<Push, Refusal> {
    decode_push(&Bytes::copy_from_slice(json.as_bytes()), None, &limits())
}

fn code(json: &str) -> RefusalCode {
    let refusal = decode(json).expect_err(json);
    assert!(!refusal.reason.is_empty());
    refusal.code
}

/// The least record with other fields beside.
fn with(fields: &str) -> String {
    format!(r#"{{"id":"order-7","app":"demo",{fields}}}"#)
}

fn least() -> PushRecord {
    PushRecord {
        id: "order-7".into(),
        app: "demo".into(),
        to: Some(crate::v1::Audience { user: "alice".into(), ..Default::default() }),
        body: Some(Body::Text("hello".into())),
        ..Default::default()
    }
}

fn protobuf(record: &PushRecord) -> Result<Push, Refusal> {
    decode_push(&record.encode_to_vec().into(), None, &limits())
}

#[test]
fn the_least_record_is_the_same_in_both_formats() {
    let push =
        decode(r#"{"id":"order-7","app":"demo","to":{"user":"alice"},"text":"hello"}"#).unwrap();
    assert_eq!(push.payload, "hello");
    assert_eq!(push.to.owners(), [Owner::User(UserId::new("alice").unwrap())]);
    assert_eq!(protobuf(&least()).unwrap(), push);
    assert_eq!(decode("\r\n\t {\"id\":\"order-7\",\"app\":\"demo\",\"to\":{\"user\":\"alice\"},\"text\":\"hello\"}").unwrap(), push);
}

#[test]
fn every_field_and_spelling_of_the_mapping_is_accepted() {
    let all = |ttl: &str, key: &str, receipts: &str| {
        with(&format!(
            r#""to":{{"user":"a","device":"d","users":null}},"data":"_-8","{ttl}":"60","{key}":"k","receipts":{receipts}"#
        ))
    };
    let push =
        decode(&all("ttlSeconds", "collapseKey", r#"["acked",1,"RECEIPT_KIND_SENT"]"#)).unwrap();
    assert_eq!(
        push,
        decode(&all("ttl_seconds", "collapse_key", r#"[4,"accepted","SENT"]"#)).unwrap()
    );
    assert_eq!(&*push.payload, b"\xff\xef");
    assert_eq!((push.ttl_ms, push.collapse_key.as_deref()), (60_000, Some("k")));
    assert_eq!(push.to.device().unwrap().as_str(), "d");
    let wanted = ReceiptSet::ACKED.with(ReceiptSet::ACCEPTED).with(ReceiptSet::SENT);
    assert_eq!(push.receipts, wanted);
    for ttl in ["6e1", "60.0", "\"60\"", "60"] {
        let push = decode(&with(&format!(r#""to":{{"user":"a"}},"text":"","ttlSeconds":{ttl}"#)));
        assert_eq!(push.unwrap().ttl_ms, 60_000, "{ttl}");
    }
}

#[test]
fn hazard_55_a_json_body_that_some_parsers_refuse_is_refused_at_the_record() {
    let limits = RecordLimits::default;
    let decode =
        |json: &str| decode_push(&Bytes::copy_from_slice(json.as_bytes()), None, &limits());
    let refused = |json: &str| {
        let text = with(&format!(r#""to":{{"user":"a"}},"json":{json}"#));
        let protobuf = PushRecord {
            body: Some(Body::Json(json.into())),
            ..PushRecord {
                id: "1".into(),
                app: "demo".into(),
                to: least().to,
                ..Default::default()
            }
        };
        let protobuf = Bytes::from(protobuf.encode_to_vec());
        let of_protobuf = decode_push(&protobuf, Some(b"application/x-protobuf"), &limits());
        [decode(&text), of_protobuf].map(|push| {
            let refusal = push.expect_err(json);
            assert_eq!(refusal.code, RefusalCode::BadJsonBody, "{json}");
            refusal.reason
        })
    };
    for (json, part) in [
        (r#"["\ud800"]"#, r#"not Unicode: "\ud800""#),
        (r#"["\udc00 "]"#, "not Unicode"),
        (r#"["\ud800\ud800"]"#, "not Unicode"),
        (r#"["\ud800\u0041"]"#, "not Unicode"),
        (r#"{"\uDFFF":1}"#, "not Unicode"),
        (r#"{"a":1,"b":2,"a":3}"#, r#"the name "a" twice"#),
        (r#"{"x":{"a":1,"\u0061":2}}"#, "twice in an object"),
        (r#"[{"a":[{"b":1}],"c":{"b":1},"a":1}]"#, r#"the name "a" twice"#),
        ("[1e309]", "beyond a double: 1e309"),
        ("[-1E400]", "beyond a double"),
        (&format!("[{}]", "9".repeat(400)), "beyond a double"),
    ] {
        for reason in refused(json) {
            assert!(reason.contains(part), "{json}: {reason}");
        }
    }
    assert!(
        decode(&with("\"to\":{\"user\":\"a\"},\"json\":[\"\u{1}\"]")).is_err(),
        "a control character"
    );
    for json in [
        r#""\ud83d\ude00""#,
        r#"["\u0000","\"","\\","\\u","]","{","a","a"]"#,
        r#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}],"c":"a"}"#,
        "[1e308,-0,0.1,123456789012345678901234567890,5e-324,1e-400]",
        r#"{"":1," ":2,"\t":3}"#,
        "{}",
        "true",
    ] {
        let push = decode(&with(&format!(r#""to":{{"user":"a"}},"json":{json}"#))).expect(json);
        let taken: serde_json::Value = serde_json::from_slice(&push.payload).expect(json);
        drop(taken);
    }
}

#[test]
fn hazard_55_the_deepest_body_fits_into_a_frame_of_64_levels() {
    // .NET's parser allows 64 levels by default; the frame has four around a body.
    let deepest = RecordLimits::default().json_depth_max;
    let json = format!("{}{}", "[".repeat(deepest), "]".repeat(deepest));
    let text = with(&format!(r#""to":{{"user":"a"}},"json":{json}"#));
    assert!(decode_push(&text.into(), None, &RecordLimits::default()).is_ok());
    assert!(deepest + 4 <= 64);
}

#[test]
fn json_bodies_stand_as_they_were_written() {
    let body = |json: &str| {
        let push = decode(&with(&format!(r#""to":{{"user":"a"}},"json":{json}"#))).unwrap();
        assert_eq!(push.kind, BodyKind::Json);
        String::from_utf8(push.payload.to_vec()).unwrap()
    };
    assert_eq!(body(r#"{"b": 1.50, "a":[true,null]}"#), r#"{"b": 1.50, "a":[true,null]}"#);
    assert_eq!(body("12345678901234567890.10"), "12345678901234567890.10");
    assert_eq!(body(r#""{\"a\":1}""#), r#"{"a":1}"#, "the mapping's spelling");
    assert_eq!(body(r#""plain words""#), r#""plain words""#);
}

#[test]
fn repeated_users_are_taken_once() {
    let push = decode(&with(r#""to":{"users":["b","a","b","a","c"]},"text":"x""#)).unwrap();
    let owners = push.to.owners();
    let names: Vec<&str> = owners.iter().map(Owner::as_str).collect();
    assert_eq!(names, ["b", "a", "c"]);
}

#[test]
fn the_header_decides_before_the_first_byte() {
    let json = Bytes::from(r#"{"id":"1","app":"a","to":{"user":"u"},"text":"t"}"#);
    let decode = |header: &str| decode_push(&json, Some(header.as_bytes()), &limits());
    assert!(decode("application/json; charset=utf-8").is_ok());
    assert!(decode("text/plain").is_ok(), "an unknown type: told by the first byte");
    assert_eq!(decode("application/x-protobuf").unwrap_err().code, RefusalCode::BadProtobuf);
}

#[test]
fn an_id_of_123_bytes_is_not_taken_for_json() {
    let record = PushRecord { id: "i".repeat(123), ..least() };
    assert!(record.encode_to_vec().starts_with(b"\n{"));
    assert_eq!(protobuf(&record).unwrap().id.as_str().len(), 123);
}

#[test]
fn each_flaw_has_its_word() {
    use RefusalCode as C;
    let to = r#""to":{"user":"alice"}"#;
    let deep = format!("{}1{}", "[".repeat(11), "]".repeat(11));
    let long = "x".repeat(101);
    let cases = [
        (with(r#""to":{"user":"alice"},"text":"x""#).replace('}', ""), C::BadJson),
        (with(r#""to":{"user":"a"},"text":"x""#).replace("order-7", "a\\u0001"), C::BadId),
        (with(&format!(r#"{to},"text":"x","txt":1"#)), C::UnknownField),
        (with(r#""to":{"segment":"g"},"text":"x""#), C::UnknownField),
        (with(&format!(r#"{to},"text":"x","text":"y""#)), C::RepeatedField),
        (with(&format!(r#"{to},"text":5"#)), C::BadValue),
        (with(r#""to":"alice","text":"x""#), C::BadValue),
        (with(&format!(r#"{to},"text":"x","ttlSeconds":"soon""#)), C::BadValue),
        (format!(r#"{{"app":"a",{to},"text":"x"}}"#), C::MissingField),
        (format!(r#"{{"id":"","app":"a",{to},"text":"x"}}"#), C::MissingField),
        (format!(r#"{{"id":7,"app":"a",{to},"text":"x"}}"#), C::BadId),
        (format!(r#"{{"id":"1","app":"a:b",{to},"text":"x"}}"#), C::BadApp),
        (with(r#""to":{"user":"a\u0000b"},"text":"x""#), C::BadUser),
        (with(r#""to":{"users":["a",""]},"text":"x""#), C::BadUser),
        (with(r#""to":{"users":"a"},"text":"x""#), C::BadUser),
        (with(&format!(r#""to":{{"user":"a","device":"{long}"}},"text":"x""#)), C::BadDevice),
        (with(r#""to":{"users":["a"],"device":"d"},"text":"x""#), C::BadDevice),
        (with(r#""text":"x""#), C::NoAudience),
        (with(r#""to":{"device":"d","users":[]},"text":"x""#), C::NoAudience),
        (with(r#""to":{"user":"a","users":["b"]},"text":"x""#), C::TwoAudiences),
        (with(r#""to":{"user":"a","group":"g"},"text":"x""#), C::TwoAudiences),
        (with(r#""to":{"group":"g","everyone":true},"text":"x""#), C::TwoAudiences),
        (with(r#""to":{"everyone":false},"text":"x""#), C::NoAudience),
        (with(r#""to":{"everyone":"yes"},"text":"x""#), C::BadValue),
        (with(r#""to":{"everyone":true,"device":"d"},"text":"x""#), C::BadDevice),
        (with(r#""to":{"group":"everyone"},"text":"x""#), C::BadGroup),
        (with(r#""to":{"group":"a\u0000b"},"text":"x""#), C::BadGroup),
        (with(&format!(r#""to":{{"group":"{long}"}},"text":"x""#)), C::BadGroup),
        (with(r#""to":{"group":["g"]},"text":"x""#), C::BadGroup),
        (with(r#""to":{"group":"g"},"text":"x","receipts":["acked"]"#), C::ReceiptForMany),
        (with(r#""to":{"everyone":true},"text":"x","receipts":["sent"]"#), C::ReceiptForMany),
        (with(r#""to":{"users":["a","b","c","d"]},"text":"x""#), C::TooManyUsers),
        (
            with(&format!(r#""to":{{"users":["a","b"]}},"text":"{}""#, "x".repeat(80))),
            C::FanoutTooLarge,
        ),
        (with(to), C::NoBody),
        (with(&format!(r#"{to},"text":"x","data":"eA==""#)), C::TwoBodies),
        (with(&format!(r#"{to},"data":"@@""#)), C::BadBase64),
        (with(&format!(r#"{to},"json":{deep}"#)), C::TooDeep),
        (with(&format!(r#"{to},"text":"{long}""#)), C::PayloadTooLarge),
        (with(&format!(r#"{to},"text":"x","ttlSeconds":-1"#)), C::NegativeTtl),
        (with(&format!(r#"{to},"text":"x","ttlSeconds":1e18"#)), C::TtlTooLong),
        (with(&format!(r#"{to},"text":"x","collapseKey":"{long}""#)), C::BadCollapseKey),
        (with(&format!(r#"{to},"text":"x","receipts":["read"]"#)), C::UnknownReceipt),
        (with(&format!(r#"{to},"text":"x","receipts":[7]"#)), C::UnknownReceipt),
    ];
    for (json, expected) in cases {
        assert_eq!(code(&json), expected, "{json}");
    }
    let decode = |value: &'static [u8]| decode_push(&Bytes::from_static(value), None, &limits());
    assert_eq!(decode(b"").unwrap_err().code, C::EmptyRecord);
    assert_eq!(decode(b"\x0a\xff").unwrap_err().code, C::BadProtobuf);
    let bad_body = PushRecord { body: Some(Body::Json("{]".into())), ..least() };
    assert_eq!(protobuf(&bad_body).unwrap_err().code, C::BadJsonBody);
}

#[test]
fn a_refusal_names_the_record_as_far_as_it_can_be_read() {
    let refusal =
        decode(r#"{"text":"x","nonsense":1,"id":"order-7","app":"demo","to":{"user":"alice"}}"#)
            .unwrap_err();
    assert_eq!(refusal.to_string(), "unknown_field: unknown field `nonsense`");
    assert_eq!((&*refusal.id, &*refusal.app, &*refusal.user), ("order-7", "demo", "alice"));
}

#[test]
fn whatever_is_wrong_the_names_that_can_be_read_are_told() {
    use RefusalCode as C;
    let named = r#""id":"order-7","app":"demo","to":{"user":"alice"}"#;
    for (json, code) in [
        (r#"{"to":"alice","id":"order-7","app":"demo"}"#.to_owned(), C::BadValue),
        (
            r#"{"to":{"nobody":1,"user":"alice"},"app":7,"id":"order-7"}"#.to_owned(),
            C::UnknownField,
        ),
        (format!("{{{named},\"text\":\"x\",\"text\":\"y\"}}"), C::RepeatedField),
        (r#"{"id":"order-7","id":"order-8","app":"demo"}"#.to_owned(), C::RepeatedField),
        (format!("{{{named},\"text\":\"hel"), C::BadJson),
        (format!("{{{named},\"text\":\"hello\"}} and more"), C::BadJson),
        (format!("{{{named},\"text\":NaN}}"), C::BadJson),
        (r#"{"id":"order-7","app":"demo","to":{"user":"al"#.to_owned(), C::BadJson),
    ] {
        let refusal = decode(&json).expect_err(&json);
        assert_eq!((refusal.code, refusal.id.as_str()), (code, "order-7"), "{json}");
    }
    let mut bytes = least().encode_to_vec();
    bytes.truncate(bytes.len() - 3);
    let refusal = decode_push(&bytes.into(), None, &limits()).unwrap_err();
    let told = (refusal.code, &*refusal.id, &*refusal.app, &*refusal.user);
    assert_eq!(told, (C::BadProtobuf, "order-7", "demo", "alice"));
}

#[test]
fn reasons_say_what_to_mend() {
    let json = |text: &str| decode(text).unwrap_err().reason;
    assert_eq!(json(r#"{"id":7}"#), "`id` must be a string, is a number");
    assert!(json(r#"{"id":"\ud800"}"#).starts_with("`id` is not a string of Unicode: "));
    assert_eq!(json(r#"{"to":{"user":"a","user":"b"}}"#), "`to.user` is given twice");
    let guessed = decode(r#"[{"id":"1"}]"#).unwrap_err();
    assert_eq!(guessed.code, RefusalCode::BadProtobuf);
    assert!(guessed.reason.ends_with("; JSON would begin with {"), "{}", guessed.reason);
    let marked = format!("\u{feff}{}", with(r#""to":{"user":"alice"},"text":"hello""#));
    assert_eq!(decode(&marked).unwrap(), protobuf(&least()).unwrap(), "a byte order mark");
    let long = json(&format!(r#"{{"{}":1}}"#, "é".repeat(5000)));
    assert!(long.len() <= 512, "{}", long.len());
}

#[test]
fn words_are_unique() {
    let words: HashSet<&str> = RefusalCode::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(words.len(), RefusalCode::ALL.len());
}

#[test]
fn receipts_come_back_from_either_format() {
    let receipt = crate::v1::Receipt {
        kind: ReceiptKind::Acked as i32,
        id: "order-7".into(),
        app: "demo".into(),
        user: "alice".into(),
        device: "phone".into(),
        seq: 5,
        at_ms: 9,
        ..Default::default()
    };
    let json = encode_receipt(&receipt, Format::Json);
    let text = r#"{"kind":"acked","id":"order-7","app":"demo","user":"alice","device":"phone","seq":5,"atMs":9}"#;
    assert_eq!(json, text);
    assert_eq!(decode_receipt(&json).unwrap(), receipt);
    assert_eq!(decode_receipt(&encode_receipt(&receipt, Format::Protobuf)).unwrap(), receipt);
}

fn json_like() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"id\"",
        "\"to\"",
        "\"user\"",
        "\"users\"",
        "\"group\"",
        "\"everyone\"",
        "\"json\"",
        "\"data\"",
        "\"receipts\"",
        "\"ttlSeconds\"",
        "1e999",
        "-1",
        "true",
        "true",
        "\"\\ud800\"",
        "\"a\"",
        "\\",
        "\"",
    ]);
    prop::collection::vec(word, 0..40).prop_map(|words| format!("{{{}", words.concat()))
}

proptest! {
    #[test]
    fn no_bytes_panic(value in prop::collection::vec(any::<u8>(), 0..300)) {
        let value = Bytes::from(value);
        for header in [None, Some(&b"application/json"[..]), Some(&b"application/x-protobuf"[..])] {
            let _ = decode_push(&value, header, &limits());
        }
        let _ = decode_receipt(&value);
    }

    #[test]
    fn no_json_panics(value in json_like()) {
        let _ = decode(&value);
    }

    /// Closer to what is valid than any bytes: what passes the first checks meets the later ones.
    #[test]
    fn no_damaged_record_panics_and_refusals_are_small(
        at in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(), byte in any::<u8>(),
        json in any::<bool>(),
    ) {
        let text = with(r#""to":{"users":["alice","bob"],"device":""},"json":[1,{"a":"b"}],"ttlSeconds":"60","receipts":["acked"]"#);
        let mut bytes = if json { text.into_bytes() } else { least().encode_to_vec() };
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(1 + cut.index(bytes.len()));
        if let Err(refusal) = decode_push(&bytes.into(), None, &limits()) {
            prop_assert!(!refusal.reason.is_empty() && refusal.reason.len() <= 512);
            prop_assert!(refusal.id.len() <= 128 && refusal.app.len() <= 64 && refusal.user.len() <= 128);
        }
    }

    #[test]
    fn what_protobuf_carries_is_checked_and_kept(id in "\\PC{1,20}", user in "\\PC{1,20}", text in "\\PC{0,20}", ttl in 0i64..1000) {
        let record = PushRecord {
            id: id.clone(),
            to: Some(crate::v1::Audience { user: user.clone(), ..Default::default() }),
            body: Some(Body::Text(text.clone())),
            ttl_seconds: ttl,
            ..least()
        };
        let push = protobuf(&record).unwrap();
        prop_assert_eq!(push.id.as_str(), id);
        prop_assert_eq!(push.to.owners(), [Owner::User(UserId::new(&user).unwrap())]);
        prop_assert_eq!(&*push.payload, text.as_bytes());
        prop_assert_eq!(push.ttl_ms, ttl as u64 * 1000);
    }
}

#[test]
fn hazard_61_every_number_of_a_record_ends_at_its_maximum() {
    // JSON: plain, quoted, with a point, with an exponent.
    let json = |ttl: &str| {
        let text =
            format!(r#"{{"id":"1","app":"a","to":{{"user":"u"}},"text":"t","ttlSeconds":{ttl}}}"#);
        decode_push(&Bytes::from(text), None, &RecordLimits::default()).map(|push| push.ttl_ms)
    };
    let max = RecordLimits::default().ttl_seconds_max;
    let whole = [0, 1, max, max + 1, 1 << 43, 1 << 53, (1 << 53) + 1, i64::MAX as u64, 1 << 63];
    for number in whole.into_iter().chain([u64::MAX]) {
        for text in [number.to_string(), format!("\"{number}\""), format!("{number}.0")] {
            match json(&text) {
                Ok(ttl_ms) => assert_eq!(ttl_ms, number * 1000),
                Err(refusal) => {
                    assert!(number > max, "{text}: {refusal}");
                    assert_eq!(refusal.code, RefusalCode::TtlTooLong, "{text}");
                }
            }
        }
    }
    for text in ["-1", "-9223372036854775808", "-1e308", "\"-9223372036854775809\""] {
        assert_eq!(json(text).unwrap_err().code, RefusalCode::NegativeTtl, "{text}");
    }
    for text in ["1e308", "18446744073709551616", "340282366920938463463374607431768211456"] {
        assert_eq!(json(text).unwrap_err().code, RefusalCode::TtlTooLong, "{text}");
    }
    for text in ["1.5", "\"NaN\"", "\"Infinity\"", "\"\"", "true", "[]", "1e-300"] {
        assert_eq!(json(text).unwrap_err().code, RefusalCode::BadValue, "{text}");
    }
    assert_eq!(json("-0.0"), Ok(0));
    // Protobuf, and kinds of receipts in both.
    let ends = [0, 1, 7, 8, 31, 32, 1 << 16, i64::from(i32::MAX), 1 << 53, i64::MAX, i64::MIN, -1];
    for number in ends {
        let record = PushRecord {
            id: "1".into(),
            app: "a".into(),
            to: Some(crate::v1::Audience { user: "u".into(), ..Default::default() }),
            body: Some(Body::Text("t".into())),
            ttl_seconds: number,
            ..Default::default()
        };
        let decode = |record: &PushRecord| {
            decode_push(&record.encode_to_vec().into(), None, &RecordLimits::default())
        };
        let decoded = decode(&record).map(|push| push.ttl_ms);
        let fits = u64::try_from(number).is_ok_and(|number| number <= max);
        assert_eq!(decoded.ok(), fits.then(|| number as u64 * 1000), "{number}");
        let kind = number as i32;
        let asked = PushRecord { ttl_seconds: 0, receipts: vec![kind], ..record };
        assert_eq!(decode(&asked).is_ok(), (1..=6).contains(&kind), "{kind}");
        let text = format!(
            r#"{{"id":"1","app":"a","to":{{"user":"u"}},"text":"t","receipts":[{number}]}}"#
        );
        let decoded = decode_push(&Bytes::from(text), None, &RecordLimits::default());
        assert_eq!(decoded.is_ok(), (1..=6).contains(&number), "{number}");
    }
}
