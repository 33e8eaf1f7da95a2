//! Tokens, and when a fresh one is due.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use barid_core::Secret;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// A token for the handshake.
#[derive(Debug, Clone)]
pub struct Token {
    value: Secret,
    expires_at_s: Option<u64>,
}

/// Why the callback has no token now. It is called again later.
pub type TokenError = Box<dyn std::error::Error + Send + Sync>;

pub(crate) type TokenSource =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Token, TokenError>> + Send>> + Send + Sync>;

/// How long before its expiry a token is replaced; at half of its lifetime if that is shorter.
const REFRESH_AHEAD: Duration = Duration::from_secs(30);

impl Token {
    /// Wraps a token. If it is a JWT, its `exp` claim is read (the signature is not verified), so that it can be
    /// replaced in time.
    pub fn new(token: impl Into<String>) -> Self {
        let token = token.into();
        Self { expires_at_s: expiry(&token), value: Secret::new(token) }
    }

    /// The token as text. Do not log it.
    pub fn expose(&self) -> &str {
        self.value.expose()
    }

    /// The wait before a fresh token is needed; `None`: the token does not expire.
    pub(crate) fn refresh_in(&self, now_ms: u64) -> Option<Duration> {
        let left =
            Duration::from_millis(self.expires_at_s?.saturating_mul(1000).saturating_sub(now_ms));
        Some(left.saturating_sub(REFRESH_AHEAD).max(left / 2))
    }
}

impl From<String> for Token {
    fn from(token: String) -> Self {
        Self::new(token)
    }
}

impl From<&str> for Token {
    fn from(token: &str) -> Self {
        Self::new(token)
    }
}

#[derive(serde::Deserialize)]
struct Claims {
    exp: f64,
}

fn expiry(token: &str) -> Option<u64> {
    let payload = token.split('.').nth(1)?;
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let claims: Claims = serde_json::from_slice(&json).ok()?;
    (claims.exp >= 0.0 && claims.exp < 9e15).then_some(claims.exp as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(claims: &str) -> Token {
        Token::new(format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)))
    }

    #[test]
    fn a_fresh_token_is_due_before_the_old_one_expires() {
        let token = jwt(r#"{"exp":1000}"#);
        assert_eq!(token.refresh_in(0), Some(Duration::from_secs(970)));
        assert_eq!(token.refresh_in(990_000), Some(Duration::from_secs(5)));
        assert_eq!(token.refresh_in(2_000_000), Some(Duration::ZERO));
    }

    #[test]
    fn tokens_without_expiry_are_never_due() {
        assert_eq!(Token::new("opaque").refresh_in(0), None);
        assert_eq!(jwt(r#"{"sub":"a"}"#).refresh_in(0), None);
    }

    #[test]
    fn tokens_do_not_show_in_logs() {
        assert!(!format!("{:?}", Token::new("opaque")).contains("opaque"));
    }
}
