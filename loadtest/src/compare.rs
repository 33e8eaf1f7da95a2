//! Compares runs of `bench`: what changed by more than noise.

mod statistics;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use crate::measure::{Measure, shown};
use crate::report::Repeated;

#[derive(Debug, Args)]
pub struct Options {
    /// The base, then one or more sides to compare with it: bench.json or report.json files; several runs
    /// of one side are separated by commas.
    #[arg(required = true, num_args = 2.., value_name = "FILE[,FILE...]")]
    sides: Vec<String>,
    /// The value to compare.
    #[arg(long, default_value = "barid")]
    of: Of,
    /// Confidence level of each measure's margin: 0.5 to 0.9999.
    #[arg(long, default_value_t = 0.99, value_parser = confidence)]
    confidence: f64,
    /// Noise band of all measures, instead of their own: 0.1 if two runs of the same thing differ by up to
    /// 10 %.
    #[arg(long, value_parser = band)]
    noise: Option<f64>,
    /// Exit with code 1 if a measure became worse by more than noise, or is missing.
    #[arg(long)]
    fail_on_regression: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn confidence(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number")?;
    if (0.5..=0.9999).contains(&value) { Ok(value) } else { Err("must be 0.5 to 0.9999".into()) }
}

fn band(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number")?;
    if value > 0.0 && value <= 100.0 { Ok(value) } else { Err("must be above 0, up to 100".into()) }
}

/// A value of each measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Of {
    /// Barid's value.
    Barid,
    /// Barid's value over the floor's, which depends less on the machine and its load.
    Ratio,
}

/// One measure in all runs of one side.
#[derive(Debug, Clone, Default)]
struct Runs {
    unit: String,
    more_is_better: bool,
    noise: f64,
    barid: Vec<f64>,
    ratio: Vec<f64>,
    floor: Vec<f64>,
}

/// All runs of one side.
#[derive(Debug, Clone, Default)]
struct Side {
    /// In the order of the first file.
    names: Vec<String>,
    runs: BTreeMap<String, Runs>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Better,
    Worse,
    /// Equal, or different by no more than noise.
    Same,
    /// Missing in the base.
    New,
    /// Missing in the compared side.
    Gone,
}

/// One row. Field names are stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    measure: String,
    unit: String,
    /// The base's geometric mean.
    before: Option<f64>,
    after: Option<f64>,
    /// Relative: 0.1 is 10 % more. Absent if a value is not above zero.
    change: Option<f64>,
    /// Changes by a factor of up to 1 + margin are noise.
    margin: Option<f64>,
    /// The floor's change, if it is more than noise: then the machine changed.
    floor_change: Option<f64>,
    runs: (usize, usize),
    verdict: Verdict,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
struct Comparison {
    before: String,
    after: String,
    of: Of,
    confidence: f64,
    rows: Vec<Row>,
}

/// Returns false on a regression if `--fail-on-regression` is set.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    let sides = options.sides.iter().map(|files| Side::read(files));
    let sides = sides.collect::<anyhow::Result<Vec<_>>>()?;
    let (base, others) = sides.split_first().context("no file to compare")?;
    let comparisons: Vec<_> = others
        .iter()
        .zip(&options.sides[1..])
        .map(|(side, name)| Comparison {
            before: options.sides[0].clone(),
            after: name.clone(),
            of: options.of,
            confidence: options.confidence,
            rows: rows(base, side, options),
        })
        .collect();
    print(&comparisons, options.json)?;
    let is_bad = |row: &Row| matches!(row.verdict, Verdict::Worse | Verdict::Gone);
    let regressed = comparisons.iter().any(|comparison| comparison.rows.iter().any(is_bad));
    Ok(!(options.fail_on_regression && regressed))
}

impl Side {
    /// Reads comma-separated files.
    fn read(files: &str) -> anyhow::Result<Self> {
        let mut side = Self::default();
        for file in files.split(',').map(PathBuf::from) {
            for measure in measures(&file).with_context(|| format!("{}", file.display()))? {
                side.add(measure);
            }
        }
        ensure!(!side.names.is_empty(), "{files} has no measures");
        Ok(side)
    }

    fn add(&mut self, repeated: Repeated) {
        let Repeated { measure, noise, values, floor_values } = repeated;
        let name = measure.measure.clone();
        if !self.names.contains(&name) {
            self.names.push(name.clone());
        }
        let runs = self.runs.entry(name).or_default();
        runs.more_is_better = measure.more_is_better();
        runs.noise = noise;
        runs.unit = measure.unit;
        let ratios = values.iter().zip(&floor_values).filter(|(_, floor)| **floor != 0.0);
        runs.ratio.extend(ratios.map(|(barid, floor)| barid / floor));
        runs.barid.extend(values);
        runs.floor.extend(floor_values);
    }
}

