//! The machine, commit and time of a measurement.

use std::fs;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use time::UtcDateTime;
use time::format_description::well_known::Rfc3339;

/// Field names are stable.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    pub memory_bytes: u64,
    /// The distribution.
    pub os: String,
    pub kernel: String,
    /// Load average of the last minute before the run.
    pub load_before: f64,
}

impl Machine {
    pub fn this() -> Self {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let memory = field(&file("/proc/meminfo"), "MemTotal", ':');
        let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or_default();
        let load = file("/proc/loadavg");
        Self {
            cpu: field(&file("/proc/cpuinfo"), "model name", ':'),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_bytes: kib * 1024,
            os: field(&file("/etc/os-release"), "PRETTY_NAME", '='),
            kernel: format!("Linux {}", file("/proc/sys/kernel/osrelease").trim()),
            load_before: load.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default(),
        }
    }
}

/// The value of the first line with this name, or an empty string.
fn field(text: &str, name: &str, separator: char) -> String {
    let value = text.lines().find_map(|line| {
        line.split_once(separator).filter(|(known, _)| known.trim() == name).map(|(_, value)| value)
    });
    value.unwrap_or_default().trim().trim_matches('"').to_owned()
}

/// The commit of the work tree that contains this program's file, with `-dirty` if the tree has changes.
pub fn commit() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let mut git = Command::new("git");
    git.arg("-C").arg(program.parent()?).args(["describe", "--always", "--dirty", "--abbrev=12"]);
    let output = git.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| output.status.success() && !text.is_empty())
}

/// The present time, UTC, RFC 3339.
pub fn now() -> String {
    let now = UtcDateTime::now().replace_nanosecond(0).unwrap_or(UtcDateTime::UNIX_EPOCH);
    now.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::this();
        assert!(machine.cores > 0 && machine.memory_bytes > 1 << 28, "{machine:?}");
        assert_eq!(field("model name\t: A B\n", "model name", ':'), "A B");
        assert_eq!(field("PRETTY_NAME=\"X 1\"\n", "PRETTY_NAME", '='), "X 1");
    }
}
