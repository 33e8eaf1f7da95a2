//! Blocks of addresses that are refused again and again, each ten times as long as the one before. An IPv6 /48 is
//! blocked as well, when several of its /64s are refused.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::admission::addresses::{AddressKey, NetworkKey};

/// The time in which refusals are counted, µs.
const MINUTE_US: u64 = 60_000_000;
/// A block is so many times as long as the one before.
const ESCALATION: u64 = 10;

/// Limits of one address, and of one network.
#[derive(Debug, Clone, Copy)]
pub struct BlockLimits {
    /// Refusals of an address in a minute, beyond one for each of its sessions; 0: nothing is blocked.
    pub refusals_max: u32,
    /// Refusals of an IPv6 /48 in a minute, beyond one for each of its sessions; 0: no /48 is blocked.
    pub network_refusals_max: u32,
    /// The first block.
    pub first: Duration,
    /// The longest block. After as much time without a block, and a minute at least, the next one is a first one.
    pub longest: Duration,
    /// Addresses in the table; also IPv6 networks.
    pub addresses_max: usize,
}

/// Welcomed sessions of a refused address, and of its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sessions {
    /// Those of the address.
    pub address: u32,
    /// Those of its IPv6 /48.
    pub network: u32,
}

/// Effect of one counted refusal.
#[derive(Debug, PartialEq, Eq, Default)]
pub struct Refusal {
    /// The time for which the address is now blocked.
    pub address: Option<Duration>,
    /// The time for which its IPv6 /48 is now blocked.
    pub network: Option<Duration>,
    /// Addresses and networks that were forgotten early, because a table was full.
    pub forgotten: u64,
}

/// The addresses that were refused in the last minute, or are blocked, or were not long ago.
#[derive(Debug)]
pub struct Blocks {
    limits: BlockLimits,
    tables: Mutex<Tables>,
    blocked: AtomicUsize,
}

#[derive(Debug, Default)]
struct Tables {
    addresses: Table<AddressKey>,
    /// IPv6 only.
    networks: Table<NetworkKey>,
}

#[derive(Debug)]
struct Table<K> {
    records: HashMap<K, Record>,
    /// When each record without a block may be forgotten, µs.
    counted: BTreeSet<(u64, K)>,
    /// When each record with a block may be forgotten, µs.
    remembered: BTreeSet<(u64, K)>,
    /// Ends of blocks under way, µs.
    blocked: BTreeSet<(u64, K)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Record {
    /// When the bucket of refusals is full again.
    full_at_us: u64,
    /// End of the last block.
    blocked_until_us: u64,
    /// Blocks since it was last left alone.
    blocks: u32,
}

/// Limits of a table's entries.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Cost of a refusal in the bucket, µs.
    cost_us: u64,
    first_us: u64,
    longest_us: u64,
    /// Time without a block after which earlier ones do not count, µs.
    memory_us: u64,
    entries_max: usize,
}

impl Blocks {
    /// Creates an empty table.
    pub fn new(limits: BlockLimits) -> Self {
        Self { limits, tables: Mutex::default(), blocked: AtomicUsize::new(0) }
    }

    /// Counts a refusal of an address with so many sessions. A /64 that was blocked not long ago does not count towards
    /// a block of its /48, so that a single one cannot shut out the others.
    pub fn refused(&self, key: AddressKey, sessions: Sessions, now_us: u64) -> Refusal {
        let Some(limits) = self.limits_for(self.limits.refusals_max) else {
            return Refusal::default();
        };
        let mut tables = self.tables.lock();
        let Tables { addresses, networks } = &mut *tables;
        let mut refusal = Refusal::default();
        let was_blocked = addresses.was_blocked(key, limits, now_us);
        refusal.forgotten = u64::from(addresses.make_room(key, limits, now_us));
        refusal.address = addresses.refused(key, limits, sessions.address, now_us);
        let shared = self.limits_for(self.limits.network_refusals_max);
        if let (Some(network), Some(limits), false) = (key.wider_network(), shared, was_blocked) {
            refusal.forgotten += u64::from(networks.make_room(network, limits, now_us));
            refusal.network = networks.refused(network, limits, sessions.network, now_us);
        }
        self.publish(&mut tables, now_us);
        refusal
    }

