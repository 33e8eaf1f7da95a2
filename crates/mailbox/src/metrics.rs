//! `barid_mailbox_*`.

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    exponential_buckets,
};

use crate::{Error, scripts};

/// Every metric of this crate.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub seconds: HistogramVec,
    pub batch_items: HistogramVec,
    pub errors: IntCounterVec,
    pub connections: IntCounter,
    pub evicted: IntCounter,
    pub gaps: IntCounter,
    pub lease_events: IntCounterVec,
}

impl Metrics {
    /// Creates the metrics. They are registered later, so that opening a mailbox can be retried.
    ///
    /// # Errors
    /// Returns an error if a name or a bucket is invalid.
    pub fn new() -> Result<Self, Error> {
        Self::create().map_err(|e| Error::Unusable(e.to_string()))
    }

    /// # Errors
    /// Returns an error if the registry already has these metrics.
    pub fn register(&self, registry: &Registry) -> Result<(), Error> {
        let all: [Box<dyn Collector>; 7] = [
            Box::new(self.seconds.clone()),
            Box::new(self.batch_items.clone()),
            Box::new(self.errors.clone()),
            Box::new(self.connections.clone()),
            Box::new(self.evicted.clone()),
            Box::new(self.gaps.clone()),
            Box::new(self.lease_events.clone()),
        ];
        let mut registered = all.into_iter().map(|metric| registry.register(metric));
        registered.try_for_each(|one| one.map_err(|e| Error::Unusable(e.to_string())))
    }

    fn create() -> prometheus::Result<Self> {
        let seconds = HistogramVec::new(
            HistogramOpts::new(
                "barid_mailbox_call_seconds",
                "Duration of script calls, by script.",
            )
            .buckets(exponential_buckets(0.000_1, 2.5, 12)?),
            &["script"],
        )?;
        let batch_items = HistogramVec::new(
            HistogramOpts::new("barid_mailbox_batch_items", "Items in a script call, by script.")
                .buckets(exponential_buckets(1.0, 2.0, 9)?),
            &["script"],
        )?;
        let errors = IntCounterVec::new(
            Opts::new("barid_mailbox_errors_total", "Failed items, by script and kind."),
            &["script", "kind"],
        )?;
        let lease_events = IntCounterVec::new(
            Opts::new("barid_mailbox_lease_events_total", "Events of this node's lease, by event."),
            &["event"],
        )?;
        for event in ["taken", "lapsed", "was_gone", "forgot", "uncertain"] {
            drop(lease_events.with_label_values(&[event]));
        }
        let counter = |name: &str, help: &str| IntCounter::new(name, help);
        // All label values exist from the start, as zeros.
        for script in scripts::TIMED.map(|script| script.name) {
            drop((seconds.with_label_values(&[script]), batch_items.with_label_values(&[script])));
            Error::KINDS.iter().for_each(|kind| drop(errors.with_label_values(&[script, kind])));
        }
        Ok(Self {
            seconds,
            batch_items,
            errors,
            connections: counter("barid_mailbox_connections_total", "Connections made to Redis.")?,
            evicted: counter(
                "barid_mailbox_evicted_total",
                "Entries evicted before every device had acknowledged them.",
            )?,
            gaps: counter(
                "barid_mailbox_gaps_total",
                "Accept groups refused because an earlier one is missing.",
            )?,
            lease_events,
        })
    }

    /// Counts a call's items; returns the histogram of its duration.
    pub fn timer(&self, script: &str, items: usize) -> Histogram {
        self.batch_items.with_label_values(&[script]).observe(items as f64);
        self.seconds.with_label_values(&[script])
    }

    /// Counts one failed item.
    pub fn failed(&self, script: &str, error: &Error) {
        self.errors.with_label_values(&[script, error.kind()]).inc();
    }
}
