//! The live display of a running scenario, and its record for the report: one sample per second of the
//! agents' counts and the server's usage.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::controller::{Seen, Watch};
use crate::table::Table;
use crate::usage::{Source, Usage};

const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// An agent that hangs must not keep the record back.
const LAST_SAMPLE_LIMIT: Duration = Duration::from_secs(5);
/// Samples per line where standard error is no terminal.
const SAMPLES_PER_LINE: u64 = 10;
/// CPU use is the mean over this many samples.
const CPU_SAMPLES: usize = 10;
const MIB: f64 = 1024.0 * 1024.0;

/// The status line at the bottom of the terminal, or an empty string.
static STATUS: Mutex<String> = Mutex::new(String::new());

/// Prints a line about progress to standard error, above the status line.
pub fn say(line: &str) -> std::io::Result<()> {
    let status = STATUS.lock();
    let mut out = std::io::stderr().lock();
    match status.is_empty() {
        true => writeln!(out, "{line}"),
        false => write!(out, "\r\x1b[K{line}\n{}", drawn(&status)),
    }
}

/// Redraws the status line; an empty one is removed.
fn status(line: String) {
    let mut status = STATUS.lock();
    *status = line;
    let mut out = std::io::stderr().lock();
    // Without standard error, there is still the result.
    let _ = write!(out, "\r\x1b[K{}", drawn(&status)).and_then(|()| out.flush());
}

/// Without wrapping at the edge of the terminal (DECAWM).
fn drawn(line: &str) -> String {
    if line.is_empty() { String::new() } else { format!("\x1b[?7l{line}\x1b[?7h") }
}

/// The record of one scenario. Field names are stable, also of the types within.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// One for each server that was measured.
    pub series: Vec<Series>,
    pub latencies: Vec<Latencies>,
    /// Further figures, of Barid.
    #[serde(default)]
    pub tables: Vec<Table>,
}

/// One server over time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// `floor` or `barid`.
    pub server: String,
    pub phases: Vec<Phase>,
    /// One per second.
    pub samples: Vec<Sample>,
}

/// A named part of a scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Seconds since the scenario began.
    pub at_s: f64,
    pub phase: String,
}

/// Counts and usage at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the scenario began.
    pub at_s: f64,
    /// Open sessions.
    pub sessions: u32,
    /// Sessions that were opened since the server was started.
    pub opened: u64,
    /// Messages that arrived since the server was started.
    pub delivered: u64,
    /// Memory of the server; absent if unknown.
    pub resident_bytes: Option<u64>,
    /// User and system time of the server.
    pub cpu_s: Option<f64>,
    /// Open files of the server.
    pub open_files: Option<u64>,
    /// Tasks of the server; absent if unknown.
    pub tasks: Option<u64>,
}

/// A distribution of times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// The name: `push`, `return`, `handshake`, `connect`.
    pub what: String,
    /// `floor` or `barid`.
    pub server: String,
    /// Number of values.
    pub count: u64,
    /// In rising order.
    pub quantiles: Vec<Quantile>,
}

/// A share (0 to 1) of all values is at or below a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quantile {
    pub share: f64,
    pub ms: f64,
}

impl Latencies {
    fn new(what: &str, server: &str, times_us: &Histogram<u64>) -> Self {
        // Five steps for each halving of the remaining share.
        let quantiles = times_us.iter_quantiles(5).map(|at| Quantile {
            share: at.quantile_iterated_to(),
            ms: at.value_iterated_to() as f64 / 1000.0,
        });
        let (what, server) = (what.to_owned(), server.to_owned());
        Self { what, server, count: times_us.len(), quantiles: quantiles.collect() }
    }
}

/// Samples a scenario until it is dropped.
pub struct Live {
    shared: Arc<Shared>,
    watch: Watch,
    sampling: JoinHandle<()>,
}

