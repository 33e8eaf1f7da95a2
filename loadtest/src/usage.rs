//! Memory, CPU time, files and tasks of a server's processes: on this machine from `/proc`, elsewhere from
//! `/metrics`.

use std::net::SocketAddr;

use barid_runtime::exposition::Metrics;
use barid_testkit::http;
use futures::future::try_join_all;

use crate::process;

/// Where usage is read.
#[derive(Debug, Clone, Default)]
pub enum Source {
    #[default]
    Unknown,
    /// Processes of this machine.
    Processes(Vec<u32>),
    /// Admin addresses.
    Scraped(Vec<SocketAddr>),
}

/// Sums over all processes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    pub resident_bytes: u64,
    /// User and system time since the processes started.
    pub cpu_s: f64,
    /// Open files, sockets included.
    pub open_files: u64,
    /// Tasks that have not ended; only `/metrics` has them.
    pub tasks: Option<u64>,
}

impl Source {
    /// The present usage; `None` if the source is unknown.
    pub async fn read(&self) -> anyhow::Result<Option<Usage>> {
        match self {
            Self::Unknown => Ok(None),
            Self::Processes(pids) => {
                let each = pids.iter().map(|pid| of_process(*pid));
                Ok(Some(each.sum::<anyhow::Result<Usage>>()?))
            }
            Self::Scraped(addresses) => {
                let each = addresses.iter().map(|address| http::get(*address, "/metrics"));
                let texts = try_join_all(each).await?;
                Ok(Some(texts.iter().map(|(_, text)| of_metrics(text)).sum()))
            }
        }
    }
}

impl std::iter::Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), |sum, usage| Self {
            resident_bytes: sum.resident_bytes + usage.resident_bytes,
            cpu_s: sum.cpu_s + usage.cpu_s,
            open_files: sum.open_files + usage.open_files,
            tasks: usage.tasks.map(|tasks| tasks + sum.tasks.unwrap_or_default()).or(sum.tasks),
        })
    }
}

fn of_process(pid: u32) -> anyhow::Result<Usage> {
    Ok(Usage {
        resident_bytes: process::resident_bytes(pid)?,
        cpu_s: process::cpu_s(pid)?,
        open_files: process::open_files(pid)?,
        tasks: None,
    })
}

fn of_metrics(text: &str) -> Usage {
    let metrics = Metrics::parse(text);
    Usage {
        resident_bytes: metrics.sum("process_resident_memory_bytes") as u64,
        cpu_s: metrics.sum("process_cpu_seconds_total"),
        open_files: metrics.sum("process_open_fds") as u64,
        tasks: Some(metrics.sum("barid_tasks") as u64).filter(|tasks| *tasks > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_add_up() {
        let node = "process_resident_memory_bytes 1000\nprocess_cpu_seconds_total 1.5\nprocess_open_fds 7\nbarid_tasks 9\n";
        let usage = [node, node].into_iter().map(of_metrics).sum::<Usage>();
        assert_eq!(
            usage,
            Usage { resident_bytes: 2000, cpu_s: 3.0, open_files: 14, tasks: Some(18) }
        );
    }

    #[tokio::test]
    async fn this_process_is_known() {
        let usage = Source::Processes(vec![std::process::id()]).read().await.unwrap().unwrap();
        assert!(usage.resident_bytes > 1 << 20 && usage.open_files >= 3, "{usage:?}");
        assert_eq!(Source::Unknown.read().await.unwrap(), None);
    }
}
