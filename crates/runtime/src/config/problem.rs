//! A problem with a key, and the value to write instead.

use std::fmt;

use toml::{Table, Value};

use super::sources::Sources;
use crate::words::{described, nearest, shown};

/// A key that is unknown, or whose value is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, dotted.
    pub key: String,
    /// The reason, and what to write instead.
    pub problem: String,
    /// Where it was set; may be empty.
    pub source: String,
    line: Option<usize>,
}

impl Problem {
    pub(super) fn new(key: &str, problem: &str) -> Self {
        let key = key.trim_end_matches(".?").to_owned();
        Self { key, problem: problem.to_owned(), source: String::new(), line: None }
    }

    pub(super) fn at(self, sources: &Sources) -> Self {
        let source = sources.of(&self.key).map(|source| format!(" ({source})"));
        let line = sources.line_of(&self.key);
        Self { source: source.unwrap_or_default(), line, ..self }
    }

    /// Orders as in the file, and what is not in the file last.
    pub(super) fn order(&self) -> (bool, Option<usize>, String) {
        (self.line.is_none(), self.line, self.key.clone())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}{}", self.key, self.problem, self.source)
    }
}

/// Words that stand for true or false elsewhere.
const SWITCHES: [&str; 12] =
    ["yes", "no", "on", "off", "true", "false", "1", "0", "y", "n", "enabled", "disabled"];

/// Rewords serde's message about `key`. Any value may be a secret in the wrong place, so that only words that were
/// nearly right are shown, and what the type's own message shows. `known`: all dotted keys; `meant`: how to write a key
/// that is suggested.
pub(super) fn reword(
    key: &str,
    message: &str,
    value: Option<&Value>,
    known: &[String],
    meant: impl Fn(&str) -> String,
) -> String {
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let (_, here) = rest.split_once('`').unwrap_or((rest, ""));
        return unknown_key(key, &words(here), known, meant);
    }
    if let Some(rest) = message.strip_prefix("unknown variant `") {
        let (word, choice) = rest.split_once("`, expected").unwrap_or((rest, ""));
        return unknown_word(word, &words(choice));
    }
    let invalid = message.strip_prefix("invalid type: ");
    let wanted = invalid.and_then(|rest| wanted(rest.rsplit_once(", expected ")?.1));
    match (wanted, value) {
        (Some((what @ "true or false", form)), Some(Value::String(text))) => {
            let is_switch = SWITCHES.iter().any(|word| word.eq_ignore_ascii_case(text));
            let is = if is_switch { format!("{} is text", shown(text)) } else { described(text) };
            format!("{is}, not {what}; {form}")
        }
        (Some((what, form)), Some(value)) => format!("{}, not {what}; {form}", kind(value)),
        _ => without_value(message),
    }
}

/// The keys that are tables by default and something else in `table`. serde would take the items of a list for the
/// values of a table.
pub(super) fn not_tables(table: &Table, defaults: &Table) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (key, value) in table {
        match (value, defaults.get(key)) {
            (Value::Table(below), Some(Value::Table(defaults))) => {
                let below = not_tables(below, defaults).into_iter();
                found.extend(below.map(|(name, problem)| (format!("{key}.{name}"), problem)));
            }
            (value, Some(Value::Table(_))) => {
                let is_tables = |items: &Vec<Value>| items.iter().all(Value::is_table);
                let problem = match value.as_array().is_some_and(is_tables) {
                    true => {
                        "a list of tables, not a table; write its name in single brackets".into()
                    }
                    false => format!("{}, not a table; {TABLE_FORM}", kind(value)),
                };
                found.push((key.clone(), problem));
            }
            _ => {}
        }
    }
    found
}

const TABLE_FORM: &str = "write its name in brackets, and its keys below";

/// The form that serde expected, in words, and how to write it.
fn wanted(expected: &str) -> Option<(&'static str, String)> {
    let write = |form: &str| format!("write {form}");
    Some(match expected {
        "a boolean" => ("true or false", write("true or false without quotes")),
        "a sequence" => ("a list", write("[\"…\", \"…\"]")),
        "a string" | "path string" => ("text", write("it in quotes")),
        "a map" => ("a table", TABLE_FORM.to_owned()),
        table if table.starts_with("struct ") => ("a table", TABLE_FORM.to_owned()),
        _ => return None,
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

fn unknown_key(
    key: &str,
    here: &[String],
    known: &[String],
    meant: impl Fn(&str) -> String,
) -> String {
    let (table, name) = key.rsplit_once('.').map_or(("", key), |(table, name)| (table, name));
    let dotted =
        |name: &str| if table.is_empty() { name.into() } else { format!("{table}.{name}") };
    let flat = |key: &str| key.replace('.', "_");
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let found = nearest(name, here)
        .map(dotted)
        .or_else(|| known.iter().find(|known| flat(known) == flat(key)).cloned())
        .or_else(|| known.iter().find(|known| last(known) == name).cloned());
    match found {
        Some(found) => format!("unknown key; did you mean {}?", meant(&found)),
        None if here.is_empty() => "unknown key".to_owned(),
        None => format!("unknown key; the keys here are {}", here.join(", ")),
    }
}

fn unknown_word(word: &str, choice: &[String]) -> String {
    let near = nearest(word, choice);
    let hint = near.map(|near| format!("; did you mean {near:?}?"));
    let choice: Vec<String> = choice.iter().map(|word| format!("{word:?}")).collect();
    let is = near.map_or_else(|| described(word), |_| shown(word));
    format!("{is} is not one of {}{}", choice.join(", "), hint.unwrap_or_default())
}

/// The words in backticks.
fn words(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// A message without the value that it repeats, which may be a secret: "invalid type: integer `12345`, expected a
/// string".
pub(super) fn without_value(message: &str) -> String {
    for problem in ["invalid type: ", "invalid value: "] {
        let parts = message.strip_prefix(problem).and_then(|rest| rest.rsplit_once(", expected "));
        if let Some((found, expected)) = parts {
            let kind = found.split(['`', '"']).next().unwrap_or_default().trim_end();
            return format!("{problem}{kind}, expected {expected}");
        }
    }
    message.to_owned()
}
