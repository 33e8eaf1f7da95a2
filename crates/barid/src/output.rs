//! Output: aligned text, or JSON with one object per line.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use serde::Serialize;

/// How to print. Colours are used on a terminal if `NO_COLOR` is not set.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
    colour: bool,
    /// Errors of stdout are ignored.
    lenient: bool,
}

/// The meaning of a piece of text, which selects its colour.
#[derive(Debug, Clone, Copy)]
pub enum Tone {
    Strong,
    Faint,
    Good,
    Warn,
    Bad,
}

impl Output {
    pub fn new(json: bool) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { json, colour: !json && !plain && io::stdout().is_terminal(), lenient: false }
    }

    /// Text without colours.
    #[cfg(test)]
    pub fn plain() -> Self {
        Self { json: false, colour: false, lenient: false }
    }

    /// Whether the output is JSON.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Ignores errors of stdout (a closed pipe, a full disk): for commands that do more than print.
    pub fn lenient(self) -> Self {
        Self { lenient: true, ..self }
    }

    /// Prints a line of text.
    pub fn line(self, text: impl Display) -> io::Result<()> {
        self.print(format!("{text}\n").as_bytes())
    }

    fn print(self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let printed = out.write_all(bytes).and_then(|()| out.flush());
        if self.lenient { Ok(()) } else { printed }
    }

    /// Prints an object.
    pub fn object(self, object: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(object)?;
        line.push(b'\n');
        self.print(&line)
    }

    /// Prints an object if the output is JSON, else a line of text.
    pub fn either(self, object: &impl Serialize, line: impl FnOnce() -> String) -> io::Result<()> {
        if self.json { self.object(object) } else { self.line(line()) }
    }

    /// Prints a note to stderr.
    pub fn note(self, text: impl Display) {
        // An error of stderr cannot be reported.
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// Colours a text.
    pub fn paint(self, tone: Tone, text: impl Display) -> String {
        let code = match tone {
            _ if !self.colour => return text.to_string(),
            Tone::Strong => "1",
            Tone::Faint => "2",
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Prints an error and returns the exit code. A closed pipe is not an error.
    pub fn fail(self, error: &anyhow::Error) -> ExitCode {
        let gone = error
            .chain()
            .filter_map(|cause| cause.downcast_ref::<io::Error>())
            .any(|io| io.kind() == io::ErrorKind::BrokenPipe);
        if gone {
            return ExitCode::SUCCESS;
        }
        #[derive(Serialize)]
        struct Failure {
            error: String,
        }
        if self.json {
            let failure = Failure { error: format!("{error:#}") };
            self.note(serde_json::to_string(&failure).unwrap_or_default());
        } else {
            self.note(format_args!("barid: {error:#}"));
        }
        ExitCode::FAILURE
    }
}

/// Removes control characters from text of others: a terminal would interpret them.
pub fn clean(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

/// A time of day (UTC).
pub fn clock(at_ms: u64) -> String {
    let (seconds, millis) = (at_ms / 1000, at_ms % 1000);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{h:02}:{m:02}:{s:02}.{millis:03}")
}

/// A duration in one unit.
pub fn span(millis: u64) -> String {
    match millis {
        0..1_000 => format!("{millis} ms"),
        1_000..120_000 => format!("{:.1} s", millis as f64 / 1e3),
        120_000..7_200_000 => format!("{} min", millis / 60_000),
        7_200_000..172_800_000 => format!("{} h", millis / 3_600_000),
        _ => format!("{} d", millis / 86_400_000),
    }
}

/// A size in one unit.
pub fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{:.1} KB", count as f64 / 1e3),
        _ => format!("{:.1} MB", count as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        assert_eq!(clean("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(clean("برید ü"), "برید ü");
    }

    #[test]
    fn quantities_are_short() {
        assert_eq!(clock(3_723_004), "01:02:03.004");
        assert_eq!(
            (span(7), span(2_500), span(600_000)),
            ("7 ms".into(), "2.5 s".into(), "10 min".into())
        );
        assert_eq!((bytes(7), bytes(12_345)), ("7 B".into(), "12.3 KB".into()));
    }

    #[test]
    fn json_has_no_colour() {
        assert_eq!(Output { json: true, colour: false, lenient: false }.paint(Tone::Bad, "x"), "x");
    }
}
