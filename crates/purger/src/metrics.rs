//! The closed set of the purger's metrics.

use barid_runtime::{Hop, Hops};
use barid_wire::record::RefusalCode;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// The purger's metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Records taken from Kafka, by topic.
    pub taken: IntCounterVec,
    /// Messages (one a user), by outcome: accepted, before, duplicate, failed; and of those that are
    /// read again: known, expired.
    pub messages: IntCounterVec,
    /// Records refused, by code.
    pub refused: IntCounterVec,
    /// Messages that were accepted while their user was online, and went to a dispatcher.
    pub handed: IntCounter,
    /// Those that found no room, and were left to the retry timer.
    pub handoff_dropped: IntCounter,
    /// Entries that had to leave a mailbox for a newer one.
    pub evicted: IntCounter,
    /// Times that a shard had forgotten what it had confirmed.
    pub gaps: IntCounter,
    /// Times that a partition's log was read again for that.
    pub repairs: IntCounter,
    /// Shards, one a partition, for which the log is read again, or which are not yet raised to what
    /// they must know.
    pub repairing: IntGauge,
    /// Shards for whose positions a commit's metadata had no room.
    pub left_out: IntCounter,
    /// Groups of accept calls, by outcome (`CALLS`).
    pub calls: IntCounterVec,
    /// Messages of an accept call.
    pub call_messages: Histogram,
    /// How long accept calls take.
    pub call_seconds: Histogram,
    /// Records taken and not finished, by topic.
    pub in_flight: IntGaugeVec,
    /// Their bytes, by topic.
    pub in_flight_bytes: IntGaugeVec,
    /// How often a bound stopped the taking of records: records or bytes of a priority, messages of a lane,
    /// records left in the log.
    pub stalls: IntCounterVec,
    /// Partitions assigned, by topic: with those of other purgers, how the work is shared out.
    pub partitions: IntGaugeVec,
    /// Partitions that cannot be fetched.
    pub partitions_stuck: IntGauge,
    /// 1: the broker offers no assignor that shares out each topic evenly.
    pub assignor_missing: IntGauge,
    /// Topics that do not exist.
    pub topics_missing: IntGauge,
    /// Receipts and dead letters that Kafka has not taken so far.
    pub produce_held: IntGauge,
    /// How long the oldest record that was taken has not been finished, seconds.
    pub oldest_seconds: IntGauge,
    /// Partitions whose next record waits for room.
    pub paused: IntGauge,
    /// Records that are left in the log until a master is back.
    pub skipped: IntGauge,
    /// Shards whose master did not take the last call.
    pub shards_away: IntGauge,
    /// Records between what is committed and the log's end, over all partitions.
    pub lag: IntGauge,
    /// Partitions taken away, by how: drained, cut, lost.
    pub revoked: IntCounterVec,
    /// Topics that were found created anew.
    pub recreated: IntCounter,
    /// Commits, by outcome.
    pub commits: IntCounterVec,
    /// Receipts that could not be produced.
    pub receipts_dropped: IntCounter,
    /// Dead letters that their topic never takes.
    pub dead_letters_dropped: IntCounter,
    /// Malformed `traceparent` headers.
    pub traces_ignored: IntCounter,
    /// Where a message's time goes.
    pub hops: Hops,
    /// Whether some dispatcher takes work.
    pub dispatchers: IntGauge,
}

