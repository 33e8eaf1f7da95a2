//! What is measured, beside the floor and the goal: a row of the table and of `bench.json`.

use serde::{Deserialize, Serialize};

/// What would be good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// One row. Field names are stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// Its name, which is stable.
    pub measure: String,
    /// `1/s`, `ms`, `B` and so on; empty: it has none.
    pub unit: String,
    /// What the barest program takes, measured in the same run; for latencies Kafka's hop alone;
    /// absent: there is none.
    pub floor: Option<f64>,
    /// What Barid takes.
    pub barid: f64,
    /// Barid's over the floor's; absent: there is no floor, or it is zero.
    pub ratio: Option<f64>,
    /// What would be good; absent: there is no goal.
    pub goal: Option<f64>,
    /// Absent: there is no goal.
    pub met: Option<bool>,
}

impl Measure {
    /// A row without a goal.
    pub fn new(measure: &str, unit: &str, floor: Option<f64>, barid: f64) -> Self {
        let ratio = floor.filter(|floor| *floor != 0.0).map(|floor| barid / floor);
        let (measure, unit) = (measure.to_owned(), unit.to_owned());
        Self { measure, unit, floor, barid, ratio, goal: None, met: None }
    }

    /// Held against a goal.
    #[must_use]
    pub fn against(self, goal: Goal) -> Self {
        let (value, met) = match goal {
            Goal::AtMost(value) => (value, self.barid <= value),
            Goal::AtLeast(value) => (value, self.barid >= value),
        };
        Self { goal: Some(value), met: Some(met), ..self }
    }

    /// Whether more is better: what comes a second. All else is cost.
    pub fn more_is_better(&self) -> bool {
        self.unit == "1/s"
    }

    /// By what factor, less one, two runs of the same binaries differ on a machine that does nothing
    /// else, 99 times in 100: what is known without repeating. Counts of bytes and CPU time bear a busy
    /// machine; times do not, and the tail of a distribution least.
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

/// The rows as people read them.
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

/// Three digits, or all before the point.
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
    fn a_row_says_how_far_from_floor_and_goal_it_is() {
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
