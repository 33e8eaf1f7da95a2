//! Where the time of a message goes: the roles' histograms of hops, over the time between two scrapes.

use barid_runtime::exposition::{Histogram, Metrics};
use barid_runtime::{Hop, Hops};

use crate::table::Table;

/// One hop over some time.
#[derive(Debug)]
struct Passed {
    /// From which moment to which.
    name: String,
    /// Messages that were seen.
    count: u64,
    /// Milliseconds.
    mean_ms: f64,
    /// Milliseconds, to a bucket's width.
    p50_ms: f64,
    /// Milliseconds, to a bucket's width.
    p99_ms: f64,
    /// Of the whole way's mean.
    share: f64,
}

/// The hops of the fast path, in a message's order. What is left of the whole way lies between the
/// node's write and the application.
const WAY: [Hop; 4] =
    [Hop::ProducedTaken, Hop::TakenAccepted, Hop::AcceptedDispatched, Hop::DispatchedWritten];

/// What was observed, in a message's order.
fn between(before: &str, after: &str, whole_ms: f64) -> Vec<Passed> {
    let hops = |text| Metrics::parse(text).histograms(Hops::FAMILY, "hop");
    let (mut before, after) = (hops(before), hops(after));
    let passed = |hop: &Hop| {
        let earlier = before.remove(hop.as_str()).unwrap_or_default();
        passed(*hop, &after.get(hop.as_str())?.since(&earlier), whole_ms)
    };
    WAY.iter().filter_map(passed).collect()
}

/// What was observed between two scrapes of all roles, with what is left between the node's write and the
/// application. `whole_ms`: what the whole way took on average, as the devices saw it.
pub fn table(before: &str, after: &str, whole_ms: f64) -> Table {
    let mut table = Table::new("hop", &["mean_ms", "p50_ms", "p99_ms", "share", "messages"]);
    let hops = between(before, after, whole_ms);
    for Passed { name, count, mean_ms, p50_ms, p99_ms, share } in &hops {
        let figures = [*mean_ms, *p50_ms, *p99_ms, *share, *count as f64];
        table.row(name, figures.map(Some));
    }
    let rest_ms = whole_ms - hops.iter().map(|hop| hop.mean_ms).sum::<f64>();
    table.row("written_shown", [Some(rest_ms), None, None, Some(rest_ms / whole_ms), None]);
    table.row("produced_shown", [Some(whole_ms), None, None, Some(1.0), None]);
    table
}

fn passed(hop: Hop, times: &Histogram, whole_ms: f64) -> Option<Passed> {
    let ms = |share| times.quantile(share).map(|seconds| seconds * 1000.0);
    let mean_ms = times.mean()? * 1000.0;
    Some(Passed {
        name: hop.as_str().to_owned(),
        count: times.count() as u64,
        mean_ms,
        p50_ms: ms(0.5)?,
        p99_ms: ms(0.99)?,
        share: mean_ms / whole_ms,
    })
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
