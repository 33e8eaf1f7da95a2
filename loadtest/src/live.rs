//! What a running scenario shows on the terminal, and what is kept of it for the report: one sample a
//! second of what the agents hold and the server takes.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::controller::{Seen, Watch};
use crate::table::Table;
use crate::usage::{Taken, Usage};

/// How often is looked.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// How often who reads no terminal is told, in samples.
const TELL_EVERY: u64 = 10;
/// Over how many samples CPU time is shown.
const CPU_SAMPLES: usize = 10;
const MIB: f64 = 1024.0 * 1024.0;

/// The line at the bottom of the terminal; empty: there is none.
static STATUS: Mutex<String> = Mutex::new(String::new());

/// A line about progress, apart from the result.
///
/// # Errors
/// Standard error is closed.
pub fn say(line: &str) -> std::io::Result<()> {
    let status = STATUS.lock();
    let mut out = std::io::stderr().lock();
    match status.is_empty() {
        true => writeln!(out, "{line}"),
        false => write!(out, "\r\x1b[K{line}\n{}", drawn(&status)),
    }
}

/// Redraws the status line; empty: takes it away.
fn status(line: String) {
    let mut status = STATUS.lock();
    *status = line;
    let mut out = std::io::stderr().lock();
    // Who cannot be told of progress is told the result.
    let _ = write!(out, "\r\x1b[K{}", drawn(&status)).and_then(|()| out.flush());
}

/// Cut off at the edge of the terminal, not wrapped (DECAWM).
fn drawn(line: &str) -> String {
    if line.is_empty() { String::new() } else { format!("\x1b[?7l{line}\x1b[?7h") }
}

/// What was seen of one scenario. Field names are stable, as are those within.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Each server that was measured, in turn.
    pub series: Vec<Series>,
    /// Distributions of times.
    pub latencies: Vec<Latencies>,
    /// What else was seen, of Barid.
    #[serde(default)]
    pub tables: Vec<Table>,
}

/// One server over time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// `floor` or `barid`.
    pub server: String,
    /// What was done when.
    pub phases: Vec<Phase>,
    /// One a second.
    pub samples: Vec<Sample>,
}

/// What was done from some moment on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Seconds since the scenario began.
    pub at_s: f64,
    /// In a word or two.
    pub phase: String,
}

/// One moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the scenario began.
    pub at_s: f64,
    /// Sessions that stand.
    pub sessions: u32,
    /// Sessions that were opened, from the first sample on.
    pub opened: u64,
    /// Messages that devices were shown, from the first sample on.
    pub delivered: u64,
    /// Of the server's processes; absent: not known.
    pub resident_bytes: Option<u64>,
    /// User and system seconds since the server's start.
    pub cpu_s: Option<f64>,
    /// Files that the server has open.
    pub open_files: Option<u64>,
    /// Tasks of the server that have not ended; absent: not known.
    pub tasks: Option<u64>,
}

/// How long something took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// What.
    pub what: String,
    /// `floor` or `barid`.
    pub server: String,
    /// How many were recorded.
    pub count: u64,
    /// Rising shares (0 to 1), each with the time below which it lies.
    pub quantiles: Vec<Quantile>,
}

/// A point of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quantile {
    /// 0 to 1.
    pub share: f64,
    /// Milliseconds.
    pub ms: f64,
}

impl Latencies {
    fn of(what: &str, server: &str, times_us: &Histogram<u64>) -> Self {
        // Five steps each time the distance to the longest halves.
        let quantiles = times_us.iter_quantiles(5).map(|at| Quantile {
            share: at.quantile_iterated_to(),
            ms: at.value_iterated_to() as f64 / 1000.0,
        });
        let (what, server) = (what.to_owned(), server.to_owned());
        Self { what, server, count: times_us.len(), quantiles: quantiles.collect() }
    }
}

