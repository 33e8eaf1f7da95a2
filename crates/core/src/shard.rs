//! Logical shards. All data of a user is in one shard, and so in one Redis hash slot.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

/// Number of shards of a cluster, fixed when it is created. 1 to 16384, the number of Redis hash slots.
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
    /// Creates a shard count.
    ///
    /// # Errors
    /// `count` is not within 1 to 16384.
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

    /// The shard of a user (or another key of an app): `xxh3_64(app NUL key) % count`.
    pub fn shard_of(self, app: &str, key: &str) -> Shard {
        let mut hash = Xxh3::new();
        hash.update(app.as_bytes());
        hash.update(&[0]);
        hash.update(key.as_bytes());
        Shard((hash.digest() % u64::from(self.0)) as u16)
    }

    /// The shard with this number; `None` if it is out of range.
    pub fn shard(self, number: u16) -> Option<Shard> {
        (number < self.0).then_some(Shard(number))
    }

    /// All shards, in order.
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
