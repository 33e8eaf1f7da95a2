//! Intake: decodes, validates and compresses a record into messages for mailboxes.

use std::sync::Arc;

use barid_bus::consumer::Record;
use barid_core::{IdHash, Owner, Shard, ShardCount, TraceParent};
use barid_mailbox::{AcceptMessage, LogPosition};
use barid_wire::envelope::{Envelope, encode_body, set_payload};
use barid_wire::record::{CONTENT_TYPE, Push, RecordLimits, Refusal, decode_push};
use bytes::Bytes;
use prometheus::IntCounter;
use tokio::time::Instant;

use crate::config::{CompressionConfig, Config};
use crate::flight::{Flight, Parcel, Reading, produced_at_ms};

/// Decodes records.
#[derive(Debug, Clone)]
pub struct Intake {
    limits: RecordLimits,
    compression: CompressionConfig,
    shards: ShardCount,
    /// Counts malformed `traceparent` headers.
    traces_ignored: IntCounter,
}

/// A decoded record: ready for the mailboxes, or refused.
#[derive(Debug)]
pub enum Decoded {
    /// The messages, one per mailbox.
    Parcels(Vec<Parcel>),
    /// The record, and the reason for its refusal.
    Refused(Arc<Flight>, Refusal),
}

impl Intake {
    /// Creates an intake for a cluster of `shards`.
    pub fn new(config: &Config, shards: ShardCount, traces_ignored: IntCounter) -> Self {
        let (limits, compression) = (config.record_limits(), config.compression.clone());
        Self { limits, compression, shards, traces_ignored }
    }

    /// Decodes a record that was just taken.
    pub fn decode(&self, reading: &Arc<Reading>, record: Record, now_ms: u64) -> Decoded {
        let reading = Arc::clone(reading);
        let taken = Instant::now();
        let traceparent = self.traceparent(&record);
        match decode_push(&record.value, record.header(CONTENT_TYPE), &self.limits) {
            Err(refusal) => {
                let flight = Flight::new(reading, record, None, taken, traceparent, &[]);
                Decoded::Refused(Arc::new(flight), refusal)
            }
            Ok(push) => {
                let body = self.body(&push, &record, &traceparent, now_ms);
                let owners = push.to.owners();
                let shard = |of: &Owner| self.shards.shard_of(push.app.as_str(), of.as_str());
                let shards: Vec<Shard> = owners.iter().map(shard).collect();
                let flight = Flight::new(reading, record, Some(push), taken, traceparent, &shards);
                Decoded::Parcels(self.parcels(flight, owners, &shards, &body))
            }
        }
    }

    fn parcels(
        &self,
        flight: Flight,
        owners: Vec<Owner>,
        shards: &[Shard],
        body: &Bytes,
    ) -> Vec<Parcel> {
        let flight = Arc::new(flight);
        let Some(push) = &flight.push else { return Vec::new() };
        let id = IdHash::of(push.id.as_str());
        let parcel = |(index, (owner, shard)): (u32, (Owner, &Shard))| Parcel {
            flight: Arc::clone(&flight),
            shard: *shard,
            message: AcceptMessage {
                position: LogPosition {
                    leader_epoch: flight.record.leader_epoch,
                    offset: flight.record.offset,
                    index,
                },
                app: push.app.clone(),
                owner,
                id,
                collapse_key: push.collapse_key.clone(),
                body: body.clone(),
            },
        };
        (0u32..).zip(owners.into_iter().zip(shards)).map(parcel).collect()
    }

    /// The envelope without the fields that accept writes; the same for all mailboxes of the record.
    fn body(&self, push: &Push, record: &Record, traceparent: &str, now_ms: u64) -> Bytes {
        let mut envelope = Envelope {
            id: push.id.as_str().to_owned(),
            kind: push.kind as i32,
            ttl_ms: push.ttl_ms,
            device: push.to.device().map_or_else(String::new, ToString::to_string),
            receipts: push.receipts.0,
            produced_at_ms: produced_at_ms(record),
            taken_at_ms: now_ms,
            traceparent: traceparent.to_owned(),
            ..Default::default()
        };
        let CompressionConfig { min_bytes, level } = self.compression;
        set_payload(&mut envelope, push.payload.clone(), min_bytes, level);
        encode_body(envelope)
    }

