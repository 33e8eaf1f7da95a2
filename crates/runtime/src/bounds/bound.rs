//! The bound of one number in the configuration: its key, its allowed values and their unit.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::Value;

use crate::words::{described, is_quantity, shown};

/// An hour in milliseconds, the upper bound of most waits.
pub const HOUR_MS: u64 = 3_600_000;
/// A day in seconds.
pub const DAY_SECONDS: u64 = 86_400;
/// A tebibyte, the upper bound of sizes in memory.
pub const TEBIBYTE: u64 = 1 << 40;

/// The allowed values of a number.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    /// The dotted key; without the index in a list of tables.
    pub key: String,
    range: Range,
    /// The unit after the number: `ms`, `bytes`, `a second`; empty for a count.
    pub unit: &'static str,
    /// The meaning of 0, if it is allowed in addition to the range.
    zero: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq)]
enum Range {
    Whole(RangeInclusive<u64>),
    Real(RangeInclusive<f64>),
}

/// The bound of an integer.
pub fn whole(key: &str, range: RangeInclusive<u64>, unit: &'static str) -> Bound {
    Bound { key: key.to_owned(), range: Range::Whole(range), unit, zero: None }
}

/// The bound of a number with a fraction.
pub fn real(key: &str, range: RangeInclusive<f64>, unit: &'static str) -> Bound {
    Bound { key: key.to_owned(), range: Range::Real(range), unit, zero: None }
}

/// Prefixes the bounds of a table with its `key`.
pub fn within<T: Bounded>(key: &str) -> Vec<Bound> {
    let below = |bound: Bound| Bound { key: format!("{key}.{}", bound.key), ..bound };
    T::bounds().into_iter().map(below).collect()
}

/// A table of the configuration, with the bounds of its numbers.
pub trait Bounded {
    /// One bound for each number in the table and in the tables below it.
    fn bounds() -> Vec<Bound>;
}

impl Bound {
    /// Allows 0 as well, with this meaning.
    pub fn or_zero(self, meaning: &'static str) -> Self {
        Self { zero: Some(meaning), ..self }
    }

    /// The allowed range and its unit, as shown in errors.
    pub fn allowed(&self) -> String {
        let (unit, zero) = (self.unit, self.zero.map(|meaning| format!(", or 0 ({meaning})")));
        let space = if unit.is_empty() { "" } else { " " };
        format!("{}{space}{unit}{}", self.range, zero.unwrap_or_default())
    }

    /// The smallest and the largest value, not counting an extra 0.
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

    /// Checks a value.
    ///
    /// # Errors
    /// Returns the value and the allowed range, without the key.
    pub(crate) fn check(&self, value: &Value) -> Result<(), String> {
        let allowed = || self.allowed();
        let Value::Number(number) = value else {
            // Other texts may be secrets.
            let parsed = |text: &str| is_quantity(text).then(|| text.parse::<f64>().ok()).flatten();
            return Err(match value {
                Value::String(text) => match parsed(text) {
                    // An integer from the environment that is too large for TOML is kept as text.
                    Some(number) if !self.spans(number) => {
                        format!("{text} is out of range; write {}", allowed())
                    }
                    Some(_) => {
                        format!(
                            "{text:?} is text, not a number; write {} without quotes",
                            allowed()
                        )
                    }
                    None if text.is_empty() => {
                        format!("is empty; write {}, or leave it out", allowed())
                    }
                    None if is_quantity(text) => {
                        format!("{} is not a number; write {}", shown(text), allowed())
                    }
                    None => format!("{}, not a number; write {}", described(text), allowed()),
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
