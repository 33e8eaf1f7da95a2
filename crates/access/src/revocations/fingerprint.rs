//! Hashes of a token's id and of its key's id, which sessions keep in place of the ids.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;

use barid_core::AppId;

/// Keyed by secrets of this process, so that nobody can choose ids that collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The hash of a token's id (`jti`) within its app; never 0.
pub fn id_hash(app: &AppId, jti: &str) -> u64 {
    HASHER.hash_one((app.as_str(), jti)).max(1)
}

/// The hash of a key's id (`kid`); never 0.
pub fn key_hash(kid: &str) -> u64 {
    HASHER.hash_one(kid).max(1)
}
