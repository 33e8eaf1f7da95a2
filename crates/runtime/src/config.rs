//! Configuration: a TOML file, overridden by environment variables, checked before anything starts.
//! An unknown key is a start-up error that names the key.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::bounds::{Bound, Bounded, DAY_SECONDS, check_value, whole};

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
    /// The file cannot be read.
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
    /// A key is unknown, or its value does not fit.
    #[error("{key}: {problem}{origin}")]
    Key {
        /// The key, dotted.
        key: String,
        /// The reason, and what to write instead.
        problem: String,
        /// The environment variable that it came from, if one.
        origin: String,
    },
    /// An environment variable is not UTF-8.
    #[error("{0}: its value is not UTF-8")]
    NotText(String),
    /// An environment variable's path crosses a value.
    #[error("{variable}: {key} is not a table")]
    NotATable {
        /// The variable.
        variable: String,
        /// The key in the way.
        key: String,
    },
}

/// Reads `file` (if there is one), then `<prefix>A__B=value` from `variables` as key `a.b`. Variables
/// that Kubernetes sets for a Service named like the role are ignored.
///
/// # Errors
/// [`ConfigError`]; the first problem found.
pub fn load<C: DeserializeOwned + Serialize + Default + Bounded>(
    file: Option<&Path>,
    prefix: &str,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<C, ConfigError> {
    let mut table = file.map(read).transpose()?.unwrap_or_default();
    let defaults = Table::try_from(C::default()).unwrap_or_default();
    let mut origins = Vec::new();
    for (variable, value) in variables {
        // Variables of other programs need not be UTF-8.
        let Some(name) = variable.to_str().and_then(|name| name.strip_prefix(prefix)) else {
            continue;
        };
        let variable = format!("{prefix}{name}");
        let Some(value) = value.to_str() else { return Err(ConfigError::NotText(variable)) };
        let path: Vec<String> = name.split("__").map(str::to_lowercase).collect();
        let default = lookup(&defaults, &path);
        if default.is_none() && is_of_a_service(name, value) {
            continue;
        }
        let value = environment_value(value, default);
        set(&mut table, &path, value, &variable)?;
        origins.push((path.join("."), variable));
    }
    accept(table, &origins)
}

/// Numbers are compared with their bounds before they are made to fit types, so that the error names the
/// range. `origins`: keys and the variables that set them.
pub(crate) fn accept<C: DeserializeOwned + Bounded>(
    table: Table,
    origins: &[(String, String)],
) -> Result<C, ConfigError> {
    let refused = |key: String, problem: String| {
        let origin = origin(&key, origins).map(|variable| format!(" (set by {variable})"));
        ConfigError::Key { key, problem, origin: origin.unwrap_or_default() }
    };
    if let Ok(written) = serde_json::to_value(&table) {
        check_value(&C::bounds(), &written).map_err(|e| refused(e.key, e.problem))?;
    }
    serde_path_to_error::deserialize(Value::Table(table))
        .map_err(|error| refused(error.path().to_string(), without_value(error.inner().message())))
}

/// The variable that set `key`, or a key in it, or a table that it is in.
fn origin<'a>(key: &str, origins: &'a [(String, String)]) -> Option<&'a str> {
    let key = key.trim_end_matches(".?");
    let is_below = |key: &str, table: &str| {
        key.strip_prefix(table).is_some_and(|rest| rest.starts_with(['.', '[']))
    };
    let find = |fits: &dyn Fn(&str) -> bool| {
        origins.iter().find(|(path, _)| fits(path)).map(|(_, variable)| variable.as_str())
    };
    find(&|path| path == key)
        .or_else(|| find(&|path| is_below(path, key)))
        .or_else(|| find(&|path| is_below(key, path)))
}

/// serde's message without the value that it repeats, which may be a secret: "invalid type: integer
/// `12345`, expected a string".
fn without_value(message: &str) -> String {
    for problem in ["invalid type: ", "invalid value: "] {
        let parts = message.strip_prefix(problem).and_then(|rest| rest.rsplit_once(", expected "));
        if let Some((found, expected)) = parts {
            let kind = found.split(['`', '"']).next().unwrap_or_default().trim_end();
            let expected = if expected.starts_with("struct ") { "a table" } else { expected };
            return format!("{problem}{kind}, expected {expected}");
        }
    }
    message.to_owned()
}

