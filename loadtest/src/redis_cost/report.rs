//! The outcome, for people or programs.

use std::io::Write;

use serde::Serialize;

use crate::Arguments;
use crate::case::Case;

/// With this many messages a call the goal holds.
const GOAL_BATCH: usize = 64;
const GOAL_RATIO: f64 = 1.3;

/// Of one round, per message.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub cpu_us: f64,
    pub script_us: f64,
}

/// Rounds of both sides, in pairs.
#[derive(Debug, Default)]
pub struct Measure(Vec<(Sample, Sample)>);

impl Measure {
    pub fn push(&mut self, floor: Sample, barid: Sample) {
        self.0.push((floor, barid));
    }

    /// The value at this share of the rounds, in order.
    fn at(&self, share: f64, of: impl Fn(&(Sample, Sample)) -> f64) -> f64 {
        quantile(self.0.iter().map(of).collect(), share)
    }
}

/// Accept rounds with one number of replicas, and the turns that they were asked in.
#[derive(Debug, Default)]
pub struct Waits {
    times_ms: Vec<f64>,
    cpu_us: Vec<f64>,
}

impl Waits {
    /// A turn: how long each of its rounds took, and the master's CPU time per message.
    pub fn push(&mut self, times_ms: Vec<f64>, cpu_us: f64) {
        self.times_ms.extend(times_ms);
        self.cpu_us.push(cpu_us);
    }
}

/// The value at this share of all, in order.
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

/// Accept with `redis.wait_replicas`, and as many replicas. Field names are stable.
#[derive(Debug, Serialize)]
struct WaitRow {
    batch: usize,
    replicas: u32,
    /// Of an accept round, as the purger sees it.
    ms: f64,
    ms_p25: f64,
    ms_p75: f64,
    /// CPU time of the master per message.
    cpu_us: f64,
}

/// All rows.
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
    pub fn new(arguments: &Arguments) -> Self {
        let Arguments { users, payload_bytes, rounds, append_only, .. } = *arguments;
        Self { users, payload_bytes, rounds, append_only, measures: Vec::new(), waits: Vec::new() }
    }

    pub fn add(&mut self, kind: &str, case: Case, batch: usize, measure: &Measure) {
        let ratio = |share| measure.at(share, |(floor, barid)| barid.cpu_us / floor.cpu_us);
        let goal = (batch == GOAL_BATCH).then_some(GOAL_RATIO);
        self.measures.push(Row {
            measure: format!("{kind}_{}", case.name()),
            batch,
            unit: "us",
            floor: measure.at(0.5, |(floor, _)| floor.cpu_us),
            barid: measure.at(0.5, |(_, barid)| barid.cpu_us),
            ratio: ratio(0.5),
            ratio_p25: ratio(0.25),
            ratio_p75: ratio(0.75),
            floor_script: measure.at(0.5, |(floor, _)| floor.script_us),
            barid_script: measure.at(0.5, |(_, barid)| barid.script_us),
            goal,
            met: goal.map(|goal| ratio(0.5) <= goal),
        });
    }

    pub fn add_waits(&mut self, batch: usize, replicas: u32, waits: &Waits) {
        let ms = |share| quantile(waits.times_ms.clone(), share);
        let cpu_us = quantile(waits.cpu_us.clone(), 0.5);
        let (p25, p75) = (ms(0.25), ms(0.75));
        self.waits.push(WaitRow { batch, replicas, ms: ms(0.5), ms_p25: p25, ms_p75: p75, cpu_us });
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
