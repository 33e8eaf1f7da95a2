use barid_core::{Chain, Epoch, Seq};
use proptest::prelude::*;

use super::*;
use crate::envelope::{Header, encode_body, set_payload};
use crate::v1::{
    self, BodyKind, Error, GoAway, Message, Ping, Skip, Subscribed, Unsubscribed, Welcome, message,
};

const BOTH: [Encoding; 2] = [Encoding::Proto, Encoding::Json];

fn json_client(text: &str) -> Result<ClientFrame, String> {
    let heard =
        decode_client(Encoding::Json, text.as_bytes()).map_err(|error| error.to_string())?;
    assert_eq!(heard.ignored, None, "{text}");
    Ok(heard.frame.unwrap())
}

fn entry(seq: u64, kind: BodyKind, payload: Vec<u8>, min_bytes: usize) -> Envelope {
    let mut entry = Envelope { seq, id: format!("order-{seq}"), ..Default::default() };
    entry.set_kind(kind);
    set_payload(&mut entry, payload.into(), min_bytes, 3);
    entry
}

#[test]
fn what_a_stranger_types_is_understood() {
    let hello = json_client(r#"{"hello":{"device":"phone"}}"#).unwrap();
    assert_eq!(
        hello,
        ClientFrame::Hello(v1::Hello { device: "phone".into(), ..Default::default() })
    );
    let ack = ClientFrame::Ack(v1::Ack { seq: 5, ..Default::default() });
    assert_eq!(json_client(r#"{"ack":{"seq":5}}"#).unwrap(), ack);
    assert_eq!(json_client(r#"{"ack":{"seq":"5","generation":null}}"#).unwrap(), ack);
    assert_eq!(json_client(r#"{"ack":{"seq":5.0}}"#).unwrap(), ack);
    assert_eq!(json_client(r#"{"pong":{}}"#).unwrap(), ClientFrame::Pong(v1::Pong {}));
    let snake = json_client(
        r#"{"hello":{"visible_pings":true,"attempt":"7","positions":[{"epoch":1,"seq":2,"chain":"3"}]}}"#,
    );
    let ClientFrame::Hello(hello) = snake.unwrap() else { panic!("not a hello") };
    assert!(hello.visible_pings && hello.attempt == 7 && hello.positions[0].chain == Some(3));
}

#[test]
fn errors_say_what_is_wrong() {
    let error = |text: &str| json_client(text).unwrap_err();
    assert!(error("{").contains("EOF"));
    assert!(error("").contains("EOF"));
    let one_key = "an object with one key, the kind";
    for text in
        ["{}", r#"{"pong":{},"ack":{"seq":1}}"#, r#"{"pong":{},"pong":{}}"#, r#""pong""#, "[]"]
    {
        assert!(error(text).contains(one_key), "{text}: {}", error(text));
    }
    assert!(error(&format!(r#"{{"ack":{{"{}":1}}}}"#, "x".repeat(9999))).len() < 300);
    assert!(error(r#"{"ack":5}"#).ends_with("ack: not an object of its fields"));
    assert!(error(r#"{"ack":{"seqq":1}}"#).contains("unknown field `seqq`"));
    assert!(error(r#"{"ack":{}}"#).contains("missing field `seq`"));
    assert!(error(r#"{"ack":{"seq":-1}}"#).contains("whole number"));
    let too_large = error(r#"{"ack":{"seq":1,"generation":4294967296}}"#);
    assert!(too_large.contains("4294967296 is too large for 32 bits"), "{too_large}");
    let too_large = error(r#"{"ack":{"seq":18446744073709551616}}"#);
    assert!(too_large.contains("too large for 64 bits"), "{too_large}");
    assert_eq!(error(r#"{"ack":{"seq":9007199254740992}}"#), "ack.seq is not below 2^53");
    assert_eq!(decode_client(Encoding::Proto, b"").unwrap_err(), FrameError::Kind);
}

#[test]
fn a_protobuf_frame_is_of_one_kind() {
    let [pong, ack] = [
        ClientFrame::Pong(v1::Pong {}),
        ClientFrame::Ack(v1::Ack { seq: 5, ..Default::default() }),
    ]
    .map(|frame| encode_client(Encoding::Proto, &frame));
    let error = |bytes: &[u8]| decode_client(Encoding::Proto, bytes).unwrap_err().to_string();
    assert_eq!(
        error(&[&pong[..], &ack].concat()),
        "not a protobuf frame: it has more than one kind"
    );
    assert_eq!(
        error(&[&ack[..], &ack].concat()),
        "not a protobuf frame: it has more than one kind"
    );
    // A field of a later version beside a kind is passed over.
    let later = [&ack[..], &[0xa2, 0x06, 1, 7]].concat();
    assert_eq!(decode_client(Encoding::Proto, &later), decode_client(Encoding::Proto, &ack));
}

#[test]
fn hazard_41_what_only_a_newer_client_says_is_passed_over_and_named() {
    let heard = |text: &str| decode_client(Encoding::Json, text.as_bytes()).unwrap();
    let ack = |seq| Some(ClientFrame::Ack(v1::Ack { seq, ..Default::default() }));
    let kind = |name: &str| Some(Ignored::Kind(name.into()));
    let field = |name: &str| Some(Ignored::Field(name.into()));
    for (text, frame, ignored) in [
        (r#"{"probe":{"a":[1,{}]}}"#, None, kind("probe")),
        (r#"{"probe":5}"#, None, kind("probe")),
        (r#"{"ack":{"seq":5,"at":[{"seq":7}]}}"#, ack(5), field("ack.at")),
        (r#"{"ack":{"a":1,"b":2,"seq":"5","generation":null}}"#, ack(5), field("ack.a")),
        (r#"{"pong":{"load":1}}"#, Some(ClientFrame::Pong(v1::Pong {})), field("pong.load")),
    ] {
        assert_eq!(heard(text), Decoded { frame, ignored }, "{text}");
    }
    let hello = heard(r#"{"hello":{"device":"phone","visible_pings":true,"city":"thr"}}"#);
    let Some(ClientFrame::Hello(v1::Hello { device, visible_pings, .. })) = hello.frame else {
        panic!("not a hello")
    };
    assert_eq!(
        (device.as_str(), visible_pings, hello.ignored),
        ("phone", true, field("hello.city"))
    );
    let hello = heard(
        r#"{"hello":{"device":"phone","positions":[{"seq":4},{"mailbox":"m","at":[1],"seq":"5"}]}}"#,
    );
    let Some(ClientFrame::Hello(v1::Hello { positions, .. })) = hello.frame else {
        panic!("not a hello")
    };
    assert_eq!(positions.iter().map(|position| position.seq).collect::<Vec<_>>(), [4, 5]);
    assert_eq!(hello.ignored, field("hello.positions.at"));
    let long = format!(r#"{{"{}":{{}}}}"#, "x".repeat(9999));
    assert!(matches!(heard(&long).ignored, Some(Ignored::Kind(name)) if name.len() <= 40));
    // Kinds 7 to 9 are reserved, others unheard of.
    for later in [&[0x3a, 0][..], &[0xa2, 0x06, 1, 7]] {
        let heard = decode_client(Encoding::Proto, later).unwrap();
        assert!(heard.frame.is_none() && heard.ignored.is_some(), "{later:?}");
    }
    // Other errors are still reported.
    for text in [
        r#"{"ack":{"seq":-1,"new":1}}"#,
        r#"{"ack":{"new":1}}"#,
        r#"{"ack":{"seq":null,"new":1}}"#,
        r#"{"refresh":{"new":1}}"#,
        r#"{"hello":{"device":"phone","positions":[{"seq":-1,"new":1}]}}"#,
        r#"{"hello":{"device":"phone","positions":[7,{"new":1}]}}"#,
    ] {
        assert!(decode_client(Encoding::Json, text.as_bytes()).is_err(), "{text}");
    }
    let twice = r#"{"ack":{"seq":1,"seq":2,"new":1}}"#;
    assert!(decode_client(Encoding::Json, twice.as_bytes()).is_err());
}

#[test]
fn hello_stands_in_a_mailbox_once_and_in_so_many() {
    let hello = |mailboxes: &[String]| {
        let position = |name: &String| v1::Position { mailbox: name.clone(), ..Default::default() };
        let positions = mailboxes.iter().map(position).collect();
        let frame = ClientFrame::Hello(v1::Hello { positions, ..Default::default() });
        BOTH.map(|encoding| decode_client(encoding, &encode_client(encoding, &frame)).map(|_| ()))
    };
    let names: Vec<String> = (0..=POSITIONS_MAX).map(|n| n.to_string()).collect();
    assert_eq!(hello(&names[1..]), [Ok(()), Ok(())]);
    let too_many = || Err(FrameError::Positions(POSITIONS_MAX + 1));
    assert_eq!(hello(&names), [too_many(), too_many()]);
    let far = v1::Position { generation: GENERATION_MAX + 1, ..Default::default() };
    let far = ClientFrame::Hello(v1::Hello { positions: vec![far], ..Default::default() });
    let far = encode_client(Encoding::Proto, &far);
    assert_eq!(
        decode_client(Encoding::Proto, &far),
        Err(FrameError::Generation("hello.positions.generation"))
    );
    let twice = || Err(FrameError::PositionTwice);
    assert_eq!(hello(&[String::new(), String::new()]), [twice(), twice()]);
}

#[test]
fn delivered_json_reads_as_designed() {
    let entries = [
        entry(5, BodyKind::Text, b"hello".to_vec(), 128),
        entry(6, BodyKind::Json, br#"{"a": [1]}"#.to_vec(), 128),
        entry(7, BodyKind::Data, vec![0xff, 0xfe], 128),
    ];
    let frame = encode_deliver(Encoding::Json, 0, &entries, true).unwrap();
    assert_eq!(
        std::str::from_utf8(&frame).unwrap(),
        r#"{"deliver":{"messages":[{"seq":5,"id":"order-5","text":"hello"},{"seq":6,"id":"order-6","json":{"a": [1]}},{"seq":7,"id":"order-7","data":"//4="}]}}"#
    );
    let skip = v1::Skip { to: 9, why: SkipReason::Expired.into(), chain: 1, ..Default::default() };
    let skip = encode_server(Encoding::Json, &ServerFrame::Skip(skip)).unwrap();
    assert_eq!(&skip[..], br#"{"skip":{"to":9,"why":"expired","chain":1}}"#);
    let away = v1::GoAway { why: "draining".into(), reconnect_after_ms: 7 };
    let away = encode_server(Encoding::Json, &ServerFrame::GoAway(away)).unwrap();
    assert_eq!(&away[..], br#"{"goAway":{"why":"draining","reconnectAfterMs":7}}"#);
}

use crate::v1::SkipReason;

#[test]
fn a_message_of_200_bytes_costs_at_most_12_over_its_id_and_body() {
    for seq in [1, 500, 16_000, 2_000_000] {
        let entry = entry(seq, BodyKind::Text, vec![b'x'; 200], 1000);
        let frame = encode_deliver(Encoding::Proto, 0, [&entry], false).unwrap();
        assert!(frame.len() <= 12 + entry.id.len() + 200, "{} bytes", frame.len());
    }
}

#[test]
fn compressed_bodies_reach_only_who_accepts_them() {
    let long = entry(1, BodyKind::Text, vec![b'a'; 4000], 128);
    assert_ne!(long.raw_bytes, 0);
    for (encoding, accept_zstd, packed) in [
        (Encoding::Proto, true, true),
        (Encoding::Proto, false, false),
        (Encoding::Json, true, false),
    ] {
        let frame = encode_deliver(encoding, 3, [&long], accept_zstd).unwrap();
        assert_eq!(frame.len() < 200, packed);
        let ServerFrame::Deliver(deliver) = decode_server(encoding, frame).unwrap() else {
            panic!("not a delivery")
        };
        assert_eq!(deliver.generation, 3);
        let got = body(deliver.messages[0].clone(), 4000).unwrap();
        assert_eq!(got, Body::Text("a".repeat(4000)));
    }
}

#[test]
fn a_broken_payload_is_told_by_index_and_breaks_no_frame() {
    let good = entry(1, BodyKind::Text, b"ok".to_vec(), 128);
    let no_text = entry(2, BodyKind::Text, vec![0xff], 128);
    let no_json = entry(2, BodyKind::Json, b"{".to_vec(), 128);
    let bomb = Envelope { raw_bytes: u32::MAX, ..good.clone() };
    for encoding in BOTH {
        assert_eq!(encode_deliver(encoding, 0, [&good, &no_text], false).unwrap_err().0, 1);
        assert_eq!(encode_deliver(encoding, 0, [&bomb], false).unwrap_err().0, 0);
    }
    assert!(encode_deliver(Encoding::Json, 0, [&no_json], false).is_err());
}

#[test]
fn joined_frames_are_the_frame_of_all_their_entries() {
    let entries: Vec<_> =
        [&b"]}}"[..], b"", b"x"].map(|body| entry(7, BodyKind::Text, body.to_vec(), 100)).into();
    for (encoding, generation) in [(BOTH[0], 0), (BOTH[0], 300), (BOTH[1], 0), (BOTH[1], 300)] {
        let of = |entries: &[Envelope]| {
            decode_server(encoding, encode_deliver(encoding, generation, entries, true).unwrap())
        };
        for count in 1..=entries.len() {
            let single = entries[..count].chunks(1);
            let frames: Vec<_> = single
                .map(|one| encode_deliver(encoding, generation, one, true).unwrap())
                .collect();
            let joined = join_delivers(encoding, "", generation, &frames);
            assert_eq!(decode_server(encoding, joined), of(&entries[..count]));
            let joined = join_delivers(encoding, "a \"group\"", generation, &frames);
            let Ok(ServerFrame::Deliver(own)) = of(&entries[..count]) else {
                panic!("no delivery")
            };
            let of_group = Deliver { mailbox: "a \"group\"".into(), ..own };
            assert_eq!(decode_server(encoding, joined), Ok(ServerFrame::Deliver(of_group)));
        }
    }
}

#[test]
fn null_is_a_json_body() {
    let entry = entry(1, BodyKind::Json, b"null".to_vec(), 128);
    let frame = encode_deliver(Encoding::Json, 0, [&entry], false).unwrap();
    let ServerFrame::Deliver(deliver) = decode_server(Encoding::Json, frame).unwrap() else {
        panic!("not a delivery")
    };
    assert_eq!(body(deliver.messages[0].clone(), 10).unwrap(), Body::Json("null".into()));
}

#[test]
fn what_a_newer_node_says_is_passed_over() {
    let newer = br#"{"probe":{"x":1}}"#;
    assert_eq!(
        decode_server(Encoding::Json, Bytes::from_static(newer)).unwrap(),
        ServerFrame::Unknown
    );
    let field = br#"{"goAway":{"why":"x","reconnectAfterMs":1,"newer":true}}"#;
    assert!(matches!(
        decode_server(Encoding::Json, Bytes::from_static(field)).unwrap(),
        ServerFrame::GoAway(_)
    ));
}

fn name() -> impl Strategy<Value = String> {
    "\\PC{0,20}"
}

fn wire_number() -> impl Strategy<Value = u64> {
    0..=WIRE_NUMBER_MAX
}

fn position() -> impl Strategy<Value = v1::Position> {
    (name(), wire_number(), 0..=GENERATION_MAX, wire_number(), any::<Option<u32>>()).prop_map(
        |(mailbox, epoch, generation, seq, chain)| v1::Position {
            mailbox,
            epoch,
            generation,
            seq,
            chain,
        },
    )
}

fn client_frame() -> impl Strategy<Value = ClientFrame> {
    let positions = proptest::collection::vec(position(), 0..3);
    let positions = positions.prop_filter("each mailbox once", |positions| {
        let mailboxes: HashSet<&str> = positions.iter().map(|p| p.mailbox.as_str()).collect();
        mailboxes.len() == positions.len()
    });
    prop_oneof![
        (name(), name(), wire_number(), positions, any::<(bool, bool, u32)>()).prop_map(
            |(device, platform, attempt, positions, (accepts_zstd, visible_pings, interval))| {
                ClientFrame::Hello(v1::Hello {
                    device,
                    sdk: platform.clone(),
                    platform,
                    attempt,
                    positions,
                    accepts_zstd,
                    visible_pings,
                    ping_interval_ms: interval,
                })
            }
        ),
        (name(), prop::option::of(0..=GENERATION_MAX), wire_number()).prop_map(
            |(mailbox, generation, seq)| { ClientFrame::Ack(v1::Ack { mailbox, generation, seq }) }
        ),
        name().prop_map(|token| ClientFrame::Refresh(v1::Refresh { token })),
        name().prop_map(|group| ClientFrame::Subscribe(v1::Subscribe { group })),
        name().prop_map(|group| ClientFrame::Unsubscribe(v1::Unsubscribe { group })),
        Just(ClientFrame::Pong(v1::Pong {})),
    ]
}

fn server_frame() -> impl Strategy<Value = ServerFrame> {
    let body = prop_oneof![
        name().prop_map(message::Body::Text),
        any::<i32>().prop_map(|n| message::Body::Json(format!("{{\"n\":{n}}}"))),
        any::<Vec<u8>>().prop_map(|data| message::Body::Data(data.into())),
    ];
    let message = (wire_number(), name(), body).prop_map(|(seq, id, body)| Message {
        seq,
        id,
        body: Some(body),
    });
    let positions = proptest::collection::vec(position(), 0..3);
    prop_oneof![
        (name(), any::<u32>(), proptest::collection::vec(message, 1..4)).prop_map(
            |(mailbox, generation, messages)| {
                ServerFrame::Deliver(Deliver { mailbox, generation, messages })
            }
        ),
        (name(), any::<(u32, u32, u32, u32)>(), positions, wire_number()).prop_map(
            |(
                session,
                (ping_interval_ms, max_frame_bytes, max_unacked, ack_ms),
                positions,
                now,
            )| {
                ServerFrame::Welcome(Welcome {
                    session,
                    ping_interval_ms,
                    max_frame_bytes,
                    max_unacked,
                    positions,
                    server_time_ms: now,
                    ack_interval_ms: ack_ms,
                })
            }
        ),
        (wire_number(), 0..7, any::<(u32, u32)>()).prop_map(|(to, why, (chain, generation))| {
            ServerFrame::Skip(Skip { mailbox: String::new(), to, why, chain, generation })
        }),
        (name(), any::<u32>()).prop_map(|(why, reconnect_after_ms)| ServerFrame::GoAway(GoAway {
            why,
            reconnect_after_ms
        })),
        (any::<u32>(), name(), wire_number())
            .prop_map(|(code, text, attempt)| ServerFrame::Error(Error { code, text, attempt })),
        Just(ServerFrame::Ping(Ping {})),
        (name(), prop::option::of(position())).prop_map(|(group, position)| {
            ServerFrame::Subscribed(Subscribed { group, position })
        }),
        (name(), any::<u32>(), name()).prop_map(|(group, code, text)| {
            ServerFrame::Unsubscribed(Unsubscribed { group, code, text })
        }),
    ]
}

proptest! {
    #[test]
    fn client_frames_come_back_as_they_went(frame in client_frame()) {
        for encoding in BOTH {
            let bytes = encode_client(encoding, &frame);
            let heard = Decoded { frame: Some(frame.clone()), ignored: None };
            prop_assert_eq!(decode_client(encoding, &bytes).unwrap(), heard);
        }
    }

    #[test]
    fn server_frames_come_back_as_they_went(frame in server_frame()) {
        for encoding in BOTH {
            let bytes = encode_server(encoding, &frame).unwrap();
            prop_assert_eq!(&decode_server(encoding, bytes).unwrap(), &frame);
        }
    }

    #[test]
    fn entries_are_written_as_the_generated_code_would(
        seq in 1..WIRE_NUMBER_MAX, text in name(), generation in any::<u32>(), zstd in any::<bool>(),
    ) {
        let mut envelope = Envelope { id: "order".into(), ..Default::default() };
        set_payload(&mut envelope, text.clone().into(), 0, 3);
        let header = Header {
            epoch: Epoch(1), seq: Seq(seq), prev_chain: Chain(2), chain: Chain(3), accepted_at_us: 4,
        };
        let bytes = [&header.encode()[..], &encode_body(envelope)].concat();
        let (_, entry) = crate::envelope::decode(bytes.into()).unwrap();
        for encoding in BOTH {
            let frame = encode_deliver(encoding, generation, [&entry], zstd).unwrap();
            let ServerFrame::Deliver(deliver) = decode_server(encoding, frame).unwrap() else {
                panic!("not a delivery")
            };
            prop_assert_eq!(deliver.generation, generation);
            prop_assert_eq!(deliver.messages[0].seq, seq);
            prop_assert_eq!(body(deliver.messages[0].clone(), 1000).unwrap(), Body::Text(text.clone()));
        }
    }

    #[test]
    fn no_bytes_panic(bytes in any::<Vec<u8>>(), text in "[{}\\[\\]\",:a-z0-9 ]{0,60}") {
        for encoding in BOTH {
            let _ = decode_client(encoding, &bytes);
            let _ = decode_server(encoding, bytes.clone().into());
            let _ = decode_client(encoding, text.as_bytes());
            let _ = decode_server(encoding, text.clone().into());
        }
    }
}

/// Boundary values of numbers on the wire: the ends of every width, and one beyond.
const NUMBERS: [u64; 13] = [
    0,
    1,
    GENERATION_MAX as u64,
    GENERATION_MAX as u64 + 1,
    u32::MAX as u64,
    u32::MAX as u64 + 1,
    WIRE_NUMBER_MAX - 1,
    WIRE_NUMBER_MAX,
    WIRE_NUMBER_MAX + 1,
    WIRE_NUMBER_MAX + 2,
    1 << 63,
    (1 << 63) + 1,
    u64::MAX,
];

#[test]
fn hazard_61_every_number_of_a_frame_ends_at_its_maximum_in_json() {
    let generation = u64::from(GENERATION_MAX);
    let bits = u64::from(u32::MAX);
    let client = [
        (r#"{"hello":{"attempt":N}}"#, WIRE_NUMBER_MAX),
        (r#"{"hello":{"pingIntervalMs":N}}"#, bits),
        (r#"{"hello":{"positions":[{"epoch":N,"seq":1}]}}"#, WIRE_NUMBER_MAX),
        (r#"{"hello":{"positions":[{"epoch":1,"seq":N}]}}"#, WIRE_NUMBER_MAX),
        (r#"{"hello":{"positions":[{"epoch":1,"seq":1,"generation":N}]}}"#, generation),
        (r#"{"hello":{"positions":[{"epoch":1,"seq":1,"chain":N}]}}"#, bits),
        (r#"{"ack":{"seq":N}}"#, WIRE_NUMBER_MAX),
        (r#"{"ack":{"seq":1,"generation":N}}"#, generation),
    ];
    let server = [
        (r#"{"deliver":{"messages":[{"seq":N,"id":"a","text":""}]}}"#, WIRE_NUMBER_MAX),
        (r#"{"deliver":{"messages":[],"generation":N}}"#, bits),
        (r#"{"welcome":{"serverTimeMs":N}}"#, WIRE_NUMBER_MAX),
        (r#"{"welcome":{"pingIntervalMs":N}}"#, bits),
        (r#"{"welcome":{"maxFrameBytes":N}}"#, bits),
        (r#"{"welcome":{"maxUnacked":N}}"#, bits),
        (r#"{"welcome":{"ackIntervalMs":N}}"#, bits),
        (r#"{"welcome":{"positions":[{"epoch":N,"seq":1}]}}"#, WIRE_NUMBER_MAX),
        (r#"{"welcome":{"positions":[{"epoch":1,"seq":N}]}}"#, WIRE_NUMBER_MAX),
        (r#"{"skip":{"to":N}}"#, WIRE_NUMBER_MAX),
        (r#"{"skip":{"to":1,"chain":N}}"#, bits),
        (r#"{"skip":{"to":1,"generation":N}}"#, bits),
        (r#"{"goAway":{"reconnectAfterMs":N}}"#, bits),
        (r#"{"error":{"code":N}}"#, bits),
        (r#"{"unsubscribed":{"group":"a","code":N}}"#, bits),
    ];
    let taken = |is_client: bool, text: String| match is_client {
        true => decode_client(Encoding::Json, text.as_bytes()).map(drop),
        false => decode_server(Encoding::Json, text.into_bytes().into()).map(drop),
    };
    let frames = client.map(|f| (true, f)).into_iter().chain(server.map(|f| (false, f)));
    for (is_client, (template, max)) in frames {
        let of = |number: &str| taken(is_client, template.replace('N', number));
        for number in NUMBERS {
            let fits = number <= max;
            for text in [number.to_string(), format!("\"{number}\""), format!("{number}.0")] {
                // A float above 2^53 is not exact, and below it is what it says.
                let told = of(&text);
                assert_eq!(told.is_ok(), fits, "{text} in {template}: {told:?}");
            }
        }
        for text in ["-1", "-9223372036854775808", "1.5", "1e308", "-1e308", "1e999", "NaN"] {
            assert!(of(text).is_err(), "{text} in {template}");
        }
        for text in ["18446744073709551616", "\"18446744073709551616\"", "\"-1\"", "\"1e3\""] {
            assert!(of(text).is_err(), "{text} in {template}");
        }
        assert!(of("-0.0").is_ok() && of("1e3").is_ok(), "{template}");
    }
}

#[test]
fn hazard_61_every_number_of_a_frame_ends_at_its_maximum_in_protobuf() {
    for number in NUMBERS {
        let fits = number <= WIRE_NUMBER_MAX;
        let (bits, generation) = (number as u32, number as u32);
        let position = v1::Position { epoch: 1, seq: 1, ..Default::default() };
        let hello = |position| v1::Hello { positions: vec![position], ..Default::default() };
        let epoch = hello(v1::Position { epoch: number, ..position.clone() });
        let seq = hello(v1::Position { seq: number, ..position.clone() });
        let attempt = v1::Hello { attempt: number, ..Default::default() };
        let reset = hello(v1::Position { generation, ..position.clone() });
        let ping = v1::Hello {
            ping_interval_ms: bits,
            ..hello(v1::Position { chain: Some(bits), ..position })
        };
        let ack = v1::Ack { seq: number, ..Default::default() };
        let old = v1::Ack { generation: Some(generation), ..Default::default() };
        for (fits, frame) in [
            (fits, ClientFrame::Hello(epoch)),
            (fits, ClientFrame::Hello(seq)),
            (fits, ClientFrame::Hello(attempt)),
            (fits, ClientFrame::Ack(ack)),
            (generation <= GENERATION_MAX, ClientFrame::Hello(reset)),
            (generation <= GENERATION_MAX, ClientFrame::Ack(old)),
            (true, ClientFrame::Hello(ping)),
        ] {
            let decoded = decode_client(Encoding::Proto, &encode_client(Encoding::Proto, &frame));
            let frames = decoded.as_ref().ok().and_then(|heard| heard.frame.as_ref());
            assert_eq!(frames, fits.then_some(&frame), "{decoded:?}");
        }
        let position = v1::Position { epoch: number, seq: number, ..Default::default() };
        let time = v1::Welcome { server_time_ms: number, ..Default::default() };
        let stands = v1::Welcome { positions: vec![position], ..Default::default() };
        let message = v1::Message {
            seq: number,
            body: Some(message::Body::Text(String::new())),
            ..Default::default()
        };
        for frame in [
            ServerFrame::Welcome(time),
            ServerFrame::Welcome(stands),
            ServerFrame::Skip(v1::Skip { to: number, why: bits as i32, ..Default::default() }),
            ServerFrame::Deliver(Deliver { messages: vec![message], ..Default::default() }),
        ] {
            let bytes = encode_server(Encoding::Proto, &frame).unwrap();
            let decoded = decode_server(Encoding::Proto, bytes);
            assert_eq!(decoded.as_ref().ok(), fits.then_some(&frame), "{decoded:?}");
        }
    }
}
