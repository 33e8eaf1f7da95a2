//! Structured logs on stderr. A thread writes the lines from a bounded buffer. A stopped reader, a full disk or a
//! closed pipe never blocks a task or ends the process; lines that do not fit are dropped and counted.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts, Registry};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::config::{LOG_BUFFER_BYTES, LogConfig, LogFormat};
use crate::repeats;
use crate::words::{nearest, shown};

/// The longest wait for buffered lines when the process exits.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Pause between attempts to write to a stderr that another process has made non-blocking.
const RETRY: Duration = Duration::from_millis(20);

/// Values of `log.level`, and of its directives.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;
static SET_FILTER: OnceLock<SetFilter> = OnceLock::new();

/// Installs the process's subscriber, and a panic hook that logs. A second call has no effect.
pub fn init(config: &LogConfig) {
    install(config, Clock::Date);
}

/// As [`init`], for a terminal on which people watch: lines begin with the time of day (UTC) and name no module.
pub fn init_brief(config: &LogConfig) {
    install(config, Clock::OfDay);
}

/// How a line begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clock {
    /// Date and time, RFC 3339.
    Date,
    /// `12:34:56.789`.
    OfDay,
}

impl FormatTime for Clock {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        match self {
            Self::Date => SystemTime.format_time(w),
            Self::OfDay => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let at = since.unwrap_or_default();
                let (s, ms) = (at.as_secs(), at.subsec_millis());
                write!(w, "{:02}:{:02}:{:02}.{ms:03}", s / 3600 % 24, s / 60 % 60, s % 60)
            }
        }
    }
}

fn install(config: &LogConfig, clock: Clock) {
    let lines = stderr();
    ORIGIN.write().format = config.format;
    lines.bytes_max.store(config.buffer_bytes_max, Ordering::Relaxed);
    repeats::configure(config);
    // The level was checked by `check_level`.
    let filter =
        EnvFilter::try_new(quiet(&config.level)).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(clock)
        .with_target(clock == Clock::Date)
        .with_writer(move || LineWriter(lines))
        .with_ansi(io::stderr().is_terminal());
    // `try_init` fails if another role of this process has installed a subscriber.
    let (set_filter, installed): (SetFilter, _) = match config.format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            let set = move |filter| handle.reload(filter).map_err(|error| error.to_string());
            (Box::new(set), builder.try_init())
        }
        LogFormat::Json => {
            let builder = builder.json().with_filter_reloading();
            let handle = builder.reload_handle();
            let set = move |filter| handle.reload(filter).map_err(|error| error.to_string());
            (Box::new(set), builder.try_init())
        }
    };
    if installed.is_ok() {
        let _ = SET_FILTER.set(set_filter);
        std::panic::set_hook(Box::new(log_panic));
    }
}

/// Names the process's role in each line, for collectors of the lines of many processes.
pub(crate) fn set_role(role: &'static str) {
    ORIGIN.write().set(|origin| origin.role = role);
}

/// Names the process's node in each line.
pub(crate) fn set_node(node: &str) {
    ORIGIN.write().set(|origin| origin.node = node.to_owned());
}

const NODE: &[u8] = b" node=";

static ORIGIN: RwLock<Origin> = RwLock::new(Origin::none());

/// The writer of this process's lines, in the form in which each line shows it.
struct Origin {
    role: &'static str,
    node: String,
    format: LogFormat,
    shown: String,
}

impl Origin {
    const fn none() -> Self {
        Self { role: "", node: String::new(), format: LogFormat::Text, shown: String::new() }
    }

    fn set(&mut self, change: impl FnOnce(&mut Self)) {
        change(self);
        let named = [("role", self.role), ("node", &self.node)];
        let named = named.into_iter().filter(|(_, value)| !value.is_empty());
        self.shown = match self.format {
            LogFormat::Json => {
                named.map(|(name, value)| format!("{name:?}:{},", json(value))).collect()
            }
            LogFormat::Text => named.map(|(name, value)| format!(" {name}={value:?}")).collect(),
        };
    }

    /// A line of the subscriber, with its origin: the first members of a JSON object, or the last fields of a text.
    fn add_to(&self, line: &[u8]) -> Option<Vec<u8>> {
        let shown = self.shown.as_bytes();
        match (shown, self.format, line) {
            ([], ..) => None,
            (_, LogFormat::Json, [b'{', rest @ ..]) => Some([b"{", shown, rest].concat()),
            (_, LogFormat::Text, [text @ .., b'\n']) => {
                // An event that is about a node names it itself.
                let named = text.windows(NODE.len()).any(|part| part == NODE);
                let shown = match self.shown.split_once(" node=") {
                    Some((role, _)) if named => role.as_bytes(),
                    _ => shown,
                };
                Some([text, shown, b"\n"].concat())
            }
            _ => None,
        }
    }
}

