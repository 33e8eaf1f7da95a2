//! Rendezvous hashing: all callers rank the peers of a key alike, and when a peer is added or removed, only the keys
//! that it gains or loses move.

use barid_core::Shard;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A peer's weight for a shard; the highest weight wins.
pub fn score(peer: &str, shard: Shard) -> u64 {
    xxh3_64_with_seed(peer.as_bytes(), u64::from(shard.get()))
}

/// The peer that ranks first for a shard; `None` if there is no peer.
pub fn first<'a, T>(
    peers: impl Iterator<Item = &'a T>,
    name: impl Fn(&T) -> &str,
    shard: Shard,
) -> Option<&'a T> {
    peers.max_by_key(|peer| score(name(peer), shard))
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::ShardCount;
    use proptest::prelude::*;

    fn owner(peers: &[String], shard: Shard) -> Option<&str> {
        first(peers.iter(), |peer| peer.as_str(), shard).map(String::as_str)
    }

    proptest! {
        #[test]
        fn a_peer_that_goes_moves_only_its_own_shards(count in 2usize..12, gone in 0usize..12) {
            let peers: Vec<String> = (0..count).map(|i| format!("dispatcher-{i}")).collect();
            let mut rest = peers.clone();
            let gone = rest.remove(gone % count);
            for shard in ShardCount::new(64).unwrap().all() {
                let before = owner(&peers, shard).unwrap();
                let after = owner(&rest, shard).unwrap();
                prop_assert!(before == gone || before == after);
            }
        }
    }

    #[test]
    fn shards_spread_over_the_peers() {
        let peers: Vec<String> = (0..4).map(|i| format!("dispatcher-{i}")).collect();
        for peer in &peers {
            let shards = ShardCount::new(256).unwrap().all();
            let owned = shards.filter(|shard| owner(&peers, *shard) == Some(peer)).count();
            assert!((32..=96).contains(&owned), "{peer} owns {owned} of 256");
        }
        assert_eq!(owner(&[], ShardCount::new(1).unwrap().all().next().unwrap()), None);
    }
}
