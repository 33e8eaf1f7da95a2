//! The bounds of all numbers in the configuration. A number's key, range and unit are declared once, next to the
//! struct that contains it. They are checked when the file is read, by `--check-config`, and before a role starts.
//! docs/configuration.md is written from them.

mod apart;
mod arguments;
mod bound;
mod check;
mod walk;

pub use self::apart::check_apart;
pub use self::arguments::walk_arguments;
pub use self::bound::{Bound, Bounded, DAY_SECONDS, HOUR_MS, TEBIBYTE, real, whole, within};
pub use self::check::{OutOfBounds, all, check, check_under, refuse_if};
pub(crate) use self::check::{check_value, without_indexes};
pub use self::walk::walk;
