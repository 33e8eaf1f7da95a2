//! Revocations of tokens: the records of `barid.revocations`, a compacted topic that access nodes follow.
//!
//! A record's key is the canonical text of its [`Subject`], so that a later record of the same subject replaces an
//! earlier one, and a tombstone withdraws it. The value is one JSON object that repeats the subject and adds the times.
//! docs/security.md documents the format for other producers.
//!
//! Readers ignore unknown fields of version 1. A value that cannot be decoded revokes all tokens of its key
//! ([`Revocation::decode_or_all`]): after compaction nobody could know what it has replaced.

use std::fmt;
use std::str::FromStr;

use barid_core::limits::EPOCH_SECONDS_MAX;
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
/// How much of a value an error repeats, bytes.
const SHOWN_BYTES: usize = 64;

/// An invalid revocation, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a revocation: {0}")]
pub struct RevocationError(String);

/// Which tokens a record is about. Its text is the record's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
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
    pub subject: Subject,
    /// Only tokens that were issued before this time (seconds since the Unix epoch), or that do not say when. `None` for
    /// [`Subject::Token`] and [`Subject::Key`], which revoke tokens of any time, and only for these.
    pub issued_before_s: Option<u64>,
    /// When the revocation ends, seconds since the Unix epoch; `None`: never.
    pub until_s: Option<u64>,
    /// The reason, for operators; may be empty.
    pub reason: String,
    /// When it was made, seconds since the Unix epoch.
    pub at_s: u64,
}

#[derive(Serialize, Deserialize)]
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
        match &self.subject {
            Subject::User(key) => {
                (app, user) = (Some(key.app.to_string()), Some(key.user.to_string()));
            }
            Subject::App(name) => app = Some(name.to_string()),
            Subject::Everyone => {}
            Subject::Token(of, id) => (app, jti) = (Some(of.to_string()), Some(id.to_string())),
            Subject::Key(id) => kid = Some(id.to_string()),
        }
        let json = Json {
            v: VERSION,
            kind: self.subject.kind().into(),
            app,
            user,
            jti,
            kid,
            issued_before: self.issued_before_s,
            until: self.until_s,
            reason: (!self.reason.is_empty()).then(|| self.reason.clone()),
            at: self.at_s,
        };
        let value = serde_json::to_vec(&json).map_err(|error| invalid(error.to_string()))?;
        if value.len() > RECORD_BYTES_MAX {
            return Err(too_long(value.len()));
        }
        Ok((self.subject.to_string(), value))
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
        let subject = json.subject()?;
        let own = subject.to_string();
        if own.as_bytes() != key {
            let key = String::from_utf8_lossy(key);
            let (key, own) = (cut(&key, SHOWN_BYTES), cut(&own, SHOWN_BYTES));
            return Err(invalid(format!("its key is {key:?}, and its value revokes {own:?}")));
        }
        let revocation = Self {
            subject,
            issued_before_s: json.issued_before,
            until_s: json.until,
            reason: json.reason.unwrap_or_default(),
            at_s: json.at,
        };
        revocation.check()?;
        Ok(revocation)
    }

    /// Decodes a record. One whose value cannot be decoded revokes all tokens of its key without an end; the reason is
    /// returned with it.
    ///
    /// # Errors
    /// The key is not that of a subject, so that the record concerns no token.
    pub fn decode_or_all(
        key: &[u8],
        value: &[u8],
    ) -> Result<(Self, Option<RevocationError>), RevocationError> {
        let error = match Self::decode(key, value) {
            Ok(revocation) => return Ok((revocation, None)),
            Err(error) => error,
        };
        let subject = Subject::from_key(key)?;
        let issued_before_s = subject.has_time().then_some(EPOCH_SECONDS_MAX);
        let all = Self { subject, issued_before_s, until_s: None, reason: String::new(), at_s: 0 };
        Ok((all, Some(error)))
    }

    /// Extends it to what `earlier`, a revocation of the same subject, revokes.
    pub fn extend(&mut self, earlier: &Self) {
        self.issued_before_s = self.issued_before_s.max(earlier.issued_before_s);
        // `None` is the latest end.
        self.until_s = self.until_s.zip(earlier.until_s).map(|(own, other)| own.max(other));
    }

    /// Whether it revokes all that `other`, a revocation of the same subject, revokes.
    pub fn covers(&self, other: &Self) -> bool {
        let mut both = self.clone();
        both.extend(other);
        (both.issued_before_s, both.until_s) == (self.issued_before_s, self.until_s)
    }

    /// Whether it has ended at `now_s`, seconds since the Unix epoch.
    pub fn is_over(&self, now_s: u64) -> bool {
        self.until_s.is_some_and(|until| until <= now_s)
    }

    fn check(&self) -> Result<(), RevocationError> {
        let times = [
            ("issued_before", self.issued_before_s),
            ("until", self.until_s),
            ("at", Some(self.at_s)),
        ];
        for (name, time) in times {
            if time.is_some_and(|time| time > EPOCH_SECONDS_MAX) {
                return Err(invalid(format!(
                    "{name} is later than the year 9999; it counts seconds, not milliseconds"
                )));
            }
        }
        match (self.subject.has_time(), self.issued_before_s) {
            (true, None) => return Err(invalid("issued_before is missing")),
            (true, Some(0)) => {
                return Err(invalid("issued_before is 0: no token was issued before"));
            }
            (false, Some(_)) => {
                let kind = self.subject.kind();
                return Err(invalid(format!("issued_before has no effect for kind {kind}")));
            }
            _ => {}
        }
        check_reason(&self.reason)
    }
}

