//! Configuration: a TOML file, overridden by environment variables, checked before anything starts.
//! An unknown key is a start-up error that names the key.

mod address;
mod environment;
mod file;
mod printed;
mod problem;
mod sources;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::bounds::{Bound, Bounded, DAY_SECONDS, check_value, whole};

pub use self::address::listen;
pub use self::environment::{misspelt, without_role};
pub use self::printed::printed;
pub use self::problem::Problem;
pub use self::sources::Sources;

/// The settings that all roles share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Common {
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// Maximum duration of a drain after SIGTERM, s.
    pub drain_seconds: u64,
    /// File to which the bound addresses are written as JSON once the role is up.
    pub ready_file: Option<PathBuf>,
}

/// Gives a configuration's common part.
pub trait HasCommon {
    /// A copy of the common keys.
    fn common(&self) -> Common;
}

/// Implements [`HasCommon`] for a configuration that has the common keys as fields of these names:
/// they stand at its top level, and serde's `flatten` would let unknown keys pass.
#[macro_export]
macro_rules! has_common {
    ($config:ty) => {
        impl $crate::HasCommon for $config {
            fn common(&self) -> $crate::Common {
                $crate::Common {
                    admin: self.admin.clone(),
                    log: self.log.clone(),
                    drain_seconds: self.drain_seconds,
                    ready_file: self.ready_file.clone(),
                }
            }
        }
    };
}

/// Keys under `admin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// Address of `/metrics`, `/healthz` and `/readyz`, which need no authentication: keep it on a private network.
    #[serde(deserialize_with = "listen")]
    pub listen: SocketAddr,
    /// Time without progress of one of the role's loops after which `/readyz` fails, s.
    pub stalled_after_seconds: u64,
    /// Time without any task being run after which `/healthz` fails, s.
    pub blocked_after_seconds: u64,
    /// Maximum connections; for a further one the oldest is closed.
    pub connections_max: usize,
    /// Timeout of a request's head, s; also of the next one on the same connection.
    pub request_timeout_seconds: u64,
}

impl AdminConfig {
    /// On this port of this machine.
    pub fn local(port: u16) -> Self {
        let listen = SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            listen,
            stalled_after_seconds: 15,
            blocked_after_seconds: 30,
            connections_max: 64,
            request_timeout_seconds: 20,
        }
    }
}

impl Bounded for AdminConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("stalled_after_seconds", 1..=DAY_SECONDS, "s"),
            whole("blocked_after_seconds", 1..=DAY_SECONDS, "s"),
            whole("connections_max", 1..=10_000, ""),
            whole("request_timeout_seconds", 1..=3_600, "s"),
        ]
    }
}

impl Bounded for LogConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("traces_per_second", 1..=1_000_000, "a second").or_zero("none"),
            whole("buffer_bytes_max", LOG_BUFFER_BYTES_RANGE, "bytes"),
            whole("repeat_seconds", 1..=3_600, "s"),
            // Each is looked at when a new one takes the place of the oldest.
            whole("conditions_max", 1..=10_000, ""),
        ]
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self::local(0)
    }
}

/// Keys under `log`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,barid_access=debug`.
    pub level: String,
    /// `text` for terminals, `json` for log collectors.
    pub format: LogFormat,
    /// Maximum events of sampled messages (target `barid::trace`) logged per second.
    pub traces_per_second: u32,
    /// Maximum bytes of lines queued for stderr; further lines are dropped and counted.
    pub buffer_bytes_max: usize,
    /// Interval at which a failure that persists is logged, s; what was left out since is counted in the line.
    pub repeat_seconds: u64,
    /// Maximum failures that are remembered for that; beyond it the one that was logged longest ago is forgotten, and may
    /// be logged again too early.
    pub conditions_max: usize,
}

