//! All metrics of the purger.

use barid_runtime::{Hop, Hops, MetricSet};
use barid_wire::record::RefusalCode;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

/// The purger's metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Records taken, by topic.
    pub taken: IntCounterVec,
    /// Bytes of these records' values, by topic.
    pub taken_bytes: IntCounterVec,
    /// Messages (one per user), by outcome: accepted, before, duplicate, failed; for messages that a repair reads again
    /// also known, expired.
    pub messages: IntCounterVec,
    /// Records refused, by code.
    pub refused: IntCounterVec,
    /// Messages of online users that were queued for a dispatcher.
    pub handed: IntCounter,
    /// Messages of online users that were left to the retry timer, because the dispatcher's queue was full.
    pub handoff_dropped: IntCounter,
    /// Entries that were evicted from a full mailbox.
    pub evicted: IntCounter,
    /// Times that a shard had forgotten messages it had confirmed.
    pub gaps: IntCounter,
    /// Times that a partition's log was read again for forgotten messages.
    pub repairs: IntCounter,
    /// Shards (counted per partition) under repair: until the log is read again for them and their positions are
    /// raised.
    pub repairing: IntGauge,
    /// Shards whose positions did not fit into a commit's metadata.
    pub left_out: IntCounter,
    /// Groups of accept calls, by outcome (`CALLS`).
    pub calls: IntCounterVec,
    /// Messages of an accept call.
    pub call_messages: Histogram,
    /// Duration of accept calls.
    pub call_seconds: Histogram,
    /// Records taken and not finished, by topic.
    pub in_flight: IntGaugeVec,
    /// Bytes of these records, by topic.
    pub in_flight_bytes: IntGaugeVec,
    /// Times that a bound stopped the purger from taking records: records or bytes of a priority, messages of a lane,
    /// records left in the log.
    pub stalls: IntCounterVec,
    /// Partitions assigned to this purger, by topic.
    pub partitions: IntGaugeVec,
    /// Partitions that cannot be fetched.
    pub partitions_stuck: IntGauge,
    /// 1: the group does not use the assignor that distributes each topic evenly.
    pub assignor_missing: IntGauge,
    /// Topics that do not exist.
    pub topics_missing: IntGauge,
    /// Receipts and dead letters that Kafka has not accepted yet.
    pub produce_held: IntGauge,
    /// Age of the oldest unfinished record, seconds.
    pub oldest_seconds: IntGauge,
    /// Partitions of which no record is taken, for lack of room or another reason.
    pub paused: IntGauge,
    /// Records left in the log until their master is available.
    pub skipped: IntGauge,
    /// Shards whose last call failed.
    pub shards_away: IntGauge,
    /// Records between what is committed and the log's end, over all partitions.
    pub lag: IntGauge,
    /// Revoked partitions, by result: drained, cut, lost.
    pub revoked: IntCounterVec,
    /// Topics found recreated.
    pub recreated: IntCounter,
    /// Commits, by outcome.
    pub commits: IntCounterVec,
    /// Receipts that could not be produced.
    pub receipts_dropped: IntCounter,
    /// Dead letters that Kafka refused for good.
    pub dead_letters_dropped: IntCounter,
    /// Malformed `traceparent` headers.
    pub traces_ignored: IntCounter,
    /// Latencies of the hops.
    pub hops: Hops,
    /// Whether a dispatcher is available.
    pub dispatchers: IntGauge,
}

/// The code for a message that the accept script refused.
pub const ACCEPT_FAILED: &str = "accept_failed";