    /// The rest of the block of an address, or of its network; `None`: it is not blocked.
    pub fn left(&self, key: AddressKey, now_us: u64) -> Option<Duration> {
        if self.blocked.load(Ordering::Acquire) == 0 {
            return None;
        }
        let tables = self.tables.lock();
        let network = key.wider_network().and_then(|network| tables.networks.left(network, now_us));
        let left_us = tables.addresses.left(key, now_us).max(network)?;
        Some(Duration::from_micros(left_us))
    }

    /// Number of addresses and networks that are blocked. Call it every second: it notes which blocks have ended.
    pub fn count(&self, now_us: u64) -> usize {
        self.publish(&mut self.tables.lock(), now_us)
    }

    /// Stores the number of blocks for [`Self::left`], which reads it without the lock. The lock is held meanwhile: an
    /// older number never replaces a newer one.
    fn publish(&self, tables: &mut Tables, now_us: u64) -> usize {
        let blocked = tables.addresses.blocked(now_us) + tables.networks.blocked(now_us);
        self.blocked.store(blocked, Ordering::Release);
        blocked
    }

    /// Forgets addresses that were left alone for long enough.
    pub fn sweep(&self, now_us: u64) {
        let mut tables = self.tables.lock();
        tables.addresses.sweep(now_us);
        tables.networks.sweep(now_us);
    }

    /// The limits of a table with so many refusals a minute; `None`: nothing is blocked.
    fn limits_for(&self, refusals_max: u32) -> Option<Limits> {
        let longest_us = micros(self.limits.longest);
        Some(Limits {
            cost_us: MINUTE_US.checked_div(refusals_max.into())?.max(1),
            first_us: micros(self.limits.first),
            longest_us,
            // Refusals of a /48 are counted for a minute: an address that was blocked may not add to them before.
            memory_us: longest_us.max(MINUTE_US),
            entries_max: self.limits.addresses_max,
        })
    }
}

impl<K: Copy + Ord + Hash> Table<K> {
    fn was_blocked(&self, key: K, limits: Limits, now_us: u64) -> bool {
        let record = self.records.get(&key).filter(|record| record.blocks > 0);
        record.is_some_and(|record| record.blocked_until_us + limits.memory_us > now_us)
    }

    /// Makes room for a newcomer: the record that would be forgotten first is removed, of those with a block or of those
    /// without, whichever are more. So neither kind can leave the other without room. Returns whether one that was
    /// still needed was removed.
    fn make_room(&mut self, key: K, limits: Limits, now_us: u64) -> bool {
        if self.records.len() < limits.entries_max || self.records.contains_key(&key) {
            return false;
        }
        self.sweep(now_us);
        if self.records.len() < limits.entries_max {
            return false;
        }
        let with_block = self.remembered.len() > self.counted.len();
        let ends = if with_block { &mut self.remembered } else { &mut self.counted };
        let Some((_, first)) = ends.pop_first() else { return false };
        let removed = self.records.remove(&first);
        removed.is_some_and(|removed| {
            self.blocked.remove(&(removed.blocked_until_us, first));
            true
        })
    }

    /// Counts a refusal. Returns the block that begins with it.
    fn refused(&mut self, key: K, limits: Limits, sessions: u32, now_us: u64) -> Option<Duration> {
        let mut record = self.records.get(&key).copied().unwrap_or_default();
        if record.blocked_until_us > now_us {
            return None; // refused before it was blocked
        }
        self.ends(record).remove(&(record.needed_until_us(limits), key));
        let block_us = record.refused(limits, sessions, now_us);
        self.ends(record).insert((record.needed_until_us(limits), key));
        self.records.insert(key, record);
        if block_us.is_some() {
            self.blocked.insert((record.blocked_until_us, key));
        }
        block_us.map(Duration::from_micros)
    }

