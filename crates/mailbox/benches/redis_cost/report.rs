//! The results as tables, or as JSON.

use std::io::Write;

use serde::Serialize;

use crate::options::Options;
use crate::workload::Case;

/// The goal applies to this batch size.
const GOAL_BATCH: usize = 64;
const GOAL_RATIO: f64 = 1.3;

/// Usage per message of one round.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub cpu_us: f64,
    pub script_us: f64,
}

/// Neighbouring rounds: the floor's, then Barid's.
pub type Pairs = Vec<(Sample, Sample)>;

/// The value below which this share of all values lies.
fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((share * (values.len().max(1) - 1) as f64).round() as usize).copied().unwrap_or(0.0)
}

/// Field names are stable: programs compare runs by them.
#[derive(Debug, Serialize)]
struct Row {
    measure: String,
    batch: usize,
    unit: &'static str,
    /// CPU time of the whole server, protocol included.
    floor: f64,
    barid: f64,
    ratio: f64,
    ratio_p25: f64,
    ratio_p75: f64,
    floor_script: f64,
    barid_script: f64,
    goal: Option<f64>,
    met: Option<bool>,
}

/// Accept rounds with one value of `redis.wait_replicas`. Field names are stable.
#[derive(Debug, Serialize)]
struct WaitRow {
    batch: usize,
    replicas: u32,
    /// Duration of an accept round for the caller.
    ms: f64,
    ms_p25: f64,
    ms_p75: f64,
    /// CPU time of the master per message.
    cpu_us: f64,
}

/// All results. Field names are stable.
#[derive(Debug, Serialize)]
pub struct Report {
    users: u32,
    payload_bytes: u32,
    rounds: u32,
    append_only: bool,
    measures: Vec<Row>,
    waits: Vec<WaitRow>,
}

impl Report {
    pub fn new(options: &Options) -> Self {
        let Options { users, payload_bytes, rounds, append_only, .. } = *options;
        Self { users, payload_bytes, rounds, append_only, measures: Vec::new(), waits: Vec::new() }
    }

    pub fn add(&mut self, kind: &str, case: Case, batch: usize, pairs: &Pairs) {
        let at = |share, value: fn(&(Sample, Sample)) -> f64| {
            quantile(pairs.iter().map(value).collect(), share)
        };
        let ratio = |share| at(share, |(floor, barid)| barid.cpu_us / floor.cpu_us);
        let goal = (batch == GOAL_BATCH).then_some(GOAL_RATIO);
        self.measures.push(Row {
            measure: format!("{kind}_{}", case.name()),
            batch,
            unit: "us",
            floor: at(0.5, |(floor, _)| floor.cpu_us),
            barid: at(0.5, |(_, barid)| barid.cpu_us),
            ratio: ratio(0.5),
            ratio_p25: ratio(0.25),
            ratio_p75: ratio(0.75),
            floor_script: at(0.5, |(floor, _)| floor.script_us),
            barid_script: at(0.5, |(_, barid)| barid.script_us),
            goal,
            met: goal.map(|goal| ratio(0.5) <= goal),
        });
    }

    pub fn add_wait(&mut self, batch: usize, replicas: u32, times_ms: Vec<f64>, cpu_us: Vec<f64>) {
        let [ms_p25, ms, ms_p75] = [0.25, 0.5, 0.75].map(|share| quantile(times_ms.clone(), share));
        let cpu_us = quantile(cpu_us, 0.5);
        self.waits.push(WaitRow { batch, replicas, ms, ms_p25, ms_p75, cpu_us });
    }

    /// Whether every goal is met.
    pub fn is_met(&self) -> bool {
        self.measures.iter().all(|row| row.met != Some(false))
    }

    pub fn print(&self, json: bool) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if json {
            writeln!(out, "{}", serde_json::to_string(self)?)?;
            return Ok(());
        }
        if !self.measures.is_empty() {
            self.print_measures(&mut out)?;
        }
        if !self.measures.is_empty() && !self.waits.is_empty() {
            writeln!(out)?;
        }
        if !self.waits.is_empty() {
            self.print_waits(&mut out)?;
        }
        Ok(())
    }

    fn print_measures(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(
            out,
            "CPU time of redis-server per message, protocol included, us: medians of {} rounds of {} \
             messages of {} bytes",
            self.rounds, self.users, self.payload_bytes
        )?;
        writeln!(
            out,
            "{:<16} {:>5} {:>8} {:>8} {:>7} {:>13} {:>16} {:>6}",
            "measure", "batch", "floor", "barid", "ratio", "p25-p75", "in script", "goal"
        )?;
        for row in &self.measures {
            let goal = match (row.goal, row.met) {
                (Some(goal), Some(true)) => format!("{goal} ok"),
                (Some(goal), _) => format!("{goal} NO"),
                _ => String::new(),
            };
            writeln!(
                out,
                "{:<16} {:>5} {:>8.2} {:>8.2} {:>7.2} {:>6.2}-{:<6.2} {:>7.2} {:>8.2} {:>6}",
                row.measure,
                row.batch,
                row.floor,
                row.barid,
                row.ratio,
                row.ratio_p25,
                row.ratio_p75,
                row.floor_script,
                row.barid_script,
                goal
            )?;
        }
        Ok(())
    }

    fn print_waits(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(
            out,
            "An accept round with redis.wait_replicas at the number of replicas, ms, and CPU time of the \
             master per message, us: medians of {} turns, {} bytes",
            self.rounds, self.payload_bytes
        )?;
        writeln!(
            out,
            "{:<8} {:>5} {:>9} {:>15} {:>10}",
            "replicas", "batch", "round", "p25-p75", "master"
        )?;
        for row in &self.waits {
            writeln!(
                out,
                "{:<8} {:>5} {:>9.3} {:>7.3}-{:<7.3} {:>10.2}",
                row.replicas, row.batch, row.ms, row.ms_p25, row.ms_p75, row.cpu_us
            )?;
        }
        Ok(())
    }
}
