//! Reads a TOML file, with the line of each key.

use std::ops::Range;
use std::path::Path;

use toml::Table;
use toml::de::{DeTable, DeValue, Error};

use super::ConfigError;
use super::problem::{Problem, without_value};
use super::sources::Sources;
use crate::bounds::{Bound, without_indexes};
use crate::files;

/// Reads `path`. Neither a line nor a value of a file that is not TOML is shown: it may hold a secret.
///
/// `known`: all dotted keys. Those that an error names are no secrets.
pub(super) fn read(
    path: &Path,
    bounds: &[Bound],
    known: &[String],
) -> Result<(Table, Sources), ConfigError> {
    let text =
        files::read_text(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
    let tree = DeTable::parse(&text).map_err(|error| not_toml(path, &text, &error, known))?;
    let mut spans = Vec::new();
    add_table(tree.get_ref(), "", &mut spans);
    let lines = spans.iter().map(|(key, span)| (key.clone(), line(&text, span.start)));
    let sources = Sources { file: path.into(), lines: lines.collect(), variables: Vec::new() };
    match text.parse::<Table>() {
        Ok(table) => Ok((table, sources)),
        Err(error) => Err(match too_large(&text, &error, &spans, bounds) {
            Some(problem) => ConfigError::Keys(vec![problem.at(&sources)]),
            None => not_toml(path, &text, &error, known),
        }),
    }
}

type Spans = Vec<(String, Range<usize>)>;

fn add_table(table: &DeTable<'_>, path: &str, spans: &mut Spans) {
    for (name, value) in table {
        let name = name.get_ref();
        let key = if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
        add(value.get_ref(), value.span(), key, spans);
    }
}

fn add(value: &DeValue<'_>, span: Range<usize>, key: String, spans: &mut Spans) {
    match value {
        DeValue::Table(table) => add_table(table, &key, spans),
        DeValue::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                add(item.get_ref(), item.span(), format!("{key}[{index}]"), spans);
            }
        }
        _ => {}
    }
    spans.push((key, span));
}

/// The problem of an integer beyond 64 bits, which the parser refuses without its key.
fn too_large(text: &str, error: &Error, spans: &Spans, bounds: &[Bound]) -> Option<Problem> {
    let at = error.span()?;
    let (key, span) = spans.iter().find(|(_, span)| *span == at)?;
    let bound = bounds.iter().find(|bound| bound.key == without_indexes(key))?;
    let number = text.get(span.clone())?.to_owned();
    bound.check(&number.into()).err().map(|problem| Problem::new(key, &problem))
}

fn not_toml(path: &Path, text: &str, error: &Error, known: &[String]) -> ConfigError {
    let at = error.span().map_or(0, |span| text.floor_char_boundary(span.start));
    let line_start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    ConfigError::Toml {
        path: path.into(),
        line: line(text, at),
        column: text[line_start..at].chars().count() + 1,
        problem: named(without_value(error.message()), &text[line_start..], known),
    }
}

/// The problem, with the key of the line if it is known, and what to write in place of a bare word or a unit.
fn named(problem: String, line: &str, known: &[String]) -> String {
    let line = line.lines().next().unwrap_or_default();
    let key = line.split(['=', ']']).next().unwrap_or_default().trim_matches(['[', ' ', '\t']);
    let is_known = |one: &String| {
        one == key || one.ends_with(&format!(".{key}")) || one.starts_with(&format!("{key}."))
    };
    let problem = match problem.starts_with("string values must be quoted") {
        true => "the value is neither a number nor in quotes; write a number without a unit, or text in quotes".to_owned(),
        false => problem,
    };
    match !key.is_empty() && known.iter().any(is_known) {
        true => format!("{key}: {problem}"),
        false => problem,
    }
}

fn line(text: &str, at: usize) -> usize {
    let at = text.floor_char_boundary(at);
    text[..at].matches('\n').count() + 1
}