fn json(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_default()
}

/// Checks a value of `log.level`. An unknown name (`verbose`) is refused: `EnvFilter` would take it for a target, and
/// log nothing else.
///
/// # Errors
/// Returns the invalid part, and what to write instead.
pub fn check_level(level: &str) -> Result<(), String> {
    parse_level(level).map(drop)
}

/// The level, without the lines of the client of Redis's announcements, which are Rust's debug output: the roles report
/// its failures in their own. A directive for it turns them on.
fn quiet(level: &str) -> String {
    format!("fred=off,{level}")
}

fn parse_level(level: &str) -> Result<EnvFilter, String> {
    let is_level = |text: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(text));
    // `EnvFilter` accepts any text as a target.
    let is_target = |text: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-:".contains(c);
        !text.is_empty() && text.chars().all(allowed)
    };
    let valid = |part: &str| match part.split_once('=') {
        Some((target, level)) => is_target(target) && is_level(level),
        None => is_level(part),
    };
    // Commas within brackets separate fields of spans.
    let parts: Vec<&str> = match level.contains('[') {
        true => vec![],
        false => level.split(',').map(str::trim).collect(),
    };
    let wrong = parts.iter().find(|part| !valid(part));
    match (wrong, EnvFilter::try_new(quiet(level))) {
        (None, Ok(filter)) => Ok(filter),
        (wrong, _) => {
            let wrong = wrong.unwrap_or(&level);
            let word = wrong.rsplit_once('=').map_or(*wrong, |(_, level)| level);
            let meant = nearest(word, &LEVELS).map(|near| format!("did you mean {near:?}? "));
            Err(format!(
                "log.level: {} is not valid; {}write {}, or directives such as \
                 info,barid_access=debug",
                shown(wrong),
                meant.unwrap_or_default(),
                LEVELS.join(", ")
            ))
        }
    }
}

/// Changes the level.
///
/// # Errors
/// `level` is invalid, or [`init`] has not installed this process's subscriber.
pub fn set_level(level: &str) -> Result<(), String> {
    SET_FILTER.get().ok_or("logs are not set up")?(parse_level(level)?)
}

/// Writes a plain line, after the buffered log lines.
pub fn say(line: &str) {
    stderr().push(format!("{line}\n").as_bytes());
}

/// Waits up to a second until all buffered lines are written. Call it before the process exits.
pub fn flush() {
    if let Some(lines) = STDERR.get() {
        lines.flush(LAST_WORDS);
    }
}

/// Registers `barid_log_lines_dropped_total` and `barid_log_repeats_total`.
///
/// # Errors
/// One is registered already.
pub fn register(registry: &Registry) -> prometheus::Result<()> {
    repeats::register(registry)?;
    let name = "barid_log_lines_dropped_total";
    let help = "Log lines that were lost: full, the reader of stderr is too slow or has stopped; \
                failed, stderr cannot be written";
    let counter = IntCounterVec::new(Opts::new(name, help), &["why"])?;
    registry.register(Box::new(Dropped { lines: stderr(), counter }))
}

/// Logs a panic. The default hook writes to stderr itself, which blocks while nobody reads it.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("unnamed");
    let message = panic.payload_as_str().unwrap_or("not text");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!(thread = name, location, message, %backtrace, "panicked");
    } else {
        tracing::error!(thread = name, location, message, "panicked");
    }
    // A panic of the main thread ends the process, so the line is written at once.
    if name == "main" {
        flush();
    }
}

static STDERR: OnceLock<Arc<Lines>> = OnceLock::new();

/// The buffer in front of stderr. The first call starts its thread.
fn stderr() -> &'static Arc<Lines> {
    STDERR.get_or_init(|| match io::stderr().as_fd().try_clone_to_owned() {
        Ok(stderr) => Lines::to(File::from(stderr)),
        Err(_) => Lines::to(io::sink()),
    })
}

/// Lines to be written, and counts of dropped lines.
#[derive(Debug)]
struct Lines {
    pending: Mutex<Pending>,
    changed: Condvar,
    bytes_max: AtomicUsize,
    full: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug, Default)]
struct Pending {
    text: Vec<u8>,
    /// Bytes being written.
    writing: usize,
}

