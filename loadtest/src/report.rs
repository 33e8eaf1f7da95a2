//! The report of a run of `bench`, as JSON and as an HTML page: measures, samples, latencies, the machine
//! and the command.

mod data;
mod escape;
mod html;
mod machine;
mod plot;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

pub use self::data::{Repeated, Report, Scenario};

#[derive(Debug, Args)]
pub struct Options {
    /// The report.json.
    report: PathBuf,
    /// File for the page (default: beside the report).
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Creates the page of a stored report.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    let json = std::fs::read(&options.report)
        .with_context(|| format!("reading {}", options.report.display()))?;
    let report: Report = serde_json::from_slice(&json)?;
    let out = options.out.clone().unwrap_or_else(|| options.report.with_extension("html"));
    std::fs::write(&out, html::page(&report))
        .with_context(|| format!("writing {}", out.display()))?;
    Ok(true)
}

impl Report {
    /// Writes NAME.json and NAME.html into an existing directory.
    pub fn write(&self, directory: &Path, name: &str) -> anyhow::Result<()> {
        let json = serde_json::to_string(self)? + "\n";
        for (extension, text) in [("json", json), ("html", html::page(self))] {
            let path = directory.join(format!("{name}.{extension}"));
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::Recorded;
    use crate::measure::Measure;

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
    }
}
