//! The bound on a node's memory. Above a high-water mark of queued bytes or of resident memory, the node refuses new
//! handshakes and closes the sessions with the largest queues, until both are below their low-water marks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use barid_core::CloseCode;
use barid_session::Close;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::LimitsConfig;
use crate::handle::Handle;
use crate::labels::Limit;
use crate::metrics::Metrics;
use crate::node::Node;
use crate::registry::Registry;

/// How often queued bytes are checked, and after how many checks resident memory. The latter is slower: memory that was
/// just freed is still counted in it.
const LOOK: Duration = Duration::from_millis(100);
const LOOKS_PER_RESIDENT: u32 = 10;
/// The low-water mark, as a share of the high-water mark.
const LOW_WATER: f64 = 0.9;
/// Default high-water mark of resident memory, as a share of the cgroup's limit.
const CGROUP_SHARE: f64 = 0.8;
/// Smaller queues are not closed: that would free too little.
const QUEUE_BYTES_MIN: usize = 16 << 10;

/// The high-water marks, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// The bound of the bytes queued for all sessions.
    pub queued: u64,
    /// The bound of resident memory; `None` if there is none.
    pub resident: Option<u64>,
}

/// Memory in use, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InUse {
    queued: u64,
    resident: u64,
}

impl Marks {
    /// Reads the configuration. Without `memory_bytes_max`, the cgroup's limit bounds resident memory.
    pub fn new(limits: &LimitsConfig) -> Self {
        let resident = match limits.memory_bytes_max {
            0 => cgroup_limit(Path::new("/")).map(|limit| (limit as f64 * CGROUP_SHARE) as u64),
            configured => Some(configured),
        };
        Self { queued: limits.node_queued_bytes_max, resident }
    }

    /// Whether memory is short; `was_short` is the last answer, for the hysteresis.
    fn is_short(&self, in_use: InUse, was_short: bool) -> bool {
        let mark = |high: u64| if was_short { low(high) } else { high };
        in_use.queued > mark(self.queued)
            || self.resident.is_some_and(|high| in_use.resident > mark(high))
    }

    /// Bytes above the low-water mark, which have to be freed.
    fn excess(&self, in_use: InUse) -> u64 {
        let queued = in_use.queued.saturating_sub(low(self.queued));
        let resident = self.resident.map_or(0, |high| in_use.resident.saturating_sub(low(high)));
        queued.max(resident)
    }
}

/// Resident memory per session.
#[derive(Debug, Default)]
struct Density {
    /// Resident memory when the node last had no session.
    empty: u64,
}

impl Density {
    /// Average resident bytes of a session; 0 without sessions.
    fn session_bytes(&mut self, resident: u64, sessions: u64) -> u64 {
        if sessions == 0 {
            self.empty = resident;
        }
        resident.saturating_sub(self.empty).checked_div(sessions).unwrap_or(0)
    }
}

fn low(high: u64) -> u64 {
    (high as f64 * LOW_WATER) as u64
}

/// Watches the node's memory. Never returns.
pub async fn guard(node: Arc<Node>, marks: Marks) {
    tracing::info!(queued = marks.queued, resident = marks.resident, "memory bounds, bytes");
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut looks, mut resident, mut was_short) = (0_u32, 0, false);
    let mut density = Density::default();
    loop {
        look.tick().await;
        let read_resident = looks.is_multiple_of(LOOKS_PER_RESIDENT);
        looks = looks.wrapping_add(1);
        if read_resident {
            resident = resident_bytes().unwrap_or(0);
            let sessions = u64::try_from(node.metrics.sessions.get()).unwrap_or(0);
            let each = density.session_bytes(resident, sessions);
            node.metrics.session_bytes.set(i64::try_from(each).unwrap_or(i64::MAX));
        }
        let queued = u64::try_from(node.metrics.queued_bytes.get()).unwrap_or(0);
        let in_use = InUse { queued, resident };
        let short = marks.is_short(in_use, was_short);
        node.policy.admission.set_memory_short(short);
        if short != was_short {
            tracing::warn!(short, queued, resident, "memory pressure changed");
            was_short = short;
        }
        // A stale value of resident memory would close too many sessions.
        let current = InUse { resident: if read_resident { resident } else { 0 }, ..in_use };
        let excess = marks.excess(current);
        if short && excess > 0 {
            close_largest(&node.sessions.registry, &node.metrics, excess);
        }
    }
}