/// Watches a scenario. Dropped, it looks no more and its line is taken from the terminal.
pub struct Live {
    shared: Arc<Shared>,
    sampling: JoinHandle<()>,
}

struct Shared {
    scenario: String,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    usage: Usage,
    phase: String,
    recorded: Recorded,
    /// As the agents counted at the last look.
    opened: u64,
    delivered: u64,
}

impl Live {
    /// Begins to look.
    pub fn start(scenario: &str, watcher: Watch) -> Self {
        let (scenario, started) = (scenario.to_owned(), Instant::now());
        let shared = Arc::new(Shared { scenario, started, state: Mutex::default() });
        let sampling = tokio::spawn(sample(Arc::clone(&shared), watcher));
        Self { shared, sampling }
    }

    /// From now on this server is measured: `floor` or `barid`.
    pub fn server(&self, name: &str, usage: Usage) {
        let mut state = self.shared.state.lock();
        state.usage = usage;
        state.phase.clear();
        let series = Series { server: name.to_owned(), ..Series::default() };
        state.recorded.series.push(series);
    }

    /// What is done from now on, in a word or two.
    pub fn phase(&self, phase: &str) {
        let at_s = self.shared.started.elapsed().as_secs_f64();
        let mut state = self.shared.state.lock();
        phase.clone_into(&mut state.phase);
        if let Some(series) = state.recorded.series.last_mut() {
            series.phases.push(Phase { at_s, phase: phase.to_owned() });
        }
    }

    /// Keeps a distribution of the server that is measured, microseconds.
    pub fn latencies(&self, what: &str, times_us: &Histogram<u64>) {
        let mut state = self.shared.state.lock();
        let server = state.recorded.series.last().map_or("barid", |series| &series.server);
        let latencies = Latencies::of(what, server, times_us);
        state.recorded.latencies.push(latencies);
    }

    /// Keeps a distribution of what is the floor though no server was started for it, microseconds.
    pub fn floor_latencies(&self, what: &str, times_us: &Histogram<u64>) {
        let latencies = Latencies::of(what, "floor", times_us);
        self.shared.state.lock().recorded.latencies.push(latencies);
    }

    /// Keeps what is shown beside the measures.
    pub fn table(&self, table: Table) {
        self.shared.state.lock().recorded.tables.push(table);
    }

    /// What was seen of the server that is measured, until now.
    pub fn series(&self) -> Series {
        self.shared.state.lock().recorded.series.last().cloned().unwrap_or_default()
    }

