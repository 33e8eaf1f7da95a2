//! Compares docs/metrics.md with the metrics of the roles.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use barid_runtime::exposition::Metrics;
use barid_testkit::{Cluster, Role};

/// A metric's type, and the values of its labels; `…` is any value.
#[derive(Debug, PartialEq, Eq, Default)]
struct Shape {
    kind: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

type Shapes = BTreeMap<String, Shape>;

/// The rows of a section's table.
fn documented(page: &str, section: &str) -> Shapes {
    let heading = format!("## {section}");
    let body = page.lines().skip_while(|line| *line != heading).skip(1);
    let rows = body.take_while(|line| !line.starts_with("## ")).filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        let labels = cells[3].split("; ").filter_map(|label| {
            let (name, values) = label.split_once(": ")?;
            Some((name.to_owned(), values.split(", ").map(str::to_owned).collect()))
        });
        Some((name.to_owned(), Shape { kind: cells[2].to_owned(), labels: labels.collect() }))
    });
    rows.collect()
}

/// The types and labels in a role's answer. The bounds of buckets are not labels.
fn served(text: &str) -> Result<Shapes> {
    let mut shapes = Shapes::new();
    for rest in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = rest.split_once(' ').context("a type")?;
        shapes.insert(name.into(), Shape { kind: kind.into(), ..Default::default() });
    }
    for (name, labels) in Metrics::parse(text).series() {
        let suffixes = ["_bucket", "_sum", "_count"];
        let base = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        let base = base.filter(|base| shapes.contains_key(*base)).unwrap_or(name);
        let shape = shapes.get_mut(base).with_context(|| format!("{name} has no type"))?;
        for (label, value) in labels.iter().filter(|(label, _)| label != "le") {
            shape.labels.entry(label.clone()).or_default().insert(value.clone());
        }
    }
    Ok(shapes)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_documented_and_there_from_the_start() -> Result<()> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md"))?;
    let mut cluster = Cluster::start().await?;
    let mut differences = Vec::new();
    for role in Role::ALL {
        let section = match role {
            Role::Purger => "Purger",
            Role::Dispatcher => "Dispatcher",
            Role::Delayer => "Delayer",
            Role::Access => "Access",
        };
        let mut wanted = documented(&page, "Every role");
        wanted.extend(documented(&page, section));
        let mut found = served(&cluster.node(role, 0).metrics_text().await?)?;
        for (name, shape) in wanted {
            let mut there = found.remove(&name);
            for (label, values) in &shape.labels {
                if values.contains("…")
                    && let Some(any) = there.as_mut().and_then(|there| there.labels.get_mut(label))
                {
                    any.clone_from(values);
                }
            }
            if there.as_ref() != Some(&shape) {
                differences
                    .push(format!("{section}: {name} is {there:?}, the page says {shape:?}"));
            }
        }
        differences
            .extend(found.keys().map(|name| format!("{section}: {name} is not on the page")));
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}
