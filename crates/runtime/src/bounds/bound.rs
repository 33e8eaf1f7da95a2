//! One number of configuration: its key, the values that it may have, and their unit.

use std::fmt;
use std::ops::RangeInclusive;

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
    pub(crate) fn check(&self, value: &Value) -> Result<(), String> {
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