/// The code of a message that Redis cannot take.
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
    /// Registers them.
    ///
    /// # Errors
    /// One is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let new = Registrar(registry);
        let codes = RefusalCode::ALL.iter().map(|code| code.as_str());
        let codes: Vec<_> = codes.chain([ACCEPT_FAILED]).collect();
        Ok(Self {
            taken: new.counters(
                "records_taken_total",
                "Records taken from Kafka.",
                "topic",
                &[],
            )?,
            messages: new.counters(
                "messages_total",
                "Messages, one a user.",
                "outcome",
                &OUTCOMES,
            )?,
            refused: new.counters("records_refused_total", "Records refused.", "code", &codes)?,
            handed: new.counter("handed_total", "Messages handed to dispatchers.")?,
            handoff_dropped: new
                .counter("handoff_dropped_total", "Messages left to the retry timer.")?,
            evicted: new.counter("evicted_total", "Entries that left a full mailbox.")?,
            gaps: new.counter("gaps_total", "Shards that had forgotten what they confirmed.")?,
            repairs: new.counter("repairs_total", "Logs read again for that.")?,
            repairing: new.gauge("shards_repairing", "Shards for which a log is read again.")?,
            left_out: new.counter(
                "commit_shards_left_out_total",
                "Shards for which a commit's metadata had no room.",
            )?,
            calls: new.counters(
                "accept_calls_total",
                "Groups of accept calls.",
                "outcome",
                &CALLS,
            )?,
            call_messages: new.histogram("accept_messages", "Messages of a call.", &SIZES)?,
            call_seconds: new.histogram("accept_seconds", "Time of accept calls.", &LATENCY)?,
            in_flight: new.gauges("in_flight_records", "Records not finished.", "topic")?,
            in_flight_bytes: new.gauges("in_flight_bytes", "Their bytes.", "topic")?,
            stalls: new.counters("stalls_total", "Bounds reached.", "limit", &LIMITS)?,
            partitions: new.gauges("partitions", "Partitions assigned.", "topic")?,
            partitions_stuck: new
                .gauge("partitions_stuck", "Partitions that cannot be fetched.")?,
            assignor_missing: new
                .gauge("assignor_missing", "Partitions are not shared by topic.")?,
            topics_missing: new.gauge("topics_missing", "Topics that do not exist.")?,
            produce_held: new.gauge("produce_held", "Receipts and dead letters that wait.")?,
            oldest_seconds: new.gauge("oldest_unfinished_seconds", "Age of the oldest record.")?,
            paused: new.gauge("partitions_paused", "Partitions that wait for room.")?,
            skipped: new.gauge("skipped_records", "Records left in the log for a master.")?,
            shards_away: new.gauge("shards_away", "Shards whose master does not answer.")?,
            lag: new.gauge("lag_records", "Records between the commits and the logs' ends.")?,
            revoked: new.counters(
                "partitions_revoked_total",
                "Partitions taken away.",
                "how",
                &REVOKED,
            )?,
            recreated: new.counter("topics_recreated_total", "Topics found created anew.")?,
            commits: new.counters("commits_total", "Commits.", "outcome", &COMMITS)?,
            receipts_dropped: new.counter("receipts_dropped_total", "Receipts not produced.")?,
            dead_letters_dropped: new
                .counter("dead_letters_dropped_total", "Dead letters not produced.")?,
            traces_ignored: new
                .counter("traceparents_ignored_total", "Malformed traceparent headers.")?,
            hops: Hops::new(registry, &[Hop::ProducedTaken, Hop::TakenAccepted])?,
            dispatchers: new.gauge("dispatchers_available", "Whether a dispatcher takes work.")?,
        })
    }
}

/// Creates metrics and registers them.
struct Registrar<'a>(&'a Registry);

impl Registrar<'_> {
    fn register<T: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: Result<T, prometheus::Error>,
    ) -> Result<T, prometheus::Error> {
        let metric = metric?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.register(IntCounter::new(full(name), help))
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let counters = self.register(IntCounterVec::new(Opts::new(full(name), help), &[label]))?;
        // Every label is exported from the start, as zero.
        values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
        Ok(counters)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.register(IntGauge::new(full(name), help))
    }

    fn gauges(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> Result<IntGaugeVec, prometheus::Error> {
        self.register(IntGaugeVec::new(Opts::new(full(name), help), &[label]))
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, prometheus::Error> {
        let opts = HistogramOpts::new(full(name), help).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts))
    }
}

fn full(name: &str) -> String {
    format!("barid_purger_{name}")
}