fn read(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError::Read { path: path.into(), error })?;
    text.parse().map_err(|error: toml::de::Error| {
        let at = error.span().map_or(0, |span| text.floor_char_boundary(span.start));
        let before = &text[..at];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        ConfigError::Toml {
            path: path.into(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            problem: without_value(error.message()),
        }
    })
}

/// Whether Kubernetes sets such a variable for a Service: the name has one of its endings, and the value the
/// form that Kubernetes writes there. A mistyped key of Barid's has another value, and stays an error.
fn is_of_a_service(name: &str, value: &str) -> bool {
    let is_port = |text: &str| text.parse::<u16>().is_ok_and(|port| port != 0);
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok();
    let is_protocol = |text: &str| matches!(text, "tcp" | "udp" | "sctp");
    let is_url = |text: &str| {
        let parts =
            text.split_once("://").and_then(|(scheme, at)| Some((scheme, at.rsplit_once(':')?)));
        parts.is_some_and(|(scheme, (host, port))| {
            let host =
                host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            is_protocol(scheme) && is_address(host) && is_port(port)
        })
    };
    // The name of the Service, behind the role's, may stand before these.
    let ends = |end: &str| name == end || name.ends_with(&format!("_{end}"));
    if ends("SERVICE_HOST") {
        return is_address(value);
    }
    if ends("SERVICE_PORT") || name.starts_with("SERVICE_PORT_") || name.contains("_SERVICE_PORT_")
    {
        return is_port(value);
    }
    if ends("PORT") {
        // Also the end of PORT_<number>_<protocol>_PORT.
        return is_url(value) || is_numbered(name, "_PORT") && is_port(value);
    }
    is_numbered(name, "") && is_url(value)
        || is_numbered(name, "_PROTO") && is_protocol(value)
        || is_numbered(name, "_ADDR") && is_address(value)
}

/// Whether a name ends with `PORT_<number>_<protocol>` and `end`.
fn is_numbered(name: &str, end: &str) -> bool {
    let Some((rest, protocol)) = name.strip_suffix(end).and_then(|name| name.rsplit_once('_'))
    else {
        return false;
    };
    let Some((rest, number)) = rest.rsplit_once('_') else { return false };
    matches!(protocol, "TCP" | "UDP" | "SCTP")
        && number.parse::<u16>().is_ok()
        && (rest == "PORT" || rest.ends_with("_PORT"))
}

fn lookup<'a>(table: &'a Table, path: &[String]) -> Option<&'a Value> {
    let (last, tables) = path.split_last()?;
    let mut table = table;
    for key in tables {
        table = table.get(key)?.as_table()?;
    }
    table.get(last)
}

