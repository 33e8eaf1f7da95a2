//! Revocations of tokens: the records of `barid.revocations`, a compacted topic that access nodes follow.
//!
//! The record's key is the canonical text of what is revoked ([`Revoked`]), so that a later record about the same
//! replaces an earlier one, and a tombstone withdraws it. The value is one JSON object that says the same, and since
//! when.

use std::fmt;
use std::str::FromStr;

use barid_core::mailbox::UserKey;
use barid_core::{AppId, UserId};
use serde::{Deserialize, Serialize};

use crate::cut;

/// Maximum size of a record's value, bytes.
pub const RECORD_BYTES_MAX: usize = 4096;
/// Maximum length of a token's id (`jti`) or of a key id (`kid`) that can be revoked, bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Maximum length of a reason, bytes.
pub const REASON_BYTES_MAX: usize = 256;

/// The version of the encoding.
const VERSION: u64 = 1;
/// The last second of the year 9999. A time in milliseconds is far larger.
const SECONDS_MAX: u64 = 253_402_300_799;
/// How much of a value an error repeats, bytes.
const SHOWN_BYTES: usize = 64;

/// An invalid revocation, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a revocation: {0}")]
pub struct RevocationError(String);

/// Which tokens are revoked. Its text is the record's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Revoked {
    /// `user:APP:USER`: a user's tokens that were issued before a time.
    User(UserKey),
    /// `app:APP`: the tokens of an app that were issued before a time.
    App(AppId),
    /// `everyone:`: all tokens that were issued before a time.
    Everyone,
    /// `token:APP:JTI`: the tokens of an app that have this id.
    Token(AppId, Name),
    /// `key:KID`: the tokens that were verified with this key.
    Key(Name),
}

/// The id of a token or a key: 1 to [`NAME_BYTES_MAX`] bytes without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name(Box<str>);

/// A revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Which tokens.
    pub revoked: Revoked,
    /// Only tokens that were issued before this time (seconds since the Unix epoch), or that do not say when. 0 for
    /// [`Revoked::Token`] and [`Revoked::Key`], which revoke tokens of any time.
    pub issued_before_s: u64,
    /// When the revocation ends, seconds since the Unix epoch; `None`: never.
    pub until_s: Option<u64>,
    /// The reason, for operators; may be empty.
    pub reason: String,
    /// When it was made, seconds since the Unix epoch.
    pub at_s: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    v: u64,
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    app: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jti: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    issued_before: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    at: u64,
}

/// Read first, so that a newer record is told from a malformed one.
#[derive(Deserialize)]
struct Versioned {
    v: Option<u64>,
}

impl Revocation {
    /// Encodes the key and the value of its record.
    ///
    /// # Errors
    /// A time or the reason is out of bounds, or a time is missing or of no use.
    pub fn encode(&self) -> Result<(String, Vec<u8>), RevocationError> {
        self.check()?;
        let (mut app, mut user, mut jti, mut kid) = (None, None, None, None);
        match &self.revoked {
            Revoked::User(key) => {
                (app, user) = (Some(key.app.to_string()), Some(key.user.to_string()));
            }
            Revoked::App(name) => app = Some(name.to_string()),
            Revoked::Everyone => {}
            Revoked::Token(of, id) => (app, jti) = (Some(of.to_string()), Some(id.to_string())),
            Revoked::Key(id) => kid = Some(id.to_string()),
        }
        let json = Json {
            v: VERSION,
            kind: self.revoked.kind().into(),
            app,
            user,
            jti,
            kid,
            issued_before: self.revoked.has_time().then_some(self.issued_before_s),
            until: self.until_s,
            reason: (!self.reason.is_empty()).then(|| self.reason.clone()),
            at: self.at_s,
        };
        let value = serde_json::to_vec(&json).map_err(|error| invalid(error.to_string()))?;
        if value.len() > RECORD_BYTES_MAX {
            return Err(too_long(value.len()));
        }
        Ok((self.revoked.to_string(), value))
    }

