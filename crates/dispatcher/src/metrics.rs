//! Everything that a dispatcher counts.

use barid_mesh::LinkMetrics;
use barid_runtime::{Hop, Hops, MetricSet};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};

const PUSHES: [&str; 7] = ["handed", "no_route", "void", "full", "down", "away", "invalid"];
const RESENDS: [&str; 7] = ["handed", "superseded", "void", "full", "down", "away", "invalid"];
const REAPED: [&str; 4] = ["removed", "failed", "unknown", "dropped"];

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The streams to access nodes.
    pub nodes: LinkMetrics,
    /// Pushes by outcome, one for each node that has a route: `handed`, or why not: `no_route`,
    /// `void`, `full`, `down`, `away`, `invalid`.
    pub pushes: IntCounterVec,
    /// Re-sends by outcome: `handed`, `superseded` (that session is over), or what the delayer is
    /// told as unreachable: `void`, `full`, `down`, `away`; `invalid`.
    pub resends: IntCounterVec,
    /// Items that a stream to a node took along when it broke.
    pub lost: IntCounter,
    /// Batches received.
    pub batches: IntCounter,
    /// Streams from purgers and delayers that are open.
    pub callers: IntGauge,
    /// Lookups that L1 answered.
    pub l1_hits: IntCounter,
    /// Lookups that went to Redis.
    pub l1_misses: IntCounter,
    /// Invalidations that Redis or a node's answer brought.
    pub l1_invalidations: IntCounter,
    /// Loads that an invalidation overtook: their values were not kept.
    pub l1_discarded: IntCounter,
    /// Users that left L1, or found no room, because of its bound of bytes.
    pub l1_evicted: IntCounter,
    /// Users in L1.
    pub l1_entries: IntGauge,
    /// 1 while Redis reports changes.
    pub tracking: IntGauge,
    /// Loads that failed or took too long.
    pub load_failures: IntCounter,
    /// Void routes by outcome: `removed`, `failed`, `unknown`, `dropped` (too many at once).
    pub reaped: IntCounterVec,
    /// Where a message's time goes.
    pub hops: Hops,
}

impl Metrics {
    /// # Errors
    /// One of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let set = MetricSet::new(registry, "barid_dispatcher");
        Ok(Self {
            nodes: LinkMetrics::new(registry, "barid_dispatcher_node_links")?,
            pushes: set.counters(
                "pushes_total",
                "Pushes by what became of them.",
                "outcome",
                &PUSHES,
            )?,
            resends: set.counters(
                "resends_total",
                "Re-sends by what became of them.",
                "outcome",
                &RESENDS,
            )?,
            lost: set.counter("lost_items_total", "Items on streams that broke.")?,
            batches: set.counter("batches_total", "Batches received.")?,
            callers: set.gauge("callers", "Open streams from purgers and delayers.")?,
            l1_hits: set.counter("l1_hits_total", "Lookups that L1 answered.")?,
            l1_misses: set.counter("l1_misses_total", "Lookups that went to Redis.")?,
            l1_invalidations: set.counter("l1_invalidations_total", "Invalidations handled.")?,
            l1_discarded: set.counter("l1_discarded_total", "Loads that were overtaken.")?,
            l1_evicted: set.counter("l1_evicted_total", "Users for whom L1 has no room.")?,
            l1_entries: set.gauge("l1_entries", "Users in L1.")?,
            tracking: set.gauge("tracking", "1 while Redis reports changes of routes.")?,
            load_failures: set.counter("load_failures_total", "Loads of routes that failed.")?,
            reaped: set.counters(
                "reaped_total",
                "Void routes by what became of them.",
                "outcome",
                &REAPED,
            )?,
            hops: Hops::new(registry, &[Hop::AcceptedDispatched])?,
        })
    }
}
