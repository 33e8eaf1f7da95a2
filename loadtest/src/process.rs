//! CPU time, memory and files of processes, from `/proc`.

use std::fs;

use anyhow::Context as _;

/// Clock ticks per second in `/proc/<pid>/stat`: fixed by the kernel's interface.
const TICKS_PER_S: f64 = 100.0;

/// User and system time of a process since its start.
pub fn cpu_s(pid: u32) -> anyhow::Result<f64> {
    seconds(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
}

pub fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/<pid>/status has no VmRSS")? * 1024)
}

/// Open files of a process, sockets included.
pub fn open_files(pid: u32) -> anyhow::Result<u64> {
    let directory = format!("/proc/{pid}/fd");
    // Linux 6.2 and later report their number; listing 20,000 once per second takes a tenth of a core.
    match fs::metadata(&directory)?.len() {
        0 => Ok(fs::read_dir(directory)?.count() as u64),
        count => Ok(count),
    }
}

fn seconds(stat: &str) -> anyhow::Result<f64> {
    let (_, rest) = stat.rsplit_once(") ").context("/proc/<pid>/stat has no name")?;
    let mut fields = rest.split(' ').skip(11);
    let mut ticks = || fields.next().and_then(|field| field.parse::<f64>().ok());
    let (user, system) = ticks().zip(ticks()).context("/proc/<pid>/stat has no times")?;
    Ok((user + system) / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn times_are_read_behind_any_name() {
        let stat = "12 (rdk:broker (1) x) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20";
        assert_eq!(seconds(stat).unwrap(), 3.0);
    }

    #[test]
    fn this_process_takes_time() {
        let (before, started) = (cpu_s(std::process::id()).unwrap(), Instant::now());
        while cpu_s(std::process::id()).unwrap() <= before {
            assert!(started.elapsed() < Duration::from_secs(30), "{before}");
        }
    }

    #[test]
    fn memory_that_is_written_is_resident() {
        let pid = std::process::id();
        let before = resident_bytes(pid).unwrap();
        let written = vec![1_u8; 256 << 20];
        // Other tests in this process may free memory meanwhile, but not half as much.
        assert!(resident_bytes(pid).unwrap() > before + (128 << 20), "{}", written.len());
    }
}