/// Reads a bench.json (a list) or a report.json (an object).
fn measures(file: &Path) -> anyhow::Result<Vec<Repeated>> {
    let json: Value = serde_json::from_slice(&std::fs::read(file)?)?;
    if json.is_array() {
        let rows: Vec<Measure> = serde_json::from_value(json)?;
        return Ok(rows.into_iter().map(Repeated::once).collect());
    }
    let measures = json.get("measures").context("neither a bench.json nor a report.json")?;
    Ok(serde_json::from_value(measures.clone())?)
}

fn rows(before: &Side, after: &Side, options: &Options) -> Vec<Row> {
    let new = after.names.iter().filter(|name| !before.runs.contains_key(*name));
    let names = before.names.iter().chain(new);
    names.filter_map(|name| row(name, before, after, options)).collect()
}

/// `None` if neither side has a value.
fn row(name: &str, before: &Side, after: &Side, options: &Options) -> Option<Row> {
    let (nothing, of) = (Runs::default(), options.of);
    let values = |runs: &Runs| match of {
        Of::Barid => runs.barid.clone(),
        Of::Ratio => runs.ratio.clone(),
    };
    let (a, b) = (before.runs.get(name), after.runs.get(name));
    let known = b.or(a)?;
    let (a, b) = (a.unwrap_or(&nothing), b.unwrap_or(&nothing));
    let (old, new) = (values(a), values(b));
    let noise = options.noise.unwrap_or_else(|| a.noise.max(b.noise));
    let compared = statistics::change(&old, &new, noise, options.confidence);
    let verdict = match (old.is_empty(), new.is_empty()) {
        (true, true) => return None,
        (true, false) => Verdict::New,
        (false, true) => Verdict::Gone,
        (false, false) => match compared {
            Some(compared) if !compared.is_significant() => Verdict::Same,
            Some(compared) if (compared.change > 0.0) == known.more_is_better => Verdict::Better,
            Some(_) => Verdict::Worse,
            // A value is zero, so there is no relative change.
            None => match mean(&new).total_cmp(&mean(&old)) {
                std::cmp::Ordering::Equal => Verdict::Same,
                more if more.is_gt() == known.more_is_better => Verdict::Better,
                _ => Verdict::Worse,
            },
        },
    };
    let floor = statistics::change(&a.floor, &b.floor, noise, options.confidence);
    Some(Row {
        measure: name.to_owned(),
        unit: if of == Of::Ratio { String::new() } else { known.unit.clone() },
        before: (!old.is_empty()).then(|| typical(&old)),
        after: (!new.is_empty()).then(|| typical(&new)),
        change: compared.map(|compared| compared.change),
        margin: compared.map(|compared| compared.margin),
        floor_change: floor.filter(|floor| floor.is_significant()).map(|floor| floor.change),
        runs: (old.len(), new.len()),
        verdict,
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The geometric mean; the arithmetic mean if a value is not above zero.
fn typical(values: &[f64]) -> f64 {
    if values.iter().any(|value| *value <= 0.0) {
        return mean(values);
    }
    (values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp()
}

fn print(comparisons: &[Comparison], json: bool) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    if json {
        let comparisons = serde_json::json!({ "comparisons": comparisons });
        return writeln!(out, "{}", serde_json::to_string_pretty(&comparisons)?);
    }
    comparisons.iter().try_for_each(|comparison| writeln!(out, "{}", text(comparison)))
}

fn text(comparison: &Comparison) -> String {
    let Comparison { before, after, rows, confidence, .. } = comparison;
    let mut lines = vec![format!("{before} -> {after}"), String::new()];
    lines.push(format!(
        "{:<34}{:<6}{:>10}{:>10}{:>10}{:>12}  ",
        "measure", "unit", "before", "after", "change", "noise"
    ));
    for row in rows {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), shown);
        let change = row.change.map_or_else(|| "-".to_owned(), per_cent);
        let noise = row.margin.map_or_else(|| "-".to_owned(), noise_per_cent);
        let verdict = match row.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "WORSE",
            Verdict::Same => "",
            Verdict::New => "new",
            Verdict::Gone => "GONE",
        };
        let moved = row.floor_change.map(|change| format!(" (the floor: {})", per_cent(change)));
        let line = format!(
            "{:<34}{:<6}{:>10}{:>10}{change:>10}{noise:>12}  {verdict}{}",
            row.measure,
            row.unit,
            number(row.before),
            number(row.after),
            moved.unwrap_or_default()
        );
        lines.push(line.trim_end().to_owned());
    }
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    let by_chance = rows.len() as f64 * (1.0 - confidence);
    lines.push(format!(
        "\n{} better, {} worse, {} gone; {:.1} of {} measures are expected to change by chance",
        count(Verdict::Better),
        count(Verdict::Worse),
        count(Verdict::Gone),
        by_chance,
        rows.len(),
    ));
    lines.join("\n")
}

