//! Where each key of a configuration was set: a line of the file, or an environment variable.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Where keys were set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    pub(super) file: PathBuf,
    /// Line, from 1, of each key of the file.
    pub(super) lines: BTreeMap<String, usize>,
    /// Keys, and the variables that set them.
    pub(super) variables: Vec<(String, String)>,
}

impl Sources {
    /// Adds to each line, which begins with a key, where that key was set.
    pub fn add_to(&self, problems: &str) -> String {
        let lines = problems.lines().map(|line| match self.exact(key_of(line).as_str()) {
            Some(source) => format!("{line} ({source})"),
            None => match self.mentioned(line) {
                Some((key, source)) => format!("{line} ({key} {source})"),
                None => line.to_owned(),
            },
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Whether a line of a check is about a key that was set, and about none of `refused`, in whose place the check saw
    /// a default.
    pub(super) fn is_about_set_keys(&self, line: &str, refused: &[&str]) -> bool {
        let is_set = self.exact(key_of(line).as_str()).is_some() || self.mentioned(line).is_some();
        let words = || line.split(|c: char| !(c.is_ascii_alphanumeric() || "_.".contains(c)));
        let names = |key: &str| {
            let key = key.split('[').next().unwrap_or_default();
            let last = key.rsplit('.').next().unwrap_or_default();
            words().any(|word| word == key || word == last)
        };
        is_set && !refused.iter().any(|key| names(key))
    }

    /// The first key that a line names and that was set: the one that the line begins with may be absent.
    fn mentioned<'a>(&self, line: &'a str) -> Option<(&'a str, String)> {
        let words = line.split(|c: char| !(c.is_ascii_alphanumeric() || "_.".contains(c)));
        let keys = words.map(|word| word.trim_matches('.')).filter(|word| !word.is_empty());
        let mut set = keys.filter_map(|key| Some((key, self.exact(key)?)));
        set.find(|(key, _)| !self.lines.keys().any(|other| is_below(other, key)))
    }

    /// Where `key` was set, or else a key in it, or a table that it is in.
    pub(super) fn of(&self, key: &str) -> Option<String> {
        let key = key.trim_end_matches(".?");
        let above = |key: &str| self.lines.keys().rfind(|table| is_below(key, table)).cloned();
        self.exact(key)
            .or_else(|| self.variable(&|path| is_below(path, key)).map(set_by))
            .or_else(|| above(key).and_then(|table| self.line(&table)))
    }

    /// The variable that set `key` itself, or a table or list that it is in.
    pub(super) fn variable_of(&self, key: &str) -> Option<&str> {
        self.variable(&|path| path == key).or_else(|| self.variable(&|path| is_below(key, path)))
    }

    pub(super) fn line_of(&self, key: &str) -> Option<usize> {
        self.lines.get(key).copied()
    }

    fn exact(&self, key: &str) -> Option<String> {
        self.variable_of(key).map(set_by).or_else(|| self.line(key))
    }

    fn variable(&self, fits: &dyn Fn(&str) -> bool) -> Option<&str> {
        let found = self.variables.iter().find(|(path, _)| fits(path));
        found.map(|(_, variable)| variable.as_str())
    }

    fn line(&self, key: &str) -> Option<String> {
        let line = self.lines.get(key)?;
        Some(format!("set in {}, line {line}", self.file.display()))
    }
}

fn set_by(variable: &str) -> String {
    format!("set by {variable}")
}

fn is_below(key: &str, table: &str) -> bool {
    key.strip_prefix(table).is_some_and(|rest| rest.starts_with(['.', '[']))
}

/// The key with which a line begins: up to a colon, a comma or a space, except in quotes, which are left out.
fn key_of(line: &str) -> String {
    let mut quoted = false;
    let key = line.chars().take_while(|c| {
        quoted ^= *c == '"';
        quoted || !matches!(c, ' ' | ':' | ',')
    });
    key.filter(|c| *c != '"').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_blamed_on_the_variable_that_set_its_key_and_no_other() {
        let sources = |keys: &[&str]| Sources {
            variables: keys.iter().map(|key| ((*key).to_owned(), key.to_uppercase())).collect(),
            ..Default::default()
        };
        let all = sources(&["nodes_refresh_ms", "auth.keys", "admin.listen", "name.deep"]);
        let by = |variable: &str| Some(format!("set by {variable}"));
        assert_eq!(all.of("node"), None);
        assert_eq!(all.of("auth.key"), None);
        assert_eq!(all.of("admin.listen_more"), None);
        assert_eq!(all.of("nodes_refresh_ms"), by("NODES_REFRESH_MS"));
        assert_eq!(all.of("auth.keys[0].secret"), by("AUTH.KEYS"));
        assert_eq!(all.of("name"), by("NAME.DEEP"));
        assert_eq!(all.of("name.?"), by("NAME.DEEP"));
        let exact = sources(&["log.level_x", "log.level", "log"]);
        assert_eq!(exact.of("log.level"), by("LOG.LEVEL"));
    }

    #[test]
    fn a_problem_is_followed_by_the_line_of_its_key() {
        let lines = [("redis", 1), ("redis.url", 2), ("kafka.properties.sasl.password", 9)];
        let sources = Sources {
            file: "a.toml".into(),
            lines: lines.map(|(key, line)| (key.to_owned(), line)).into(),
            ..Default::default()
        };
        let told = sources
            .add_to("redis.url is wrong\nredis.urls: too\nkafka.properties.\"sasl.password\": bad");
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines[0], "redis.url is wrong (set in a.toml, line 2)");
        assert_eq!(lines[1], "redis.urls: too");
        let told = sources.add_to("advertise must be set where redis.url names no address");
        assert!(told.ends_with("no address (redis.url set in a.toml, line 2)"), "{told}");
        let quoted = "kafka.properties.\"sasl.password\": bad (set in a.toml, line 9)";
        assert_eq!(lines[2], quoted);
        assert_eq!(sources.of("redis.window"), Some("set in a.toml, line 1".into()));
    }
}
