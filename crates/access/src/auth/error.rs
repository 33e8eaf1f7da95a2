//! Errors of tokens and of the configured keys.

use barid_core::CloseCode;

use crate::labels::TokenRefusal;
use crate::revocations::{NotAdmitted, REVOKED};

/// Why a token was refused, in words for the developer who issues tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The request has no token.
    #[error("no token: send one as Authorization: Bearer, ?token= or subprotocol bearer.<token>")]
    Missing,
    /// The token is not a JWT, lacks a claim, or has a claim of the wrong type.
    #[error("not a valid token: {0}")]
    Malformed(String),
    /// No key has its key id and algorithm.
    #[error("no key for the token's key id and algorithm")]
    UnknownKey,
    /// The signature does not match the key.
    #[error("the token's signature is not valid")]
    Signature,
    /// A key set that may hold the key was never read, or too long ago.
    #[error("the key set that may hold the token's key could not be read: come back later")]
    NoKeys,
    /// `exp` has passed.
    #[error("the token has expired")]
    Expired,
    /// `nbf` is in the future.
    #[error("the token is not valid yet")]
    TooEarly,
    /// `exp` is too far ahead.
    #[error("the token is valid for longer than {0} s")]
    Lifetime(u64),
    /// `aud` does not name this service.
    #[error("the token is for another audience")]
    Audience,
    /// `iss` is not the configured one.
    #[error("the token is from another issuer")]
    Issuer,
    /// The key is not allowed for this app.
    #[error("the key is not allowed for this app")]
    OtherApp,
    /// It is revoked.
    #[error("{REVOKED}")]
    Revoked,
    /// A revocation hits it only because its `iat` is so far ahead of the node's clock that it counts as none.
    #[error(
        "the token has been revoked: its iat is ahead of this node's clock, and counts as none"
    )]
    IssuedAhead,
    /// The topic of revocations was not read since the node started.
    #[error("the revocations of tokens have not been read yet: come back later")]
    NoRevocations,
}

/// The configured keys cannot be used. Names the key, and shows no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeyError(pub(super) String);

impl From<NotAdmitted> for AuthError {
    fn from(why: NotAdmitted) -> Self {
        match why {
            NotAdmitted::Revoked => Self::Revoked,
            NotAdmitted::IssuedAhead => Self::IssuedAhead,
            NotAdmitted::NotRead => Self::NoRevocations,
        }
    }
}

impl AuthError {
    /// The value that metrics show.
    pub fn label(&self) -> TokenRefusal {
        match self {
            Self::Missing => TokenRefusal::Missing,
            Self::Malformed(_) => TokenRefusal::Malformed,
            Self::UnknownKey => TokenRefusal::UnknownKey,
            Self::Signature => TokenRefusal::Signature,
            Self::NoKeys => TokenRefusal::NoKeys,
            Self::Lifetime(_) => TokenRefusal::Lifetime,
            Self::Expired => TokenRefusal::Expired,
            Self::TooEarly => TokenRefusal::TooEarly,
            Self::Audience => TokenRefusal::Audience,
            Self::Issuer => TokenRefusal::Issuer,
            Self::OtherApp => TokenRefusal::OtherApp,
            Self::Revoked => TokenRefusal::Revoked,
            Self::IssuedAhead => TokenRefusal::IssuedAhead,
            Self::NoRevocations => TokenRefusal::NoRevocations,
        }
    }

    /// Whether a revocation hits the token.
    pub fn is_revoked(&self) -> bool {
        matches!(self, Self::Revoked | Self::IssuedAhead)
    }

    /// Whether the same token may be accepted later.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::NoKeys | Self::NoRevocations)
    }

    /// The status of a handshake's answer.
    pub fn status(&self) -> &'static str {
        if self.is_temporary() { "503 Service Unavailable" } else { "401 Unauthorized" }
    }

    /// The close code of a handshake that is refused by a close.
    pub fn close_code(&self) -> CloseCode {
        match self {
            error if error.is_temporary() => CloseCode::Overloaded,
            Self::Expired | Self::Revoked | Self::IssuedAhead => CloseCode::TokenExpired,
            _ => CloseCode::BadToken,
        }
    }

    /// The close code after a Refresh.
    pub fn refresh_code(&self) -> CloseCode {
        if self.is_temporary() { CloseCode::Overloaded } else { CloseCode::BadToken }
    }
}
