//! URLs that may hold a password.

use std::fmt;

/// A URL whose password is printed as `***` by `Debug`, `Display` and `Serialize`. The password ends at the last `@`,
/// because it may contain any character, or it is in the query (`redis+unix:///path?pass=…`). A text without scheme is
/// hidden as a whole.
#[derive(Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// Wraps a URL.
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// The URL with its password; do not log it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    fn masked(&self) -> String {
        // What is not a URL may be a password that was set in place of one.
        let Some(scheme) = self.0.find("://").map(|at| at + 3) else {
            return if self.0.is_empty() { String::new() } else { "***".into() };
        };
        let (scheme, rest) = self.0.split_at(scheme);
        // A path without host has no authority.
        let credentials = rest.rfind('@').filter(|_| !rest.starts_with('/'));
        let (credentials, rest) = rest.split_at(credentials.unwrap_or(0));
        let user = credentials.split_once(':').map_or("", |(user, _)| user);
        let mask = if credentials.is_empty() { "" } else { ":***" };
        let Some((path, query)) = rest.split_once('?') else {
            return format!("{scheme}{user}{mask}{rest}");
        };
        let shown = |pair: &str| match pair.split_once('=') {
            Some((name, _)) if !matches!(name, "db" | "user" | "protocol") => {
                format!("{name}=***")
            }
            _ => pair.to_owned(),
        };
        let query: Vec<String> = query.split('&').map(shown).collect();
        format!("{scheme}{user}{mask}{path}?{}", query.join("&"))
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.masked())
    }
}

impl serde::Serialize for SecretUrl {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.masked())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_password_is_hidden() {
        let shown = |url: &str| SecretUrl::new(url).to_string();
        assert_eq!(shown("redis://h:1/0"), "redis://h:1/0");
        assert_eq!(shown("redis://me:p@ss@h:1/0"), "redis://me:***@h:1/0");
        assert_eq!(shown("redis://:pw@h"), "redis://:***@h");
        assert_eq!(shown("redis://tokenonly@h"), "redis://:***@h");
        assert_eq!(
            (shown("me:pw@h:1"), shown("pw"), shown("")),
            ("***".into(), "***".into(), "".into())
        );
    }

    #[test]
    fn hazard_74_a_password_with_any_character_is_hidden() {
        let shown = |url: &str| SecretUrl::new(url).to_string();
        assert_eq!(shown("redis://me:p/s@h:1/0"), "redis://me:***@h:1/0");
        assert_eq!(shown("redis://:p?s#s@h"), "redis://:***@h");
        assert_eq!(shown("redis://:p/?a=b&c@h"), "redis://:***@h");
        assert_eq!(shown("redis+unix:///a@b"), "redis+unix:///a@b");
        assert_eq!(
            shown("redis+unix:///run/r?db=1&user=me&pass=p@s"),
            "redis+unix:///run/r?db=1&user=me&pass=***"
        );
    }
}
