//! For tests: walks every number of a configuration over its ends and beyond.

use std::collections::BTreeSet;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::bound::{Bound, Bounded};
use super::check::without_indexes;
use crate::config::{ConfigError, Sources, accept};

/// A configuration that [`walk`] can check.
pub trait Walked: Bounded + DeserializeOwned + Serialize + Default {}

impl<C: Bounded + DeserializeOwned + Serialize + Default> Walked for C {}

/// Sets each number of `base` (TOML) in turn to its ends and beyond, to 0, 1, powers of two, -1, and what
/// floats can say. Each is refused as a file would be, with key and range, or is left to `check`, which may
/// refuse it for its relation to others and must name its key; what passes goes to `build`, which must not
/// panic. Also asserts that each number has a bound, and each bound a number.
///
/// # Panics
/// One of these does not hold.
pub fn walk<C: Walked>(base: &str, check: impl Fn(&C) -> Result<(), String>, build: impl Fn(C)) {
    let table: Table = base.parse().expect("the base is TOML");
    let config: C = read(table.clone()).expect("the base is a configuration");
    check(&config).expect("the base is valid");
    // As it is printed, defaults are there as well.
    let whole = Table::try_from(&config).expect("a configuration is a table");
    assert_eq!(numbers(&serde_json::to_value(&whole).expect("data")), keys(&C::bounds()));
    for bound in C::bounds() {
        for value in probes(&bound) {
            let told = format!("{} = {value}", bound.key);
            let mut table = table.clone();
            let path: Vec<&str> = bound.key.split('.').collect();
            set(&mut table, &path, list_like(&whole, &path, &value));
            let within = serde_json::to_value(&value).is_ok_and(|v| bound.check(&v).is_ok());
            match read::<C>(table) {
                Ok(config) => {
                    assert!(within, "{told} is taken");
                    match check(&config) {
                        Ok(()) => build(config),
                        Err(error) => {
                            let last = path.last().expect("a key has parts");
                            assert!(error.contains(last), "{told} is not named: {error}");
                        }
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(!within, "{told} is refused: {error}");
                    let named =
                        error.split(": ").next().map(without_indexes).as_ref() == Some(&bound.key);
                    assert!(named && error.contains(&bound.allowed()), "{told}: {error}");
                }
            }
        }
    }
}

fn read<C: Walked>(table: Table) -> Result<C, ConfigError> {
    let read = accept(table, "", &Sources::default(), Vec::new());
    match read.config {
        Some(config) if read.problems.is_empty() => Ok(config),
        _ => Err(ConfigError::Keys(read.problems)),
    }
}

fn probes(bound: &Bound) -> Vec<Value> {
    let (min, max) = bound.ends();
    let mut probes = vec![];
    if let (Some(min), Some(max)) = (min.as_u64(), max.as_u64()) {
        let around = |n: u64| [n.saturating_sub(1), n, n.saturating_add(1)];
        let ends = [min, max, 1 << 16, 1 << 31, 1 << 32, 1 << 48, 1 << 53].map(around);
        let whole = ends.concat().into_iter().chain([0, 1, i64::MAX as u64]);
        probes.extend(whole.map(|n| Value::Integer(n.try_into().unwrap_or(i64::MAX))));
        probes.extend([-1, i64::MIN].map(Value::Integer));
    }
    if let (Some(min), Some(max)) = (min.as_f64(), max.as_f64()) {
        let real =
            [min, max, min - 0.5, max + 0.5, -0.0, 1.0, 1e-300, 1e308, f64::NAN, f64::INFINITY];
        probes.extend(real.map(Value::Float));
    }
    // Too large for an integer of TOML: only the environment can set it.
    probes.push(Value::String(u64::MAX.to_string()));
    probes
}

/// `value`, or a list of it where the configuration has a list.
fn list_like(whole: &Table, path: &[&str], value: &Value) -> Value {
    let mut at = Some(whole);
    for key in &path[..path.len() - 1] {
        at = at.and_then(|table| table.get(*key)).and_then(Value::as_table);
    }
    match at.and_then(|table| table.get(path[path.len() - 1])) {
        Some(Value::Array(items)) => Value::Array(vec![value.clone(); items.len()]),
        _ => value.clone(),
    }
}

fn set(table: &mut Table, path: &[&str], value: Value) {
    let (key, rest) = path.split_first().expect("a key has parts");
    if rest.is_empty() {
        table.insert((*key).to_owned(), value);
        return;
    }
    match table.entry(*key).or_insert_with(|| Value::Table(Table::new())) {
        Value::Table(below) => set(below, rest, value),
        Value::Array(items) => items.iter_mut().for_each(|item| {
            set(item.as_table_mut().expect("a list of tables"), rest, value.clone());
        }),
        other => panic!("{key} is {other}"),
    }
}

fn keys(bounds: &[Bound]) -> BTreeSet<String> {
    bounds.iter().map(|bound| bound.key.clone()).collect()
}

/// The dotted keys at which numbers stand.
fn numbers(value: &Json) -> BTreeSet<String> {
    match value {
        Json::Number(_) => BTreeSet::from([String::new()]),
        Json::Array(items) => items.iter().flat_map(numbers).collect(),
        Json::Object(table) => table
            .iter()
            .flat_map(|(key, value)| {
                let dotted = move |below: String| match below.as_str() {
                    "" => key.clone(),
                    below => format!("{key}.{below}"),
                };
                numbers(value).into_iter().map(dotted)
            })
            .collect(),
        _ => BTreeSet::new(),
    }
}
