//! Where the time of a message goes: the roles' histograms of hops, over the time between two scrapes.

use std::collections::HashMap;

use serde::Serialize;

/// The family that all roles share.
const FAMILY: &str = "barid_hop_seconds";

/// One hop.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hop {
    /// From which moment to which.
    pub name: String,
    /// Messages that were seen.
    pub count: u64,
    /// Milliseconds.
    pub mean_ms: f64,
    /// Milliseconds, to a bucket's width.
    pub p50_ms: f64,
    /// Milliseconds, to a bucket's width.
    pub p99_ms: f64,
    /// Of the whole way's mean.
    pub share: f64,
}

#[derive(Debug, Clone, Default)]
struct Histogram {
    sum: f64,
    count: f64,
    /// Cumulative counts by upper bound, in order of appearance.
    buckets: Vec<(f64, f64)>,
}

/// The hops of the fast path, in a message's order. What is left of the whole way lies between the
/// node's write and the application.
const WAY: [&str; 4] =
    ["produced_taken", "taken_accepted", "accepted_dispatched", "dispatched_written"];

/// What was observed between two scrapes of all roles, in a message's order. `whole_ms`: what the
/// whole way took on average, as the devices saw it.
pub fn between(before: &str, after: &str, whole_ms: f64) -> Vec<Hop> {
    let (before, after) = (histograms(before), histograms(after));
    let none = Histogram::default();
    let hop = |name: &str| hop(name, before.get(name).unwrap_or(&none), after.get(name)?);
    let mut hops: Vec<Hop> = WAY.iter().filter_map(|name| hop(name)).collect();
    for hop in &mut hops {
        hop.share = hop.mean_ms / whole_ms;
    }
    hops
}

fn hop(name: &str, before: &Histogram, after: &Histogram) -> Option<Hop> {
    let count = after.count - before.count;
    let buckets: Vec<_> = after
        .buckets
        .iter()
        .enumerate()
        .map(|(i, (le, n))| (*le, n - before.buckets.get(i).map_or(0.0, |(_, n)| *n)))
        .collect();
    (count > 0.0).then(|| Hop {
        name: name.to_owned(),
        count: count as u64,
        mean_ms: (after.sum - before.sum) / count * 1000.0,
        p50_ms: quantile(&buckets, count * 0.5) * 1000.0,
        p99_ms: quantile(&buckets, count * 0.99) * 1000.0,
        share: 0.0,
    })
}

/// Where the `rank`th of the observations lies, by interpolation within its bucket.
fn quantile(buckets: &[(f64, f64)], rank: f64) -> f64 {
    let (mut low, mut below) = (0.0, 0.0);
    for (le, n) in buckets {
        if *n >= rank {
            let le = if le.is_finite() { *le } else { low };
            let share = if *n > below { (rank - below) / (n - below) } else { 1.0 };
            return low + (le - low) * share;
        }
        (low, below) = (*le, *n);
    }
    low
}

fn histograms(text: &str) -> HashMap<String, Histogram> {
    let mut all = HashMap::<String, Histogram>::new();
    for line in text.lines() {
        let Some((kind, rest)) = line.strip_prefix(FAMILY).and_then(|rest| rest.split_once('{'))
        else {
            continue;
        };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let label = |name: &str| {
            labels
                .split(',')
                .find_map(|l| l.strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"'))
        };
        let (Some(name), Ok(value)) = (label("hop"), value.parse::<f64>()) else { continue };
        let histogram = all.entry(name.to_owned()).or_default();
        match (kind, label("le").map(|le| le.parse().unwrap_or(f64::INFINITY))) {
            ("_sum", _) => histogram.sum += value,
            ("_count", _) => histogram.count += value,
            ("_bucket", Some(le)) => histogram.buckets.push((le, value)),
            _ => (),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hops_are_what_came_between_two_scrapes() {
        let scrape = |a: u32, b: u32, sum: f64| {
            format!(
                "# TYPE barid_hop_seconds histogram\n\
                 barid_hop_seconds_bucket{{hop=\"taken_accepted\",le=\"0.001\"}} {a}\n\
                 barid_hop_seconds_bucket{{hop=\"taken_accepted\",le=\"0.002\"}} {b}\n\
                 barid_hop_seconds_bucket{{hop=\"taken_accepted\",le=\"+Inf\"}} {b}\n\
                 barid_hop_seconds_sum{{hop=\"taken_accepted\"}} {sum}\n\
                 barid_hop_seconds_count{{hop=\"taken_accepted\"}} {b}\n"
            )
        };
        let hops = between(&scrape(5, 5, 1.0), &scrape(5, 15, 1.015), 3.0);
        let [hop] = &hops[..] else { panic!("{hops:?}") };
        assert_eq!((hop.name.as_str(), hop.count), ("taken_accepted", 10));
        let is = |value: f64, expected: f64| (value - expected).abs() < 1e-6;
        assert!(is(hop.mean_ms, 1.5) && is(hop.p50_ms, 1.5) && is(hop.share, 0.5), "{hop:?}");
        assert!(between(&scrape(5, 5, 1.0), &scrape(5, 5, 1.0), 1.0).is_empty());
    }
}
