//! Latency histograms that are cheap enough to record every message: an increment and an addition.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Opts, Registry};

/// Upper bounds of the buckets, µs: 50 µs to 100 s. Up to 100 ms, neighbours differ by at most 15 %, which bounds the
/// error of a quantile; above, by at most half.
pub const BOUNDS_US: [u64; 79] = bounds();

const fn bounds() -> [u64; 79] {
    const BELOW: [u64; 6] = [50, 57, 65, 74, 84, 94];
    const FINE: [u64; 18] =
        [100, 115, 130, 149, 170, 195, 220, 250, 285, 325, 370, 420, 480, 550, 630, 720, 820, 940];
    const COARSE: [u64; 6] = [100, 150, 220, 330, 500, 750];
    let mut bounds = [0; 79];
    let (mut at, mut decade, mut scale) = (0, 0, 1);
    while at < BELOW.len() {
        bounds[at] = BELOW[at];
        at += 1;
    }
    while decade < 6 {
        let mut i = 0;
        while i < if decade < 3 { FINE.len() } else { COARSE.len() } {
            bounds[at] = scale * if decade < 3 { FINE[i] } else { COARSE[i] };
            at += 1;
            i += 1;
        }
        decade += 1;
        scale *= 10;
    }
    bounds[at] = 100 * scale;
    bounds
}

/// A histogram. Cheap to clone; clones share the counts.
#[derive(Debug, Clone)]
pub struct Latency(Arc<Cells>);

#[derive(Debug)]
struct Cells {
    /// The last one counts values above all bounds.
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Latency {
    fn new() -> Self {
        let buckets = std::array::from_fn(|_| AtomicU64::new(0));
        Self(Arc::new(Cells { buckets, sum_us: AtomicU64::new(0) }))
    }

    /// Records a time, µs.
    pub fn observe_us(&self, us: u64) {
        let at = BOUNDS_US.partition_point(|bound| *bound < us);
        self.0.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.0.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Number of recorded times.
    pub fn count(&self) -> u64 {
        self.0.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    fn show(&self) -> Histogram {
        let mut count = 0;
        let mut buckets = Vec::with_capacity(BOUNDS_US.len());
        for (bound, cell) in BOUNDS_US.iter().zip(&self.0.buckets) {
            count += cell.load(Ordering::Relaxed);
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound as f64 / 1e6);
            bucket.set_cumulative_count(count);
            buckets.push(bucket);
        }
        count += self.0.buckets[BOUNDS_US.len()].load(Ordering::Relaxed);
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(count);
        histogram.set_sample_sum(self.0.sum_us.load(Ordering::Relaxed) as f64 / 1e6);
        histogram
    }
}

/// Histograms of one name, distinguished by a label.
#[derive(Debug)]
struct Family {
    name: String,
    help: String,
    label: String,
    members: Vec<(&'static str, Latency)>,
    desc: Desc,
}

/// Registers `name` (in seconds), with a histogram for each value of `label`. All are exported from the start.
///
/// # Errors
/// The name is registered already, or is invalid.
pub fn register_latencies(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
    values: &[&'static str],
) -> Result<Vec<Latency>, prometheus::Error> {
    use prometheus::core::Describer as _;
    let desc = Opts::new(name, help).variable_label(label).describe()?;
    let members: Vec<_> = values.iter().map(|value| (*value, Latency::new())).collect();
    let latencies = members.iter().map(|(_, latency)| latency.clone()).collect();
    let (name, help, label) = (name.to_owned(), help.to_owned(), label.to_owned());
    registry.register(Box::new(Family { name, help, label, members, desc }))?;
    Ok(latencies)
}

impl Collector for Family {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let shown = self.members.iter().map(|(value, latency)| {
            let mut pair = LabelPair::default();
            pair.set_name(self.label.clone());
            pair.set_value((*value).to_owned());
            let mut metric = Metric::from_label(vec![pair]);
            metric.set_histogram(latency.show());
            metric
        });
        let mut family = MetricFamily::default();
        family.set_name(self.name.clone());
        family.set_help(self.help.clone());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(shown.collect());
        vec![family]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_bounds_up_to_100_ms_differ_by_15_percent_at_most() {
        assert_eq!((BOUNDS_US[0], BOUNDS_US[78]), (50, 100_000_000));
        for pair in BOUNDS_US.windows(2) {
            let ratio = pair[1] as f64 / pair[0] as f64;
            assert!(ratio > 1.0, "{pair:?}");
            assert!(ratio <= if pair[1] <= 100_000 { 1.155 } else { 1.53 }, "{pair:?} {ratio}");
        }
    }

    #[test]
    fn is_shown_as_prometheus_shows_histograms() {
        let registry = Registry::new();
        let made = register_latencies(&registry, "t_seconds", "Time.", "of", &["a", "b"]).unwrap();
        for us in [50, 51, 300, 6_000, 200_000_000] {
            made[1].observe_us(us);
        }
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "# TYPE t_seconds histogram",
            "t_seconds_count{of=\"a\"} 0",
            "t_seconds_bucket{of=\"b\",le=\"0.00005\"} 1",
            "t_seconds_bucket{of=\"b\",le=\"0.000057\"} 2",
            "t_seconds_bucket{of=\"b\",le=\"0.000285\"} 2",
            "t_seconds_bucket{of=\"b\",le=\"0.000325\"} 3",
            "t_seconds_bucket{of=\"b\",le=\"100\"} 4",
            "t_seconds_bucket{of=\"b\",le=\"+Inf\"} 5",
            "t_seconds_count{of=\"b\"} 5",
            "t_seconds_sum{of=\"b\"} 200.006401",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
    }
}
