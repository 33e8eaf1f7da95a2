//! All metrics of the delayer.

use barid_core::limits::RESENDS_MAX;
use barid_mailbox::Unreached;
use barid_mesh::MeshMetrics;
use barid_runtime::MetricSet;
use prometheus::{
    Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, exponential_buckets,
};

/// The delayer's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The links to dispatchers.
    pub mesh: MeshMetrics,
    /// Users whose timer was claimed.
    pub fired: IntCounter,
    /// Devices sent to a dispatcher, by the number of the re-send: `1` to `5`, `last` above.
    pub resends: IntCounterVec,
    /// Devices whose claim was given back, by reason: their node is `down`, `full` or `void` (gone), or no dispatcher
    /// is available (`away`).
    pub deferred: IntCounterVec,
    /// Devices whose claim could not be given back. They are due again after a backoff.
    pub defer_failures: IntCounter,
    /// Failed polls.
    pub poll_failures: IntCounter,
    /// Delay of claimed timers, seconds.
    pub due_lag: Histogram,
    /// Duration of a poll, seconds.
    pub poll_seconds: Histogram,
    /// Time from a claim to the dispatcher's answer, seconds.
    pub claim_to_answer: Histogram,
    /// Users whose claim is unanswered.
    pub claims: IntGauge,
    /// Age of the oldest last poll of all masters, seconds.
    pub poll_age_seconds: IntGauge,
    /// The largest delay of timers in the last polls of all masters, seconds.
    pub late_seconds: Gauge,
}

impl Metrics {
    /// # Errors
    /// One of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let set = MetricSet::new(registry, "barid_delayer");
        let numbers: Vec<_> = (1..=RESENDS_MAX + 1).map(number_label).collect();
        let whys = [Unreached::Down, Unreached::Full, Unreached::Void, Unreached::Away];
        let whys = whys.map(why_label);
        let seconds = exponential_buckets(0.000_2, 2.5, 13)?;
        Ok(Self {
            mesh: MeshMetrics::new(registry, "barid_delayer")?,
            fired: set.counter("fired_total", "Users whose timer was claimed.")?,
            resends: set.counters(
                "resends_total",
                "Devices handed on, by re-send.",
                "number",
                &numbers,
            )?,
            deferred: set.counters(
                "deferred_total",
                "Devices whose claim was given back.",
                "why",
                &whys,
            )?,
            defer_failures: set
                .counter("defer_failures_total", "Devices whose claim could not be given back.")?,
            poll_failures: set.counter("poll_failures_total", "Polls without answer.")?,
            due_lag: set.histogram(
                "due_lag_seconds",
                "How long claimed timers had been due.",
                exponential_buckets(0.01, 2.0, 14)?,
            )?,
            poll_seconds: set.histogram("poll_seconds", "What a poll takes.", seconds.clone())?,
            claim_to_answer: set.histogram(
                "claim_to_answer_seconds",
                "From claim to answer.",
                seconds,
            )?,
            claims: set.gauge("claims", "Users whose claim is being handed on.")?,
            poll_age_seconds: set.gauge(
                "poll_age_seconds",
                "Seconds since the master that was polled longest ago was polled.",
            )?,
            late_seconds: set.real_gauge("late_seconds", "How late the last claims were.")?,
        })
    }

    /// The counter of claims given back for this reason.
    pub(crate) fn deferred_for(&self, why: Unreached) -> IntCounter {
        self.deferred.with_label_values(&[why_label(why)])
    }

    /// The counter of a re-send.
    pub(crate) fn resends_of(&self, number: u32) -> IntCounter {
        self.resends.with_label_values(&[number_label(number)])
    }
}

fn why_label(why: Unreached) -> &'static str {
    match why {
        Unreached::Down => "down",
        Unreached::Full => "full",
        Unreached::Void => "void",
        Unreached::Away => "away",
    }
}

fn number_label(number: u32) -> &'static str {
    match number {
        1 => "1",
        2 => "2",
        3 => "3",
        4 => "4",
        5 => "5",
        _ => "last",
    }
}