struct Shared {
    scenario: String,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    source: Source,
    phase: String,
    recorded: Recorded,
    /// Totals of opened sessions and deliveries: at the last sample, and when the server was started.
    last: (u64, u64),
    base: (u64, u64),
}

impl Live {
    pub fn start(scenario: &str, watch: Watch) -> Self {
        let (scenario, started) = (scenario.to_owned(), Instant::now());
        let shared = Arc::new(Shared { scenario, started, state: Mutex::default() });
        let sampling = tokio::spawn(run(Arc::clone(&shared), watch.clone()));
        Self { shared, watch, sampling }
    }

    /// The server that is measured from now on: `floor` or `barid`.
    pub fn server(&self, name: &str, source: Source) {
        let mut state = self.shared.state.lock();
        state.source = source;
        state.phase.clear();
        state.base = state.last;
        let series = Series { server: name.to_owned(), ..Series::default() };
        state.recorded.series.push(series);
    }

    /// Sets the scenario's current phase, in a word or two.
    pub fn phase(&self, phase: &str) {
        let at_s = self.shared.started.elapsed().as_secs_f64();
        let mut state = self.shared.state.lock();
        phase.clone_into(&mut state.phase);
        if let Some(series) = state.recorded.series.last_mut() {
            series.phases.push(Phase { at_s, phase: phase.to_owned() });
        }
    }

    /// Records a distribution for the present server.
    pub fn latencies(&self, what: &str, times_us: &Histogram<u64>) {
        let mut state = self.shared.state.lock();
        let server = state.recorded.series.last().map_or("barid", |series| &series.server);
        let latencies = Latencies::new(what, server, times_us);
        state.recorded.latencies.push(latencies);
    }

    /// Records a distribution for a floor that is no server.
    pub fn floor_latencies(&self, what: &str, times_us: &Histogram<u64>) {
        let latencies = Latencies::new(what, "floor", times_us);
        self.shared.state.lock().recorded.latencies.push(latencies);
    }

    pub fn table(&self, table: Table) {
        self.shared.state.lock().recorded.tables.push(table);
    }

    /// The present server's series.
    pub fn series(&self) -> Series {
        self.shared.state.lock().recorded.series.last().cloned().unwrap_or_default()
    }

    /// Takes a last sample and returns the record.
    pub async fn finish(mut self) -> Recorded {
        self.sampling.abort();
        let _ = timeout(LAST_SAMPLE_LIMIT, self.shared.sample(&mut self.watch)).await;
        self.shared.state.lock().recorded.clone()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.sampling.abort();
        if !STATUS.lock().is_empty() {
            status(String::new());
        }
    }
}

