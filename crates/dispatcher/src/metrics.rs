//! All metrics of the dispatcher.

use barid_mesh::LinkMetrics;
use barid_runtime::{Hop, Hops, MetricSet};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};

const PUSHES: [&str; 7] = ["handed", "no_route", "void", "full", "down", "away", "invalid"];
const RESENDS: [&str; 7] = ["handed", "superseded", "void", "full", "down", "away", "invalid"];
const FANOUTS: [&str; 5] = ["handed", "void", "full", "down", "invalid"];
const REAPED: [&str; 4] = ["removed", "failed", "unknown", "dropped"];

/// The dispatcher's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The links to access nodes.
    pub nodes: LinkMetrics,
    /// Pushes by outcome, counted per node with a route: `handed`, or the reason for dropping it: `no_route`, `void`,
    /// `full`, `down`, `away`, `invalid`.
    pub pushes: IntCounterVec,
    /// Re-sends by outcome: `handed`, `superseded` (the session has ended), `invalid`, or the reason that is reported
    /// to the delayer: `void`, `full`, `down`, `away`.
    pub resends: IntCounterVec,
    /// Messages for audiences by outcome, counted per node that had members when the message was accepted: `handed`, or
    /// the reason for dropping it: `void` (the node has no lease), `full`, `down`, `invalid`.
    pub fanouts: IntCounterVec,
    /// Items that were lost with a broken stream to a node.
    pub lost: IntCounter,
    /// Batches received.
    pub batches: IntCounter,
    /// Open streams from purgers and delayers.
    pub callers: IntGauge,
    /// Lookups that L1 answered.
    pub l1_hits: IntCounter,
    /// Lookups that went to Redis.
    pub l1_misses: IntCounter,
    /// Invalidations, by Redis or by a node's answer.
    pub l1_invalidations: IntCounter,
    /// Loads that an invalidation overtook. Their values are not cached.
    pub l1_discarded: IntCounter,
    /// Users that were evicted from L1, or not cached, because of its bound.
    pub l1_evicted: IntCounter,
    /// Users in L1.
    pub l1_entries: IntGauge,
    /// 1 while Redis reports changes of routes.
    pub tracking: IntGauge,
    /// Loads that failed or took too long.
    pub load_failures: IntCounter,
    /// Void routes by outcome: `removed`, `failed`, `unknown`, `dropped` (the queue was full).
    pub reaped: IntCounterVec,
    /// Latencies of the hops.
    pub hops: Hops,
}

impl Metrics {
    /// # Errors
    /// One of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let set = MetricSet::new(registry, "barid_dispatcher");
        Ok(Self {
            nodes: LinkMetrics::new(registry, "barid_dispatcher_node_links")?,
            pushes: set.counters("pushes_total", "Pushes, by outcome.", "outcome", &PUSHES)?,
            resends: set.counters("resends_total", "Re-sends, by outcome.", "outcome", &RESENDS)?,
            fanouts: set.counters(
                "fanouts_total",
                "Messages for audiences, by node and outcome.",
                "outcome",
                &FANOUTS,
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
            reaped: set.counters("reaped_total", "Void routes, by outcome.", "outcome", &REAPED)?,
            hops: Hops::new(registry, &[Hop::AcceptedDispatched])?,
        })
    }
}
