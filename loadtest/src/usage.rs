//! What a server's processes take: of this machine from `/proc`, of others from their `/metrics`.

use std::net::SocketAddr;

use barid_runtime::exposition::Metrics;
use barid_testkit::http;
use futures::future::try_join_all;

use crate::cpu;

/// Where it is read.
#[derive(Debug, Clone, Default)]
pub enum Usage {
    /// Nowhere.
    #[default]
    Unknown,
    /// Processes of this machine; what they take is added up.
    Processes(Vec<u32>),
    /// Admin addresses; what they take is added up.
    Scraped(Vec<SocketAddr>),
}

/// What processes take.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Taken {
    /// Memory in RAM.
    pub resident_bytes: u64,
    /// User and system seconds since the start.
    pub cpu_s: f64,
    /// Files that are open, sockets included.
    pub open_files: u64,
    /// Tasks that have not ended; `None`: only `/metrics` knows.
    pub tasks: Option<u64>,
}

impl Usage {
    /// What is taken now; `None`: it is not known.
    ///
    /// # Errors
    /// A process is gone or does not answer.
    pub async fn now(&self) -> anyhow::Result<Option<Taken>> {
        match self {
            Self::Unknown => Ok(None),
            Self::Processes(pids) => {
                let each = pids.iter().map(|pid| of_process(*pid));
                Ok(Some(each.sum::<anyhow::Result<Taken>>()?))
            }
            Self::Scraped(addresses) => {
                let each = addresses.iter().map(|address| http::get(*address, "/metrics"));
                let texts = try_join_all(each).await?;
                Ok(Some(texts.iter().map(|(_, text)| of_metrics(text)).sum()))
            }
        }
    }
}

impl std::iter::Sum for Taken {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), |sum, taken| Self {
            resident_bytes: sum.resident_bytes + taken.resident_bytes,
            cpu_s: sum.cpu_s + taken.cpu_s,
            open_files: sum.open_files + taken.open_files,
            tasks: taken.tasks.map(|tasks| tasks + sum.tasks.unwrap_or_default()).or(sum.tasks),
        })
    }
}

fn of_process(pid: u32) -> anyhow::Result<Taken> {
    Ok(Taken {
        resident_bytes: cpu::resident_bytes(pid)?,
        cpu_s: cpu::of_process(pid)?,
        open_files: cpu::open_files(pid)?,
        tasks: None,
    })
}

fn of_metrics(text: &str) -> Taken {
    let metrics = Metrics::parse(text);
    Taken {
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
        let taken = [node, node].into_iter().map(of_metrics).sum::<Taken>();
        assert_eq!(
            taken,
            Taken { resident_bytes: 2000, cpu_s: 3.0, open_files: 14, tasks: Some(18) }
        );
    }

    #[tokio::test]
    async fn this_process_is_known() {
        let taken = Usage::Processes(vec![std::process::id()]).now().await.unwrap().unwrap();
        assert!(taken.resident_bytes > 1 << 20 && taken.open_files >= 3, "{taken:?}");
        assert_eq!(Usage::Unknown.now().await.unwrap(), None);
    }
}
