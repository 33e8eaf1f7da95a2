//! Tables that a scenario shows beside its measures.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::measure::shown;

/// Rows of figures. Field names are stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Heading of the first column: `hop`, `process`.
    pub what: String,
    /// Headings of the figures, with their unit: `mean_ms`.
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
}

/// A row of a [`Table`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    /// One for each column; absent if unknown.
    pub values: Vec<Option<f64>>,
}

impl Table {
    pub fn new(what: &str, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|column| (*column).to_owned()).collect();
        Self { what: what.to_owned(), columns, rows: Vec::new() }
    }

    pub fn row(&mut self, name: &str, values: impl IntoIterator<Item = Option<f64>>) {
        let values = values.into_iter().collect();
        self.rows.push(Row { name: name.to_owned(), values });
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24}", self.what)?;
        self.columns.iter().try_for_each(|column| write!(f, "{column:>14}"))?;
        for Row { name, values } in &self.rows {
            write!(f, "\n{name:<24}")?;
            for value in values {
                write!(f, "{:>14}", value.map_or_else(|| "-".to_owned(), shown))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_stands_below_its_columns() {
        let mut table = Table::new("hop", &["mean_ms", "share"]);
        table.row("taken_accepted", [Some(0.161), None]);
        let text = table.to_string();
        let lines: Vec<_> = text.lines().collect();
        let wanted = [
            ("hop", "       mean_ms", "         share"),
            ("taken_accepted", "          0.16", "             -"),
        ];
        for (line, (name, first, second)) in lines.iter().zip(wanted) {
            assert_eq!(*line, format!("{name:<24}{first}{second}"));
        }
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&json).unwrap(), table);
    }
}
