//! What a report holds.

use serde::{Deserialize, Serialize};

use super::machine::{self, Machine};
use crate::live::Recorded;
use crate::measure::Measure;

/// Grows when a field changes its meaning.
const FORMAT: u32 = 1;

/// A run of the bench. Field names are stable, as are those within.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Of this file.
    pub format: u32,
    /// Of the load tool.
    pub version: String,
    /// `git describe` where the tool was built; absent: not known.
    pub commit: Option<String>,
    /// UTC, RFC 3339.
    pub started: String,
    /// How long all of it took.
    pub seconds: f64,
    /// As it was typed.
    pub command: String,
    /// Where it ran.
    pub machine: Machine,
    /// In the order of the table.
    pub measures: Vec<Repeated>,
    /// In the order in which they ran.
    pub scenarios: Vec<Scenario>,
}

/// A measure, and what each repetition gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Repeated {
    /// The middle one of the repetitions, by Barid's value; of an even number, the worse of the two.
    #[serde(flatten)]
    pub measure: Measure,
    /// By what factor, less one, two single runs of the same thing differ.
    pub noise: f64,
    /// Barid's.
    pub values: Vec<f64>,
    /// The floor's, in the same order; empty: there is none.
    pub floor_values: Vec<f64>,
}

/// One scenario, once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// Its name on the command line.
    pub scenario: String,
    /// From 1 on.
    pub repetition: u32,
    /// How long it took.
    pub seconds: f64,
    /// Why nothing was measured; absent: it was.
    pub failed: Option<String>,
    /// What was seen.
    #[serde(flatten)]
    pub recorded: Recorded,
}

impl Repeated {
    /// One that was not repeated.
    pub fn once(measure: Measure) -> Self {
        Self {
            noise: measure.noise(),
            values: vec![measure.barid],
            floor_values: measure.floor.into_iter().collect(),
            measure,
        }
    }

    /// Rows of all repetitions, by name, in the order in which they first came.
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
    /// Of a run that begins now.
    pub fn begin() -> Self {
        let command = std::env::args().map(|word| quoted(&word)).collect::<Vec<_>>().join(" ");
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: machine::commit(),
            started: machine::now(),
            seconds: 0.0,
            command,
            machine: Machine::find(),
            measures: Vec::new(),
            scenarios: Vec::new(),
        }
    }
}

/// A word as a shell wants it.
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
    fn a_command_is_quoted_as_a_shell_wants_it() {
        assert_eq!(quoted("it's") + &quoted("a=b"), r"'it'\''s'a=b");
    }
}
