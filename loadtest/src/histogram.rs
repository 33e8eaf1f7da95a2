//! HDR histograms of microseconds that processes exchange and add up.

use hdrhistogram::Histogram;

use crate::rpc;

/// An hour; longer times count as an hour.
const MAX_US: u64 = 3_600_000_000;

/// An empty histogram with three significant digits.
pub fn new() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_US, 3).expect("the bounds are valid constants")
}

pub fn to_wire(histogram: &Histogram<u64>) -> rpc::Histogram {
    let recorded = histogram.iter_recorded();
    let (values, counts) = recorded.map(|at| (at.value_iterated_to(), at.count_at_value())).unzip();
    rpc::Histogram { values, counts }
}

/// Adds another process's histogram.
pub fn add(sum: &mut Histogram<u64>, other: &rpc::Histogram) {
    for (value, count) in other.values.iter().zip(&other.counts) {
        sum.saturating_record_n(*value, *count);
    }
}

/// The value, in ms, at or below which a share (0 to 1) of all values lies.
pub fn quantile_ms(histogram: &Histogram<u64>, share: f64) -> f64 {
    histogram.value_at_quantile(share) as f64 / 1000.0
}

/// The mean in ms; 0 for an empty histogram.
pub fn mean_ms(histogram: &Histogram<u64>) -> f64 {
    histogram.mean() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_agents_recorded_is_one_histogram() {
        let (mut a, mut b, mut whole) = (new(), new(), new());
        for us in 1..=20_000_u64 {
            if us % 2 == 0 { &mut a } else { &mut b }.record(us).unwrap();
            whole.record(us).unwrap();
        }
        let mut sum = new();
        add(&mut sum, &to_wire(&a));
        add(&mut sum, &to_wire(&b));
        assert_eq!(sum.len(), 20_000);
        for share in [0.5, 0.99, 1.0] {
            let (sum, whole) = (quantile_ms(&sum, share), quantile_ms(&whole, share));
            assert!((sum / whole - 1.0).abs() < 0.002, "{share}: {sum} {whole}");
        }
    }
}
