//! The allow-list of web pages. Browsers send the page's origin in `Origin` (RFC 6454), which a page cannot change. A
//! client that sends none is not a browser.

use barid_runtime::words::shown;

/// The allow-list; an empty one allows every page.
#[derive(Debug, Clone, Default)]
pub struct Origins(Vec<Pattern>);

#[derive(Debug, Clone)]
enum Pattern {
    /// An origin as browsers serialize it: `https://app.example.com`, `http://localhost:3000`, `null`.
    Exactly(String),
    /// `https://*.example.com`: any subdomain; the port must match.
    Below { scheme: String, domain: String },
}

impl Origins {
    /// Parses `auth.origins`.
    ///
    /// # Errors
    /// Returns the first invalid entry.
    pub fn new(patterns: &[String]) -> Result<Self, String> {
        patterns.iter().map(|pattern| parse(pattern)).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a page of this origin may connect; `None`: the request has no `Origin`.
    pub fn allow(&self, origin: Option<&str>) -> bool {
        let Some(origin) = origin else { return true };
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.fits(origin))
    }
}

impl Pattern {
    fn fits(&self, origin: &str) -> bool {
        let origin = origin.to_ascii_lowercase();
        match self {
            Self::Exactly(known) => *known == origin,
            Self::Below { scheme, domain } => origin
                .strip_prefix(scheme.as_str())
                .and_then(|host| host.strip_suffix(domain.as_str()))
                .is_some_and(|below| !below.is_empty() && below.bytes().all(is_host_byte)),
        }
    }
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

fn parse(text: &str) -> Result<Pattern, String> {
    let wrong = || {
        Err(format!(
            "auth.origins: {} is not scheme://host[:port] in lower case without a path, \
             scheme://*.host[:port], or null",
            shown(text)
        ))
    };
    if text == "null" {
        return Ok(Pattern::Exactly(text.into()));
    }
    let Some((scheme, authority)) = text.split_once("://") else { return wrong() };
    let (wild, host) = match authority.strip_prefix("*.") {
        Some(host) => (true, host),
        None => (false, authority),
    };
    let port_or_v6 = |byte: u8| matches!(byte, b':' | b'[' | b']');
    let good = |byte: u8| (is_host_byte(byte) || port_or_v6(byte)) && !byte.is_ascii_uppercase();
    let scheme_good =
        !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
    if !scheme_good || host.is_empty() || !host.bytes().all(good) {
        return wrong();
    }
    Ok(match wild {
        true => Pattern::Below { scheme: format!("{scheme}://"), domain: format!(".{host}") },
        false => Pattern::Exactly(text.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(patterns: &[&str]) -> Result<Origins, String> {
        Origins::new(&patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn pages_are_told_apart() {
        let list =
            origins(&["https://app.example.com", "https://*.example.org", "http://[::1]:80"]);
        let list = list.unwrap();
        for (origin, allowed) in [
            ("https://app.example.com", true),
            ("HTTPS://App.Example.Com", true),
            ("http://app.example.com", false),
            ("https://app.example.com:8443", false),
            ("https://app.example.com.evil.net", false),
            ("https://a.example.org", true),
            ("https://a.b.example.org", true),
            ("https://example.org", false),
            ("https://evilexample.org", false),
            ("https://evil.net/.example.org", false),
            ("https://evil.net?.example.org", false),
            ("https://user@a.example.org", false),
            ("http://a.example.org", false),
            ("http://[::1]:80", true),
            ("null", false),
            ("", false),
        ] {
            assert_eq!(list.allow(Some(origin)), allowed, "{origin}");
        }
        assert!(list.allow(None), "no browser");
        assert!(origins(&["null"]).unwrap().allow(Some("null")));
        assert!(origins(&[]).unwrap().allow(Some("https://anything")));
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for bad in [
            "",
            "*",
            "example.com",
            "https://",
            "https://*.",
            "https://*",
            "https://a.example.com/",
            "https://A.example.com",
            "https://a.*.com",
            "://a",
        ] {
            let error = origins(&[bad]).unwrap_err();
            assert!(error.starts_with("auth.origins: "), "{error}");
        }
    }
}
