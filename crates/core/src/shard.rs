//! Logical shards: everything about one user lives in one of them, hence in one Redis hash slot.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

/// How many shards a cluster has; fixed when it is created. 1 to 16384 (Redis has no more slots).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardCount(u16);

/// A shard count out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shard count {0} is not within 1 to 16384")]
pub struct InvalidShardCount(u32);

/// One shard, `0..count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shard(u16);

impl ShardCount {
    /// # Errors
    /// Not within 1 to 16384.
    pub fn new(count: u32) -> Result<Self, InvalidShardCount> {
        match u16::try_from(count) {
            Ok(n @ 1..=16384) => Ok(Self(n)),
            _ => Err(InvalidShardCount(count)),
        }
    }

    /// The number itself.
    pub fn get(self) -> u16 {
        self.0
    }

    /// Where a user (or another key of an app) lives: `xxh3_64(app NUL key) % count`.
    pub fn shard_of(self, app: &str, key: &str) -> Shard {
        let mut hash = Xxh3::new();
        hash.update(app.as_bytes());
        hash.update(&[0]);
        hash.update(key.as_bytes());
        Shard((hash.digest() % u64::from(self.0)) as u16)
    }

    /// The shard of this number; `None`: the cluster has no such shard.
    pub fn shard(self, number: u16) -> Option<Shard> {
        (number < self.0).then_some(Shard(number))
    }

    /// Every shard, in order.
    pub fn all(self) -> impl ExactSizeIterator<Item = Shard> {
        (0..self.0).map(Shard)
    }
}

impl Shard {
    /// The number itself.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placement_is_part_of_the_redis_layout_and_never_changes() {
        let count = ShardCount::new(64).unwrap();
        assert_eq!(count.shard_of("demo", "alice").get(), 51);
        assert_eq!(count.shard_of("demo", "bob").get(), 59);
        assert_ne!(count.shard_of("a", "b:c"), count.shard_of("a:b", "c"));
        assert!(ShardCount::new(0).is_err() && ShardCount::new(16385).is_err());
    }
}