    /// Decodes a record.
    ///
    /// # Errors
    /// The record is not what [`Self::encode`] makes, or is of a newer version.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self, RevocationError> {
        if value.len() > RECORD_BYTES_MAX {
            return Err(too_long(value.len()));
        }
        let not_json = |error: serde_json::Error| invalid(error.to_string());
        match serde_json::from_slice::<Versioned>(value).map_err(not_json)?.v {
            Some(VERSION) => {}
            Some(0) | None => return Err(invalid("it has no version (v)")),
            Some(v) => {
                return Err(invalid(format!(
                    "its version {v} is newer than {VERSION}, the newest known"
                )));
            }
        }
        let json: Json = serde_json::from_slice(value).map_err(not_json)?;
        let revoked = json.revoked()?;
        let own = revoked.to_string();
        if own.as_bytes() != key {
            let key = String::from_utf8_lossy(key);
            let (key, own) = (cut(&key, SHOWN_BYTES), cut(&own, SHOWN_BYTES));
            return Err(invalid(format!("its key is {key:?}, and its value revokes {own:?}")));
        }
        match (revoked.has_time(), json.issued_before) {
            (true, None) => return Err(invalid("issued_before is missing")),
            (false, Some(_)) => {
                let kind = revoked.kind();
                return Err(invalid(format!("issued_before has no effect for kind {kind}")));
            }
            _ => {}
        }
        let read = Self {
            revoked,
            issued_before_s: json.issued_before.unwrap_or(0),
            until_s: json.until,
            reason: json.reason.unwrap_or_default(),
            at_s: json.at,
        };
        read.check()?;
        Ok(read)
    }

    /// Whether it has ended at `now_s`, seconds since the Unix epoch.
    pub fn is_over(&self, now_s: u64) -> bool {
        self.until_s.is_some_and(|until| until <= now_s)
    }

    fn check(&self) -> Result<(), RevocationError> {
        let times = [
            ("issued_before", Some(self.issued_before_s)),
            ("until", self.until_s),
            ("at", Some(self.at_s)),
        ];
        for (name, time) in times {
            if time.is_some_and(|time| time > SECONDS_MAX) {
                return Err(invalid(format!(
                    "{name} is later than the year 9999; it counts seconds, not milliseconds"
                )));
            }
        }
        match (self.revoked.has_time(), self.issued_before_s) {
            (true, 0) => return Err(invalid("issued_before is 0: no token was issued before")),
            (false, 1..) => {
                let kind = self.revoked.kind();
                return Err(invalid(format!("issued_before has no effect for kind {kind}")));
            }
            _ => {}
        }
        check_text("reason", &self.reason, REASON_BYTES_MAX)
    }
}

impl Json {
    fn revoked(&self) -> Result<Revoked, RevocationError> {
        let Self { kind, app, user, jti, kid, .. } = self;
        let fields = (app.as_deref(), user.as_deref(), jti.as_deref(), kid.as_deref());
        match (kind.as_str(), fields) {
            ("user", (Some(app), Some(user), None, None)) => Revoked::user(app, user),
            ("app", (Some(app), None, None, None)) => Revoked::app(app),
            ("everyone", (None, None, None, None)) => Ok(Revoked::Everyone),
            ("token", (Some(app), None, Some(jti), None)) => Revoked::token(app, jti),
            ("key", (None, None, None, Some(kid))) => Revoked::key(kid),
            (kind, _) => match Revoked::KINDS.iter().find(|(known, _)| *known == kind) {
                Some((_, names)) => Err(invalid(format!("kind {kind} has exactly: {names}"))),
                None => Err(unknown_kind(kind)),
            },
        }
    }
}

impl Revoked {
    /// The kinds, each with the fields that name what it revokes.
    pub const KINDS: [(&str, &str); 5] = [
        ("user", "app, user"),
        ("app", "app"),
        ("everyone", "no other field"),
        ("token", "app, jti"),
        ("key", "kid"),
    ];

    /// The kind, as it begins the text.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::App(_) => "app",
            Self::Everyone => "everyone",
            Self::Token(..) => "token",
            Self::Key(_) => "key",
        }
    }

    /// Whether only tokens issued before a time are revoked.
    pub fn has_time(&self) -> bool {
        matches!(self, Self::User(_) | Self::App(_) | Self::Everyone)
    }

    fn user(app: &str, user: &str) -> Result<Self, RevocationError> {
        let user = UserId::new(user).map_err(|error| invalid(error.to_string()))?;
        Ok(Self::User(UserKey { app: app_id(app)?, user }))
    }

    fn app(app: &str) -> Result<Self, RevocationError> {
        app_id(app).map(Self::App)
    }

    fn token(app: &str, jti: &str) -> Result<Self, RevocationError> {
        Ok(Self::Token(app_id(app)?, Name::new("jti", jti)?))
    }

    fn key(kid: &str) -> Result<Self, RevocationError> {
        Name::new("kid", kid).map(Self::Key)
    }
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(UserKey { app, user }) => write!(f, "user:{app}:{user}"),
            Self::App(app) => write!(f, "app:{app}"),
            Self::Everyone => f.write_str("everyone:"),
            Self::Token(app, jti) => write!(f, "token:{app}:{jti}"),
            Self::Key(kid) => write!(f, "key:{kid}"),
        }
    }
}