    /// Where the end of a record is kept.
    fn ends(&mut self, record: Record) -> &mut BTreeSet<(u64, K)> {
        if record.blocks > 0 { &mut self.remembered } else { &mut self.counted }
    }

    /// The rest of a block, µs.
    fn left(&self, key: K, now_us: u64) -> Option<u64> {
        let until_us = self.records.get(&key)?.blocked_until_us;
        until_us.checked_sub(now_us).filter(|left_us| *left_us > 0)
    }

    fn blocked(&mut self, now_us: u64) -> usize {
        while self.blocked.first().is_some_and(|(end_us, _)| *end_us <= now_us) {
            self.blocked.pop_first();
        }
        self.blocked.len()
    }

    fn sweep(&mut self, now_us: u64) {
        for ends in [&mut self.counted, &mut self.remembered] {
            while let Some(&(_, key)) = ends.first().filter(|(end_us, _)| *end_us <= now_us) {
                ends.pop_first();
                self.records.remove(&key);
            }
        }
        if self.records.capacity() > 4 * self.records.len().max(64) {
            self.records.shrink_to_fit();
        }
    }
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        let (counted, remembered) = (BTreeSet::new(), BTreeSet::new());
        Self { records: HashMap::new(), counted, remembered, blocked: BTreeSet::new() }
    }
}

impl Record {
    /// Counts a refusal. Returns the block that begins with it, µs.
    fn refused(&mut self, limits: Limits, sessions: u32, now_us: u64) -> Option<u64> {
        self.full_at_us = self.full_at_us.max(now_us) + limits.cost_us;
        // Many devices share the address of a carrier: a few of them must not shut out the others.
        let tolerated_us = MINUTE_US + u64::from(sessions) * limits.cost_us;
        if self.full_at_us - now_us <= tolerated_us {
            return None;
        }
        if now_us >= self.blocked_until_us + limits.memory_us {
            self.blocks = 0;
        }
        let escalated = ESCALATION.saturating_pow(self.blocks);
        let block_us = limits.first_us.saturating_mul(escalated).min(limits.longest_us);
        let blocked_until_us = now_us + block_us;
        *self = Self { full_at_us: 0, blocked_until_us, blocks: self.blocks + 1 };
        Some(block_us)
    }

