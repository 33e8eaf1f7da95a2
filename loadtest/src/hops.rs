//! The time that a message spends in each hop, from the roles' histograms between two scrapes.

use barid_runtime::exposition::{Histogram, Metrics};
use barid_runtime::{Hop, Hops};

use crate::table::Table;

/// One hop between two scrapes.
#[derive(Debug)]
struct HopTime {
    name: String,
    messages: u64,
    mean_ms: f64,
    /// Precise to the width of a histogram bucket.
    p50_ms: f64,
    p99_ms: f64,
    /// Of the mean from produce to device.
    share: f64,
}

/// The hops of the fast path, in order. The rest of the latency is between the node's write and the
/// application.
const PATH: [Hop; 4] =
    [Hop::ProducedTaken, Hop::TakenAccepted, Hop::AcceptedDispatched, Hop::DispatchedWritten];

fn between(before: &str, after: &str, whole_ms: f64) -> Vec<HopTime> {
    let hops = |text| Metrics::parse(text).histograms(Hops::FAMILY, "hop");
    let (mut before, after) = (hops(before), hops(after));
    let time = |hop: &Hop| {
        let earlier = before.remove(hop.as_str()).unwrap_or_default();
        hop_time(*hop, &after.get(hop.as_str())?.since(&earlier), whole_ms)
    };
    PATH.iter().filter_map(time).collect()
}

/// The hops between two scrapes of all roles. `whole_ms`: the mean from produce to device, as the devices
/// measured it.
pub fn table(before: &str, after: &str, whole_ms: f64) -> Table {
    let mut table = Table::new("hop", &["mean_ms", "p50_ms", "p99_ms", "share", "messages"]);
    let hops = between(before, after, whole_ms);
    for HopTime { name, messages, mean_ms, p50_ms, p99_ms, share } in &hops {
        let figures = [*mean_ms, *p50_ms, *p99_ms, *share, *messages as f64];
        table.row(name, figures.map(Some));
    }
    let rest_ms = whole_ms - hops.iter().map(|hop| hop.mean_ms).sum::<f64>();
    table.row("written_shown", [Some(rest_ms), None, None, Some(rest_ms / whole_ms), None]);
    table.row("produced_shown", [Some(whole_ms), None, None, Some(1.0), None]);
    table
}

fn hop_time(hop: Hop, times: &Histogram, whole_ms: f64) -> Option<HopTime> {
    let ms = |share| times.quantile(share).map(|seconds| seconds * 1000.0);
    let mean_ms = times.mean()? * 1000.0;
    Some(HopTime {
        name: hop.as_str().to_owned(),
        messages: times.count() as u64,
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
    fn hops_are_the_difference_of_two_scrapes() {
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
        assert_eq!((hop.name.as_str(), hop.messages), ("taken_accepted", 10));
        let is = |value: f64, expected: f64| (value - expected).abs() < 1e-6;
        assert!(is(hop.mean_ms, 1.5) && is(hop.p50_ms, 1.5) && is(hop.share, 0.5), "{hop:?}");
        assert!(between(&scrape(5, 5, 1.0), &scrape(5, 5, 1.0), 1.0).is_empty());
    }
}
