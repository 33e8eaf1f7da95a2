//! Tokens of the users.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header};

/// Signs a token that is valid for `life`.
pub fn sign(
    key: &EncodingKey,
    key_id: Option<String>,
    app: &str,
    user: &str,
    life: Duration,
) -> anyhow::Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let claims = serde_json::json!({ "app": app, "sub": user, "exp": (now + life).as_secs() });
    let header = Header { kid: key_id, ..Header::new(Algorithm::HS256) };
    Ok(jsonwebtoken::encode(&header, &claims, key)?)
}