impl FromStr for Revoked {
    type Err = RevocationError;

    /// Parses a record's key.
    fn from_str(text: &str) -> Result<Self, RevocationError> {
        let no_kind = || invalid(format!("{:?} has no kind", cut(text, SHOWN_BYTES)));
        let (kind, rest) = text.split_once(':').ok_or_else(no_kind)?;
        let pair = || {
            let missing = || invalid(format!("{:?} names no app", cut(text, SHOWN_BYTES)));
            rest.split_once(':').ok_or_else(missing)
        };
        match kind {
            "user" => pair().and_then(|(app, user)| Self::user(app, user)),
            "app" => Self::app(rest),
            "everyone" if rest.is_empty() => Ok(Self::Everyone),
            "everyone" => Err(invalid("nothing follows \"everyone:\"")),
            "token" => pair().and_then(|(app, jti)| Self::token(app, jti)),
            "key" => Self::key(rest),
            kind => Err(unknown_kind(kind)),
        }
    }
}

impl Name {
    /// Checks a name; `what` it is, for the error.
    ///
    /// # Errors
    /// The name is empty, too long, or has a control character.
    pub fn new(what: &str, name: &str) -> Result<Self, RevocationError> {
        if name.is_empty() {
            return Err(invalid(format!("{what} is empty")));
        }
        check_text(what, name, NAME_BYTES_MAX)?;
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = RevocationError;

    fn from_str(name: &str) -> Result<Self, RevocationError> {
        Self::new("id", name)
    }
}

fn app_id(name: &str) -> Result<AppId, RevocationError> {
    AppId::new(name).map_err(|error| invalid(error.to_string()))
}

fn check_text(what: &str, text: &str, bytes_max: usize) -> Result<(), RevocationError> {
    if text.len() > bytes_max {
        let bytes = text.len();
        return Err(invalid(format!("{what} has {bytes} bytes, the limit is {bytes_max}")));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(bad) => Err(invalid(format!("{what} contains {bad:?}"))),
        None => Ok(()),
    }
}

fn invalid(problem: impl Into<String>) -> RevocationError {
    RevocationError(problem.into())
}

fn unknown_kind(kind: &str) -> RevocationError {
    let kinds = Revoked::KINDS.map(|(kind, _)| kind).join(", ");
    invalid(format!("kind {:?} is none of {kinds}", cut(kind, SHOWN_BYTES)))
}

fn too_long(bytes: usize) -> RevocationError {
    invalid(format!("it has {bytes} bytes, the limit is {RECORD_BYTES_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(bytes_max: usize) -> impl Strategy<Value = String> {
        let texts = prop::collection::vec(
            any::<char>().prop_filter("a control", |c| !c.is_control()),
            1..80,
        );
        texts.prop_map(move |chars| cut(&chars.into_iter().collect::<String>(), bytes_max))
    }

    fn revoked() -> impl Strategy<Value = Revoked> {
        let app = || "[a-z][a-z0-9._-]{0,12}".prop_map(|name| AppId::new(&name).unwrap());
        let user = "[!-~]{1,40}".prop_map(|name| UserId::new(&name).unwrap());
        let name = || text(NAME_BYTES_MAX).prop_map(|name| Name::new("id", &name).unwrap());
        prop_oneof![
            (app(), user).prop_map(|(app, user)| Revoked::User(UserKey { app, user })),
            app().prop_map(Revoked::App),
            Just(Revoked::Everyone),
            (app(), name()).prop_map(|(app, jti)| Revoked::Token(app, jti)),
            name().prop_map(Revoked::Key),
        ]
    }

    proptest! {
        #[test]
        fn any_revocation_reads_back_and_any_bytes_do_no_harm(
            revoked in revoked(),
            issued in 1..=SECONDS_MAX,
            until_s in prop::option::of(0..=SECONDS_MAX),
            reason in prop_oneof![Just(String::new()), text(REASON_BYTES_MAX)],
            at_s in 0..=SECONDS_MAX,
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let issued_before_s = if revoked.has_time() { issued } else { 0 };
            let revocation = Revocation { revoked, issued_before_s, until_s, reason, at_s };
            let (key, value) = revocation.encode().unwrap();
            prop_assert_eq!(key.parse::<Revoked>().unwrap(), revocation.revoked.clone());
            prop_assert_eq!(Revocation::decode(key.as_bytes(), &value).unwrap(), revocation);
            let _ = Revocation::decode(&bytes, &bytes);
            let _ = String::from_utf8_lossy(&bytes).parse::<Revoked>();
        }
    }

    #[test]
    fn a_record_is_short_and_stable() {
        let user = Revocation {
            revoked: "user:demo:al:ice".parse().unwrap(),
            issued_before_s: 1_760_000_000,
            until_s: Some(1_760_003_600),
            reason: "stolen".into(),
            at_s: 1_760_000_000,
        };
        let (key, value) = user.encode().unwrap();
        assert_eq!(key, "user:demo:al:ice");
        assert_eq!(
            String::from_utf8(value).unwrap(),
            r#"{"v":1,"kind":"user","app":"demo","user":"al:ice","issued_before":1760000000,"until":1760003600,"reason":"stolen","at":1760000000}"#
        );
    }

    #[test]
    fn hazard_96_what_is_no_revocation_is_refused_with_the_reason() {
        let refused = |key: &str, value: &str| {
            Revocation::decode(key.as_bytes(), value.as_bytes()).unwrap_err().to_string()
        };
        for (key, value, why) in [
            ("app:a", "", "EOF"),
            ("app:a", "[]", "invalid"),
            ("app:a", r#"{"kind":"app","app":"a","issued_before":1,"at":1}"#, "it has no version"),
            ("app:a", r#"{"v":2,"kind":"flock","herd":7}"#, "its version 2 is newer than 1"),
            ("app:a", r#"{"v":1,"kind":"app","app":"a","issued_before":1}"#, "missing field `at`"),
            ("app:a", r#"{"v":1,"kind":"app","app":"a","at":1}"#, "issued_before is missing"),
            ("app:a", r#"{"v":1,"kind":"app","app":"a","issued_before":0,"at":1}"#, "is 0"),
            ("app:a", r#"{"v":1,"kind":"app","app":"a","issued_before":-1,"at":1}"#, "-1"),
            ("app:a", r#"{"v":1,"kind":"app","app":"a","issued_before":1.5,"at":1}"#, "1.5"),
            (
                "app:a",
                r#"{"v":1,"kind":"app","app":"a","issued_before":1760000000000,"at":1}"#,
                "issued_before is later than the year 9999; it counts seconds",
            ),
            (
                "app:a",
                r#"{"v":1,"kind":"app","app":"a","issued_before":1,"at":1,"until":1760000000000}"#,
                "until is later",
            ),
            (
                "app:a",
                r#"{"v":1,"kind":"app","app":"a","issued_before":1,"at":1,"colour":1}"#,
                "unknown field `colour`",
            ),
            (
                "app:a",
                r#"{"v":1,"kind":"app","app":"a","app":"b","issued_before":1,"at":1}"#,
                "duplicate field `app`",
            ),
            (
                "app:b",
                r#"{"v":1,"kind":"app","app":"a","issued_before":1,"at":1}"#,
                r#"its key is "app:b", and its value revokes "app:a""#,
            ),
            ("app:a", r#"{"v":1,"kind":"flock","at":1}"#, r#"kind "flock" is none of user, app,"#),
            (
                "app:a",
                r#"{"v":1,"kind":"user","app":"a","at":1}"#,
                "kind user has exactly: app, user",
            ),
            (
                "everyone:",
                r#"{"v":1,"kind":"everyone","app":"a","issued_before":1,"at":1}"#,
                "kind everyone has exactly: no other field",
            ),
            ("key:k", r#"{"v":1,"kind":"key","kid":"","at":1}"#, "kid is empty"),
            ("key:k", r#"{"v":1,"kind":"key","kid":"k","issued_before":1,"at":1}"#, "no effect"),
            (
                "token:a:\u{1}",
                r#"{"v":1,"kind":"token","app":"a","jti":"\u0001","at":1}"#,
                "contains",
            ),
            (
                "user::u",
                r#"{"v":1,"kind":"user","app":"","user":"u","issued_before":1,"at":1}"#,
                "app is empty",
            ),
        ] {
            let told = refused(key, value);
            assert!(
                told.starts_with("not a revocation: ") && told.contains(why),
                "{value}: {told}"
            );
        }
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        let value = format!(r#"{{"v":1,"kind":"key","kid":"{long}","at":1}}"#);
        assert!(refused("key:", &value).ends_with("kid has 257 bytes, the limit is 256"));
        let value = format!(r#"{{"v":1,"pad":"{}"}}"#, "x".repeat(RECORD_BYTES_MAX));
        assert!(refused("key:", &value).ends_with("the limit is 4096"));
        for key in [
            "",
            "user",
            "user:a",
            "token:a:",
            "app:",
            "key:",
            "everyone:x",
            "everyone",
            "flock:a",
            "app:a:b",
        ] {
            assert!(key.parse::<Revoked>().is_err(), "{key}");
        }
    }
}
