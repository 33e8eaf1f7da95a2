//! Checks of a configuration's numbers against their bounds.

use serde::Serialize;
use serde_json::Value;

use super::bound::{Bound, Bounded};

/// A number out of its bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct OutOfBounds {
    /// The dotted key.
    pub key: String,
    /// The value, and what to write instead.
    pub problem: String,
}

/// Checks every number of a configuration.
///
/// # Errors
/// Returns the numbers that are out of their bounds, one a line, with key, value and allowed range.
pub fn check<C: Bounded + Serialize>(config: &C) -> Result<(), String> {
    check_under("", config)
}

/// As [`check`], for a table whose keys begin with `prefix` (`redis.`).
///
/// # Errors
/// As [`check`].
pub fn check_under<C: Bounded + Serialize>(prefix: &str, config: &C) -> Result<(), String> {
    let value = serde_json::to_value(config).map_err(|error| error.to_string())?;
    let out =
        check_value(&C::bounds(), &value).into_iter().map(|out| Err(format!("{prefix}{out}")));
    all(out)
}

/// A check of one condition.
///
/// # Errors
/// Returns `problem` if it is bad.
pub fn refuse_if(is_bad: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if is_bad { Err(problem()) } else { Ok(()) }
}

/// The problems of several checks, which are one or more lines each.
///
/// # Errors
/// Returns all lines.
pub fn all(checks: impl IntoIterator<Item = Result<(), String>>) -> Result<(), String> {
    let problems: Vec<String> = checks.into_iter().filter_map(Result::err).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

/// As [`check`], for a parsed file that is not deserialized yet. Absent keys pass.
pub(crate) fn check_value(bounds: &[Bound], value: &Value) -> Vec<OutOfBounds> {
    let mut out = Vec::new();
    for bound in bounds {
        let path: Vec<&str> = bound.key.split('.').collect();
        for (key, value) in values(String::new(), value, &path) {
            out.extend(bound.check(value).err().map(|problem| OutOfBounds { key, problem }));
        }
    }
    out
}

/// A key without the indexes of lists: `auth.keys[1].secret` is `auth.keys.secret`.
pub(crate) fn without_indexes(key: &str) -> String {
    let parts = key.split('[').enumerate();
    let without = |(at, part): (usize, &str)| match part.split_once(']') {
        Some((_, rest)) if at > 0 => rest.to_owned(),
        _ => part.to_owned(),
    };
    parts.map(without).collect()
}

/// The values at a path, each with its key. There are several if the path crosses a list or ends at one.
fn values<'a>(key: String, value: &'a Value, path: &[&str]) -> Vec<(String, &'a Value)> {
    match (value, path) {
        (Value::Array(items), _) => {
            let items = items.iter().enumerate();
            items.flat_map(|(index, item)| values(format!("{key}[{index}]"), item, path)).collect()
        }
        (Value::Object(table), [name, rest @ ..]) => {
            let key = if key.is_empty() { (*name).to_owned() } else { format!("{key}.{name}") };
            table.get(*name).map_or_else(Vec::new, |value| values(key, value, rest))
        }
        (value, []) => vec![(key, value)],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::{real, whole};
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
        let out = check_value(&bounds(), value).into_iter();
        out.map(|out| out.to_string()).collect::<Vec<_>>().join("\n")
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
        assert!(rate(json!("ten")).starts_with("limits.rate: a text of 3 bytes, not a number"));
        assert!(rate(json!("10s")).starts_with("limits.rate: \"10s\" is not a number"));
        assert_eq!((rate(json!(0)), rate(json!(1)), rate(json!(10))), Default::default());
    }

    #[test]
    fn lists_and_fractions_are_looked_into() {
        assert_eq!(
            problem(&json!({"weights": [8, 0]})),
            "weights[1]: 0 is out of range; write 1 to 9"
        );
        assert_eq!(problem(&json!({"share": 1.5})), "share: 1.5 is out of range; write 0 to 1");
        assert_eq!(
            problem(&json!({"share": f64::NAN})),
            "share: not a finite number; write 0 to 1"
        );
        assert_eq!(problem(&json!({"share": 1})), "");
        let keys = json!({"keys": [{"seconds": 5}, {"seconds": 4}, {}]});
        assert_eq!(problem(&keys), "keys[1].seconds: 4 is out of range; write 5 to 9 s");
    }
}
