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
        match (self.0.as_str(), scheme_end(&self.0)) {
            ("", _) => String::new(),
            (_, None) => "***".into(),
            (url, Some(_)) => masked(url),
        }
    }
}

/// The end of `scheme://`.
fn scheme_end(text: &str) -> Option<usize> {
    let end = text.find("://")?;
    let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    (end > 0 && text[..end].chars().all(is_scheme)).then_some(end + 3)
}

/// A text with `***` in place of what is secret if it is a URL, with or without a scheme: the password, which ends at the
/// last `@`, or a user without one, which may be a token; and the values of its query.
pub(crate) fn masked(text: &str) -> String {
    let (scheme, rest) = text.split_at(scheme_end(text).unwrap_or(0));
    // A path without host has no authority.
    let is_path = scheme.contains("unix") && rest.starts_with('/');
    let credentials = rest.rfind('@').filter(|_| !is_path);
    let (credentials, rest) = rest.split_at(credentials.unwrap_or(0));
    let named = credentials.split_once(':').filter(|(_, password)| !password.is_empty());
    let user = named.map_or("", |(user, _)| user);
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

/// Whether a text that is printed may hold user info: it has a scheme, or an `@` with a password before it or a port
/// behind it. An address of mail has none of these.
pub(crate) fn may_be_url(text: &str) -> bool {
    let has_credentials = text.rsplit_once('@').is_some_and(|(credentials, host)| {
        let port = host.rsplit_once(':').map(|(_, port)| port);
        credentials.contains(':') || port.is_some_and(|port| port.parse::<u16>().is_ok())
    });
    scheme_end(text).is_some() || has_credentials
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
    fn hazard_150_user_info_is_hidden_in_whatever_may_be_a_url() {
        for (text, shown) in [
            ("me:hush@h:9092", "me:***@h:9092"),
            ("hush@h:9092", ":***@h:9092"),
            ("me:a://hush@h", "me:***@h"),
            ("https://hush:@h", "https://:***@h"),
            ("kafka://me:hush@h:1,h:2", "kafka://me:***@h:1,h:2"),
            ("wss:///me:hush@h/x?token=hush", "wss:///me:***@h/x?token=***"),
        ] {
            assert!(may_be_url(text), "{text}");
            assert_eq!(masked(text), shown);
            assert_eq!(masked(shown), shown, "masked twice");
        }
        for text in ["", "h:9092", "barid.push", "issuer@project.example.com", "a@b"] {
            assert!(!may_be_url(text), "{text}");
        }
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
