//! Holds docs/hazards.md against the tests.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The hazards that the page lists: the first cell of a table's row.
fn listed() -> io::Result<BTreeSet<u32>> {
    let page = fs::read_to_string(format!("{ROOT}/docs/hazards.md"))?;
    let first_cell = |line: &str| line.strip_prefix("| ")?.split(' ').next()?.parse().ok();
    Ok(page.lines().filter_map(first_cell).collect())
}

/// The numbers of the tests named `hazard_NN_…` below `dir`.
fn tested(dir: &Path, numbers: &mut BTreeSet<u32>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            tested(&path, numbers)?;
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path)?;
            let after = text.split("fn hazard_").skip(1);
            numbers.extend(after.filter_map(|rest| rest.split('_').next()?.parse::<u32>().ok()));
        }
    }
    Ok(())
}

#[test]
fn each_listed_hazard_has_a_test_and_each_test_a_listed_hazard() -> io::Result<()> {
    let (listed, mut numbers) = (listed()?, BTreeSet::new());
    tested(Path::new(ROOT), &mut numbers)?;
    let untested: Vec<_> = listed.difference(&numbers).collect();
    let unlisted: Vec<_> = numbers.difference(&listed).collect();
    assert!(
        untested.is_empty() && unlisted.is_empty(),
        "untested {untested:?}, unlisted {unlisted:?}"
    );
    Ok(())
}