    /// The W3C `traceparent` header; empty if it is absent or malformed.
    fn traceparent(&self, record: &Record) -> String {
        let Some(value) = record.header("traceparent") else { return String::new() };
        match TraceParent::parse(value) {
            Some(trace) => trace.as_str().to_owned(),
            None => {
                self.traces_ignored.inc();
                String::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::Assignment;
    use barid_bus::consumer::Partition;
    use barid_core::limits::TIME_MS_MAX;
    use barid_wire::envelope;
    use std::collections::HashMap;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn reading() -> Arc<Reading> {
        let topic: Arc<str> = "barid.push".into();
        let partition = Partition { topic: topic.clone(), number: 2 };
        let assignment = Assignment::new(1, partition, topic, 1, HashMap::new());
        Reading::first(Arc::new(assignment), None)
    }

    fn record(value: &str) -> Record {
        Record {
            topic: "barid.push".into(),
            partition: 2,
            offset: 40,
            leader_epoch: 3,
            timestamp_ms: Some(1000),
            key: None,
            value: Bytes::copy_from_slice(value.as_bytes()),
            headers: vec![("traceparent".into(), Bytes::from_static(TRACE.as_bytes()))],
        }
    }

    fn intake() -> Intake {
        let ignored = IntCounter::new("i", "i").unwrap();
        Intake::new(&Config::default(), ShardCount::new(64).unwrap(), ignored)
    }

    /// The body behind a header, as accept would store it.
    fn decoded(body: &Bytes) -> Envelope {
        let header = envelope::Header {
            epoch: barid_core::Epoch(1),
            seq: barid_core::Seq(1),
            prev_chain: barid_core::Chain::START,
            chain: barid_core::Chain::START,
            accepted_at_us: 1,
        };
        envelope::decode([&header.encode()[..], body].concat().into()).unwrap().1
    }

    #[test]
    fn each_user_gets_a_parcel_at_a_position_of_its_own() {
        let text = "x".repeat(5000);
        let value = format!(
            r#"{{"id":"1","app":"demo","to":{{"users":["alice","bob"]}},"text":"{text}"}}"#
        );
        let Decoded::Parcels(parcels) = intake().decode(&reading(), record(&value), 1007) else {
            panic!("refused");
        };
        let places: Vec<(u16, i64, u32)> = parcels
            .iter()
            .map(|p| (p.shard.get(), p.message.position.offset, p.message.position.index))
            .collect();
        assert_eq!(places, [(51, 40, 0), (59, 40, 1)]);
        let envelope = decoded(&parcels[0].message.body);
        assert_eq!((envelope.produced_at_ms, envelope.taken_at_ms), (1000, 1007));
        assert_eq!((envelope.raw_bytes, &*envelope.traceparent), (5000, TRACE));
        assert_eq!(envelope::payload(&envelope).unwrap().len(), 5000);
        assert!(!parcels[0].flight.part_done() && parcels[1].flight.part_done());
    }

    #[test]
    fn hazard_61_a_timestamp_beyond_what_clocks_show_is_not_known() {
        let ends = [0, 1, TIME_MS_MAX, TIME_MS_MAX + 1, 1 << 53, i64::MAX as u64];
        for told in ends.map(|ms| ms as i64).into_iter().chain([-1, i64::MIN]) {
            let value = r#"{"id":"1","app":"demo","to":{"user":"alice"},"text":"t"}"#;
            let record = Record { timestamp_ms: Some(told), ..record(value) };
            let Decoded::Parcels(parcels) = intake().decode(&reading(), record, 0) else {
                panic!("refused")
            };
            let known = u64::try_from(told).ok().filter(|ms| *ms <= TIME_MS_MAX).unwrap_or(0);
            assert_eq!(decoded(&parcels[0].message.body).produced_at_ms, known, "{told}");
            assert_eq!(parcels[0].flight.produced_at_ms(), known, "{told}");
        }
    }

    #[test]
    fn a_malformed_trace_is_ignored_and_counted() {
        let intake = intake();
        let mut record = record("{}");
        record.headers[0].1 = Bytes::from_static(b"00-ab-cd-01");
        let Decoded::Refused(flight, _) = intake.decode(&reading(), record, 0) else {
            panic!("taken")
        };
        assert_eq!((&*flight.traceparent, intake.traces_ignored.get()), ("", 1));
    }

    #[test]
    fn a_refused_record_keeps_what_it_was() {
        let Decoded::Refused(flight, refusal) = intake().decode(&reading(), record("{}"), 0) else {
            panic!("taken");
        };
        assert_eq!((refusal.code.as_str(), &*flight.record.value), ("missing_field", &b"{}"[..]));
    }
}
