//! The metrics of links and of the pool.

use barid_runtime::MetricSet;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, Registry, exponential_buckets};

const PUSHES: [&str; 5] = ["answered", "moved", "full", "unavailable", "lost"];
const RESENDS: [&str; 2] = ["answered", "unavailable"];

/// The metrics of all links of one kind.
#[derive(Debug, Clone)]
pub struct LinkMetrics {
    /// Links whose stream is open.
    pub up: IntGauge,
    /// Items that are queued or unanswered.
    pub pending: IntGauge,
    /// Batches sent.
    pub batches: IntCounter,
    /// Items sent.
    pub items: IntCounter,
    /// Time from sending a batch to its answer, seconds.
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
        let set = MetricSet::new(registry, prefix);
        let buckets = exponential_buckets(0.000_1, 2.5, 13)?;
        Ok(Self {
            up: set.gauge("up", "Streams that are open.")?,
            pending: set.gauge("pending_items", "Items queued or unanswered.")?,
            batches: set.counter("batches_total", "Batches sent.")?,
            items: set.counter("items_total", "Items sent.")?,
            reply_seconds: set.histogram(
                "reply_seconds",
                "From a batch to its answer.",
                buckets,
            )?,
            breaks: set.counter("breaks_total", "Streams that broke or could not be opened.")?,
        })
    }
}

/// The metrics of a pool.
#[derive(Debug, Clone)]
pub struct MeshMetrics {
    /// The links to dispatchers.
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
        let set = MetricSet::new(registry, format!("{prefix}_mesh"));
        let counters = |name, help, outcomes| set.counters(name, help, "outcome", outcomes);
        Ok(Self {
            link: LinkMetrics::new(registry, &format!("{prefix}_mesh_links"))?,
            pushes: counters("pushes_total", "Pushes, by outcome.", &PUSHES)?,
            resends: counters("resends_total", "Re-sends, by outcome.", &RESENDS)?,
        })
    }
}
