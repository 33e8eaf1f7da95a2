//! Where and when something was measured.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A machine, as far as it tells. Field names are stable.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Cores that this process may keep busy.
    pub cores: usize,
    /// All of it.
    pub memory_bytes: u64,
    /// The distribution.
    pub os: String,
    /// Name and release.
    pub kernel: String,
    /// Runnable tasks over the minute before: what else ran.
    pub load_before: f64,
}

impl Machine {
    /// This one.
    pub fn find() -> Self {
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

/// The value of the first line with this name; empty: there is none.
fn field(text: &str, name: &str, separator: char) -> String {
    let value = text.lines().find_map(|line| {
        line.split_once(separator).filter(|(known, _)| known.trim() == name).map(|(_, value)| value)
    });
    value.unwrap_or_default().trim().trim_matches('"').to_owned()
}

/// The commit of the work tree in which this program was built, `-dirty` where it differs from it.
pub fn commit() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let mut git = Command::new("git");
    git.arg("-C").arg(program.parent()?).args(["describe", "--always", "--dirty", "--abbrev=12"]);
    let output = git.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| output.status.success() && !text.is_empty())
}

/// The time, UTC, RFC 3339.
pub fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    rfc3339(now.as_secs())
}

/// Seconds since the Unix epoch as a date. The calendar is Hinnant's `civil_from_days`.
fn rfc3339(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let from_march = days + 719_468;
    let (era, day_of_era) = (from_march / 146_097, from_march % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(4_107_542_399), "2100-02-28T23:59:59Z");
    }

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::find();
        assert!(machine.cores > 0 && machine.memory_bytes > 1 << 28, "{machine:?}");
        assert_eq!(field("model name\t: A B\n", "model name", ':'), "A B");
        assert_eq!(field("PRETTY_NAME=\"X 1\"\n", "PRETTY_NAME", '='), "X 1");
    }
}
