//! Why a token, or the configuration of keys, is not good.

use crate::labels::TokenRefusal;

/// Why a token was refused, in words for the developer who issues tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The request has no token.
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
pub struct KeyError(pub(super) String);

impl AuthError {
    /// The value that metrics show.
    pub fn label(&self) -> TokenRefusal {
        match self {
            Self::Missing => TokenRefusal::Missing,
            Self::Malformed(_) => TokenRefusal::Malformed,
            Self::UnknownKey => TokenRefusal::UnknownKey,
            Self::Signature => TokenRefusal::Signature,
            Self::Expired => TokenRefusal::Expired,
            Self::TooEarly => TokenRefusal::TooEarly,
            Self::Audience => TokenRefusal::Audience,
            Self::Issuer => TokenRefusal::Issuer,
            Self::OtherApp => TokenRefusal::OtherApp,
        }
    }
}