    fn needed_until_us(&self, limits: Limits) -> u64 {
        match self.blocks {
            0 => self.full_at_us,
            _ => self.full_at_us.max(self.blocked_until_us + limits.memory_us),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;

    fn key(text: &str) -> AddressKey {
        AddressKey::of(text.parse().unwrap()).unwrap()
    }

    fn blocks(addresses_max: usize) -> Blocks {
        Blocks::new(BlockLimits {
            refusals_max: 10,
            network_refusals_max: 40,
            first: Duration::from_secs(1),
            longest: Duration::from_secs(600),
            addresses_max,
        })
    }

    fn remembered(blocks: &Blocks) -> (usize, usize) {
        let tables = blocks.tables.lock();
        let Tables { addresses, networks } = &*tables;
        assert_eq!(addresses.records.len(), addresses.counted.len() + addresses.remembered.len());
        assert_eq!(networks.records.len(), networks.counted.len() + networks.remembered.len());
        (tables.addresses.records.len(), tables.networks.records.len())
    }

    /// Refuses an address once; the seconds for which it and its network are then blocked.
    fn refuse(blocks: &Blocks, key: AddressKey, now_us: u64) -> [Option<u64>; 2] {
        let Refusal { address, network, .. } = blocks.refused(key, Sessions::default(), now_us);
        [address, network].map(|block| block.map(|block| block.as_secs()))
    }

    /// Refuses an address until it is blocked. Returns the refusals and the seconds.
    fn until_blocked(blocks: &Blocks, key: AddressKey, address: u32, now_us: u64) -> (u32, u64) {
        let sessions = Sessions { address, network: 0 };
        let mut refusals = 0;
        loop {
            refusals += 1;
            if let Some(block) = blocks.refused(key, sessions, now_us).address {
                return (refusals, block.as_secs());
            }
        }
    }

    #[test]
    fn hazard_93_an_address_that_is_refused_on_and_on_is_blocked_for_longer_each_time() {
        let (a, blocks) = (key("192.0.2.1"), blocks(10));
        let mut now_us = 7 * SECOND_US;
        for seconds in [1, 10, 100, 600, 600] {
            assert_eq!(blocks.left(a, now_us), None);
            assert_eq!(until_blocked(&blocks, a, 0, now_us), (11, seconds));
            assert_eq!(blocks.left(a, now_us), Some(Duration::from_secs(seconds)));
            assert_eq!(refuse(&blocks, a, now_us), [None; 2], "those on their way do not count");
            assert_eq!(blocks.left(key("192.0.2.2"), now_us), None, "another address");
            assert_eq!(blocks.count(now_us), 1);
            now_us += seconds * SECOND_US;
            assert_eq!((blocks.left(a, now_us), blocks.count(now_us)), (None, 0));
        }
        // Left alone, it begins anew.
        now_us += 600 * SECOND_US;
        assert_eq!(until_blocked(&blocks, a, 0, now_us), (11, 1));
        blocks.sweep(now_us + 600 * SECOND_US);
        assert_eq!(remembered(&blocks), (1, 0));
        blocks.sweep(now_us + 602 * SECOND_US);
        assert_eq!(remembered(&blocks), (0, 0));
    }

    #[test]
    fn hazard_93_an_address_with_many_sessions_and_a_slow_one_are_not_blocked() {
        let (a, b, blocks) = (key("192.0.2.1"), key("192.0.2.2"), blocks(10));
        assert_eq!(until_blocked(&blocks, a, 100, 0).0, 111);
        for n in 0..1_000 {
            assert_eq!(refuse(&blocks, b, n * 6 * SECOND_US), [None; 2]);
        }
    }

    #[test]
    fn hazard_93_the_table_is_bounded_and_forgets() {
        let blocks = blocks(2);
        for n in 1..=3 {
            refuse(&blocks, key(&format!("192.0.2.{n}")), 0);
        }
        assert_eq!(remembered(&blocks), (2, 0));
        blocks.sweep(6 * SECOND_US);
        assert_eq!(remembered(&blocks), (0, 0));
        let limits = BlockLimits { refusals_max: 0, ..blocks.limits };
        let none = Blocks::new(limits);
        assert_eq!((0..99).find(|_| refuse(&none, key("192.0.2.1"), 0) != [None; 2]), None);
    }

    #[test]
    fn hazard_103_in_a_full_table_a_newcomer_is_blocked_and_the_block_that_ends_soonest_goes() {
        let (a, b, c, blocks) = (key("192.0.2.1"), key("192.0.2.2"), key("192.0.2.3"), blocks(2));
        until_blocked(&blocks, a, 0, 0);
        until_blocked(&blocks, b, 0, SECOND_US / 2);
        let refusal = blocks.refused(c, Sessions::default(), SECOND_US / 2);
        assert_eq!(refusal.forgotten, 1, "counted once, as its place is taken");
        assert_eq!(until_blocked(&blocks, c, 0, SECOND_US / 2), (10, 1));
        let now_us = SECOND_US * 3 / 4;
        assert_eq!(blocks.left(a, now_us), None, "its block would have ended soonest");
        assert!(blocks.left(b, now_us).is_some() && blocks.left(c, now_us).is_some());
        assert_eq!((remembered(&blocks), blocks.count(now_us)), ((2, 0), 2));
        // An address that was refused once goes before one that is blocked.
        blocks.sweep(700 * SECOND_US);
        until_blocked(&blocks, a, 0, 700 * SECOND_US);
        refuse(&blocks, b, 700 * SECOND_US);
        refuse(&blocks, c, 700 * SECOND_US);
        assert!(blocks.left(a, 700 * SECOND_US).is_some());
    }

    #[test]
    fn hazard_104_a_48_whose_64s_are_refused_is_blocked_and_a_single_one_blocks_only_itself() {
        // Blocks do not become longer, so that one /64 has many in a minute.
        let limits = BlockLimits { longest: Duration::from_secs(1), ..blocks(1_000).limits };
        let blocks = Blocks::new(limits);
        let one = key("2001:db8:1:1::1");
        let mut now_us = 0;
        for _ in 0..9 {
            let refused = (0..11).map(|_| refuse(&blocks, one, now_us));
            let blocked: Vec<_> = refused.filter(|blocks| *blocks != [None; 2]).collect();
            assert_eq!(blocked, [[Some(1), None]]);
            now_us += 2 * SECOND_US;
        }
        assert_eq!(blocks.left(key("2001:db8:1:2::1"), now_us), None);
        // As many refusals as those of four addresses, each below its own bound.
        let other = |n: u64| key(&format!("2001:db8:2:{n:x}::1"));
        let first = (1..).find(|n| refuse(&blocks, other(*n), now_us)[1].is_some());
        assert_eq!(first, Some(41));
        assert!(blocks.left(other(999), now_us).is_some(), "a /64 that was never here");
        assert_eq!(blocks.left(key("2001:db8:3:1::1"), now_us), None, "another /48");
        assert_eq!(blocks.count(now_us), 1);
        now_us += SECOND_US;
        assert_eq!((blocks.left(other(999), now_us), blocks.count(now_us)), (None, 0));
        // Sessions of the network allow as many more.
        let sessions = Sessions { address: 0, network: 100 };
        let other = |n: u64| key(&format!("2001:db8:4:{n:x}::1"));
        let first = (1..).find(|n| blocks.refused(other(*n), sessions, now_us).network.is_some());
        assert_eq!(first, Some(141));
    }

    #[test]
    fn hazard_103_newcomers_that_take_turns_are_blocked_in_a_table_full_of_blocks() {
        let blocks = blocks(8);
        for n in 1..=8 {
            until_blocked(&blocks, key(&format!("192.0.2.{n}")), 0, 0);
        }
        // Three at once, in turn.
        let late = 2 * SECOND_US;
        let mut forgotten = 0;
        for refusal in 1.. {
            let newcomers = ["198.51.100.1", "198.51.100.2", "198.51.100.3"].map(|newcomer| {
                let refused = blocks.refused(key(newcomer), Sessions::default(), late);
                forgotten += refused.forgotten;
                refused.address.is_some()
            });
            if newcomers == [true; 3] {
                assert_eq!(refusal, 11);
                break;
            }
            assert!(newcomers == [false; 3] && refusal < 20, "{refusal}");
        }
        assert_eq!((forgotten, remembered(&blocks)), (3, (8, 0)));
        // Records that nobody needs any more make room without being counted.
        let later = 1_000 * SECOND_US;
        assert_eq!(blocks.refused(key("203.0.113.1"), Sessions::default(), later).forgotten, 0);
        assert_eq!(remembered(&blocks), (1, 0));
    }

    #[test]
    fn hazard_140_a_48_of_many_customers_is_never_blocked_where_networks_are_not() {
        let limits = BlockLimits { network_refusals_max: 0, ..blocks(1_000).limits };
        let blocks = Blocks::new(limits);
        for n in 0..99 {
            until_blocked(&blocks, key(&format!("2001:db8:1:{n:x}::1")), 0, 0);
        }
        assert_eq!(blocks.left(key("2001:db8:1:ffff::1"), 0), None);
        assert_eq!((remembered(&blocks), blocks.count(0)), ((99, 0), 99));
    }

    #[test]
    fn hazard_104_the_networks_are_bounded_too() {
        let blocks = blocks(3);
        for n in 0..9 {
            refuse(&blocks, key(&format!("2001:db8:{n}::1")), 0);
        }
        assert_eq!(remembered(&blocks), (3, 3));
        blocks.sweep(6 * SECOND_US);
        assert_eq!(remembered(&blocks), (0, 0));
    }
}
