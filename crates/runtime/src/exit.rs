//! The exit codes of all programs.

/// Drained, or done.
pub const DONE: u8 = 0;
/// Failed.
pub const FAILED: u8 = 1;
/// The configuration or the arguments are invalid, or name a dependency that cannot be used.
pub const CONFIG: u8 = 2;
/// A deadline, or a second signal, cut off what was unfinished.
pub const CUT: u8 = 3;
/// A dependency does not answer.
pub const AWAY: u8 = 4;

/// Each code with its meaning in a role, and in the command line.
pub const ALL: [(u8, &str, &str); 5] = [
    (DONE, "drained, or `--check-config` found nothing but warnings", "done"),
    (FAILED, "failed; the last lines of the log say why", "failed, or the cluster refused"),
    (
        CONFIG,
        "invalid arguments or configuration, or a Kafka or Redis that cannot be used with it",
        "invalid arguments, or a Redis that cannot be used",
    ),
    (
        CUT,
        "the drain deadline or a second signal cut work off; the log says what and how much",
        "the time was over first: `send --wait`, `listen --count`",
    ),
    (
        AWAY,
        "`--check-config --connect`: a dependency does not answer",
        "Kafka, Redis or a node does not answer",
    ),
];

/// The codes for `--help`. `meaning` selects that of a role or of the command line.
pub fn help(meaning: impl Fn(&(u8, &'static str, &'static str)) -> &'static str) -> String {
    let lines = ALL.iter().map(|row| format!("  {}  {}", row.0, meaning(row).replace('`', "")));
    format!("Exit codes:\n{}", lines.collect::<Vec<_>>().join("\n"))
}