/// Closes the sessions with the largest queues, until `excess` bytes are freed.
fn close_largest(registry: &Registry, metrics: &Metrics, excess: u64) {
    for handle in largest(registry.all(), excess) {
        metrics.limit(Limit::MemoryClosed);
        let text = "the node is short of memory, and this device's queue is one of the largest";
        handle.close(Close::new(CloseCode::SlowConsumer, text));
    }
}

/// The sessions with the largest queues, which together hold `bytes`.
fn largest(handles: Vec<Arc<Handle>>, bytes: u64) -> impl Iterator<Item = Arc<Handle>> {
    let mut queues: Vec<_> = handles
        .into_iter()
        .map(|handle| (handle.queued_bytes(), handle))
        .filter(|(queued, _)| *queued >= QUEUE_BYTES_MIN)
        .collect();
    queues.sort_unstable_by_key(|(queued, _)| std::cmp::Reverse(*queued));
    let mut left = bytes;
    queues.into_iter().map_while(move |(queued, handle)| {
        let wanted = left > 0;
        left = left.saturating_sub(queued as u64);
        wanted.then_some(handle)
    })
}

/// Resident memory of this process; `None` without /proc.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The memory limit of the process's cgroup (version 2 or 1), below `root`; `None`: unlimited.
fn cgroup_limit(root: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut limits = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        let (base, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        // In a container, the process's own cgroup is mounted at the root.
        let own = [root.join(base).join(path).join(file), root.join(base).join(file)];
        own.iter().find_map(|file| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok())
    });
    // Version 1 says "no limit" with a number of about 2^63.
    limits.by_ref().filter(|limit| *limit < 1 << 60).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::tests::handle;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_is_short_above_the_mark_until_it_is_well_below() {
        let marks = Marks { queued: 100, resident: Some(1000) };
        let in_use = |queued, resident| InUse { queued, resident };
        assert!(!marks.is_short(in_use(100, 1000), false));
        assert!(marks.is_short(in_use(101, 0), false));
        assert!(marks.is_short(in_use(95, 0), true));
        assert!(!marks.is_short(in_use(90, 900), true));
        assert!(marks.is_short(in_use(0, 1001), false));
        assert_eq!(marks.excess(in_use(130, 0)), 40);
        assert_eq!(marks.excess(in_use(130, 1200)), 300);
        assert!(!Marks { resident: None, ..marks }.is_short(in_use(0, u64::MAX), false));
    }

    #[test]
    fn a_session_weighs_what_the_node_grew_by_since_it_had_none() {
        let mut density = Density::default();
        assert_eq!(density.session_bytes(20 * MIB, 0), 0);
        assert_eq!(density.session_bytes(22 * MIB, 1024), 2048);
        assert_eq!(density.session_bytes(19 * MIB, 1024), 0, "it shrank");
        assert_eq!(density.session_bytes(21 * MIB, 0), 0);
        assert_eq!(density.session_bytes(22 * MIB, 1024), 1024);
    }

    #[test]
    fn the_largest_queues_go_first_and_no_more_than_needed() {
        let sizes = [1, 5, 3, 4].map(|mib| mib * MIB as usize);
        let handles: Vec<_> = (0..5).map(handle).collect();
        for (handle, size) in handles.iter().zip(sizes.into_iter().chain([QUEUE_BYTES_MIN - 1])) {
            handle.set_queued_bytes(size);
        }
        let closed = |bytes| -> Vec<u64> {
            largest(handles.clone(), bytes).map(|handle| handle.connection.0).collect()
        };
        assert_eq!(closed(0), [0_u64; 0]);
        assert_eq!(closed(1), [1]);
        assert_eq!(closed(5 * MIB + 1), [1, 3]);
        assert_eq!(closed(100 * MIB), [1, 3, 2, 0], "a tiny queue stays");
    }

    #[test]
    fn the_limit_of_the_cgroup_is_found_in_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(cgroup_limit(root.path()), None);
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        assert_eq!(cgroup_limit(root.path()), None);
        write("sys/fs/cgroup/a/b/memory.max", "1048576\n");
        assert_eq!(cgroup_limit(root.path()), Some(MIB));
        write("proc/self/cgroup", "9:cpu:/x\n4:hugetlb,memory:/docker/1\n0::/\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(cgroup_limit(root.path()), None);
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2097152\n");
        assert_eq!(cgroup_limit(root.path()), Some(2 * MIB));
        assert!(resident_bytes().is_some_and(|bytes| bytes > MIB));
    }
}