async fn run(shared: Arc<Shared>, mut watch: Watch) {
    let is_terminal = std::io::stderr().is_terminal();
    let mut ticks = interval(SAMPLE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 1_u64.. {
        ticks.tick().await;
        let Some(line) = shared.sample(&mut watch).await else { continue };
        if is_terminal {
            status(line);
        } else if number % SAMPLES_PER_LINE == 0 {
            let _ = say(&line);
        }
    }
}

impl Shared {
    /// Records a sample and returns the status line; `None` if the agents do not answer.
    async fn sample(&self, watch: &mut Watch) -> Option<String> {
        let seen = watch.report().await.ok()?;
        let source = self.state.lock().source.clone();
        let usage = source.read().await.ok().flatten();
        let at_s = self.started.elapsed().as_secs_f64();
        Some(self.state.lock().record(&self.scenario, at_s, &seen, usage))
    }
}

impl State {
    fn record(&mut self, scenario: &str, at_s: f64, seen: &Seen, usage: Option<Usage>) -> String {
        self.last = (seen.opened, seen.delivered);
        let Some(series) = self.recorded.series.last_mut() else {
            return format!("{scenario}  {}  starting", clock(at_s));
        };
        let sample = Sample {
            at_s,
            sessions: seen.connected,
            opened: seen.opened.saturating_sub(self.base.0),
            delivered: seen.delivered.saturating_sub(self.base.1),
            resident_bytes: usage.map(|usage| usage.resident_bytes),
            cpu_s: usage.map(|usage| usage.cpu_s),
            open_files: usage.map(|usage| usage.open_files),
            tasks: usage.and_then(|usage| usage.tasks),
        };
        let before = series.samples.last().copied().unwrap_or(sample);
        series.samples.push(sample);
        let per_s = |now: u64, then: u64| {
            let seconds = (at_s - before.at_s).max(0.001);
            thousands((now.saturating_sub(then) as f64 / seconds) as u64)
        };
        let mut line = format!(
            "{scenario} {}  {}  {:<14}{} sessions  {} opened/s  {} delivered, {}/s",
            series.server,
            clock(at_s),
            self.phase,
            thousands(u64::from(sample.sessions)),
            per_s(sample.opened, before.opened),
            thousands(sample.delivered),
            per_s(sample.delivered, before.delivered),
        );
        if let Some(usage) = usage {
            // `/metrics` has whole seconds, so one sample is not enough.
            let since = series.samples[series.samples.len().saturating_sub(CPU_SAMPLES)];
            let spent = since.cpu_s.map_or(0.0, |cpu_s| usage.cpu_s - cpu_s);
            let cores = spent.max(0.0) / (at_s - since.at_s).max(0.001);
            let mib = usage.resident_bytes as f64 / MIB;
            line.push_str(&format!("  {mib:.1} MiB  CPU {:.0} %", cores * 100.0));
        }
        line
    }
}

/// Minutes and seconds.
pub fn clock(seconds: f64) -> String {
    let whole = seconds as u64;
    format!("{:02}:{:02}", whole / 60, whole % 60)
}

/// The number with a comma between groups of three digits.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram;

    fn seen(connected: u32, opened: u64, delivered: u64) -> Seen {
        Seen { connected, opened, delivered, ..Seen::default() }
    }

    #[test]
    fn samples_become_status_lines_and_a_series() {
        let mut state = State { phase: "connecting".into(), ..State::default() };
        assert_eq!(state.record("idle", 61.0, &seen(0, 7, 50), None), "idle  01:01  starting");
        state.base = state.last;
        state.recorded.series.push(Series { server: "barid".into(), ..Series::default() });
        let usage =
            |mib: u64, cpu_s| Some(Usage { resident_bytes: mib << 20, cpu_s, ..Usage::default() });
        state.record("idle", 62.0, &seen(100, 107, 50), usage(30, 1.0));
        let line = state.record("idle", 64.0, &seen(4_100, 4_107, 3_050), usage(40, 2.0));
        assert_eq!(
            line,
            "idle barid  01:04  connecting    4,100 sessions  2,000 opened/s  3,000 delivered, \
             1,500/s  40.0 MiB  CPU 50 %"
        );
        let samples = &state.recorded.series[0].samples;
        let counts: Vec<_> = samples.iter().map(|s| (s.opened, s.delivered)).collect();
        assert_eq!(counts, [(100, 0), (4_100, 3_000)]);
        assert_eq!(
            (samples[0].resident_bytes, samples[1].resident_bytes),
            (Some(30 << 20), Some(40 << 20))
        );
    }

    #[test]
    fn a_distribution_keeps_its_tail() {
        let mut times = histogram::new();
        (1..=10_000_u64).for_each(|us| times.record(us * 10).unwrap());
        let kept = Latencies::new("push", "barid", &times);
        assert!(kept.quantiles.windows(2).all(|pair| pair[0].share <= pair[1].share));
        let at = |share: f64| kept.quantiles.iter().find(|q| q.share >= share).unwrap().ms;
        assert!((at(0.5) / 50.0 - 1.0).abs() < 0.1 && (at(1.0) / 100.0 - 1.0).abs() < 0.01);
        assert_eq!(thousands(0) + &thousands(999) + &thousands(1_234_567), "09991,234,567");
    }
}
