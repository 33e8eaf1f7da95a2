//! Authentication: JWTs, verified with keys that are each bound to one algorithm.
//!
//! A token is verified only with keys of the algorithm that it names, so that a public key is never used as an HMAC
//! secret. No token, and no part of one, appears in a log or an error.

mod error;
mod jwks;
mod keys;
mod probe;

use std::time::Duration;

use barid_core::limits::{EPOCH_SECONDS_MAX, GROUPS_MAX};
use barid_core::{AppId, DeviceId, GroupId, UserId};
use barid_mailbox::UserKey;
use barid_runtime::bounds;
use barid_session::{Claims, TokenFingerprint};
use jsonwebtoken::{Validation, decode, decode_header, errors::ErrorKind};
use serde::Deserialize;
use serde_json::Value;

use crate::config::AuthConfig;
use crate::revocations::{id_hash, key_hash};
use jwks::Jwks;
use keys::Key;

pub use error::{AuthError, KeyError};
pub use keys::SECRET_BYTES_MIN;
pub use probe::probe;
use prometheus::IntCounter;

/// How far ahead of this node's clock an `iat` may be, s. A later one counts as none, so that revocations hit it.
const ISSUED_AHEAD_SECONDS: u64 = 60;

/// Verifies tokens.
#[derive(Debug)]
pub struct Verifier {
    keys: Vec<Key>,
    jwks: Vec<Jwks>,
    audience: Vec<String>,
    issuer: Vec<String>,
    nbf_leeway_s: u64,
    lifetime_max_s: u64,
    /// Unreadable keys in key sets, counted each time a set is read.
    pub keys_skipped: IntCounter,
}

/// Values of any type, so that an error can name a claim of the wrong type.
#[derive(Default, Deserialize)]
#[serde(default)]
struct RawClaims {
    app: Value,
    sub: Value,
    exp: Value,
    nbf: Value,
    iat: Value,
    jti: Value,
    aud: Value,
    device: Value,
    groups: Value,
}

/// Reads the key sets that are files, which [`Verifier::refresh`] reads later.
///
/// # Errors
/// Returns those that cannot be read, one a line.
pub fn check_key_set_files(config: &AuthConfig) -> Result<(), String> {
    bounds::all(config.jwks.iter().enumerate().map(|(at, set)| {
        jwks::check_file(set).map_err(|problem| format!("auth.jwks[{at}].file {problem}"))
    }))
}

impl Verifier {
    /// Reads the configured keys. Key sets are read by [`Self::refresh`].
    ///
    /// # Errors
    /// Returns the keys and key sets that cannot be read or used, one a line.
    pub fn new(config: &AuthConfig) -> Result<Self, KeyError> {
        let name = "barid_access_keys_skipped_total";
        let keys_skipped = IntCounter::new(name, "Keys of key sets that could not be read")
            .map_err(|error| KeyError(error.to_string()))?;
        let keys = config.keys.iter().enumerate().map(|(at, key)| Key::from_config(at, key));
        let jwks = config.jwks.iter().enumerate();
        let jwks = jwks.map(|(at, jwks)| Jwks::new(at, jwks, keys_skipped.clone()));
        let (keys, jwks) = all_or_problems(keys, jwks).map_err(KeyError)?;
        Ok(Self {
            keys,
            jwks,
            audience: config.audience.clone(),
            issuer: config.issuer.clone(),
            nbf_leeway_s: config.nbf_leeway_seconds,
            lifetime_max_s: config.lifetime_max_seconds,
            keys_skipped,
        })
    }

    /// Verifies a token at `now_s` (seconds since the Unix epoch). For an unknown key id, key sets are read again, at
    /// most once every few seconds.
    ///
    /// # Errors
    /// Returns why the token is refused.
    pub async fn verify(&self, token: &str, now_s: u64) -> Result<Claims, AuthError> {
        match self.check(token, now_s) {
            Err(AuthError::UnknownKey | AuthError::NoKeys)
                if self.refresh_for_unknown_key().await =>
            {
                self.check(token, now_s)
            }
            result => result,
        }
    }

    /// Reads the key sets that are due. Call it about once a second.
    pub async fn refresh(&self) {
        for jwks in &self.jwks {
            jwks.refresh_if_due().await;
        }
    }

