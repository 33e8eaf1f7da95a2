//! The bounds of every number of configuration. A number's key, range and unit are declared once, beside the
//! struct that holds it. They are checked when the file is read, by `--check-config`, and again before a role
//! starts. docs/configuration.md lists the same tables.

mod arguments;
mod walk;

pub use arguments::walk_arguments;
pub use walk::walk;

use std::fmt;
use std::ops::RangeInclusive;

use serde::Serialize;
use serde_json::Value;

/// An hour in milliseconds: the longest of most waits.
pub const HOUR_MS: u64 = 3_600_000;
/// A day in seconds.
pub const DAY_SECONDS: u64 = 86_400;
/// The most that a size in memory may be: a tebibyte.
pub const TEBIBYTE: u64 = 1 << 40;

/// The allowed values of one number of configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    /// The dotted key; within a list of tables without an index.
    pub key: String,
    range: Range,
    /// The unit after the number: `ms`, `bytes`, `a second`; empty for a count.
    pub unit: &'static str,
    /// What 0 means, where it is allowed beside the range.
    zero: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq)]
enum Range {
    Whole(RangeInclusive<u64>),
    Real(RangeInclusive<f64>),
}

/// A whole number.
pub fn whole(key: &str, range: RangeInclusive<u64>, unit: &'static str) -> Bound {
    Bound { key: key.to_owned(), range: Range::Whole(range), unit, zero: None }
}

/// A number with a fraction.
pub fn real(key: &str, range: RangeInclusive<f64>, unit: &'static str) -> Bound {
    Bound { key: key.to_owned(), range: Range::Real(range), unit, zero: None }
}

/// The bounds of a table that stands under `key`.
pub fn within<T: Bounded>(key: &str) -> Vec<Bound> {
    let below = |bound: Bound| Bound { key: format!("{key}.{}", bound.key), ..bound };
    T::bounds().into_iter().map(below).collect()
}

/// A table of configuration that declares the bounds of its numbers.
pub trait Bounded {
    /// One bound for each number in it and in the tables below it.
    fn bounds() -> Vec<Bound>;
}

impl Bound {
    /// 0 is allowed as well, and means `meaning`.
    pub fn or_zero(self, meaning: &'static str) -> Self {
        Self { zero: Some(meaning), ..self }
    }

    /// The allowed range and its unit, as errors show it.
    pub fn allowed(&self) -> String {
        let (unit, zero) = (self.unit, self.zero.map(|meaning| format!(", or 0 ({meaning})")));
        let space = if unit.is_empty() { "" } else { " " };
        format!("{}{space}{unit}{}", self.range, zero.unwrap_or_default())
    }

    /// The smallest and the largest value, 0 aside.
    pub fn ends(&self) -> (Value, Value) {
        match &self.range {
            Range::Whole(range) => ((*range.start()).into(), (*range.end()).into()),
            Range::Real(range) => ((*range.start()).into(), (*range.end()).into()),
        }
    }

    fn spans(&self, number: f64) -> bool {
        let (min, max) = self.ends();
        let above = min.as_f64().is_none_or(|min| number >= min);
        let zero = self.zero.is_some() && number == 0.0;
        zero || above && max.as_f64().is_none_or(|max| number <= max)
    }

    /// # Errors
    /// The value and the allowed range, without the key.
    fn check(&self, value: &Value) -> Result<(), String> {
        let allowed = || self.allowed();
        let Value::Number(number) = value else {
            let parsed = |text: &str| {
                let short = Some(text).filter(|text| text.len() <= 64);
                short.and_then(|text| text.parse::<f64>().ok())
            };
            return Err(match value {
                Value::String(text) => match parsed(text) {
                    // From the environment: an integer that TOML cannot hold stays text.
                    Some(number) if !self.spans(number) => {
                        format!("{text} is out of range; write {}", allowed())
                    }
                    Some(_) => {
                        format!(
                            "{text:?} is text, not a number; write {} without quotes",
                            allowed()
                        )
                    }
                    None => format!("not a number; write {}", allowed()),
                },
                // serde_json turns NaN and infinity into null.
                Value::Null => format!("not a finite number; write {}", allowed()),
                _ => format!("not a number; write {}", allowed()),
            });
        };
        let zero = self.zero.is_some() && number.as_f64() == Some(0.0);
        let fits = match &self.range {
            Range::Whole(_) if number.is_f64() => {
                return Err(format!("{number} is not a whole number; write {}", allowed()));
            }
            Range::Whole(range) => number.as_u64().is_some_and(|n| range.contains(&n)),
            Range::Real(range) => number.as_f64().is_some_and(|n| range.contains(&n)),
        };
        if fits || zero {
            return Ok(());
        }
        Err(format!("{number} is out of range; write {}", allowed()))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(range) => write!(f, "{} to {}", range.start(), range.end()),
            Self::Real(range) => write!(f, "{} to {}", range.start(), range.end()),
        }
    }
}

