//! The facts of a token by which it can be revoked, as sessions keep them: hashes in place of names.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;

use barid_core::AppId;

/// Keyed by secrets of this process, so that nobody can choose names that collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The hash of a token's id (`jti`) within its app; never 0.
pub fn id_hash(app: &AppId, jti: &str) -> u64 {
    HASHER.hash_one((app.as_str(), jti)).max(1)
}

/// The hash of a key's id (`kid`); never 0.
pub fn key_hash(kid: &str) -> u64 {
    HASHER.hash_one(kid).max(1)
}
