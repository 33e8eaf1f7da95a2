//! The memory that input takes is bounded by its size, whatever it contains.
#![allow(unsafe_code, reason = "an allocator that counts")]
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use barid_wire::envelope::{self, Envelope};
use barid_wire::frames::{Encoding, body, decode_client};
use barid_wire::record::{RecordLimits, decode_push};
use barid_wire::v1::{Message, message};
use bytes::Bytes;

struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn grow(bytes: usize) {
    // The counters of a thread that is ending are gone.
    let _ = NOW.try_with(|now| {
        now.set(now.get().saturating_add(bytes));
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

fn shrink(bytes: usize) {
    let _ = NOW.try_with(|now| now.set(now.get().saturating_sub(bytes)));
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is System's, with the caller's arguments; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrink(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new allocation exist at once.
        grow(size);
        shrink(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// The most memory that `work` holds at once.
fn peak_of<T>(work: impl FnOnce() -> T) -> usize {
    let before = NOW.get();
    PEAK.set(before);
    drop(work());
    PEAK.get() - before
}

const MIB: usize = 1 << 20;

/// Bytes of memory for a byte of a record: an empty name in protobuf takes two bytes and a `String` of memory,
/// and a list that grows takes up to three times its size.
const RECORD_FACTOR: usize = 32;
/// The same of Hello's positions, two bytes of wire each.
const FRAME_FACTOR: usize = 64;

/// A length-delimited protobuf field.
fn field(number: u8, content: &str) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut out);
    out.extend_from_slice(content.as_bytes());
    out
}

#[test]
fn a_record_costs_a_bounded_multiple_of_itself() {
    let json = |fields: String| format!(r#"{{"id":"1","app":"demo",{fields}}}"#).into_bytes();
    let fill = |piece: &str| piece.repeat(MIB / piece.len());
    let hostile = [
        ("brackets", json(format!(r#""to":{{"user":"a"}},"json":{}1"#, fill("[")))),
        ("brackets for an audience", json(format!(r#""to":{}"#, fill("[")))),
        ("names", json(format!(r#""to":{{"user":"a"}},"json":{{{}"":1,"":1}}"#, fill(r#""":1,"#)))),
        ("objects for receipts", json(format!(r#""receipts":[{}"#, fill(r#"{"a":"#)))),
        ("fields", json(fill(r#""a":1,"#))),
        ("a field's name", json(format!(r#""{}":1"#, fill("n")))),
        ("users", json(format!(r#""to":{{"users":[{}"x"]}}"#, fill(r#""u","#)))),
        ("numbers for users", json(format!(r#""to":{{"users":[{}1]}}"#, fill("1,")))),
        ("receipts", json(format!(r#""to":{{"user":"a"}},"receipts":[{}1]"#, fill("1,")))),
        ("text", json(format!(r#""to":{{"user":"a"}},"text":"{}""#, fill(r"\u0041")))),
        ("base64", json(format!(r#""to":{{"user":"a"}},"data":"{}""#, fill("AAAA")))),
        ("digits", json(format!(r#""ttlSeconds":{}"#, fill("9")))),
        ("protobuf users", field(3, &fill("\x1a\0"))),
        ("protobuf receipts", field(9, &fill("\x01"))),
        ("protobuf groups", fill("\x5b").into_bytes()),
    ];
    for (name, bytes) in hostile {
        let (size, value) = (bytes.len(), Bytes::from(bytes));
        let peak =
            peak_of(|| assert!(decode_push(&value, None, &RecordLimits::default()).is_err()));
        println!("{name}: {peak} for {size}");
        assert!(peak <= RECORD_FACTOR * size, "{name}: {peak} bytes for {size}");
    }
}

#[test]
fn a_frame_costs_a_bounded_multiple_of_itself() {
    let fill = |piece: &str| piece.repeat((64 << 10) / piece.len());
    let json = |head: &str, piece: &str| format!("{head}{}", fill(piece)).into_bytes();
    let hostile = [
        ("brackets", Encoding::Json, json("", "[")),
        ("objects", Encoding::Json, json("", r#"{"a":"#)),
        ("positions", Encoding::Json, json(r#"{"hello":{"positions":["#, "{},")),
        ("a kind", Encoding::Json, json("{\"", "k")),
        ("an unknown field", Encoding::Json, json("{\"ack\":{\"", "k")),
        ("protobuf positions", Encoding::Proto, field(1, &fill("\x2a\0"))),
        ("protobuf groups", Encoding::Proto, fill("\x5b").into_bytes()),
    ];
    for (name, encoding, bytes) in hostile {
        let size = bytes.len();
        let peak = peak_of(|| assert!(decode_client(encoding, &bytes).is_err()));
        println!("{name}: {peak} for {size}");
        assert!(peak <= FRAME_FACTOR * size, "{name}: {peak} bytes for {size}");
    }
}

#[test]
fn what_unpacks_to_more_than_it_says_is_not_unpacked() {
    let packed = zstd::bulk::compress(&vec![0; 64 * MIB], 3).unwrap();
    let entry = Envelope { payload: packed.clone().into(), raw_bytes: 1000, ..Default::default() };
    let peak = peak_of(|| assert!(envelope::payload(&entry).is_err()));
    assert!(peak < MIB, "{peak}");
    let zstd_text = Some(message::Body::ZstdText(packed.into()));
    let message = Message { seq: 1, id: "1".into(), body: zstd_text };
    let peak = peak_of(|| assert!(body(message, 64 << 10).is_err()));
    assert!(peak < MIB, "{peak}");
}
