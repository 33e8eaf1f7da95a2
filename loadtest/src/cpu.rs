//! CPU time, memory and files of processes, from `/proc`.

use std::fs;

use anyhow::Context as _;

/// Clock ticks a second of `/proc/<pid>/stat`: fixed by the kernel's interface.
const TICKS_PER_S: f64 = 100.0;

/// User and system seconds of a process since its start.
///
/// # Errors
/// It is gone.
pub fn of_process(pid: u32) -> anyhow::Result<f64> {
    seconds(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
}

/// Bytes of a process in RAM.
///
/// # Errors
/// It is gone.
pub fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("no VmRSS in a status")? * 1024)
}

/// Files that a process has open, sockets included.
///
/// # Errors
/// It is gone, or another user's.
pub fn open_files(pid: u32) -> anyhow::Result<u64> {
    let directory = format!("/proc/{pid}/fd");
    // Linux tells their number since 6.2; to list twenty thousand once a second costs a tenth of a core.
    match fs::metadata(&directory)?.len() {
        0 => Ok(fs::read_dir(directory)?.count() as u64),
        count => Ok(count),
    }
}

fn seconds(stat: &str) -> anyhow::Result<f64> {
    let (_, rest) = stat.rsplit_once(") ").context("no name in a stat line")?;
    let mut fields = rest.split(' ').skip(11);
    let mut ticks = || fields.next().and_then(|field| field.parse::<f64>().ok());
    let (user, system) = ticks().zip(ticks()).context("no times in a stat line")?;
    Ok((user + system) / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_behind_any_name() {
        let stat = "12 (rdk:broker (1) x) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20";
        assert_eq!(seconds(stat).unwrap(), 3.0);
    }

    #[test]
    fn this_process_takes_time() {
        let begun = of_process(std::process::id()).unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_millis(100);
        while std::time::Instant::now() < until {}
        assert!(of_process(std::process::id()).unwrap() > begun);
    }

    #[test]
    fn memory_that_is_written_is_resident() {
        let pid = std::process::id();
        let before = resident_bytes(pid).unwrap();
        let written = vec![1_u8; 64 << 20];
        assert!(resident_bytes(pid).unwrap() > before + (60 << 20), "{}", written.len());
    }
}
