//! Creates and registers metrics.

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, Result,
};

/// Metrics with a common prefix. Each is registered when it is created.
#[derive(Debug)]
pub struct MetricSet<'a> {
    registry: &'a Registry,
    prefix: String,
}

impl<'a> MetricSet<'a> {
    /// Metrics named `<prefix>_…`, such as `barid_access_…`.
    pub fn new(registry: &'a Registry, prefix: impl Into<String>) -> Self {
        Self { registry, prefix: prefix.into() }
    }

    /// A counter; its name ends with `_total`.
    ///
    /// # Errors
    /// The name is registered already, or is invalid.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.register(IntCounter::new(self.full(name), help)?)
    }

    /// Counters with a label. Each of `values` is exported from the start, as zero; other values from their first use.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec> {
        let counters = IntCounterVec::new(Opts::new(self.full(name), help), &[label])?;
        values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
        self.register(counters)
    }

    /// A gauge with integers.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge> {
        self.register(IntGauge::new(self.full(name), help)?)
    }

    /// A gauge with fractions.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn real_gauge(&self, name: &str, help: &str) -> Result<Gauge> {
        self.register(Gauge::new(self.full(name), help)?)
    }

    /// Integer gauges with a label. Each value of the label is exported from its first use.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn gauges(&self, name: &str, help: &str, label: &str) -> Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Opts::new(self.full(name), help), &[label])?)
    }

    /// A histogram; `buckets` are the upper bounds, ascending.
    ///
    /// # Errors
    /// As [`Self::counter`]; or the bounds do not ascend.
    pub fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: impl Into<Vec<f64>>,
    ) -> Result<Histogram> {
        let options = HistogramOpts::new(self.full(name), help).buckets(buckets.into());
        self.register(Histogram::with_opts(options)?)
    }

    /// Histograms with a label. Each of `values` is exported from the start, as empty.
    ///
    /// # Errors
    /// As [`Self::histogram`].
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
        buckets: impl Into<Vec<f64>>,
    ) -> Result<HistogramVec> {
        let options = HistogramOpts::new(self.full(name), help).buckets(buckets.into());
        let histograms = HistogramVec::new(options, &[label])?;
        values.iter().for_each(|value| drop(histograms.with_label_values(&[value])));
        self.register(histograms)
    }

    fn full(&self, name: &str) -> String {
        format!("{}_{name}", self.prefix)
    }

    fn register<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_the_prefix_and_closed_labels_are_there_as_zeros() {
        let registry = Registry::new();
        let set = MetricSet::new(&registry, "barid_role");
        set.counters("calls_total", "Calls.", "outcome", &["done", "failed"]).unwrap();
        set.gauges("partitions", "Partitions.", "topic").unwrap().with_label_values(&["t"]).set(3);
        set.real_gauge("late_seconds", "Lateness.").unwrap().set(0.5);
        set.histogram("seconds", "Time.", [1.0, 2.0]).unwrap().observe(1.5);
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "# HELP barid_role_calls_total Calls.",
            "barid_role_calls_total{outcome=\"done\"} 0",
            "barid_role_calls_total{outcome=\"failed\"} 0",
            "barid_role_partitions{topic=\"t\"} 3",
            "barid_role_late_seconds 0.5",
            "barid_role_seconds_bucket{le=\"1\"} 0",
            "barid_role_seconds_bucket{le=\"2\"} 1",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
        assert!(set.counter("calls_total", "Calls.").is_err(), "it is registered already");
    }
}
