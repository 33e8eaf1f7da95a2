//! What is kept of a run of the bench beside its list of measures: everything that was seen, where, and
//! by which command; as JSON for programs and as HTML for people.

mod html;
mod machine;
mod plot;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::live::Recorded;
use crate::measure::Measure;

pub use machine::Machine;

/// Grows when a field changes its meaning.
const FORMAT: u32 = 1;

/// A report, made again.
#[derive(Debug, Args)]
pub struct Options {
    /// A report.json.
    report: PathBuf,
    /// Where the page goes; without it, beside the report.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Makes the page of a report that was kept.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    let json = std::fs::read(&options.report)
        .with_context(|| format!("reading {}", options.report.display()))?;
    let report: Report = serde_json::from_slice(&json)?;
    let out = options.out.clone().unwrap_or_else(|| options.report.with_extension("html"));
    std::fs::write(&out, html::page(&report))
        .with_context(|| format!("writing {}", out.display()))?;
    Ok(true)
}

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

    /// Writes report.json and report.html into a directory, which is there.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, directory: &Path, name: &str) -> anyhow::Result<()> {
        let json = serde_json::to_string(self)? + "\n";
        for (extension, text) in [("json", json), ("html", html::page(self))] {
            let path = directory.join(format!("{name}.{extension}"));
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
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
    fn a_report_is_read_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Report::begin();
        report.measures = vec![Repeated::once(Measure::new("x", "ms", None, 1.0))];
        let (recorded, scenario) = (Recorded::default(), "idle".to_owned());
        report.scenarios =
            vec![Scenario { scenario, repetition: 1, seconds: 2.0, failed: None, recorded }];
        report.write(dir.path(), "report").unwrap();
        let json = std::fs::read(dir.path().join("report.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Report>(&json).unwrap(), report);
        assert_eq!(quoted("it's") + &quoted("a=b"), r"'it'\''s'a=b");
    }
}
