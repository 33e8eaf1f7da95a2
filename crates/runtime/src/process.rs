//! The metrics of the process: CPU time, memory, open files, start time, process id.

use prometheus::core::{Collector, Desc};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Counter, MetricFamily};
use prometheus::{IntGauge, Opts};
use rustix::time::{ClockId, clock_gettime};

/// The collector of the prometheus crate, whose CPU time has whole seconds only.
const CPU: &str = "process_cpu_seconds_total";

/// Collects the process's metrics.
pub(crate) struct Process {
    coarse: ProcessCollector,
    id: IntGauge,
}

impl Process {
    /// Of this process.
    pub fn this() -> prometheus::Result<Self> {
        let help = "Process id, equal for roles that share a process";
        let id = IntGauge::with_opts(Opts::new("barid_process_id", help))?;
        id.set(std::process::id().into());
        Ok(Self { coarse: ProcessCollector::for_self(), id })
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        [self.coarse.desc(), self.id.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.coarse.collect();
        for family in families.iter_mut().filter(|family| family.name() == CPU) {
            for metric in family.mut_metric() {
                let mut counter = Counter::default();
                counter.set_value(cpu_seconds());
                metric.set_counter(counter);
            }
        }
        families.extend(self.id.collect());
        families
    }
}

/// CPU time of this process, of all its threads.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_116_cpu_time_is_finer_than_a_second() {
        let process = Process::this().unwrap();
        let shown = || {
            let families = process.collect();
            let family = families.iter().find(|family| family.name() == CPU).unwrap();
            family.get_metric()[0].get_counter().get_value()
        };
        let before = shown();
        let begun = std::time::Instant::now();
        while begun.elapsed() < std::time::Duration::from_millis(50) {
            std::hint::black_box(before);
        }
        let grown = shown() - before;
        assert!(grown > 0.0 && grown < 10.0 && grown.fract() != 0.0, "{grown}");
    }
}
