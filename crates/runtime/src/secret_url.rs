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
/// last `@`, or a user without one, which may be a token; what stands in place of a port and is no number; the values of
/// its query, and its fragment.
pub(crate) fn masked(text: &str) -> String {
    let (scheme, rest) = text.split_at(scheme_end(text).unwrap_or(0));
    // A path without host has no authority.
    let is_path = scheme.contains("unix") && rest.starts_with('/');
    let credentials = rest.rfind('@').filter(|_| !is_path);
    let (credentials, rest) = rest.split_at(credentials.unwrap_or(0));
    let named = credentials.split_once(':').filter(|(_, password)| !password.is_empty());
    let user = named.map_or("", |(user, _)| user);
    let mask = if credentials.is_empty() { "" } else { ":***" };
    let (rest, fragment) = match rest.split_once('#') {
        Some((rest, _)) if !scheme.is_empty() => (rest, "#***"),
        _ => (rest, ""),
    };
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    let path = if scheme.is_empty() || is_path { path.to_owned() } else { without_port(path) };
    let shown = |pair: &str| match pair.split_once('=') {
        Some(("db" | "user" | "protocol", _)) => pair.to_owned(),
        Some((name, _)) => format!("{name}=***"),
        None => "***".to_owned(),
    };
    let query = query.map(|query| query.split('&').map(shown).collect::<Vec<_>>().join("&"));
    let query = query.map_or_else(String::new, |query| format!("?{query}"));
    format!("{scheme}{user}{mask}{path}{query}{fragment}")
}

/// The part of a URL from its host on, with `***` in place of a port that is no number: a password without a host.
/// Several hosts, as of Kafka's brokers, each have a port.
fn without_port(rest: &str) -> String {
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    // An IPv6 address is in brackets.
    let port_of = |host: &str| {
        let name_end = host.find(']').unwrap_or(0);
        host[name_end..].find(':').map(|colon| name_end + colon + 1)
    };
    let has_port = |host: &str| port_of(host).is_some_and(|port| is_port(&host[port..]));
    match port_of(authority) {
        Some(port) if !authority.split(',').all(has_port) => {
            format!("{}***{path}", &authority[..port])
        }
        _ => rest.to_owned(),
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
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
    fn hazard_150_a_password_without_a_host_a_bare_query_and_a_fragment_are_hidden() {
        for (url, shown) in [
            ("redis://:hush", "redis://:***"),
            ("redis://me:hush", "redis://me:***"),
            ("wss://me:hush/v1", "wss://me:***/v1"),
            ("sasl://me:hush:9092", "sasl://me:***"),
            ("wss://h/v1?hush", "wss://h/v1?***"),
            ("wss://h:7080/v1#hush", "wss://h:7080/v1#***"),
            ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
            ("redis://[::1]", "redis://[::1]"),
            ("redis://h:6379/0", "redis://h:6379/0"),
            ("redis+unix:///run/a:b.sock?db=1", "redis+unix:///run/a:b.sock?db=1"),
        ] {
            assert_eq!(masked(url), shown);
        }
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
