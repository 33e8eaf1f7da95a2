//! Messages at a fixed rate to sessions of which some leave and return, for a long time. Every delivery is
//! checked; memory, open files and tasks may not grow.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;

use super::trial::{Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::drive::{drive, must_be_clean};
use crate::histogram::quantile_ms;
use crate::live::{Sample, say};
use crate::measure::{Goal, Measure};
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;

const PAYLOAD_BYTES: u32 = 200;
const HANDSHAKES_MAX: u32 = 64;
/// Growth is not computed from fewer samples.
const SAMPLES_MIN: usize = 10;
/// Growth is computed from all pairs of at most this many points.
const POINTS_MAX: usize = 200;

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let options = trial.options.soak.clone();
    let (users, seconds) = (options.soak_sessions, options.seconds());
    let mut server = trial.barid_with_tasks().await?;
    let request = server.connect_request().await?;
    let connect = ConnectRequest { count: users, at_once_max: HANDSHAKES_MAX, ..request };
    let Server::Barid(target) = &server else { anyhow::bail!("no cluster") };
    let business = Business::open(&target.plan(PAYLOAD_BYTES, 0)?).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;

    trial.live.phase("soaking");
    let audit = Arc::new(Audit::new(users, Some(options.soak_rate)));
    let pace = Pace::Scheduled(u64::from(options.soak_rate) * u64::from(seconds));
    let pushing = drive(&trial.agents, &business, pace, &audit, SETTLE);
    let churning = trial.agents.churn(&connect, options.soak_churn, seconds);
    let (_, returned) = tokio::try_join!(pushing, churning)?;
    let samples = last_half(&trial.live.series().samples, f64::from(seconds));
    let seen = must_be_clean(&trial.agents, &audit).await?;
    ensure!(seen.connected == users, "{} of {users}: {}", seen.connected, seen.why_closed);
    say(&format!("{}, {} re-sent", seen.outcome(audit.totals().total), seen.resent))?;
    target.all_acknowledged(Duration::from_secs(60)).await?;

    let times_us = trial.agents.latencies_us().await?;
    trial.live.latencies("push", &times_us);
    trial.live.latencies("return", &returned.took_us);
    trial.agents.drop_all().await?;
    let mut rows = vec![
        Measure::new("soak_delivered_per_s", "1/s", None, seen.shown as f64 / f64::from(seconds)),
        Measure::new("soak_push_p50_ms", "ms", None, quantile_ms(&times_us, 0.5)),
        Measure::new("soak_push_p99_ms", "ms", None, quantile_ms(&times_us, 0.99)),
        Measure::new("soak_push_max_ms", "ms", None, quantile_ms(&times_us, 1.0)),
    ];
    type Field = fn(&Sample) -> Option<u64>;
    let fields: [(&str, Field); 3] = [
        ("soak_memory_ratio", |sample| sample.resident_bytes),
        ("soak_files_ratio", |sample| sample.open_files),
        ("soak_tasks_ratio", |sample| sample.tasks),
    ];
    for (name, field) in fields {
        let point = |sample: &Sample| Some((sample.at_s, field(sample)? as f64));
        let points: Vec<_> = samples.iter().filter_map(point).collect();
        match growth(&points) {
            Some(growth) => {
                let row = Measure::new(name, "", None, 1.0 + growth);
                rows.push(row.against(Goal::AtMost(1.0 + options.growth_max)));
            }
            None => say(&format!("{name}: unknown"))?,
        }
    }
    Ok(rows)
}

/// The samples of the last `seconds / 2`.
fn last_half(samples: &[Sample], seconds: f64) -> Vec<Sample> {
    let end = samples.last().map_or(0.0, |sample| sample.at_s);
    samples.iter().filter(|sample| sample.at_s > end - seconds / 2.0).copied().collect()
}

/// Relative growth from the first point to the last, by the Theil-Sen estimator: the slope is the median of
/// the slopes of all pairs of points, so a peak does not count as growth. `None`: too few points, or the
/// median is not above zero.
fn growth(points: &[(f64, f64)]) -> Option<f64> {
    if points.len() < SAMPLES_MIN {
        return None;
    }
    // Neighbouring points of a long run are averaged.
    let chunks = points.chunks(points.len().div_ceil(POINTS_MAX));
    let mean = |chunk: &[(f64, f64)], field: fn(&(f64, f64)) -> f64| {
        chunk.iter().map(field).sum::<f64>() / chunk.len() as f64
    };
    let points: Vec<_> = chunks.map(|c| (mean(c, |p| p.0), mean(c, |p| p.1))).collect();
    let pairs = points
        .iter()
        .enumerate()
        .flat_map(|(index, first)| points[index + 1..].iter().map(move |later| (first, later)));
    let slope = median(pairs.map(|(a, b)| (b.1 - a.1) / (b.0 - a.0).max(0.001)).collect());
    let level = median(points.iter().map(|(_, value)| *value).collect());
    let span = points[points.len() - 1].0 - points[0].0;
    (level > 0.0).then(|| slope * span / level)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 300 seconds of a value.
    fn points(of: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (0..300).map(|second| (f64::from(second), of(f64::from(second)))).collect()
    }

    #[test]
    fn growth_is_found_and_a_wave_or_a_peak_is_not_growth() {
        let grown = |of: fn(f64) -> f64| growth(&points(of)).unwrap();
        assert_eq!(grown(|_| 7.0), 0.0);
        // 10 % more at the end than at the start.
        assert!((grown(|s| 100.0 + s / 30.0) - 0.095).abs() < 0.005);
        assert!(grown(|s| 100.0 + 5.0 * (s / 7.0).sin()).abs() < 0.02);
        assert!(grown(|s| if (140.0..150.0).contains(&s) { 300.0 } else { 100.0 }).abs() < 0.01);
        assert!(grown(|s| 100.0 - s / 30.0) < -0.05);
        assert_eq!(growth(&points(|_| 7.0)[..5]), None);
        assert_eq!(growth(&points(|_| 0.0)), None);
    }

    #[test]
    fn only_the_last_half_counts() {
        let samples: Vec<_> = (0..100)
            .map(|second| Sample { at_s: f64::from(second), ..Sample::default() })
            .collect();
        let half = last_half(&samples, 40.0);
        assert_eq!((half[0].at_s, half.len()), (80.0, 20));
    }
}