/// A number out of its bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct OutOfBounds {
    /// The dotted key.
    pub key: String,
    /// Its value, and what to write instead.
    pub problem: String,
}

/// Checks every number of a configuration.
///
/// # Errors
/// The first number that is out of its bounds: key, value, allowed range.
pub fn check<C: Bounded + Serialize>(config: &C) -> Result<(), String> {
    check_under("", config)
}

/// The same for a table whose keys begin with `prefix` (`redis.`).
///
/// # Errors
/// As [`check`].
pub fn check_under<C: Bounded + Serialize>(prefix: &str, config: &C) -> Result<(), String> {
    let value = serde_json::to_value(config).map_err(|error| error.to_string())?;
    check_value(&C::bounds(), &value).map_err(|error| format!("{prefix}{error}"))
}

/// The same for a file that is parsed and not yet deserialized. Absent keys pass.
pub(crate) fn check_value(bounds: &[Bound], value: &Value) -> Result<(), OutOfBounds> {
    bounds.iter().try_for_each(|bound| {
        let path: Vec<&str> = bound.key.split('.').collect();
        let out_of_bounds = |problem| OutOfBounds { key: bound.key.clone(), problem };
        values(value, &path).into_iter().try_for_each(|v| bound.check(v).map_err(out_of_bounds))
    })
}

/// The values at a path: several if the path crosses a list, or ends at one.
fn values<'a>(value: &'a Value, path: &[&str]) -> Vec<&'a Value> {
    match (value, path) {
        (Value::Array(items), _) => items.iter().flat_map(|item| values(item, path)).collect(),
        (Value::Object(table), [key, rest @ ..]) => {
            table.get(*key).map_or_else(Vec::new, |value| values(value, rest))
        }
        (value, []) => vec![value],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bounds() -> Vec<Bound> {
        vec![
            whole("limits.rate", 1..=10, "a second").or_zero("no limit"),
            whole("weights", 1..=9, ""),
            real("share", 0.0..=1.0, ""),
            whole("keys.seconds", 5..=9, "s"),
        ]
    }

    fn problem(value: &Value) -> String {
        check_value(&bounds(), value).map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn hazard_61_a_number_out_of_its_bounds_is_told_with_its_range_and_unit() {
        let rate = |rate: Value| problem(&json!({"limits": {"rate": rate}}));
        let told = "is out of range; write 1 to 10 a second, or 0 (no limit)";
        assert_eq!(rate(json!(11)), format!("limits.rate: 11 {told}"));
        assert_eq!(rate(json!(-1)), format!("limits.rate: -1 {told}"));
        assert_eq!(rate(json!(u64::MAX)), format!("limits.rate: {} {told}", u64::MAX));
        assert_eq!(
            rate(json!("18446744073709551616")),
            format!("limits.rate: {} {told}", 1u128 << 64)
        );
        assert!(
            rate(json!(1e308))
                .starts_with("limits.rate: 1e+308 is not a whole number; write 1 to 10")
        );
        assert!(rate(json!("ten")).starts_with("limits.rate: not a number"));
        assert_eq!((rate(json!(0)), rate(json!(1)), rate(json!(10))), Default::default());
    }

    #[test]
    fn lists_and_fractions_are_looked_into() {
        assert_eq!(
            problem(&json!({"weights": [8, 0]})),
            "weights: 0 is out of range; write 1 to 9"
        );
        assert_eq!(problem(&json!({"share": 1.5})), "share: 1.5 is out of range; write 0 to 1");
        assert_eq!(
            problem(&json!({"share": f64::NAN})),
            "share: not a finite number; write 0 to 1"
        );
        assert_eq!(problem(&json!({"share": 1})), "");
        let keys = json!({"keys": [{"seconds": 5}, {"seconds": 4}, {}]});
        assert_eq!(problem(&keys), "keys.seconds: 4 is out of range; write 5 to 9 s");
    }
}