impl Lines {
    fn to(sink: impl Write + Send + 'static) -> Arc<Self> {
        let lines = Arc::new(Self {
            pending: Mutex::default(),
            changed: Condvar::new(),
            bytes_max: AtomicUsize::new(LOG_BUFFER_BYTES),
            full: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let own = Arc::clone(&lines);
        // If the thread cannot be started, the buffer fills up and further lines are dropped.
        let _ = std::thread::Builder::new().name("log".into()).spawn(move || own.write_to(sink));
        lines
    }

    fn push(&self, line: &[u8]) {
        let mut pending = self.pending.lock();
        let bytes = pending.text.len() + pending.writing + line.len();
        if bytes > self.bytes_max.load(Ordering::Relaxed) {
            drop(pending);
            self.full.fetch_add(count(line), Ordering::Relaxed);
            return;
        }
        pending.text.extend_from_slice(line);
        drop(pending);
        self.changed.notify_all();
    }

    fn dropped(&self) -> u64 {
        self.full.load(Ordering::Relaxed) + self.failed.load(Ordering::Relaxed)
    }

    fn write_to(&self, mut sink: impl Write) {
        let mut told = 0;
        loop {
            let mut pending = self.pending.lock();
            while pending.text.is_empty() {
                self.changed.wait(&mut pending);
            }
            let text = std::mem::take(&mut pending.text);
            pending.writing = text.len();
            drop(pending);
            let written = write_what_is_taken(&mut sink, &text);
            self.failed.fetch_add(count(&text[written..]), Ordering::Relaxed);
            self.pending.lock().writing = 0;
            self.changed.notify_all();
            let dropped = self.dropped();
            if written == text.len() && dropped > told {
                tracing::warn!(lines = dropped - told, "log lines were dropped");
                told = dropped;
            }
        }
    }

    fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut pending = self.pending.lock();
        while pending.writing > 0 || !pending.text.is_empty() {
            if self.changed.wait_until(&mut pending, deadline).timed_out() {
                return;
            }
        }
    }
}

/// Writes until an error. Returns how many bytes were written.
#[allow(clippy::disallowed_methods, reason = "its thread runs no tasks")]
fn write_what_is_taken(sink: &mut impl Write, text: &[u8]) -> usize {
    let mut written = 0;
    while written < text.len() {
        match sink.write(&text[written..]) {
            Ok(0) => break,
            Ok(bytes) => written += bytes,
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => std::thread::sleep(RETRY),
                _ => break,
            },
        }
    }
    written
}