    /// A key set that was never read, or too long ago.
    pub fn missing(&self) -> Option<String> {
        self.jwks.iter().find(|set| set.keys().is_none()).map(ToString::to_string)
    }

    /// Time since the least recently read key set was read; `None`: none was read.
    pub fn key_set_age(&self) -> Option<Duration> {
        self.jwks.iter().filter_map(Jwks::age).max()
    }

    async fn refresh_for_unknown_key(&self) -> bool {
        let mut any = false;
        for jwks in &self.jwks {
            any |= jwks.refresh_for_unknown_key().await;
        }
        any
    }

    fn check(&self, token: &str, now_s: u64) -> Result<Claims, AuthError> {
        if token.split('.').count() != 3 {
            return Err(AuthError::Malformed("a signed JWT has three parts".into()));
        }
        let header = decode_header(token).map_err(|error| malformed("header", &error))?;
        if header.crit.is_some() {
            return Err(AuthError::Malformed("crit is not supported".into()));
        }
        let fits = |key: &&Key| key.fits(header.alg, header.kid.as_deref());
        let fetched: Vec<_> = self.jwks.iter().map(Jwks::keys).collect();
        let of_sets = fetched
            .iter()
            .flatten()
            .filter_map(|set| Key::of_set(set, header.alg, header.kid.as_deref()));
        let mut refusal = match fetched.iter().all(Option::is_some) {
            true => AuthError::UnknownKey,
            false => AuthError::NoKeys,
        };
        for key in self.keys.iter().filter(fits).chain(of_sets) {
            match self.check_with(key, token) {
                Ok(claims) => {
                    let kid = key.id.as_deref().or(header.kid.as_deref());
                    return self.check_claims(key, claims, kid, now_s);
                }
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    fn check_with(&self, key: &Key, token: &str) -> Result<RawClaims, AuthError> {
        let mut validation = Validation::new(key.algorithm);
        // exp and nbf are checked below, with the caller's clock and without leeway.
        validation.validate_exp = false;
        validation.required_spec_claims.clear();
        validation.validate_aud = !self.audience.is_empty();
        if !self.audience.is_empty() {
            validation.set_audience(&self.audience);
            validation.required_spec_claims.insert("aud".into());
        }
        if !self.issuer.is_empty() {
            validation.set_issuer(&self.issuer);
            validation.required_spec_claims.insert("iss".into());
        }
        let token = decode::<RawClaims>(token, &key.decoding, &validation);
        token.map(|token| token.claims).map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => AuthError::Signature,
            ErrorKind::InvalidAudience => AuthError::Audience,
            ErrorKind::InvalidIssuer => AuthError::Issuer,
            _ => malformed("claims", &error),
        })
    }

    /// `kid`: the id of the key, or the one in the header if the key has none.
    fn check_claims(
        &self,
        key: &Key,
        raw: RawClaims,
        kid: Option<&str>,
        now_s: u64,
    ) -> Result<Claims, AuthError> {
        let invalid = |error: barid_core::InvalidName| AuthError::Malformed(error.to_string());
        let missing = |claim| AuthError::Malformed(format!("claim {claim} is missing"));
        let app = text("app", &raw.app)?.ok_or_else(|| missing("app"))?;
        let app = AppId::new(app).map_err(invalid)?;
        let user = text("sub", &raw.sub)?.ok_or_else(|| missing("sub"))?;
        let user = UserId::new(user).map_err(invalid)?;
        let device =
            text("device", &raw.device)?.map(DeviceId::new).transpose().map_err(invalid)?;
        let expires_s = seconds("exp", &raw.exp)?.ok_or_else(|| missing("exp"))?;
        let issued_s = seconds("iat", &raw.iat)?.unwrap_or(0);
        for (claim, time_s) in [("exp", expires_s), ("iat", issued_s)] {
            if time_s > EPOCH_SECONDS_MAX {
                return Err(AuthError::Malformed(format!(
                    "claim {claim} is later than the year 9999; it counts seconds, not milliseconds"
                )));
            }
        }
        let starts_s = seconds("nbf", &raw.nbf)?.unwrap_or(0);
        if !key.speaks_for(&app) {
            return Err(AuthError::OtherApp);
        }
        if expires_s <= now_s {
            return Err(AuthError::Expired);
        }
        let lifetime_max_s = self.lifetime_max_s;
        let latest_s = now_s.saturating_add(lifetime_max_s).saturating_add(self.nbf_leeway_s);
        if lifetime_max_s > 0 && expires_s > latest_s {
            return Err(AuthError::Lifetime(lifetime_max_s));
        }
        // RFC 7519, 4.1.3: a token that names audiences is for none but these.
        if self.audience.is_empty() && !raw.aud.is_null() {
            return Err(AuthError::Audience);
        }
        if starts_s > now_s.saturating_add(self.nbf_leeway_s) {
            return Err(AuthError::TooEarly);
        }
        let groups = names("groups", &raw.groups)?;
        let groups = groups.into_iter().map(GroupId::new).collect::<Result<_, _>>();
        let groups = groups.map_err(invalid)?;
        // A time of the future would escape revocations that are made until then.
        let is_ahead = issued_s > now_s.saturating_add(self.nbf_leeway_s.max(ISSUED_AHEAD_SECONDS));
        let issued_s = u32::try_from(issued_s).unwrap_or(u32::MAX);
        let issued_ahead_s = is_ahead.then_some(issued_s);
        let token = TokenFingerprint {
            issued_s: if is_ahead { 0 } else { issued_s },
            id: text("jti", &raw.jti)?.map_or(0, |jti| id_hash(&app, jti)),
            key: kid.map_or(0, key_hash),
        };
        let user = UserKey { app, user };
        Ok(Claims { user, device, expires_s, groups, token, issued_ahead_s })
    }
}

/// All of both, or all problems, one a line.
fn all_or_problems<A, B>(
    ones: impl Iterator<Item = Result<A, String>>,
    others: impl Iterator<Item = Result<B, String>>,
) -> Result<(Vec<A>, Vec<B>), String> {
    let mut problems = Vec::new();
    let ones = ones.filter_map(|one| one.map_err(|problem| problems.push(problem)).ok()).collect();
    let others =
        others.filter_map(|other| other.map_err(|problem| problems.push(problem)).ok()).collect();
    if problems.is_empty() { Ok((ones, others)) } else { Err(problems.join("\n")) }
}

/// A text claim; `None` if it is absent.
fn text<'a>(claim: &str, value: &'a Value) -> Result<Option<&'a str>, AuthError> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        _ => Err(AuthError::Malformed(format!("claim {claim} is not a string"))),
    }
}