fn per_cent(share: f64) -> String {
    format!("{:+.1} %", share * 100.0)
}

/// A factor of 1.25 either way: from 20 % less to 25 % more.
fn noise_per_cent(margin: f64) -> String {
    let less = 1.0 - 1.0 / (1.0 + margin);
    format!("-{:.0}..+{:.0} %", less * 100.0, margin * 100.0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    /// A file with one row for each (measure, unit, barid, floor).
    fn file(dir: &Path, name: &str, rows: &[(&str, &str, f64, Option<f64>)]) -> String {
        let rows =
            rows.iter().map(|(name, unit, barid, floor)| Measure::new(name, unit, *floor, *barid));
        let path = dir.join(name);
        std::fs::write(&path, serde_json::to_vec(&rows.collect::<Vec<_>>()).unwrap()).unwrap();
        path.display().to_string()
    }

    fn options(arguments: &[&str]) -> Options {
        Line::parse_from([&["compare"], arguments].concat()).options
    }

    fn verdicts(arguments: &[&str]) -> Vec<(String, Verdict)> {
        let options = options(arguments);
        let sides: Vec<_> = options.sides.iter().map(|files| Side::read(files).unwrap()).collect();
        let rows = rows(&sides[0], &sides[1], &options);
        rows.into_iter().map(|row| (row.measure, row.verdict)).collect()
    }

    #[test]
    fn each_measure_has_its_own_direction() {
        let dir = tempfile::tempdir().unwrap();
        let a = [
            ("rate", "1/s", 100.0, None),
            ("time_p99_ms", "ms", 10.0, None),
            ("left", "B", 5.0, None),
        ];
        let b = [
            ("rate", "1/s", 300.0, None),
            ("time_p99_ms", "ms", 40.0, None),
            ("came", "B", 5.0, None),
        ];
        let (a, b) = (file(dir.path(), "a.json", &a), file(dir.path(), "b.json", &b));
        let of = |name: &str, verdict| (name.to_owned(), verdict);
        let wanted = [
            of("rate", Verdict::Better),
            of("time_p99_ms", Verdict::Worse),
            of("left", Verdict::Gone),
            of("came", Verdict::New),
        ];
        assert_eq!(verdicts(&[&a, &b]), wanted);
        let back = [
            of("rate", Verdict::Worse),
            of("time_p99_ms", Verdict::Better),
            of("came", Verdict::Gone),
            of("left", Verdict::New),
        ];
        assert_eq!(verdicts(&[&b, &a]), back);
        assert!(verdicts(&[&a, &a]).iter().all(|(_, verdict)| *verdict == Verdict::Same));
        assert!(run(&options(&[&a, &b])).unwrap());
        assert!(!run(&options(&[&a, &b, "--fail-on-regression"])).unwrap());
        assert!(run(&options(&[&a, &a, "--fail-on-regression", "--json"])).unwrap());
    }

    #[test]
    fn a_slower_machine_shows_in_the_floor_and_not_in_the_ratio() {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: &str, barid, floor| {
            file(dir.path(), name, &[("cost_us", "us", barid, Some(floor))])
        };
        let before =
            [run("1.json", 100.0, 50.0), run("2.json", 101.0, 50.5), run("3.json", 99.0, 49.5)];
        let after =
            [run("4.json", 200.0, 100.0), run("5.json", 202.0, 101.0), run("6.json", 198.0, 99.0)];
        let (before, after) = (before.join(","), after.join(","));
        let row = |arguments: &[&str]| {
            let options = options(arguments);
            let sides: Vec<_> =
                options.sides.iter().map(|files| Side::read(files).unwrap()).collect();
            rows(&sides[0], &sides[1], &options).remove(0)
        };
        // The cost doubled, but so did the floor's: the machine is slower.
        let barid = row(&[&before, &after]);
        assert_eq!((barid.verdict, barid.runs), (Verdict::Worse, (3, 3)));
        assert!((barid.floor_change.unwrap() - 1.0).abs() < 0.01, "{barid:?}");
        let ratio = row(&[&before, &after, "--of", "ratio"]);
        assert_eq!((ratio.verdict, ratio.before.map(f64::round)), (Verdict::Same, Some(2.0)));
    }

    #[test]
    fn a_change_from_or_to_zero_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, refused| file(dir.path(), name, &[("refused", "", refused, None)]);
        let (none, some) = (of("a.json", 0.0), of("b.json", 7.0));
        let verdict = |a: &str, b: &str| verdicts(&[a, b])[0].1;
        assert_eq!(verdict(&none, &some), Verdict::Worse);
        assert_eq!(verdict(&some, &none), Verdict::Better);
        assert_eq!(verdict(&none, &none), Verdict::Same);
        std::fs::write(dir.path().join("c.json"), "{}").unwrap();
        assert!(Side::read(&dir.path().join("c.json").display().to_string()).is_err());
    }
}
