//! Everything that a delayer counts.

use barid_core::limits::RESENDS_MAX;
use barid_mailbox::Unreached;
use barid_mesh::MeshMetrics;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    exponential_buckets,
};

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The streams to dispatchers.
    pub mesh: MeshMetrics,
    /// Users whose timer was claimed.
    pub fired: IntCounter,
    /// Devices handed to a dispatcher, by which re-send it is: `1` to `5`, `last` above.
    pub resends: IntCounterVec,
    /// Devices whose claim was given back, by why: their node is `down`, `full` or `void` (gone), or
    /// nobody could be asked (`away`).
    pub deferred: IntCounterVec,
    /// Devices whose claim could not even be given back: they are due again a backoff later.
    pub defer_failures: IntCounter,
    /// Polls that a master did not answer.
    pub poll_failures: IntCounter,
    /// How long claimed timers had been due, seconds.
    pub due_lag: Histogram,
    /// What a poll takes, seconds.
    pub poll_seconds: Histogram,
    /// From the claim to the dispatcher's answer, seconds.
    pub claim_to_answer: Histogram,
    /// Users whose claim is being handed on.
    pub claims: IntGauge,
    /// Seconds since the master that was polled longest ago was polled.
    pub poll_age_seconds: IntGauge,
    /// How late the users that each master's last poll claimed were, at most, seconds.
    pub late_seconds: Gauge,
}

impl Metrics {
    /// # Errors
    /// One of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let name = |name: &str| format!("barid_delayer_{name}");
        let seconds = |of: &str, help: &str| {
            let opts = HistogramOpts::new(name(of), help);
            Histogram::with_opts(opts.buckets(exponential_buckets(0.000_2, 2.5, 13)?))
        };
        let metrics = Self {
            mesh: MeshMetrics::new(registry, "barid_delayer")?,
            fired: IntCounter::new(name("fired_total"), "Users whose timer was claimed.")?,
            resends: IntCounterVec::new(
                Opts::new(name("resends_total"), "Devices handed on, by re-send."),
                &["attempt"],
            )?,
            deferred: IntCounterVec::new(
                Opts::new(name("deferred_total"), "Devices whose claim was given back."),
                &["why"],
            )?,
            defer_failures: IntCounter::new(
                name("defer_failures_total"),
                "Devices whose claim could not be given back.",
            )?,
            poll_failures: IntCounter::new(name("poll_failures_total"), "Polls without answer.")?,
            due_lag: Histogram::with_opts(
                HistogramOpts::new(
                    name("due_lag_seconds"),
                    "How long claimed timers had been due.",
                )
                .buckets(exponential_buckets(0.01, 2.0, 14)?),
            )?,
            poll_seconds: seconds("poll_seconds", "What a poll takes.")?,
            claim_to_answer: seconds("claim_to_answer_seconds", "From claim to answer.")?,
            claims: IntGauge::new(name("claims"), "Users whose claim is being handed on.")?,
            poll_age_seconds: IntGauge::new(
                name("poll_age_seconds"),
                "Seconds since the master that was polled longest ago was polled.",
            )?,
            late_seconds: Gauge::new(name("late_seconds"), "How late the last claims were.")?,
        };
        // All of them are there from the start, as zeros.
        (1..=RESENDS_MAX + 1).for_each(|attempt| drop(metrics.resends_of(attempt)));
        let whys = [Unreached::Down, Unreached::Full, Unreached::Void, Unreached::Away];
        whys.iter().for_each(|why| drop(metrics.deferred_for(*why)));
        registry.register(Box::new(metrics.fired.clone()))?;
        registry.register(Box::new(metrics.resends.clone()))?;
        registry.register(Box::new(metrics.deferred.clone()))?;
        registry.register(Box::new(metrics.defer_failures.clone()))?;
        registry.register(Box::new(metrics.poll_failures.clone()))?;
        registry.register(Box::new(metrics.due_lag.clone()))?;
        registry.register(Box::new(metrics.poll_seconds.clone()))?;
        registry.register(Box::new(metrics.claim_to_answer.clone()))?;
        registry.register(Box::new(metrics.claims.clone()))?;
        registry.register(Box::new(metrics.poll_age_seconds.clone()))?;
        registry.register(Box::new(metrics.late_seconds.clone()))?;
        Ok(metrics)
    }

    /// The counter of claims given back for this reason.
    pub(crate) fn deferred_for(&self, why: Unreached) -> IntCounter {
        let label = match why {
            Unreached::Down => "down",
            Unreached::Full => "full",
            Unreached::Void => "void",
            Unreached::Away => "away",
        };
        self.deferred.with_label_values(&[label])
    }

    /// The counter of a re-send.
    pub(crate) fn resends_of(&self, attempt: u32) -> IntCounter {
        let label = match attempt {
            1 => "1",
            2 => "2",
            3 => "3",
            4 => "4",
            5 => "5",
            _ => "last",
        };
        self.resends.with_label_values(&[label])
    }
}