    /// What was seen until now.
    pub fn recorded(&self) -> Recorded {
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

async fn sample(shared: Arc<Shared>, mut watcher: Watch) {
    let is_terminal = std::io::stderr().is_terminal();
    let mut ticks = interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 1_u64.. {
        ticks.tick().await;
        // A server that has just gone, or an agent that is busy, is asked again in a second.
        let Ok(seen) = watcher.report().await else { continue };
        let usage = shared.state.lock().usage.clone();
        let taken = usage.now().await.ok().flatten();
        let at_s = shared.started.elapsed().as_secs_f64();
        let line = shared.state.lock().take(&shared.scenario, at_s, &seen, taken);
        if is_terminal {
            status(line);
        } else if number % TELL_EVERY == 0 {
            let _ = say(&line);
        }
    }
}

impl State {
    /// Keeps a sample, and says what it says.
    fn take(&mut self, scenario: &str, at_s: f64, seen: &Seen, taken: Option<Taken>) -> String {
        // Agents begin to count anew with each run.
        let grown = |now: u64, before: u64| if now >= before { now - before } else { now };
        let delivered = seen.shown + seen.frames;
        let (opened_more, delivered_more) =
            (grown(seen.opened, self.opened), grown(delivered, self.delivered));
        (self.opened, self.delivered) = (seen.opened, delivered);
        let Some(series) = self.recorded.series.last_mut() else {
            return format!("{scenario}  {}  starting", clock(at_s));
        };
        let last = series.samples.last().copied();
        let before = last.unwrap_or_default();
        let sample = Sample {
            at_s,
            sessions: seen.connected,
            opened: before.opened + if last.is_some() { opened_more } else { 0 },
            delivered: before.delivered + if last.is_some() { delivered_more } else { 0 },
            resident_bytes: taken.map(|taken| taken.resident_bytes),
            cpu_s: taken.map(|taken| taken.cpu_s),
            open_files: taken.map(|taken| taken.open_files),
            tasks: taken.and_then(|taken| taken.tasks),
        };
        series.samples.push(sample);
        let over_s = (at_s - before.at_s).max(0.001);
        let rate = |more: u64| if last.is_some() { more as f64 / over_s } else { 0.0 };
        let mut line = format!(
            "{scenario} {}  {}  {:<14}{} sessions  {} opened/s  {} delivered, {}/s",
            series.server,
            clock(at_s),
            self.phase,
            thousands(u64::from(sample.sessions)),
            thousands(rate(opened_more) as u64),
            thousands(sample.delivered),
            thousands(rate(delivered_more) as u64),
        );
        if let Some(taken) = taken {
            // Over some samples: `/metrics` has whole seconds.
            let since = series.samples[series.samples.len().saturating_sub(CPU_SAMPLES)];
            let spent = since.cpu_s.map_or(0.0, |cpu_s| taken.cpu_s - cpu_s);
            let cores = spent.max(0.0) / (at_s - since.at_s).max(0.001);
            let mib = taken.resident_bytes as f64 / MIB;
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

/// With a comma between each three digits.
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

    fn seen(connected: u32, opened: u64, shown: u64) -> Seen {
        Seen { connected, opened, shown, ..Seen::default() }
    }

    #[test]
    fn a_sample_a_second_becomes_a_line_and_a_series() {
        let mut state = State { phase: "connecting".into(), ..State::default() };
        assert_eq!(state.take("idle", 61.0, &seen(0, 7, 0), None), "idle  01:01  starting");
        state.recorded.series.push(Series { server: "barid".into(), ..Series::default() });
        let taken =
            |mib: u64, cpu_s| Some(Taken { resident_bytes: mib << 20, cpu_s, ..Taken::default() });
        state.take("idle", 62.0, &seen(100, 107, 50), taken(30, 1.0));
        let line = state.take("idle", 64.0, &seen(4_100, 4_107, 3_050), taken(40, 2.0));
        assert_eq!(
            line,
            "idle barid  01:04  connecting    4,100 sessions  2,000 opened/s  3,000 delivered, \
             1,500/s  40.0 MiB  CPU 50 %"
        );
        // A new run: the agents count from zero.
        state.take("idle", 65.0, &seen(4_100, 4_107, 20), None);
        let samples = &state.recorded.series[0].samples;
        let counts: Vec<_> = samples.iter().map(|s| (s.opened, s.delivered)).collect();
        assert_eq!(counts, [(0, 0), (4_000, 3_000), (4_000, 3_020)]);
        assert_eq!((samples[1].resident_bytes, samples[2].resident_bytes), (Some(40 << 20), None));
    }

    #[test]
    fn a_distribution_keeps_its_tail() {
        let mut times = histogram::new();
        (1..=10_000_u64).for_each(|us| times.record(us * 10).unwrap());
        let kept = Latencies::of("push", "barid", &times);
        assert!(kept.quantiles.windows(2).all(|pair| pair[0].share <= pair[1].share));
        let at = |share: f64| kept.quantiles.iter().find(|q| q.share >= share).unwrap().ms;
        assert!((at(0.5) / 50.0 - 1.0).abs() < 0.1 && (at(1.0) / 100.0 - 1.0).abs() < 0.01);
        assert_eq!(thousands(0) + &thousands(999) + &thousands(1_234_567), "09991,234,567");
    }
}