impl Json {
    fn subject(&self) -> Result<Subject, RevocationError> {
        let Self { kind, app, user, jti, kid, .. } = self;
        let fields = (app.as_deref(), user.as_deref(), jti.as_deref(), kid.as_deref());
        match (kind.as_str(), fields) {
            ("user", (Some(app), Some(user), None, None)) => Subject::user(app, user),
            ("app", (Some(app), None, None, None)) => Subject::app(app),
            ("everyone", (None, None, None, None)) => Ok(Subject::Everyone),
            ("token", (Some(app), None, Some(jti), None)) => Subject::token(app, jti),
            ("key", (None, None, None, Some(kid))) => Subject::key(kid),
            (kind, _) => match Subject::KINDS.iter().find(|(known, _)| *known == kind) {
                Some((_, names)) => Err(invalid(format!("kind {kind} has exactly: {names}"))),
                None => Err(unknown_kind(kind)),
            },
        }
    }
}

impl Subject {
    /// The kinds, each with the fields that name the subject.
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

    /// Parses a record's key.
    ///
    /// # Errors
    /// It is not UTF-8, or not the text of a subject.
    pub fn from_key(key: &[u8]) -> Result<Self, RevocationError> {
        std::str::from_utf8(key).map_err(|_| invalid("its key is not UTF-8"))?.parse()
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

impl fmt::Display for Subject {
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

impl FromStr for Subject {
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

/// Checks a reason.
///
/// # Errors
/// It is longer than [`REASON_BYTES_MAX`], or has a control character.
pub fn check_reason(reason: &str) -> Result<(), RevocationError> {
    check_text("reason", reason, REASON_BYTES_MAX)
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
    let kinds = Subject::KINDS.map(|(kind, _)| kind).join(", ");
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

    fn subject() -> impl Strategy<Value = Subject> {
        let app = || "[a-z][a-z0-9._-]{0,12}".prop_map(|name| AppId::new(&name).unwrap());
        let user = "[!-~]{1,40}".prop_map(|name| UserId::new(&name).unwrap());
        let name = || text(NAME_BYTES_MAX).prop_map(|name| Name::new("id", &name).unwrap());
        prop_oneof![
            (app(), user).prop_map(|(app, user)| Subject::User(UserKey { app, user })),
            app().prop_map(Subject::App),
            Just(Subject::Everyone),
            (app(), name()).prop_map(|(app, jti)| Subject::Token(app, jti)),
            name().prop_map(Subject::Key),
        ]
    }

    proptest! {
        #[test]
        fn any_revocation_reads_back_and_any_bytes_do_no_harm(
            subject in subject(),
            issued in 1..=EPOCH_SECONDS_MAX,
            until_s in prop::option::of(0..=EPOCH_SECONDS_MAX),
            reason in prop_oneof![Just(String::new()), text(REASON_BYTES_MAX)],
            at_s in 0..=EPOCH_SECONDS_MAX,
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let issued_before_s = subject.has_time().then_some(issued);
            let revocation = Revocation { subject, issued_before_s, until_s, reason, at_s };
            let (key, value) = revocation.encode().unwrap();
            prop_assert_eq!(key.parse::<Subject>().unwrap(), revocation.subject.clone());
            prop_assert_eq!(Revocation::decode(key.as_bytes(), &value).unwrap(), revocation);
            let _ = Revocation::decode(&bytes, &bytes);
            let _ = Revocation::decode_or_all(&bytes, &bytes);
        }
    }

    #[test]
    fn a_record_is_short_and_stable() {
        let user = Revocation {
            subject: "user:demo:al:ice".parse().unwrap(),
            issued_before_s: Some(1_760_000_000),
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
    fn hazard_133_what_cannot_be_decoded_revokes_all_tokens_of_its_key() {
        let read = |key: &str, value: &str| {
            Revocation::decode_or_all(key.as_bytes(), value.as_bytes()).unwrap()
        };
        let newer = r#"{"v":1,"kind":"app","app":"a","issued_before":5,"at":1,"colour":1}"#;
        let (revocation, error) = read("app:a", newer);
        assert_eq!((revocation.issued_before_s, error), (Some(5), None), "a field of a newer 1");
        let user = "user:a:u";
        for (key, value) in
            [(user, "{\"v\":2}"), (user, "hello"), ("key:k", ""), (user, r#"{"v":1,"kind":"key"}"#)]
        {
            let (revocation, error) = read(key, value);
            assert_eq!(revocation.subject.to_string(), key);
            let all = revocation.subject.has_time().then_some(EPOCH_SECONDS_MAX);
            assert_eq!((revocation.issued_before_s, revocation.until_s), (all, None), "{value}");
            assert!(error.is_some(), "{value}");
        }
        for key in [b"user:a:\xff".as_slice(), b"flock:7", b""] {
            assert!(Revocation::decode_or_all(key, b"{\"v\":2}").is_err());
        }
    }

    #[test]
    fn an_extended_revocation_revokes_what_either_does() {
        let revocation = |issued: u64, until_s| Revocation {
            subject: Subject::Everyone,
            issued_before_s: Some(issued),
            until_s,
            reason: String::new(),
            at_s: 1,
        };
        for (own, earlier, both) in [
            ((5, None), (9, Some(7)), (9, None)),
            ((9, Some(7)), (5, None), (9, None)),
            ((5, Some(8)), (5, Some(7)), (5, Some(8))),
            ((5, Some(6)), (4, Some(7)), (5, Some(7))),
        ] {
            let mut extended = revocation(own.0, own.1);
            extended.extend(&revocation(earlier.0, earlier.1));
            assert_eq!(extended, revocation(both.0, both.1));
        }
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
            let error = refused(key, value);
            assert!(
                error.starts_with("not a revocation: ") && error.contains(why),
                "{value}: {error}"
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
            assert!(key.parse::<Subject>().is_err(), "{key}");
        }
    }
}