fn count(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The subscriber's writer, called once per line.
struct LineWriter(&'static Arc<Lines>);

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match ORIGIN.read().add_to(line) {
            Some(line) => self.0.push(&line),
            None => self.0.push(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Dropped {
    lines: &'static Arc<Lines>,
    counter: IntCounterVec,
}

impl Collector for Dropped {
    fn desc(&self) -> Vec<&Desc> {
        self.counter.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for (why, now) in [("full", &self.lines.full), ("failed", &self.lines.failed)] {
            let shown = self.counter.with_label_values(&[why]);
            let now = now.load(Ordering::Relaxed);
            shown.inc_by(now.saturating_sub(shown.get()));
        }
        self.counter.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    #[test]
    fn hazard_73_a_level_that_is_not_one_is_refused_with_what_to_write() {
        let told = |level: &str| check_level(level).map_or_else(|told| told, |()| String::new());
        let good = ["info", "INFO", "off", "info,barid_access=debug", "warn,barid::trace=off"];
        for good in good.into_iter().chain(["barid=debug", "info,barid[push]=trace"]) {
            assert_eq!(told(good), "");
        }
        for (level, wrong) in [
            ("info,barid=verbose", "barid=verbose"),
            ("verbose", "verbose"),
            ("warning", "warning"),
            ("", ""),
            ("info,", ""),
            ("info barid=debug", "info barid=debug"),
            ("info;debug", "info;debug"),
            ("barid=debug=info", "barid=debug=info"),
        ] {
            let told = told(level);
            assert!(told.starts_with(&format!("log.level: {wrong:?} is not valid; ")), "{told}");
            assert!(told.ends_with("or directives such as info,barid_access=debug"), "{told}");
        }
    }

    #[test]
    fn hazard_119_each_line_says_which_role_and_node_wrote_it() {
        let mut origin = Origin { format: LogFormat::Json, ..Origin::none() };
        let line = |origin: &Origin, line: &[u8]| {
            origin.add_to(line).map(|line| String::from_utf8(line).unwrap())
        };
        assert_eq!(line(&origin, b"{}\n"), None);
        origin.set(|origin| origin.role = "access");
        assert_eq!(line(&origin, b"{\"a\":1}\n").unwrap(), "{\"role\":\"access\",\"a\":1}\n");
        origin.set(|origin| origin.node = "n\"1".into());
        let told = line(&origin, b"{\"a\":1}\n").unwrap();
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told, serde_json::json!({"role": "access", "node": "n\"1", "a": 1}));
        origin.format = LogFormat::Text;
        origin.set(|origin| origin.node = "n1".into());
        let told = line(&origin, b"INFO starting\n").unwrap();
        assert_eq!(told, "INFO starting role=\"access\" node=\"n1\"\n");
        let told = line(&origin, b"WARN lapsed node=\"n2\"\n").unwrap();
        assert_eq!(told, "WARN lapsed node=\"n2\" role=\"access\"\n", "one node");
    }

    /// As much as fills any pipe.
    const LINES: usize = 20_000;

    /// Started as a process by the other tests; does nothing by itself.
    #[tokio::test(flavor = "multi_thread")]
    async fn logs() {
        let Some(told) = std::env::var_os("LOGS") else { return };
        if std::env::var_os("CLOSED").is_some() {
            // The reader of stderr is gone when the line from stdin arrives.
            io::stdin().read_line(&mut String::new()).unwrap();
        }
        let buffer_bytes_max = 64 << 10;
        init(&LogConfig { buffer_bytes_max, ..Default::default() });
        let loops = (0..4).map(|_| {
            tokio::spawn(async {
                for line in 0..LINES / 4 {
                    tracing::info!(line, "as many as fill any pipe");
                    if line % 64 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            })
        });
        for each in loops.collect::<Vec<_>>() {
            each.await.unwrap();
        }
        let panicked = tokio::spawn(async { panic!("a task of the role") }).await;
        assert!(panicked.unwrap_err().is_panic());
        flush();
        let text = format!(
            "{} {}",
            stderr().full.load(Ordering::Relaxed),
            stderr().failed.load(Ordering::Relaxed)
        );
        std::fs::write(told, text).unwrap();
    }

    fn logging(told: &std::path::Path) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--nocapture", "telemetry::tests::logs"]).env("LOGS", told);
        command.stdout(Stdio::null()).stdin(Stdio::null());
        command
    }

    /// Lines dropped because the buffer was full, and because writing failed.
    #[allow(clippy::disallowed_methods, reason = "a test thread may block")]
    fn told_by(mut child: Child, told: &std::path::Path) -> (u64, u64) {
        let deadline = Instant::now() + Duration::from_secs(120);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = child.kill();
                    panic!("logging blocks the process");
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        assert!(status.success(), "{status}");
        let text = std::fs::read_to_string(told).unwrap();
        let (full, failed) = text.split_once(' ').unwrap();
        (full.parse().unwrap(), failed.parse().unwrap())
    }

    #[test]
    fn hazard_53_a_reader_of_stderr_that_went_away_costs_lines_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let mut command = logging(&told);
        command.env("CLOSED", "1").stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stderr.take());
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let (full, failed) = told_by(child, &told);
        assert!(full + failed >= LINES as u64, "{full} {failed}");
    }

    #[test]
    fn hazard_53_a_full_disk_behind_stderr_costs_lines_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (full, failed) = told_by(logging(&told).stderr(full).spawn().unwrap(), &told);
        assert!(full + failed >= LINES as u64, "{full} {failed}");
    }

    #[test]
    fn hazard_53_a_reader_of_stderr_that_stands_still_blocks_no_loop() {
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let mut child = logging(&told).stderr(Stdio::piped()).spawn().unwrap();
        let _unread = child.stderr.take();
        let (full, failed) = told_by(child, &told);
        assert!(full > 0 && failed == 0, "{full} {failed}");
    }

    #[test]
    fn hazard_53_dropped_lines_are_told_when_stderr_is_read_again() {
        let (reader, writer) = io::pipe().unwrap();
        let lines = Lines::to(writer);
        lines.bytes_max.store(256 << 10, Ordering::Relaxed);
        let line = [b'x'; 999].into_iter().chain([b'\n']).collect::<Vec<_>>();
        for _ in 0..1000 {
            lines.push(&line);
        }
        assert!(lines.full.load(Ordering::Relaxed) > 0);
        let read = std::thread::spawn(move || {
            let mut reader = reader;
            io::copy(&mut reader, &mut io::sink())
        });
        lines.flush(Duration::from_secs(60));
        assert_eq!(lines.pending.lock().text.len(), 0);
        assert_eq!(lines.failed.load(Ordering::Relaxed), 0);
        drop(read);
    }
}
