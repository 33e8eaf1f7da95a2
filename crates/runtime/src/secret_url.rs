//! URLs that may hold a password.

use std::fmt;

/// A URL whose password is shown as `***` by `Debug`, `Display` and `Serialize`.
#[derive(Clone, PartialEq, Eq, serde::Deserialize)]
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
        let authority = self.0.find("://").map_or(0, |at| at + 3);
        // The last @ before the path: passwords may hold one.
        let end = self.0[authority..].find('/').map_or(self.0.len(), |at| authority + at);
        let Some(at) = self.0[authority..end].rfind('@') else { return self.0.clone() };
        let credentials = &self.0[authority..authority + at];
        let user = credentials.split_once(':').map_or("", |(user, _)| user);
        format!("{}{user}:***{}", &self.0[..authority], &self.0[authority + at..])
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
    }
}
