//! The outcome, for people or programs.

use std::io::Write as _;

use serde::Serialize;

use crate::Arguments;
use crate::rounds::Case;

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
        let mut values: Vec<f64> = self.0.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get((share * (values.len() - 1) as f64).round() as usize).copied().unwrap_or(0.0)
    }
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

/// All rows.
#[derive(Debug, Serialize)]
pub struct Report {
    users: u32,
    payload_bytes: u32,
    rounds: u32,
    append_only: bool,
    measures: Vec<Row>,
}

impl Report {
    pub fn new(arguments: &Arguments) -> Self {
        let Arguments { users, payload_bytes, rounds, append_only, .. } = *arguments;
        Self { users, payload_bytes, rounds, append_only, measures: Vec::new() }
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
}
