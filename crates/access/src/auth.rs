//! Who may connect: JWTs checked against keys that are each good for one algorithm.
//!
//! A token is checked only with keys of the algorithm that it names, so that a public key never
//! serves as an HMAC secret. No token, and no part of one, goes into a log or an error.

mod jwks;
mod keys;

use barid_core::{AppId, DeviceId, UserId};
use barid_mailbox::UserKey;
use jsonwebtoken::{Validation, decode, decode_header, errors::ErrorKind};
use serde::Deserialize;

use crate::config::AuthConfig;
use jwks::Jwks;
use keys::Key;

/// What a valid token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Claims `app` and `sub`.
    pub user: UserKey,
    /// The only device that it is for.
    pub device: Option<DeviceId>,
    /// When it is over, seconds since the Unix epoch.
    pub expires_s: u64,
}

/// Why a token was refused, in words for who made it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is none.
    #[error("no token: send one as Authorization: Bearer, ?token= or subprotocol bearer.<token>")]
    Missing,
    /// It is not a JWT, or lacks a claim, or has one of another type.
    #[error("not a valid token: {0}")]
    Malformed(String),
    /// No key has its key id and algorithm.
    #[error("no key for the token's key id and algorithm")]
    UnknownKey,
    /// The signature is not that of a key.
    #[error("the token's signature is not valid")]
    Signature,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// Its time has not come.
    #[error("the token is not valid yet")]
    TooEarly,
    /// `aud` is not the configured one.
    #[error("the token is for another audience")]
    Audience,
    /// `iss` is not the configured one.
    #[error("the token is by another issuer")]
    Issuer,
    /// The key may not speak for this app.
    #[error("the key is not one of this app")]
    OtherApp,
}

/// The configuration of keys does not make sense; names the key, shows no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeyError(String);

/// Checks tokens.
#[derive(Debug)]
pub struct Verifier {
    keys: Vec<Key>,
    jwks: Vec<Jwks>,
    audience: Vec<String>,
    issuer: Vec<String>,
    nbf_leeway_s: u64,
}

#[derive(Deserialize)]
struct RawClaims {
    app: String,
    sub: String,
    exp: f64,
    nbf: Option<f64>,
    device: Option<String>,
}

impl Verifier {
    /// Reads the keys; JWKS from files and URLs are read by [`Self::refresh`].
    ///
    /// # Errors
    /// A key cannot be read or used.
    pub fn new(config: &AuthConfig) -> Result<Self, KeyError> {
        Ok(Self {
            keys: config.keys.iter().map(Key::from_config).collect::<Result<_, _>>()?,
            jwks: config.jwks.iter().map(Jwks::new).collect::<Result<_, _>>()?,
            audience: config.audience.clone(),
            issuer: config.issuer.clone(),
            nbf_leeway_s: config.nbf_leeway_seconds,
        })
    }

    /// Checks a token at `now_s` (seconds since the Unix epoch). An unknown key id may cost a
    /// fetch of a JWKS, at most one every few seconds.
    ///
    /// # Errors
    /// Why it is refused.
    pub async fn verify(&self, token: &str, now_s: u64) -> Result<Claims, AuthError> {
        match self.check(token, now_s) {
            Err(AuthError::UnknownKey) if self.refresh_for_unknown_key().await => {
                self.check(token, now_s)
            }
            result => result,
        }
    }

    /// Reads the JWKS again that are due; call it about once a second.
    pub async fn refresh(&self) {
        for jwks in &self.jwks {
            jwks.refresh_if_due().await;
        }
    }

    async fn refresh_for_unknown_key(&self) -> bool {
        let mut any = false;
        for jwks in &self.jwks {
            any |= jwks.refresh_for_unknown_key().await;
        }
        any
    }

    fn check(&self, token: &str, now_s: u64) -> Result<Claims, AuthError> {
        let header = decode_header(token).map_err(|error| malformed(&error))?;
        if header.crit.is_some() {
            return Err(AuthError::Malformed("crit is not supported".into()));
        }
        let fits = |key: &&Key| key.fits(header.alg, header.kid.as_deref());
        let fetched: Vec<_> = self.jwks.iter().map(Jwks::keys).collect();
        let candidates = self.keys.iter().chain(fetched.iter().flat_map(|keys| keys.iter()));
        let mut refusal = AuthError::UnknownKey;
        for key in candidates.filter(fits) {
            match self.check_with(key, token) {
                Ok(claims) => return self.check_claims(key, claims, now_s),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    fn check_with(&self, key: &Key, token: &str) -> Result<RawClaims, AuthError> {
        let mut validation = Validation::new(key.algorithm);
        // exp and nbf are checked here, to the second, with the caller's clock.
        validation.validate_exp = false;
        validation.required_spec_claims = ["exp", "sub"].map(String::from).into();
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
            _ => malformed(&error),
        })
    }

    fn check_claims(&self, key: &Key, raw: RawClaims, now_s: u64) -> Result<Claims, AuthError> {
        let invalid = |error: barid_core::InvalidName| AuthError::Malformed(error.to_string());
        let app = AppId::new(&raw.app).map_err(invalid)?;
        let user = UserId::new(&raw.sub).map_err(invalid)?;
        let device = raw.device.as_deref().map(DeviceId::new).transpose().map_err(invalid)?;
        if !key.speaks_for(&app) {
            return Err(AuthError::OtherApp);
        }
        // Fractions and overlong times round down and saturate; NaN cannot be written in JSON.
        let expires_s = raw.exp as u64;
        if expires_s <= now_s {
            return Err(AuthError::Expired);
        }
        if raw.nbf.is_some_and(|nbf| nbf as u64 > now_s + self.nbf_leeway_s) {
            return Err(AuthError::TooEarly);
        }
        Ok(Claims { user: UserKey { app, user }, device, expires_s })
    }
}

/// The library's reasons name claims and formats, never values.
fn malformed(error: &jsonwebtoken::errors::Error) -> AuthError {
    AuthError::Malformed(match error.kind() {
        ErrorKind::Json(_) => "a part of it is not the JSON that is expected".into(),
        ErrorKind::Base64(_) | ErrorKind::Utf8(_) => "a part of it is not base64url".into(),
        ErrorKind::MissingRequiredClaim(claim) => format!("claim {claim} is missing"),
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
            "its algorithm is none of HS256, RS256, ES256, EdDSA".into()
        }
        _ => "not a JWT".into(),
    })
}

#[cfg(test)]
mod tests;
