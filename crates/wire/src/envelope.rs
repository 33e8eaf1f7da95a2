//! Mailbox entries: the fixed header that the accept script writes, and the body behind it.

use std::borrow::Cow;

use barid_core::limits::{TIME_MS_MAX, TTL_SECONDS_MAX, WIRE_NUMBER_MAX};
use barid_core::{Chain, Epoch, Seq, TraceParent};
use bytes::Bytes;
use prost::Message as _;

pub use crate::v1::{BodyKind, Envelope, SkipReason};

/// The largest body, decompressed.
pub const BODY_BYTES_MAX: u32 = 16 << 20;

/// Bytes of the header: epoch, seq, previous chain, chain, time, each a fixed-width field with its tag.
pub const HEADER_BYTES: usize = 37;

/// The fields that the accept script writes, read without decoding the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The mailbox's epoch.
    pub epoch: Epoch,
    /// The entry's position.
    pub seq: Seq,
    /// The chain before it.
    pub prev_chain: Chain,
    /// The chain after it.
    pub chain: Chain,
    /// Redis's time of acceptance, µs since the Unix epoch.
    pub accepted_at_us: u64,
}

/// An invalid envelope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// It has no header.
    #[error("not an envelope: {0} bytes without a header")]
    Header(usize),
    /// A number of the header is not below 2^53.
    #[error("not an envelope: {0} is not below 2^53")]
    Number(&'static str),
    /// The body does not decode.
    #[error("not an envelope: {0}")]
    Body(String),
    /// The payload cannot be decompressed to the stated length.
    #[error("payload cannot be decompressed: {0}")]
    Payload(String),
}

impl Header {
    /// Reads the header of an entry.
    ///
    /// # Errors
    /// Returns [`EnvelopeError::Header`] or [`EnvelopeError::Number`].
    pub fn parse(entry: &[u8]) -> Result<Self, EnvelopeError> {
        let short = || EnvelopeError::Header(entry.len());
        let header: &[u8; HEADER_BYTES] = entry.first_chunk().ok_or_else(short)?;
        let tags = [header[0], header[9], header[18], header[23], header[28]];
        if tags != [0x09, 0x11, 0x1d, 0x25, 0x29] {
            return Err(short());
        }
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let number = |name, at| match u64_at(at) {
            number @ 0..=WIRE_NUMBER_MAX => Ok(number),
            _ => Err(EnvelopeError::Number(name)),
        };
        Ok(Self {
            epoch: Epoch(number("epoch", 1)?),
            seq: Seq(number("seq", 10)?),
            prev_chain: Chain(u32_at(19)),
            chain: Chain(u32_at(24)),
            accepted_at_us: number("accepted_at_us", 29)?,
        })
    }

    /// The header's bytes, as the accept script writes them.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut put = |at: usize, tag: u8, bytes: &[u8]| {
            out[at] = tag;
            out[at + 1..at + 1 + bytes.len()].copy_from_slice(bytes);
        };
        put(0, 0x09, &self.epoch.0.to_le_bytes());
        put(9, 0x11, &self.seq.0.to_le_bytes());
        put(18, 0x1d, &self.prev_chain.0.to_le_bytes());
        put(23, 0x25, &self.chain.0.to_le_bytes());
        put(28, 0x29, &self.accepted_at_us.to_le_bytes());
        out
    }
}

/// Decodes a whole entry.
///
/// # Errors
/// Returns an error if `entry` is not a valid envelope.
pub fn decode(entry: Bytes) -> Result<(Header, Envelope), EnvelopeError> {
    let header = Header::parse(&entry)?;
    let mut envelope = Envelope::decode(entry).map_err(|e| EnvelopeError::Body(e.to_string()))?;
    // Protobuf takes the last of repeated fields: a body must not override the header.
    envelope.epoch = header.epoch.0;
    envelope.seq = header.seq.0;
    envelope.prev_chain = header.prev_chain.0;
    envelope.chain = header.chain.0;
    envelope.accepted_at_us = header.accepted_at_us;
    // Times from the clocks of a purger and a business; implausible ones count as unknown.
    for time_ms in [&mut envelope.produced_at_ms, &mut envelope.taken_at_ms] {
        *time_ms = if *time_ms > TIME_MS_MAX { 0 } else { *time_ms };
    }
    envelope.ttl_ms = envelope.ttl_ms.min(TTL_SECONDS_MAX * 1000);
    Ok((header, envelope))
}

/// Encodes the body: `envelope` without the fields of the header.
pub fn encode_body(mut envelope: Envelope) -> Bytes {
    envelope.epoch = 0;
    envelope.seq = 0;
    envelope.prev_chain = 0;
    envelope.chain = 0;
    envelope.accepted_at_us = 0;
    envelope.encode_to_vec().into()
}

/// Sets the payload of an envelope. A payload of at least `min_bytes` is compressed with zstd (`level` 1 to
/// 19) if that makes it smaller.
pub fn set_payload(envelope: &mut Envelope, payload: Bytes, min_bytes: usize, level: i32) {
    envelope.raw_bytes = 0;
    if payload.len() >= min_bytes
        && let Ok(packed) = zstd::bulk::compress(&payload, level)
        && packed.len() < payload.len()
    {
        envelope.raw_bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        envelope.payload = packed.into();
        return;
    }
    envelope.payload = payload;
}

