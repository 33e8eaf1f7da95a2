//! A mailbox's history: positions in it, and the chain that distinguishes two histories.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64;

/// The epoch of a mailbox: a random number below 2^53, which changes only when the mailbox was lost. Positions of
/// another epoch are void. 0: no mailbox. The order has no meaning but in maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Epoch(pub u64);

/// A position in a mailbox. Positions are contiguous and start at 1; 0 is before the first entry. Below 2^53.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Seq(pub u64);

/// The generation of a device's positions: how often its cursor was reset. Frames of an older generation are void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Generation(pub u32);

/// A rolling hash over the message ids up to a position. Two histories are equal up to a position if their chains
/// there are (except for one in 2^32). After a failover the same position may belong to another message; only the
/// chain tells which of the two a device has received.
///
/// One step is the body of MurmurHash3 x86_32 (Austin Appleby, public domain) over the CRC-32 (IEEE) of the id:
/// `chain' = rotl(chain ^ crc32(id), 13) * 5 + 0xe6546b64`, modulo 2^32. It is a bijection of the chain for every id,
/// so that two different chains stay different after the same further ids. Languages without 64-bit integers can
/// compute it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Chain(pub u32);

impl Chain {
    /// The chain before the first entry of an epoch.
    pub const START: Self = Self(0);

    /// The chain after one more entry.
    #[must_use]
    pub fn next(self, id: &str) -> Self {
        self.step(crc32fast::hash(id.as_bytes()))
    }

    /// The chain after one more entry whose id has this CRC-32.
    #[must_use]
    pub fn step(self, id_crc32: u32) -> Self {
        Self((self.0 ^ id_crc32).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64))
    }
}

impl Seq {
    /// The position after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Hashes of a message id for the accept script: 64 bits for the ring of recent ids, 32 bits for the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdHash {
    /// `xxh3_64` of the id, for the ring of recent ids.
    pub ring: u64,
    /// CRC-32 (IEEE) of the id, for the chain.
    pub crc32: u32,
}

impl IdHash {
    /// Hashes an id.
    pub fn of(id: &str) -> Self {
        Self { ring: xxh3_64(id.as_bytes()), crc32: crc32fast::hash(id.as_bytes()) }
    }
}

/// The position of a message in a partition's log. Later records, and later parts of the same record, are greater. The
/// leader epoch is compared first, because offsets are assigned again after an unclean election.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPosition {
    /// The partition's leader epoch; -1 if the broker does not report it.
    pub leader_epoch: i32,
    /// The record's offset.
    pub offset: i64,
    /// Index of the user among the users of the record, from 0.
    pub index: u32,
}

/// A device's position in a mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// The mailbox's epoch.
    pub epoch: Epoch,
    /// The generation of this device's positions.
    pub generation: Generation,
    /// The last position received.
    pub seq: Seq,
    /// The chain there; `None` if the client does not compute it.
    pub chain: Option<Chain>,
}

macro_rules! display {
    ($($type:ty),*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display!(Epoch, Seq, Generation, Chain);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_is_part_of_the_wire_and_never_changes() {
        let chain = Chain::START.next("order-7").next("order-8");
        assert_eq!(crc32fast::hash(b"order-7"), 0x09d0_dada);
        assert_eq!(chain, Chain(0x1095_256a)); // by an independent implementation
    }

    #[test]
    fn histories_that_parted_stay_apart() {
        let (mut x, mut y) = (Chain::START.next("x"), Chain::START.next("y"));
        for i in 0..1000 {
            assert_ne!(x, y);
            (x, y) = (x.next(&i.to_string()), y.next(&i.to_string()));
        }
    }
}
