//! Tokens for devices, signed with the key that [`crate::Cluster`] gives its access nodes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

/// The app that tests use unless they name another.
pub const APP: &str = "demo";
/// The key id of [`SECRET`].
pub const KEY_ID: &str = "test";
/// The shared secret with which the cluster's access nodes verify HS256 tokens.
pub const SECRET: &str = "a-secret-of-the-tests-32-bytes-long";

/// A token of `user` in `app`, valid for `life`.
pub fn token(app: &str, user: &str, life: Duration) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    sign(&json!({ "app": app, "sub": user, "exp": (now + life).as_secs() }), SECRET)
}

/// A token with these claims, signed with `secret`.
///
/// # Panics
/// Panics if the claims cannot be encoded.
pub fn sign(claims: &Value, secret: &str) -> String {
    sign_by(KEY_ID, claims, secret)
}

/// As [`sign`], naming another key.
///
/// # Panics
/// Panics if the claims cannot be encoded.
pub fn sign_by(key_id: &str, claims: &Value, secret: &str) -> String {
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some(key_id.into());
    let key = EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&header, claims, &key).expect("JSON claims can be signed")
}

/// The entry of `auth.keys` that access nodes need for [`token`].
pub(crate) fn key() -> toml::Table {
    let entry = [("id", KEY_ID), ("algorithm", "HS256"), ("secret", SECRET)];
    entry.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}
