//! Keys from environment variables: `BARID_ACCESS_REDIS__URL` sets `redis.url`.

use std::ffi::OsString;
use std::net::IpAddr;

use strsim::damerau_levenshtein;
use toml::{Table, Value};

use super::problem::Problem;

/// Tables whose names contain dots, which shells do not accept in a variable: `_` stands for `.` in them, and
/// values are text.
const DOTTED: [&str; 1] = ["kafka.properties"];
/// The words behind `BARID_` in the variables of a role.
const ROLES: [&str; 4] = ["ACCESS", "DELAYER", "DISPATCHER", "PURGER"];

/// A variable that sets a key.
pub(super) struct Variable {
    /// Its whole name.
    pub name: String,
    /// The parts of the key.
    pub path: Vec<String>,
    /// The value, by the type of the default.
    pub value: Value,
}

/// The variables that begin with `prefix`. Those that Kubernetes sets for a Service named like the role are skipped.
pub(super) fn read(
    prefix: &str,
    defaults: &Table,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> (Vec<Variable>, Vec<Problem>) {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for (name, value) in variables {
        // Variables of other programs need not be UTF-8.
        let Some(key) = name.to_str().and_then(|name| name.strip_prefix(prefix)) else {
            continue;
        };
        let name = format!("{prefix}{key}");
        let Some(text) = value.to_str() else {
            problems.push(Problem::new(&name, "its value is not UTF-8"));
            continue;
        };
        let path = path(key);
        let default = lookup(defaults, &path);
        if default.is_none() && is_of_a_service(key, text) {
            continue;
        }
        let value = match is_in_dotted_table(&path) {
            true => Value::String(text.to_owned()),
            false => value_of(text, default),
        };
        found.push(Variable { name, path, value });
    }
    (found, problems)
}

/// The variable that sets `key`.
pub(super) fn name_of(prefix: &str, key: &str) -> String {
    format!("{prefix}{}", key.replace('.', "__").to_uppercase())
}

/// The parts of the key that a variable, without its prefix, sets.
fn path(name: &str) -> Vec<String> {
    let mut path: Vec<String> = name.split("__").map(str::to_lowercase).collect();
    if is_in_dotted_table(&path) {
        path[2..].iter_mut().for_each(|part| *part = part.replace('_', "."));
    }
    path
}

fn is_in_dotted_table(path: &[String]) -> bool {
    path.len() > 2 && DOTTED.contains(&path[..2].join(".").as_str())
}

fn lookup<'a>(table: &'a Table, path: &[String]) -> Option<&'a Value> {
    let (last, tables) = path.split_last()?;
    let mut table = table;
    for key in tables {
        table = table.get(key)?.as_table()?;
    }
    table.get(last)
}

/// A value is text where the default is text, and a list of the texts between commas where the default is a list of
/// texts. Other values, and lists in brackets, are read as TOML, and as text if they are not TOML.
fn value_of(text: &str, default: Option<&Value>) -> Value {
    let as_toml = |text: &str| {
        let table = format!("v = {text}").parse::<Table>();
        table.ok().and_then(|mut table| table.remove("v"))
    };
    let as_text = || Value::String(text.to_owned());
    match default {
        Some(Value::String(_)) => as_text(),
        Some(Value::Array(items)) if !text.trim_start().starts_with('[') => match items.first() {
            None | Some(Value::String(_)) => Value::Array(split(text)),
            Some(_) => as_toml(&format!("[{text}]")).unwrap_or_else(as_text),
        },
        _ => as_toml(text).unwrap_or_else(as_text),
    }
}

fn split(text: &str) -> Vec<Value> {
    match text.trim() {
        "" => Vec::new(),
        text => text.split(',').map(|part| Value::String(part.trim().to_owned())).collect(),
    }
}

/// Variables that look as if they should set keys of a role, but are not read: each with the name that may have been
/// meant.
pub fn misspelt(variables: impl Iterator<Item = (OsString, OsString)>) -> Vec<(String, String)> {
    let meant = |(name, value): (OsString, OsString)| {
        let name = name.to_str()?.to_owned();
        let upper = name.to_uppercase();
        let (barid, rest) = upper.split_once('_')?;
        let (role, key) = rest.split_once('_')?;
        if key.is_empty() || damerau_levenshtein(barid, "BARID") > 1 {
            return None;
        }
        let near = |one: &&&str| damerau_levenshtein(one, role);
        let meant = ROLES.iter().min_by_key(near).filter(|one| near(one) <= 2)?;
        let meant = format!("BARID_{meant}_{key}");
        // A Service may be named barid-access2.
        let is_service = value.to_str().is_some_and(|value| is_of_a_service(key, value));
        (meant != name && !is_service).then_some((name, meant))
    };
    variables.filter_map(meant).collect()
}

/// Variables that lack a role: `BARID_REDIS__URL` sets nothing. Each with the name that sets the key for the role
/// `prefix` (`BARID_PURGER_`). `known`: all dotted keys.
pub fn without_role(
    prefix: &str,
    known: &[String],
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(String, String)> {
    let meant = |(name, _): (OsString, OsString)| {
        let name = name.to_str()?.to_owned();
        let upper = name.to_uppercase();
        let key = upper.strip_prefix("BARID_")?;
        let is_key = key.contains("__") && known.contains(&path(key).join("."));
        is_key.then(|| (name, format!("{prefix}{key}")))
    };
    variables.filter_map(meant).collect()
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
