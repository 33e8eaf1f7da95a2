//! The number of threads that run a role's tasks.

use std::num::NonZeroUsize;
use std::thread::available_parallelism;

/// Tokio's own variable, which overrides the number found.
const VARIABLE: &str = "TOKIO_WORKER_THREADS";
const WORKERS_MAX: usize = 1024;

/// The number of threads that run a process's tasks, and where it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workers {
    /// 1 to 1024.
    pub count: usize,
    /// `TOKIO_WORKER_THREADS`, or `cpus`: the CPUs that the process may use.
    pub from: &'static str,
}

impl Workers {
    /// One thread for each CPU that the process may use. On Linux, [`available_parallelism`] respects the CPU
    /// affinity (with cpusets) and the CPU quotas of the process's cgroup and its ancestors, rounded down to at least
    /// one (`cpu.max` of version 2, `cpu.cfs_quota_us` of version 1). With more workers than quota, a process would
    /// use up the quota early in a period and be throttled until its end.
    ///
    /// # Errors
    /// Returns what is wrong with `TOKIO_WORKER_THREADS`.
    pub fn find() -> Result<Self, String> {
        match std::env::var_os(VARIABLE) {
            None => Ok(Self {
                count: available_parallelism().map_or(1, NonZeroUsize::get),
                from: "cpus",
            }),
            Some(text) => match text.to_str().and_then(|text| text.parse().ok()) {
                Some(count @ 1..=WORKERS_MAX) => Ok(Self { count, from: VARIABLE }),
                _ => Err(format!(
                    "{VARIABLE} must be a number from 1 to {WORKERS_MAX}, not {text:?}"
                )),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// Started as a process by the other tests; does nothing by itself.
    #[test]
    fn tells() {
        let Some(told) = std::env::var_os("TOLD") else { return };
        let found = Workers::find().map(|found| format!("{} {}", found.count, found.from));
        std::fs::write(told, found.unwrap_or_else(|error| error)).unwrap();
    }

    /// The worker count that such a process finds if it is started through the command `through`.
    fn told_by(through: &[&str], variable: Option<&str>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let program = std::env::current_exe().unwrap();
        let mut words = through.iter().map(Path::new).chain([program.as_path()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(["--exact", "workers::tests::tells"]);
        command.env("TOLD", &told).env_remove(VARIABLE);
        if let Some(value) = variable {
            command.env(VARIABLE, value);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        std::fs::read_to_string(told).unwrap()
    }

    #[test]
    fn workers_are_as_many_as_the_affinity_allows() {
        let all = available_parallelism().unwrap();
        assert_eq!(told_by(&[], None), format!("{all} cpus"));
        let first = std::fs::read_to_string("/proc/self/status").unwrap();
        let first = first.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        let first = first.trim().split([',', '-']).next().unwrap().to_owned();
        assert_eq!(told_by(&["taskset", "-c", &first], None), "1 cpus");
    }

    /// Where this may make a cgroup: as root, and with a hierarchy of version 1 that can be written.
    #[test]
    fn workers_are_as_many_as_the_quota_allows() {
        let dir = format!("/sys/fs/cgroup/cpu/barid-workers-{}", std::process::id());
        if !Path::new("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists()
            || std::fs::create_dir(&dir).is_err()
        {
            return;
        }
        let enter = format!("echo $$ >{dir}/cgroup.procs && exec \"$0\" \"$@\"");
        let mut found = Vec::new();
        for quota_us in ["50000", "100000", "199000"] {
            std::fs::write(format!("{dir}/cpu.cfs_quota_us"), quota_us).unwrap();
            found.push(told_by(&["sh", "-c", &enter], None));
        }
        std::fs::remove_dir(&dir).unwrap();
        assert_eq!(found, ["1 cpus", "1 cpus", "1 cpus"]);
    }

    #[test]
    fn the_variable_overrides_and_is_checked() {
        assert_eq!(told_by(&[], Some("7")), "7 TOKIO_WORKER_THREADS");
        for bad in ["", "0", "two", "-1", "1025"] {
            let told = told_by(&[], Some(bad));
            assert!(told.starts_with("TOKIO_WORKER_THREADS must be"), "{bad:?}: {told}");
        }
    }
}
