//! The outcome of a run, for people or programs.

use std::io::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::Arguments;
use crate::audit::Audit;

/// Field names are stable: programs compare runs by them.
#[derive(Debug, Serialize)]
pub struct Report {
    users: u32,
    rate_per_s: u32,
    payload_bytes: u32,
    produced: u64,
    produced_in_s: f64,
    shown: u64,
    lost: u64,
    passed_over: u64,
    repeats: u64,
    foreign: u64,
    latency_p50_ms: f64,
    latency_p90_ms: f64,
    latency_p99_ms: f64,
    latency_max_ms: f64,
}

impl Report {
    /// Reads the books.
    pub fn new(arguments: &Arguments, audit: &Audit, produced_in: Duration) -> Self {
        let totals = audit.totals();
        let at = |share: f64| percentile_ms(&totals.latencies_us, share);
        Self {
            users: arguments.users,
            rate_per_s: arguments.rate,
            payload_bytes: arguments.payload_bytes,
            produced: totals.total,
            produced_in_s: produced_in.as_secs_f64(),
            shown: totals.shown,
            lost: totals.total - totals.shown,
            passed_over: totals.passed_over,
            repeats: totals.repeats,
            foreign: totals.foreign,
            latency_p50_ms: at(0.5),
            latency_p90_ms: at(0.9),
            latency_p99_ms: at(0.99),
            latency_max_ms: at(1.0),
        }
    }

    /// Whether everything was shown once and in order.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.passed_over == 0 && self.repeats == 0
    }

    /// Prints it to standard output.
    pub fn print(&self, json: bool) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        if json {
            return writeln!(out, "{}", serde_json::to_string(self)?);
        }
        writeln!(
            out,
            "produced  {:>10} records of {} bytes in {:.1} s to {} users",
            self.produced, self.payload_bytes, self.produced_in_s, self.users
        )?;
        writeln!(
            out,
            "shown     {:>10}   lost {}   passed over {}   repeated {}   of other runs {}",
            self.shown, self.lost, self.passed_over, self.repeats, self.foreign
        )?;
        writeln!(
            out,
            "latency   p50 {:.2} ms   p90 {:.2} ms   p99 {:.2} ms   max {:.2} ms",
            self.latency_p50_ms, self.latency_p90_ms, self.latency_p99_ms, self.latency_max_ms
        )
    }
}

/// Nearest-rank percentile of a sorted list, in milliseconds; 0 where it is empty.
fn percentile_ms(sorted_us: &[u32], share: f64) -> f64 {
    let rank = (share * sorted_us.len() as f64).ceil() as usize;
    sorted_us.get(rank.saturating_sub(1)).map_or(0.0, |us| f64::from(*us) / 1000.0)
}
