//! The contents of a report.

use serde::{Deserialize, Serialize};

use super::machine::{self, Machine};
use crate::live::Recorded;
use crate::measure::Measure;

/// Version of the file format; increases when a field changes its meaning.
const FORMAT: u32 = 1;

/// A run of `bench`. Field names are stable, also of the types within.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub format: u32,
    /// Version of the load tool.
    pub version: String,
    /// `git describe` in the work tree of the load tool's binary.
    pub commit: Option<String>,
    /// UTC, RFC 3339.
    pub started: String,
    pub seconds: f64,
    /// The command line.
    pub command: String,
    pub machine: Machine,
    pub measures: Vec<Repeated>,
    pub scenarios: Vec<Scenario>,
}

/// A measure with the values of all repetitions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Repeated {
    /// The median repetition by Barid's value; the worse one of the middle two.
    #[serde(flatten)]
    pub measure: Measure,
    /// As [`Measure::noise`].
    pub noise: f64,
    /// Barid's values.
    pub values: Vec<f64>,
    /// The floor's values in the same order; empty without a floor.
    pub floor_values: Vec<f64>,
}

/// One repetition of a scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// The name on the command line.
    pub scenario: String,
    /// From 1.
    pub repetition: u32,
    pub seconds: f64,
    /// The error, if it failed.
    pub failed: Option<String>,
    #[serde(flatten)]
    pub recorded: Recorded,
}

impl Repeated {
    /// A single run.
    pub fn once(measure: Measure) -> Self {
        Self {
            noise: measure.noise(),
            values: vec![measure.barid],
            floor_values: measure.floor.into_iter().collect(),
            measure,
        }
    }

    /// Groups the rows of all repetitions by name.
    pub fn of(rows: &[Measure]) -> Vec<Self> {
        let mut names: Vec<&str> = Vec::new();
        for row in rows {
            if !names.contains(&row.measure.as_str()) {
                names.push(&row.measure);
            }
        }
        let of = |name: &str| {
            let mut runs: Vec<_> = rows.iter().filter(|row| row.measure == name).collect();
            let values = runs.iter().map(|run| run.barid).collect();
            let floor_values = runs.iter().filter_map(|run| run.floor).collect();
            runs.sort_by(|a, b| a.barid.total_cmp(&b.barid));
            let middle = if runs.len() % 2 == 0 && !runs[0].more_is_better() {
                runs.len() / 2
            } else {
                (runs.len() - 1) / 2
            };
            let measure = runs[middle].clone();
            Self { noise: measure.noise(), measure, values, floor_values }
        };
        names.into_iter().map(of).collect()
    }
}

impl Report {
    /// An empty report of a run that starts now.
    pub fn begin() -> Self {
        let command = std::env::args().map(|word| quoted(&word)).collect::<Vec<_>>().join(" ");
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: machine::commit(),
            started: machine::now(),
            seconds: 0.0,
            command,
            machine: Machine::this(),
            measures: Vec::new(),
            scenarios: Vec::new(),
        }
    }
}

/// The word, quoted for a shell if necessary.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_repetition_counts_and_all_are_kept() {
        let row = |name: &str, unit: &str, value: f64| Measure::new(name, unit, Some(1.0), value);
        let rows =
            [3.0, 9.0, 1.0, 7.0].map(|value| [row("a", "ms", value), row("b", "1/s", value)]);
        let repeated = Repeated::of(rows.as_flattened());
        let middles: Vec<_> =
            repeated.iter().map(|r| (&*r.measure.measure, r.measure.barid)).collect();
        assert_eq!(middles, [("a", 7.0), ("b", 3.0)]);
        assert_eq!(repeated[0].values, [3.0, 9.0, 1.0, 7.0]);
        assert_eq!(repeated[1].floor_values, [1.0; 4]);
        assert_eq!(Repeated::of(&rows[1]), rows[1].clone().map(Repeated::once));
    }

    #[test]
    fn a_command_is_quoted_for_a_shell() {
        assert_eq!(quoted("it's") + &quoted("a=b"), r"'it'\''s'a=b");
    }
}