/// A value is text where the default is text; else it is read as TOML, and as text if it is not TOML.
fn environment_value(text: &str, default: Option<&Value>) -> Value {
    if matches!(default, Some(Value::String(_))) {
        return Value::String(text.to_owned());
    }
    format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn set(
    table: &mut Table,
    path: &[String],
    value: Value,
    variable: &str,
) -> Result<(), ConfigError> {
    let Some((last, tables)) = path.split_last() else { return Ok(()) };
    let mut table = table;
    for key in tables {
        table = table
            .entry(key.clone())
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| ConfigError::NotATable {
                variable: variable.into(),
                key: key.clone(),
            })?;
    }
    table.insert(last.clone(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Config {
        name: String,
        admin: AdminConfig,
        brokers: Vec<String>,
        limit: u32,
    }

    impl Bounded for Config {
        fn bounds() -> Vec<Bound> {
            [vec![whole("limit", 0..=9, "")], crate::bounds::within::<AdminConfig>("admin")]
                .concat()
        }
    }

    fn with(file: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        path.write_all(file.as_bytes()).unwrap();
        let variables = variables.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        load(Some(path.path()), "BARID_X_", variables).map_err(|e| e.to_string())
    }

    #[test]
    fn environment_overrides_the_file() {
        let config = with(
            "limit = 1\nname = 'file'",
            &[
                ("BARID_X_LIMIT", "7"),
                ("BARID_X_NAME", "12"),
                ("BARID_X_BROKERS", "['a:1', 'b:2']"),
                ("BARID_X_ADMIN__LISTEN", "127.0.0.1:9"),
                ("BARID_Y_LIMIT", "8"),
            ],
        )
        .unwrap();
        assert_eq!((config.limit, config.name.as_str()), (7, "12"));
        assert_eq!(config.brokers, ["a:1", "b:2"]);
        assert_eq!(config.admin.listen.port(), 9);
    }

    #[test]
    fn hazard_54_what_kubernetes_sets_for_a_service_is_passed_over() {
        // Services named barid-x, barid-x-grpc and barid-x--odd, with a named port and IPv6.
        let variables = [
            ("BARID_X_SERVICE_HOST", "10.96.0.7"),
            ("BARID_X_SERVICE_PORT", "7080"),
            ("BARID_X_SERVICE_PORT_WS", "7080"),
            ("BARID_X_PORT", "tcp://10.96.0.7:7080"),
            ("BARID_X_PORT_7080_TCP", "tcp://10.96.0.7:7080"),
            ("BARID_X_PORT_7080_TCP_PROTO", "tcp"),
            ("BARID_X_PORT_7080_TCP_PORT", "7080"),
            ("BARID_X_PORT_7080_TCP_ADDR", "10.96.0.7"),
            ("BARID_X_GRPC_SERVICE_HOST", "fd00::7"),
            ("BARID_X_GRPC_SERVICE_PORT", "7081"),
            ("BARID_X_GRPC_SERVICE_PORT_HTTP_2", "7081"),
            ("BARID_X_GRPC_PORT", "tcp://[fd00::7]:7081"),
            ("BARID_X_GRPC_PORT_7081_UDP", "udp://[fd00::7]:7081"),
            ("BARID_X_GRPC_PORT_7081_SCTP_PROTO", "sctp"),
            ("BARID_X_GRPC_PORT_7081_TCP_PORT", "7081"),
            ("BARID_X_GRPC_PORT_7081_TCP_ADDR", "fd00::7"),
            ("BARID_X__ODD_SERVICE_HOST", "10.96.0.7"),
            ("BARID_X__ODD_PORT", "tcp://10.96.0.7:7080"),
        ];
        assert_eq!(with("", &variables).unwrap(), Config::default());
    }

    #[test]
    fn hazard_54_what_is_surely_a_typo_is_an_error_still() {
        for (variable, value) in [
            ("BARID_X_PORT", "7080"),
            ("BARID_X_PORT", "0.0.0.0:7080"),
            ("BARID_X_PORT", "http://10.96.0.7:7080"),
            ("BARID_X_ADMIN_PORT", "7102"),
            ("BARID_X_SERVICE_HOST", "here"),
            ("BARID_X_SERVICE_PORT", "many"),
            ("BARID_X_SERVICE", "10.96.0.7"),
            ("BARID_X_PORT_7080_TCP", "7080"),
            ("BARID_X_PORT_TCP", "tcp://10.96.0.7:7080"),
            ("BARID_X_ADMIN__PORT", "7102"),
        ] {
            let error = with("", &[(variable, value)]).unwrap_err();
            assert!(
                error.ends_with(&format!("(set by {variable})")),
                "{variable}={value}: {error}"
            );
        }
    }

    #[test]
    fn hazard_54_variables_that_are_no_text_end_nothing_unless_they_are_ours() {
        use std::os::unix::ffi::OsStringExt as _;
        let bytes = || OsString::from_vec(vec![0xff]);
        let load = |name: OsString| {
            load::<Config>(None, "BARID_X_", [(name, bytes())].into_iter())
                .map_err(|e| e.to_string())
        };
        assert_eq!(load(bytes()).unwrap(), Config::default());
        assert_eq!(load("BARID_Y_NAME".into()).unwrap(), Config::default());
        assert_eq!(
            load("BARID_X_NAME".into()).unwrap_err(),
            "BARID_X_NAME: its value is not UTF-8"
        );
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let error = with("[admin]\nlisen = 'x'", &[]).unwrap_err();
        assert!(error.starts_with("admin.lisen: unknown field `lisen`"), "{error}");
        let error = with("", &[("BARID_X_LIMITT", "7")]).unwrap_err();
        assert!(error.contains("limitt") && error.ends_with("(set by BARID_X_LIMITT)"), "{error}");
    }

    #[test]
    fn hazard_74_no_error_repeats_the_value_of_a_key() {
        let refused = |file: &str, variables: &[(&str, &str)]| {
            let error = with(file, variables).unwrap_err();
            assert!(!error.contains("12345") && !error.contains("hunter2"), "{error}");
            error
        };
        for wrong in ["12345", "-12345", "12345.5", "[12345]", "{ v = 12345 }", "true"] {
            let told = refused(&format!("name = {wrong}"), &[]);
            assert!(told.starts_with("name: invalid type: "), "{told}");
            // As text it would be good.
            refused("", &[("BARID_X_BROKERS", wrong)]);
        }
        // Nested wrongly: a text or a list where a table belongs, a table where a text does.
        for file in [
            "admin = \"hunter2\"",
            "admin = [\"hunter2\"]",
            "admin = 12345",
            "brokers = \"hunter2, expected 12345, expected x\"",
            "brokers = [[\"hunter2\"]]",
            "brokers = [12345]",
            "name = { a = \"hunter2\" }",
            "name.a.b = \"hunter2\"",
            "admin.listen = \"hunter2\"",
            "admin.name = \"hunter2\"",
            "limit = \"hunter2\"",
            "limit = { a = \"hunter2\" }",
        ] {
            refused(file, &[]);
        }
        let told = refused("", &[("BARID_X_ADMIN", "hunter2")]);
        assert_eq!(told, "admin: invalid type: string, expected a table (set by BARID_X_ADMIN)");
        refused("", &[("BARID_X_NAME__A", "hunter2")]);
        refused("name = \"hunter2\"", &[("BARID_X_NAME__A", "hunter2")]);
        refused("", &[("BARID_X_BROKERS", "[\"hunter2\"")]);
        // Not TOML: the line is not shown.
        for line in [
            "name = hunter2",
            "name = \"hunter2",
            "name = 'hunter2\"",
            "name = \"hunter2\" 12345",
            "name = \"\\hunter2\"",
            "name = 12345hunter2",
            "name: hunter2",
            "name = \"a\"\nname = \"hunter2\"",
            "name = \"\"\"hunter2",
            "brokers = [\"hunter2\"",
            "admin = { a = \"hunter2\"",
            "name = 123450000000000000000000",
        ] {
            let told = refused(&format!("limit = 1\n{line}"), &[]);
            assert!(told.contains(": line "), "{told}");
        }
        let told = refused("limit = 1\n  name = hunter2", &[]);
        assert!(told.contains(": line 2, column 10: "), "{told}");
    }

    #[test]
    fn an_error_is_blamed_on_the_variable_that_set_its_key_and_no_other() {
        let origins = |keys: &[&str]| -> Vec<(String, String)> {
            keys.iter().map(|key| ((*key).to_owned(), key.to_uppercase())).collect()
        };
        let all = origins(&["nodes_refresh_ms", "auth.keys", "admin.listen", "name.deep"]);
        assert_eq!(origin("node", &all), None);
        assert_eq!(origin("auth.key", &all), None);
        assert_eq!(origin("admin.listen_more", &all), None);
        assert_eq!(origin("nodes_refresh_ms", &all), Some("NODES_REFRESH_MS"));
        assert_eq!(origin("auth.keys[0].secret", &all), Some("AUTH.KEYS"));
        assert_eq!(origin("name", &all), Some("NAME.DEEP"));
        assert_eq!(origin("name.?", &all), Some("NAME.DEEP"));
        let exact = origins(&["log.level_x", "log.level", "log"]);
        assert_eq!(origin("log.level", &exact), Some("LOG.LEVEL"));
    }

    #[test]
    fn values_that_do_not_fit_name_their_key() {
        let error = with("name = 1", &[]).unwrap_err();
        assert!(error.starts_with("name: invalid type"), "{error}");
        let error = with("limit = 'many'", &[]).unwrap_err();
        assert_eq!(error, "limit: not a number; write 0 to 9");
        for (file, variable) in [("limit = '7'", "1"), ("", "'7'")] {
            let variables = [("BARID_X_LIMIT", variable)];
            let error = with(file, if file.is_empty() { &variables } else { &[] }).unwrap_err();
            let told = "limit: \"7\" is text, not a number; write 0 to 9 without quotes";
            assert!(error.starts_with(told), "{error}");
        }
        let error = with("", &[("BARID_X_LIMIT", "18446744073709551616")]).unwrap_err();
        assert_eq!(
            error,
            "limit: 18446744073709551616 is out of range; write 0 to 9 (set by BARID_X_LIMIT)"
        );
        let error = with("limit = 1", &[("BARID_X_LIMIT__DEEP", "1")]).unwrap_err();
        assert_eq!(error, "BARID_X_LIMIT__DEEP: limit is not a table");
    }
}