/// A claim that is a list of texts; empty if it is absent.
fn names<'a>(claim: &str, value: &'a Value) -> Result<Vec<&'a str>, AuthError> {
    let wrong = || AuthError::Malformed(format!("claim {claim} is not a list of strings"));
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        _ => return Err(wrong()),
    };
    if list.len() > GROUPS_MAX {
        let count = list.len();
        let text = format!("claim {claim} has {count} entries, the limit is {GROUPS_MAX}");
        return Err(AuthError::Malformed(text));
    }
    list.iter().map(|name| name.as_str().ok_or_else(wrong)).collect()
}

/// A claim that is a time. Fractions are rounded down; values out of range saturate.
fn seconds(claim: &str, value: &Value) -> Result<Option<u64>, AuthError> {
    match value {
        Value::Null => Ok(None),
        Value::Number(number) => Ok(number.as_f64().map(|seconds| seconds as u64)),
        _ => Err(AuthError::Malformed(format!("claim {claim} is not a number"))),
    }
}

/// Describes what is wrong with a part of the token, without quoting it.
fn malformed(part: &str, error: &jsonwebtoken::errors::Error) -> AuthError {
    AuthError::Malformed(match error.kind() {
        ErrorKind::Json(_) if part == "header" => {
            "its header is not JSON with an alg of HS256, RS256, ES256 or EdDSA".into()
        }
        ErrorKind::Json(_) => format!("its {part} are not a JSON object, each name once"),
        ErrorKind::Base64(_) | ErrorKind::Utf8(_) => {
            format!("its {part} or its signature is not base64url")
        }
        ErrorKind::MissingRequiredClaim(claim) => format!("claim {claim} is missing"),
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
            "its algorithm is none of HS256, RS256, ES256, EdDSA".into()
        }
        _ => "not a JWT".into(),
    })
}

#[cfg(test)]
mod tests;