/// The decompressed payload.
///
/// # Errors
/// Returns [`EnvelopeError::Payload`] if it cannot be decompressed, or is larger than [`BODY_BYTES_MAX`].
pub fn payload(envelope: &Envelope) -> Result<Cow<'_, [u8]>, EnvelopeError> {
    if envelope.raw_bytes == 0 {
        return Ok(Cow::Borrowed(&envelope.payload));
    }
    if envelope.raw_bytes > BODY_BYTES_MAX {
        let why = format!("{} bytes are more than {BODY_BYTES_MAX}", envelope.raw_bytes);
        return Err(EnvelopeError::Payload(why));
    }
    let raw_bytes = envelope.raw_bytes as usize;
    let raw = zstd::bulk::decompress(&envelope.payload, raw_bytes)
        .map_err(|e| EnvelopeError::Payload(e.to_string()))?;
    if raw.len() != raw_bytes {
        return Err(EnvelopeError::Payload(format!("{} bytes instead of {raw_bytes}", raw.len())));
    }
    Ok(Cow::Owned(raw))
}

/// Whether the message's trace is sampled.
pub fn is_sampled(envelope: &Envelope) -> bool {
    let trace = TraceParent::parse(envelope.traceparent.as_bytes());
    trace.is_some_and(TraceParent::is_sampled)
}

/// Whether the message has expired at `now_ms`.
pub fn expired(envelope: &Envelope, now_ms: u64) -> bool {
    let accepted_ms = envelope.accepted_at_us / 1000;
    envelope.ttl_ms != 0 && accepted_ms.saturating_add(envelope.ttl_ms) <= now_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_body_together_are_one_protobuf_message() {
        let header = Header {
            epoch: Epoch(77),
            seq: Seq(5),
            prev_chain: Chain(1),
            chain: Chain(2),
            accepted_at_us: 9,
        };
        let mut envelope = Envelope { id: "order-7".into(), ..Default::default() };
        set_payload(&mut envelope, vec![b'a'; 4096].into(), 128, 3);
        assert!(envelope.payload.len() < 100);
        let entry = [&header.encode()[..], &encode_body(envelope)].concat();
        let (parsed, decoded) = decode(entry.into()).unwrap();
        assert_eq!((parsed, decoded.seq, decoded.id.as_str()), (header, 5, "order-7"));
        assert_eq!(payload(&decoded).unwrap().len(), 4096);
    }

    #[test]
    fn incompressible_payloads_stay_as_they_are() {
        let mut envelope = Envelope::default();
        set_payload(&mut envelope, Bytes::from_static(b"\x01\x9f\x33short"), 0, 3);
        assert_eq!(envelope.raw_bytes, 0);
        assert_eq!(&*payload(&envelope).unwrap(), b"\x01\x9f\x33short");
    }

    #[test]
    fn what_is_no_envelope_is_refused() {
        assert_eq!(Header::parse(b"short"), Err(EnvelopeError::Header(5)));
        assert!(Header::parse(&[0; 64]).is_err());
        let bomb =
            Envelope { raw_bytes: 10, payload: Bytes::from_static(b"junk"), ..Default::default() };
        assert!(payload(&bomb).is_err());
    }

    #[test]
    fn hazard_61_numbers_of_an_envelope_are_bounded() {
        let header = |number| Header {
            epoch: Epoch(number),
            seq: Seq(1),
            prev_chain: Chain(u32::MAX),
            chain: Chain(0),
            accepted_at_us: 1,
        };
        let largest = header(WIRE_NUMBER_MAX);
        assert_eq!(Header::parse(&largest.encode()), Ok(largest));
        for number in [1 << 53, 1 << 63, u64::MAX] {
            let seq = Header { seq: Seq(number), ..header(1) };
            let at = Header { accepted_at_us: number, ..header(1) };
            for (name, header) in [("epoch", header(number)), ("seq", seq), ("accepted_at_us", at)]
            {
                assert_eq!(Header::parse(&header.encode()), Err(EnvelopeError::Number(name)));
            }
        }
        for number in [0, 1, TIME_MS_MAX, TIME_MS_MAX + 1, 1 << 53, 1 << 63, u64::MAX] {
            let body = encode_body(Envelope {
                ttl_ms: number,
                produced_at_ms: number,
                taken_at_ms: number,
                raw_bytes: number.try_into().unwrap_or(u32::MAX),
                receipts: number as u32,
                kind: number as i32,
                voided: number as i32,
                ..Default::default()
            });
            // A second header behind the first one.
            let other = header(number).encode();
            let entry = [&largest.encode()[..], &body, &other].concat();
            let (parsed, envelope) = decode(entry.into()).unwrap();
            assert_eq!((parsed, envelope.epoch, envelope.seq), (largest, WIRE_NUMBER_MAX, 1));
            assert!(envelope.produced_at_ms <= TIME_MS_MAX && envelope.taken_at_ms <= TIME_MS_MAX);
            assert!(envelope.ttl_ms <= TTL_SECONDS_MAX * 1000);
            let _ = (payload(&envelope), envelope.kind(), envelope.voided());
            for now_ms in [0, 1 << 53, u64::MAX] {
                let _ = expired(&envelope, now_ms);
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(
            body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
            headed in proptest::prelude::any::<bool>(),
        ) {
            let header = Header {
                epoch: Epoch(1), seq: Seq(1), prev_chain: Chain(1), chain: Chain(1), accepted_at_us: 1,
            };
            let entry = if headed { [&header.encode()[..], &body].concat() } else { body };
            if let Ok((_, envelope)) = decode(entry.into()) {
                let _ = payload(&envelope);
            }
        }
    }
}
