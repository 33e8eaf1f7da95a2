//! The latency of each hop of a message: one family of histograms, with the same names, clocks and bounds in every
//! role.
//!
//! Only two clocks are involved: the producer's (the Kafka timestamp, in whole milliseconds rounded down, so that
//! hops from there are up to 1 ms too long), and that of the mailbox's Redis master. Every role expresses its times
//! in that master's time, which it estimates from the master's answers to within half a round trip. So differences
//! between the clocks of Barid's machines do not matter. A negative hop counts as zero, and in
//! `barid_hop_negative_total`. A hop above an hour counts as an hour, and in `barid_hop_capped_total`: a producer may
//! write any timestamp, and one of 1970 would dominate the sum.
//!
//! Only the fast path is measured. A message that is delivered from its mailbox (the device was offline, or a push was
//! lost) has waited for other reasons.

use prometheus::{IntCounter, Registry};

use crate::latency::{Latency, register_latencies};
use crate::metric_set::MetricSet;

/// A hop of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// From the record's Kafka timestamp until the purger takes it. Producer's clock, Redis's.
    ProducedTaken,
    /// Until the script that accepts it begins. Redis's clock.
    TakenAccepted,
    /// Until it is queued for its access node: it includes that script's run. Redis's clock.
    AcceptedDispatched,
    /// Until the node writes it to the device's connection. Redis's clock.
    DispatchedWritten,
    /// Until the node has the device's acknowledgement. Redis's clock.
    WrittenAcked,
    /// From the Kafka timestamp until it is written. Producer's clock, Redis's.
    ProducedWritten,
    /// From the Kafka timestamp until it is acknowledged. Producer's clock, Redis's.
    ProducedAcked,
    /// Fan-out: from the time a message is queued for an access node until the node writes it to a member's
    /// connection. Redis's clock.
    FanoutDispatchedWritten,
    /// Fan-out: from the Kafka timestamp (producer's clock) until a message is written (Redis's clock).
    FanoutProducedWritten,
}

impl Hop {
    /// All hops: the single ones in order, then those that span several, then those of messages for audiences.
    pub const ALL: [Self; 9] = [
        Self::ProducedTaken,
        Self::TakenAccepted,
        Self::AcceptedDispatched,
        Self::DispatchedWritten,
        Self::WrittenAcked,
        Self::ProducedWritten,
        Self::ProducedAcked,
        Self::FanoutDispatchedWritten,
        Self::FanoutProducedWritten,
    ];

    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ProducedTaken => "produced_taken",
            Self::TakenAccepted => "taken_accepted",
            Self::AcceptedDispatched => "accepted_dispatched",
            Self::DispatchedWritten => "dispatched_written",
            Self::WrittenAcked => "written_acked",
            Self::ProducedWritten => "produced_written",
            Self::ProducedAcked => "produced_acked",
            Self::FanoutDispatchedWritten => "fanout_dispatched_written",
            Self::FanoutProducedWritten => "fanout_produced_written",
        }
    }
}

/// The largest value of a hop, µs. Messages that wait longer in Kafka show in the lag.
const HOP_US_MAX: u64 = 3_600_000_000;

/// `barid_hop_seconds` of one role. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Hops {
    /// Indexed by [`Hop`]; `None` if another role measures the hop.
    of: [Option<Counted>; Hop::ALL.len()],
}

#[derive(Debug, Clone)]
struct Counted {
    latency: Latency,
    negative: IntCounter,
    capped: IntCounter,
}

impl Hops {
    /// The metric's name; its label is `hop`.
    pub const FAMILY: &str = "barid_hop_seconds";

    /// Registers the hops that a role measures.
    ///
    /// # Errors
    /// They are registered already.
    pub fn new(registry: &Registry, hops: &[Hop]) -> Result<Self, prometheus::Error> {
        let metrics = MetricSet::new(registry, "barid");
        let names: Vec<_> = hops.iter().map(|hop| hop.as_str()).collect();
        let help = "Latency of each hop on the fast path.";
        let latencies = register_latencies(registry, Self::FAMILY, help, "hop", &names)?;
        let help = "Negative hops, which count as zero.";
        let negative = metrics.counters("hop_negative_total", help, "hop", &names)?;
        let help = "Hops above an hour, which count as an hour: a producer's timestamp is wrong.";
        let capped = metrics.counters("hop_capped_total", help, "hop", &names)?;
        let mut of = [const { None }; Hop::ALL.len()];
        for (hop, latency) in hops.iter().zip(latencies) {
            let label = &[hop.as_str()];
            let (negative, capped) =
                (negative.with_label_values(label), capped.with_label_values(label));
            of[*hop as usize] = Some(Counted { latency, negative, capped });
        }
        Ok(Self { of })
    }

    /// Records a hop between two times, µs since the Unix epoch. A time of 0 is unknown, and the hop is not recorded.
    pub fn observe(&self, hop: Hop, from_us: u64, to_us: u64) {
        if from_us == 0 || to_us == 0 {
            return;
        }
        let Some(Counted { latency, negative, capped }) = &self.of[hop as usize] else { return };
        let us = to_us.saturating_sub(from_us);
        if to_us < from_us {
            negative.inc();
        } else if us > HOP_US_MAX {
            capped.inc();
        }
        latency.observe_us(us.min(HOP_US_MAX));
    }

    /// Number of records of a hop.
    pub fn count(&self, hop: Hop) -> u64 {
        self.of[hop as usize].as_ref().map_or(0, |of| of.latency.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_contradict_each_other_count_as_zero_and_are_told() {
        let registry = Registry::new();
        let hops = Hops::new(&registry, &[Hop::WrittenAcked, Hop::ProducedAcked]).unwrap();
        hops.observe(Hop::WrittenAcked, 1_000_300, 1_000_000);
        hops.observe(Hop::WrittenAcked, 1_000_000, 1_000_300);
        hops.observe(Hop::ProducedAcked, 0, 1_000_000);
        hops.observe(Hop::TakenAccepted, 1, 2); // another role's
        assert_eq!((hops.count(Hop::WrittenAcked), hops.count(Hop::ProducedAcked)), (2, 0));
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "barid_hop_negative_total{hop=\"written_acked\"} 1",
            "barid_hop_negative_total{hop=\"produced_acked\"} 0",
            "barid_hop_seconds_bucket{hop=\"written_acked\",le=\"0.00005\"} 1",
            "barid_hop_seconds_sum{hop=\"written_acked\"} 0.0003",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
        assert!(!text.contains("taken_accepted"));
    }

    #[test]
    fn hazard_52_a_timestamp_of_1970_does_not_spoil_the_sum() {
        let registry = Registry::new();
        let hops = Hops::new(&registry, &[Hop::ProducedTaken]).unwrap();
        for from_us in [1, 1_000, u64::MAX] {
            hops.observe(Hop::ProducedTaken, from_us, 1_790_000_000_000_000);
        }
        hops.observe(Hop::ProducedTaken, 1, u64::MAX);
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "barid_hop_seconds_count{hop=\"produced_taken\"} 4",
            "barid_hop_seconds_sum{hop=\"produced_taken\"} 10800",
            "barid_hop_capped_total{hop=\"produced_taken\"} 3",
            "barid_hop_negative_total{hop=\"produced_taken\"} 1",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
    }
}
