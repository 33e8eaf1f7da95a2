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
/// Returns the first number that is out of its bounds, with key, value and allowed range.
pub fn check<C: Bounded + Serialize>(config: &C) -> Result<(), String> {
    check_under("", config)
}

/// As [`check`], for a table whose keys begin with `prefix` (`redis.`).
///
/// # Errors
/// As [`check`].
pub fn check_under<C: Bounded + Serialize>(prefix: &str, config: &C) -> Result<(), String> {
    let value = serde_json::to_value(config).map_err(|error| error.to_string())?;
    check_value(&C::bounds(), &value).map_err(|error| format!("{prefix}{error}"))
}

/// As [`check`], for a parsed file that is not deserialized yet. Absent keys pass.
pub(crate) fn check_value(bounds: &[Bound], value: &Value) -> Result<(), OutOfBounds> {
    bounds.iter().try_for_each(|bound| {
        let path: Vec<&str> = bound.key.split('.').collect();
        let out_of_bounds = |problem| OutOfBounds { key: bound.key.clone(), problem };
        values(value, &path).into_iter().try_for_each(|v| bound.check(v).map_err(out_of_bounds))
    })
}

/// The values at a path. There are several if the path crosses a list or ends at one.
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
