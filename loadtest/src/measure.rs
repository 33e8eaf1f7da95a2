//! A measure: a row of the table and of `bench.json`.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

/// One row. Field names are stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// The name; stable.
    pub measure: String,
    /// `1/s`, `ms`, `B` and so on; may be empty.
    pub unit: String,
    /// The barest program's value in the same run; for latencies, that of Kafka's hop alone.
    pub floor: Option<f64>,
    pub barid: f64,
    /// Barid's value over the floor's; absent if the floor's is absent or zero.
    pub ratio: Option<f64>,
    pub goal: Option<f64>,
    /// Whether the goal is met.
    pub met: Option<bool>,
}

impl Measure {
    /// A row without a goal.
    pub fn new(measure: &str, unit: &str, floor: Option<f64>, barid: f64) -> Self {
        let ratio = floor.filter(|floor| *floor != 0.0).map(|floor| barid / floor);
        let (measure, unit) = (measure.to_owned(), unit.to_owned());
        Self { measure, unit, floor, barid, ratio, goal: None, met: None }
    }

    /// Adds a goal.
    #[must_use]
    pub fn against(self, goal: Goal) -> Self {
        let (value, met) = match goal {
            Goal::AtMost(value) => (value, self.barid <= value),
            Goal::AtLeast(value) => (value, self.barid >= value),
        };
        Self { goal: Some(value), met: Some(met), ..self }
    }

    /// Whether more is better: true for rates; everything else is a cost.
    pub fn more_is_better(&self) -> bool {
        self.unit == "1/s"
    }

    /// The noise band: 99 in 100 pairs of runs of the same binaries on a quiet machine differ by at most this
    /// factor, less one. Bytes and CPU time vary little on a busy machine; times vary more, and the tail of
    /// a distribution most.
    pub fn noise(&self) -> f64 {
        let is_tail = ["_p99_", "_p999_", "_max_"].iter().any(|tail| self.measure.contains(tail));
        match self.unit.as_str() {
            "B" => 0.05,
            "us" => 0.12,
            "1/s" if self.measure.ends_with("_per_core") => 0.12,
            "1/s" => 0.25,
            "ms" | "s" if is_tail => 0.70,
            "ms" | "s" => 0.30,
            _ => 0.12,
        }
    }
}

/// The rows as a text table.
pub fn table(measures: &[Measure]) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), shown);
    let head = ["measure", "unit", "floor", "barid", "ratio", "goal", ""].map(str::to_owned);
    let rows = measures.iter().map(|row| {
        let met = row.met.map_or("", |met| if met { "met" } else { "missed" });
        [
            row.measure.clone(),
            row.unit.clone(),
            number(row.floor),
            number(Some(row.barid)),
            number(row.ratio),
            number(row.goal),
            met.to_owned(),
        ]
    });
    let line = |[measure, unit, floor, barid, ratio, goal, met]: [String; 7]| {
        let line =
            format!("{measure:<34}{unit:<8}{floor:>10}{barid:>10}{ratio:>8}{goal:>10}  {met}");
        line.trim_end().to_owned()
    };
    std::iter::once(head).chain(rows).map(line).collect::<Vec<_>>().join("\n")
}

/// The number with three significant digits, or without decimals.
pub fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_ratio_and_verdict() {
        let row = Measure::new("idle_bytes_per_session", "B", Some(2000.0), 2500.0);
        assert_eq!(row.clone().against(Goal::AtMost(2560.0)).met, Some(true));
        assert_eq!(row.clone().against(Goal::AtMost(2400.0)).met, Some(false));
        assert_eq!(row.clone().against(Goal::AtLeast(2560.0)).met, Some(false));
        let row = row.against(Goal::AtMost(2560.0));
        let json = serde_json::to_value(&row).unwrap();
        let wanted = serde_json::json!({
            "measure": "idle_bytes_per_session", "unit": "B", "floor": 2000.0, "barid": 2500.0,
            "ratio": 1.25, "goal": 2560.0, "met": true,
        });
        assert_eq!(json, wanted);
        assert_eq!(serde_json::from_value::<Measure>(json).unwrap(), row);
        let lines = table(&[Measure::new("x", "ms", None, 1.234)]);
        assert!(lines.lines().nth(1).is_some_and(|line| line.contains("1.23")), "{lines}");
    }
}