const OUTCOMES: [&str; 6] = ["accepted", "before", "duplicate", "failed", "known", "expired"];
const CALLS: [&str; 7] = ["done", "gap", "away", "unreplicated", "full", "newer", "unexpected"];
const REVOKED: [&str; 3] = ["drained", "cut", "lost"];
const COMMITS: [&str; 2] = ["done", "failed"];
const LIMITS: [&str; 4] = ["records", "bytes", "lane", "skipped"];
const LATENCY: [f64; 15] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 4.0, 15.0, 60.0];
const SIZES: [f64; 9] = [1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

impl Metrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    /// A metric of the same name is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let set = MetricSet::new(registry, "barid_purger");
        let codes = RefusalCode::ALL.iter().map(|code| code.as_str());
        let codes: Vec<_> = codes.chain([ACCEPT_FAILED]).collect();
        Ok(Self {
            taken: set.counters(
                "records_taken_total",
                "Records taken from Kafka.",
                "topic",
                &[],
            )?,
            taken_bytes: set.counters(
                "record_bytes_taken_total",
                "Bytes of the records' values.",
                "topic",
                &[],
            )?,
            messages: set.counters(
                "messages_total",
                "Messages, one per user.",
                "outcome",
                &OUTCOMES,
            )?,
            refused: set.counters("records_refused_total", "Records refused.", "code", &codes)?,
            handed: set.counter("handed_total", "Messages handed to dispatchers.")?,
            handoff_dropped: set
                .counter("handoff_dropped_total", "Messages left to the retry timer.")?,
            evicted: set.counter("evicted_total", "Entries evicted from full mailboxes.")?,
            gaps: set
                .counter("gaps_total", "Times that a shard had forgotten confirmed messages.")?,
            repairs: set.counter(
                "repairs_total",
                "Times that a log was read again for forgotten messages.",
            )?,
            repairing: set.gauge("shards_repairing", "Shards for which a log is read again.")?,
            left_out: set.counter(
                "commit_shards_left_out_total",
                "Shards for which a commit's metadata had no room.",
            )?,
            calls: set.counters(
                "accept_calls_total",
                "Groups of accept calls.",
                "outcome",
                &CALLS,
            )?,
            call_messages: set.histogram(
                "accept_messages",
                "Messages of an accept call.",
                SIZES,
            )?,
            call_seconds: set.histogram("accept_seconds", "Duration of accept calls.", LATENCY)?,
            in_flight: set.gauges("in_flight_records", "Records in flight.", "topic")?,
            in_flight_bytes: set.gauges(
                "in_flight_bytes",
                "Bytes of the records in flight.",
                "topic",
            )?,
            stalls: set.counters(
                "stalls_total",
                "Times that a bound stopped the purger from taking records.",
                "limit",
                &LIMITS,
            )?,
            partitions: set.gauges("partitions", "Partitions assigned.", "topic")?,
            partitions_stuck: set
                .gauge("partitions_stuck", "Partitions that cannot be fetched.")?,
            assignor_missing: set.gauge(
                "assignor_missing",
                "1 if the group does not distribute each topic evenly.",
            )?,
            topics_missing: set.gauge("topics_missing", "Topics that do not exist.")?,
            produce_held: set.gauge("produce_held", "Receipts and dead letters that wait.")?,
            oldest_seconds: set
                .gauge("oldest_unfinished_seconds", "Age of the oldest unfinished record.")?,
            paused: set.gauge("partitions_paused", "Partitions that wait for room.")?,
            skipped: set.gauge("skipped_records", "Records left in the log for a master.")?,
            shards_away: set.gauge("shards_away", "Shards whose master does not answer.")?,
            lag: set.gauge("lag_records", "Records between the commits and the logs' ends.")?,
            revoked: set.counters(
                "partitions_revoked_total",
                "Partitions revoked, by result.",
                "how",
                &REVOKED,
            )?,
            recreated: set.counter("topics_recreated_total", "Topics found recreated.")?,
            commits: set.counters("commits_total", "Commits.", "outcome", &COMMITS)?,
            receipts_dropped: set.counter("receipts_dropped_total", "Receipts not produced.")?,
            dead_letters_dropped: set
                .counter("dead_letters_dropped_total", "Dead letters not produced.")?,
            traces_ignored: set
                .counter("traceparents_ignored_total", "Malformed traceparent headers.")?,
            hops: Hops::new(registry, &[Hop::ProducedTaken, Hop::TakenAccepted])?,
            dispatchers: set.gauge("dispatchers_available", "Whether a dispatcher takes work.")?,
        })
    }
}
