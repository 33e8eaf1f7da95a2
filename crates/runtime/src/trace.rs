//! Trace events: for a record whose `traceparent` is sampled, every role logs an event at each hop, with the target
//! `barid::trace`. Searching all logs for the trace id shows the message's path.

use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_core::TraceParent;
use parking_lot::Mutex;
use prometheus::{IntCounter, Registry};

use crate::metric_set::MetricSet;

/// A trace event.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceEvent<'a> {
    /// `taken`, `refused`, `accepted`, `dispatched`, `written`, `acked`, `resent`.
    pub hop: &'static str,
    /// The record's `traceparent`; only sampled ones are logged.
    pub traceparent: &'a str,
    /// The message's id.
    pub id: &'a str,
    /// Its app.
    pub app: &'a str,
    /// Its user; empty: unknown.
    pub user: &'a str,
    /// The device; empty: none.
    pub device: &'a str,
    /// A detail of the hop in one word: `fast` or `sync`, a refusal's code; may be empty.
    pub how: &'a str,
    /// When the business produced it, ms since the Unix epoch; 0: unknown.
    pub produced_ms: u64,
    /// When the event happened, µs since the Unix epoch.
    pub at_us: u64,
}

/// Logs trace events at a bounded rate; further ones are only counted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    logged: IntCounter,
    dropped: IntCounter,
    per_second: u32,
    /// When the current second began, and how many events were logged in it.
    second: Mutex<(Instant, u32)>,
}

impl Tracer {
    /// Creates a tracer that logs up to `per_second` events.
    ///
    /// # Errors
    /// Its metrics are registered already.
    pub fn new(registry: &Registry, per_second: u32) -> Result<Self, prometheus::Error> {
        let help = "Trace events, by outcome.";
        let metrics = MetricSet::new(registry, "barid");
        let outcomes = ["logged", "dropped"];
        let events = metrics.counters("trace_events_total", help, "outcome", &outcomes)?;
        Ok(Self(Arc::new(Inner {
            logged: events.with_label_values(&["logged"]),
            dropped: events.with_label_values(&["dropped"]),
            per_second,
            second: Mutex::new((Instant::now(), 0)),
        })))
    }

    /// Logs an event if its message is sampled.
    pub fn log(&self, seen: TraceEvent<'_>) {
        let trace = TraceParent::parse(seen.traceparent.as_bytes());
        let Some(trace) = trace.filter(|trace| trace.is_sampled()) else { return };
        if !self.admits() {
            self.0.dropped.inc();
            return;
        }
        self.0.logged.inc();
        let TraceEvent { hop, id, app, user, device, how, produced_ms, at_us, .. } = seen;
        let since_produced_us = if produced_ms == 0 {
            0
        } else {
            (at_us as i64).saturating_sub((produced_ms as i64).saturating_mul(1000))
        };
        tracing::info!(
            target: "barid::trace",
            hop,
            trace_id = trace.trace_id(),
            id,
            app,
            user,
            device,
            how,
            since_produced_us,
        );
    }

    fn admits(&self) -> bool {
        let mut second = self.0.second.lock();
        if second.0.elapsed() >= Duration::from_secs(1) {
            *second = (Instant::now(), 0);
        }
        second.1 = second.1.saturating_add(1);
        second.1 <= self.0.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn only_sampled_ones_count_and_no_more_than_may() {
        let tracer = Tracer::new(&Registry::new(), 2).unwrap();
        let saw = |traceparent: &str| {
            tracer.log(TraceEvent { hop: "taken", traceparent, ..Default::default() });
        };
        saw("");
        saw("junk");
        saw(&SAMPLED.replace("-01", "-00"));
        assert_eq!((tracer.0.logged.get(), tracer.0.dropped.get()), (0, 0));
        // A second that ends in between admits more: so many are not seen within one or two.
        (0..10).for_each(|_| saw(SAMPLED));
        let (logged, dropped) = (tracer.0.logged.get(), tracer.0.dropped.get());
        assert!((2..=4).contains(&logged) && logged + dropped == 10, "{logged} {dropped}");
    }
}