/// Default and range of [`LogConfig::buffer_bytes_max`].
pub(crate) const LOG_BUFFER_BYTES: usize = 1 << 20;
const LOG_BUFFER_BYTES_RANGE: RangeInclusive<u64> = 16 << 10..=256 << 20;

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
            traces_per_second: 100,
            buffer_bytes_max: LOG_BUFFER_BYTES,
            repeat_seconds: 10,
            conditions_max: 128,
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is not a regular one.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is not TOML. The line itself is not shown: it may hold a secret.
    #[error("{path}: line {line}, column {column}: {problem}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Character of the line, from 1.
        column: usize,
        /// The parser's description of the error.
        problem: String,
    },
    /// Keys that are unknown, or whose values do not fit; one a line.
    #[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
    Keys(Vec<Problem>),
}

/// A configuration, and where its keys were set.
#[derive(Debug)]
pub struct Loaded<C> {
    /// The configuration.
    pub config: C,
    /// Where its keys were set.
    pub sources: Sources,
}

/// Reads `file` (if there is one), then `<prefix>A__B=value` from `variables` as key `a.b`. Variables
/// that Kubernetes sets for a Service named like the role are ignored.
///
/// # Errors
/// [`ConfigError`], with all problems that are found.
pub fn load<C: DeserializeOwned + Serialize + Default + Bounded>(
    path: Option<&Path>,
    prefix: &str,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Loaded<C>, ConfigError> {
    let (read, sources) = read(path, prefix, variables)?;
    match read.config {
        Some(config) if read.problems.is_empty() => Ok(Loaded { config, sources }),
        _ => Err(ConfigError::Keys(read.problems)),
    }
}

/// As [`load`], followed by `check`, whose lines begin with keys. If keys are refused, the others are checked
/// nevertheless, so that all problems are found at once.
///
/// # Errors
/// Returns all problems, one a line, each with the place where its key was set.
pub fn load_checked<C: DeserializeOwned + Serialize + Default + Bounded>(
    path: Option<&Path>,
    prefix: &str,
    variables: impl Iterator<Item = (OsString, OsString)>,
    check: impl Fn(&C) -> Result<(), String>,
) -> Result<Loaded<C>, String> {
    let (read, sources) = read::<C>(path, prefix, variables).map_err(|error| error.to_string())?;
    let checked = read.config.as_ref().map_or(Ok(()), check);
    let mut lines: Vec<String> = read.problems.iter().map(Problem::to_string).collect();
    if let Err(problems) = checked {
        let refused: Vec<&str> = read.problems.iter().map(|problem| problem.key.as_str()).collect();
        let lasting = problems
            .lines()
            .filter(|line| refused.is_empty() || sources.is_about_set_keys(line, &refused));
        lines.extend(lasting.map(|line| sources.add_to(line)));
    }
    match read.config {
        Some(config) if lines.is_empty() => Ok(Loaded { config, sources }),
        _ => Err(lines.join("\n")),
    }
}

fn read<C: DeserializeOwned + Serialize + Default + Bounded>(
    path: Option<&Path>,
    prefix: &str,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<(Read<C>, Sources), ConfigError> {
    let read = path.map(|path| file::read(path, &C::bounds(), &known::<C>())).transpose()?;
    let (mut table, mut sources) = read.unwrap_or_default();
    let defaults = Table::try_from(C::default()).unwrap_or_default();
    let (variables, mut problems) = environment::read(prefix, &defaults, variables);
    for variable in variables {
        match set(&mut table, &variable.path, variable.value) {
            Ok(()) => sources.variables.push((variable.path.join("."), variable.name)),
            Err(table) => {
                problems.push(Problem::new(&variable.name, &format!("{table} is not a table")));
            }
        }
    }
    Ok((accept(table, prefix, &sources, problems), sources))
}

/// What could be read of a configuration.
pub(crate) struct Read<C> {
    /// The configuration, without the keys that were refused; `None` if the rest cannot be read either.
    pub config: Option<C>,
    /// The keys that were refused.
    pub problems: Vec<Problem>,
}

/// Rounds of reading, each of which finds a further problem.
const PROBLEMS_MAX: usize = 100;

/// Numbers are compared with their bounds before they are made to fit types, so that the error names the
/// range. What is refused is removed, so that the rest can be read and its problems be found as well.
pub(crate) fn accept<C: DeserializeOwned + Serialize + Default + Bounded>(
    mut table: Table,
    prefix: &str,
    sources: &Sources,
    mut problems: Vec<Problem>,
) -> Read<C> {
    let defaults = Table::try_from(C::default()).unwrap_or_default();
    let mut accepted = None;
    for (key, problem) in problem::not_tables(&table, &defaults) {
        remove(&mut table, &key);
        problems.push(Problem::new(&key, &problem).at(sources));
    }
    let written = serde_json::to_value(&table).unwrap_or_default();
    for out in check_value(&C::bounds(), &written) {
        remove(&mut table, &out.key);
        problems.push(Problem::new(&out.key, &out.problem).at(sources));
    }
    while problems.len() < PROBLEMS_MAX {
        let error = match serde_path_to_error::deserialize(Value::Table(table.clone())) {
            Ok(config) => {
                accepted = Some(config);
                break;
            }
            Err(error) => error,
        };
        let key = error.path().to_string();
        let value = find(&table, &key);
        let meant = |meant: &str| match sources.variable_of(&key) {
            Some(_) => environment::name_of(prefix, meant),
            None => format!("{meant:?}"),
        };
        let default = find(&defaults, &key).and_then(Value::as_str);
        let message = address::with_port(error.inner().message(), default);
        let problem = problem::reword(&key, &message, value, &known::<C>(), meant);
        problems.push(Problem::new(&key, &problem).at(sources));
        if !remove(&mut table, &key) {
            break;
        }
    }
    problems.sort_by_key(Problem::order);
    Read { config: accepted, problems }
}

/// All keys of a configuration, dotted, those of lists and of absent values excepted.
pub(crate) fn known<C: Serialize + Default>() -> Vec<String> {
    fn add(table: &Table, path: &str, known: &mut Vec<String>) {
        for (name, value) in table {
            let key = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match value {
                Value::Table(below) => add(below, &key, known),
                _ => known.push(key),
            }
        }
    }
    let mut known = Vec::new();
    add(&Table::try_from(C::default()).unwrap_or_default(), "", &mut known);
    known
}

/// The table that holds a key, and the key's last part; names may contain dots. Of a list, the list.
fn parent<'a, 'b>(table: &'a mut Table, key: &'b str) -> Option<(&'a mut Table, &'b str)> {
    let key = key.trim_end_matches(".?");
    let whole = key.split('[').next().unwrap_or_default();
    if table.contains_key(whole) {
        return Some((table, whole));
    }
    let dots = whole.match_indices('.').map(|(dot, _)| dot);
    let dot =
        dots.into_iter().find(|dot| matches!(table.get(&whole[..*dot]), Some(Value::Table(_))))?;
    let (first, rest) = (&whole[..dot], &whole[dot + 1..]);
    parent(table.get_mut(first)?.as_table_mut()?, rest)
}

fn find<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    // An item of a list is not looked for: its own kind would be shown as the list's.
    if key.contains('[') {
        return None;
    }
    let key = key.trim_end_matches(".?");
    table.get(key).or_else(|| {
        let mut parts = key.match_indices('.');
        parts.find_map(|(dot, _)| find(table.get(&key[..dot])?.as_table()?, &key[dot + 1..]))
    })
}

fn remove(table: &mut Table, key: &str) -> bool {
    parent(table, key).is_some_and(|(table, last)| table.remove(last).is_some())
}

/// The error is the key that is in the way.
fn set(table: &mut Table, path: &[String], value: Value) -> Result<(), String> {
    let Some((last, tables)) = path.split_last() else { return Ok(()) };
    let mut table = table;
    for key in tables {
        table = table
            .entry(key.clone())
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| key.clone())?;
    }
    table.insert(last.clone(), value);
    Ok(())
}

#[cfg(test)]
mod tests;
