//! Output: aligned text, or JSON with one object per line.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use barid_runtime::exit;
use serde::Serialize;

/// An error with an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub struct Coded {
    /// One of [`exit`].
    pub code: u8,
    problem: String,
}

impl Coded {
    /// The arguments, or the configuration, have to be changed.
    pub fn config(problem: impl Into<String>) -> Self {
        Self { code: exit::CONFIG, problem: problem.into() }
    }

    /// The time was over first.
    pub fn cut(problem: impl Into<String>) -> Self {
        Self { code: exit::CUT, problem: problem.into() }
    }

    /// Something does not answer.
    pub fn away(problem: impl Into<String>) -> Self {
        Self { code: exit::AWAY, problem: problem.into() }
    }
}

/// The exit code of an error.
fn code_of(error: &anyhow::Error) -> u8 {
    let of = |cause: &(dyn std::error::Error + 'static)| {
        if let Some(coded) = cause.downcast_ref::<Coded>() {
            return Some(coded.code);
        }
        if let Some(redis) = cause.downcast_ref::<barid_mailbox::Error>() {
            return match redis {
                error if error.is_away() => Some(exit::AWAY),
                error if error.is_config() => Some(exit::CONFIG),
                _ => None,
            };
        }
        let own = |error: &barid_bus::Error| match error {
            barid_bus::Error::Away(_) => Some(exit::AWAY),
            barid_bus::Error::Config(_) => Some(exit::CONFIG),
            _ => None,
        };
        match cause.downcast_ref::<rdkafka::error::KafkaError>() {
            Some(kafka) => own(&barid_bus::Error::from(kafka.clone())),
            None => cause.downcast_ref::<barid_bus::Error>().and_then(own),
        }
    };
    error.chain().find_map(of).unwrap_or(exit::FAILED)
}

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
        ExitCode::from(code_of(error))
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
    fn hazard_113_an_error_ends_with_the_code_of_its_cause() {
        use anyhow::Context as _;
        let code = |error: anyhow::Error| code_of(&error);
        let redis =
            |error: barid_mailbox::Error| code(Err::<(), _>(error).context("a").unwrap_err());
        assert_eq!(redis(barid_mailbox::Error::Away("a".into())), 4);
        assert_eq!(redis(barid_mailbox::Error::Unusable("a".into())), 2);
        assert_eq!(redis(barid_mailbox::Error::Full("a".into())), 1);
        let kafka = |code| rdkafka::error::KafkaError::MetadataFetch(code);
        let away = kafka(rdkafka::types::RDKafkaErrorCode::BrokerTransportFailure);
        assert_eq!(code(away.into()), 4);
        let refused = kafka(rdkafka::types::RDKafkaErrorCode::TopicAuthorizationFailed);
        assert_eq!(code(refused.into()), 1);
        assert_eq!(code(anyhow::anyhow!("a")), 1);
        assert_eq!(code(Coded::cut("a").into()), 3);
        assert_eq!(code(Coded::config("a").into()), 2);
    }

    #[test]
    fn json_has_no_colour() {
        assert_eq!(Output { json: true, colour: false, lenient: false }.paint(Tone::Bad, "x"), "x");
    }
}
