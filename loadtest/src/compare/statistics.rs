//! Whether values of two sides differ by more than noise.
//!
//! A moderated t-test (Smyth 2004, "Linear models and empirical Bayes methods"): the variance combines the
//! spread of the runs with the known noise band of the measure, which counts like some further runs. One
//! run per side is judged by the band alone, many runs by their own spread. Values are compared as
//! logarithms, because noise of times and rates is a factor.

use statrs::distribution::{ContinuousCDF as _, StudentsT};
use statrs::statistics::Statistics as _;

/// Degrees of freedom of the known band.
const BAND_FREEDOM: f64 = 4.0;
/// 99 in 100 normal values are within this many standard deviations.
const BAND_DEVIATIONS: f64 = 2.576;

/// A change from one side to the other, relative: 0.1 is 10 % more.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Of the geometric means.
    pub change: f64,
    /// Changes by a factor of up to `1 + margin`, either way, are noise.
    pub margin: f64,
}

impl Change {
    /// Whether it is more than noise.
    pub fn is_significant(self) -> bool {
        (1.0 + self.change).ln().abs() > (1.0 + self.margin).ln()
    }
}

/// The change from `before` to `after`. `band`: 99 in 100 pairs of runs of the same thing differ by a factor
/// of up to `1 + band`. `confidence`: the probability (0 to 1) that noise is within the margin. `None` if a
/// side is empty or has a value that is not above zero, and so has no logarithm.
pub fn change(before: &[f64], after: &[f64], band: f64, confidence: f64) -> Option<Change> {
    let logarithms = |values: &[f64]| {
        let logarithm = |value: &f64| (*value > 0.0 && value.is_finite()).then(|| value.ln());
        values.iter().map(logarithm).collect::<Option<Vec<f64>>>().filter(|all| !all.is_empty())
    };
    let (before, after) = (logarithms(before)?, logarithms(after)?);
    let difference = after.as_slice().mean() - before.as_slice().mean();
    let band_variance = ((1.0 + band).ln() / BAND_DEVIATIONS).powi(2) / 2.0;
    let freedom = BAND_FREEDOM + (before.len() + after.len() - 2) as f64;
    let variance = (BAND_FREEDOM * band_variance + squares(&before) + squares(&after)) / freedom;
    let of_means = variance * (1.0 / before.len() as f64 + 1.0 / after.len() as f64);
    let margin = t_quantile(confidence, freedom)? * of_means.sqrt();
    Some(Change { change: difference.exp() - 1.0, margin: margin.exp() - 1.0 })
}

/// The sum of squared distances to the mean.
fn squares(values: &[f64]) -> f64 {
    values.population_variance() * values.len() as f64
}

/// A value of Student's distribution is within this distance of zero with probability `confidence`.
fn t_quantile(confidence: f64, freedom: f64) -> Option<f64> {
    Some(StudentsT::new(0.0, 1.0, freedom).ok()?.inverse_cdf((1.0 + confidence) / 2.0))
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (confidence, freedom, wanted) in
            [(0.95, 4.0, 2.776), (0.99, 4.0, 4.604), (0.99, 10.0, 3.169), (0.95, 120.0, 1.980)]
        {
            let t = t_quantile(confidence, freedom).unwrap();
            assert!((t - wanted).abs() < 0.002, "{confidence} {freedom}: {t}");
        }
    }

    #[test]
    fn single_runs_are_judged_by_the_band() {
        let of = |before, after| change(&[before], &[after], 0.1, 0.99).unwrap();
        // Wider than the band, which is only an estimate: 1.1^(4.604 / 2.576).
        assert!((of(100.0, 105.0).margin - 0.1857).abs() < 1e-3, "{:?}", of(100.0, 105.0));
        assert!(!of(100.0, 118.0).is_significant() && of(100.0, 119.0).is_significant());
        assert!(!of(118.0, 100.0).is_significant() && of(119.0, 100.0).is_significant());
        assert!((of(100.0, 120.0).change - 0.2).abs() < 1e-9);
        assert_eq!(change(&[], &[1.0], 0.1, 0.99), None);
        assert_eq!(change(&[1.0], &[0.0], 0.1, 0.99), None);
    }

    #[test]
    fn more_runs_see_smaller_changes_and_wild_runs_see_less() {
        let still = |at: f64| [at, at * 1.001, at * 0.999, at * 1.002, at * 0.998];
        let calm = change(&still(100.0), &still(106.0), 0.1, 0.99).unwrap();
        assert!(calm.is_significant() && calm.margin < 0.06, "{calm:?}");
        let wild = |at: f64| [at, at * 1.5, at * 0.7, at * 1.2, at * 0.8];
        let noisy = change(&wild(100.0), &wild(115.0), 0.1, 0.99).unwrap();
        assert!(!noisy.is_significant() && noisy.margin > 0.2, "{noisy:?}");
    }

    /// A standard normal value (Box-Muller).
    fn normal(random: &mut StdRng) -> f64 {
        let (a, b): (f64, f64) = (random.random(), random.random());
        (-2.0 * (1.0 - a).ln()).sqrt() * (2.0 * PI * b).cos()
    }

    /// The share of 1,000 pairs of sides that differ significantly, with `runs` per side, noise of the size
    /// of the band, and a planted change.
    fn found(runs: usize, planted: f64) -> f64 {
        let (mut random, band, confidence) = (StdRng::seed_from_u64(7), 0.1, 0.99);
        // Two single runs differ by more than the band in 1 % of cases.
        let sigma = 1.1_f64.ln() / BAND_DEVIATIONS / 2.0_f64.sqrt();
        let mut side = |at: f64| -> Vec<f64> {
            (0..runs).map(|_| at * (sigma * normal(&mut random)).exp()).collect()
        };
        let differ = (0..1_000).filter(|_| {
            let (before, after) = (side(100.0), side(100.0 * (1.0 + planted)));
            change(&before, &after, band, confidence).unwrap().is_significant()
        });
        differ.count() as f64 / 1_000.0
    }

    #[test]
    fn noise_is_rarely_taken_for_a_change_and_planted_ones_are_found() {
        for runs in [1, 2, 3, 5] {
            let false_alarms = found(runs, 0.0);
            assert!(false_alarms < 0.015, "{runs}: {false_alarms}");
        }
        for (runs, planted) in [(1, 0.35), (3, 0.20), (5, 0.15)] {
            assert!(found(runs, planted) > 0.95, "{runs}: {}", found(runs, planted));
        }
        assert!(found(5, 0.10) > found(1, 0.10) + 0.3);
    }
}
