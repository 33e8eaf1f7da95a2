//! Everything that links and the pool count.

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    exponential_buckets,
};

const PUSHES: [&str; 5] = ["answered", "moved", "full", "unavailable", "lost"];
const RESENDS: [&str; 2] = ["answered", "unavailable"];

/// Counted over all links of one kind.
#[derive(Debug, Clone)]
pub struct LinkMetrics {
    /// Links whose stream is open.
    pub up: IntGauge,
    /// Items between their queue and their answer.
    pub pending: IntGauge,
    /// Batches sent.
    pub batches: IntCounter,
    /// Items sent.
    pub items: IntCounter,
    /// From sending a batch to its answer, seconds.
    pub reply_seconds: Histogram,
    /// Streams that broke or could not be opened.
    pub breaks: IntCounter,
}

impl LinkMetrics {
    /// Registers `<prefix>_up`, `<prefix>_pending_items` and so on.
    ///
    /// # Errors
    /// One of the names is registered already.
    pub fn new(registry: &Registry, prefix: &str) -> Result<Self, prometheus::Error> {
        let name = |suffix: &str| format!("{prefix}_{suffix}");
        let buckets = exponential_buckets(0.000_1, 2.5, 13)?;
        let reply = HistogramOpts::new(name("reply_seconds"), "From a batch to its answer.");
        let metrics = Self {
            up: IntGauge::new(name("up"), "Streams that are open.")?,
            pending: IntGauge::new(name("pending_items"), "Items queued or unanswered.")?,
            batches: IntCounter::new(name("batches_total"), "Batches sent.")?,
            items: IntCounter::new(name("items_total"), "Items sent.")?,
            reply_seconds: Histogram::with_opts(reply.buckets(buckets))?,
            breaks: IntCounter::new(
                name("breaks_total"),
                "Streams that broke or could not be opened.",
            )?,
        };
        registry.register(Box::new(metrics.up.clone()))?;
        registry.register(Box::new(metrics.pending.clone()))?;
        registry.register(Box::new(metrics.batches.clone()))?;
        registry.register(Box::new(metrics.items.clone()))?;
        registry.register(Box::new(metrics.reply_seconds.clone()))?;
        registry.register(Box::new(metrics.breaks.clone()))?;
        Ok(metrics)
    }
}

/// What a pool counts.
#[derive(Debug, Clone)]
pub struct MeshMetrics {
    /// The streams to dispatchers.
    pub link: LinkMetrics,
    /// Pushes by outcome: `answered`, `moved` (handed to the next dispatcher after a break),
    /// `full`, `unavailable`, `lost` (dropped after a second break).
    pub pushes: IntCounterVec,
    /// Re-sends by outcome: `answered`, `unavailable`.
    pub resends: IntCounterVec,
}

impl MeshMetrics {
    /// Registers everything under `<prefix>_mesh_…`; `prefix` is the role's, `barid_purger`.
    ///
    /// # Errors
    /// One of the names is registered already.
    pub fn new(registry: &Registry, prefix: &str) -> Result<Self, prometheus::Error> {
        let counter = |what: &str, help: &str, outcomes: &[&str]| {
            let opts = Opts::new(format!("{prefix}_mesh_{what}_total"), help);
            let counter = IntCounterVec::new(opts, &["outcome"])?;
            // All of them are there from the start, as zeros.
            outcomes.iter().for_each(|outcome| drop(counter.with_label_values(&[outcome])));
            Ok::<_, prometheus::Error>(counter)
        };
        let metrics = Self {
            link: LinkMetrics::new(registry, &format!("{prefix}_mesh_links"))?,
            pushes: counter("pushes", "Pushes by what became of them.", &PUSHES)?,
            resends: counter("resends", "Re-sends by what became of them.", &RESENDS)?,
        };
        registry.register(Box::new(metrics.pushes.clone()))?;
        registry.register(Box::new(metrics.resends.clone()))?;
        Ok(metrics)
    }
}
