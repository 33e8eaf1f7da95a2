//! Blocks of addresses that are refused again and again, each ten times as long as the one before. An IPv6 /48 is
//! blocked as well, when several of its /64s are refused.

use std::collections::hash_map::Entry;
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
/// An IPv6 /48 is allowed so many times the refusals of an address.
const NETWORK_SHARE: u32 = 4;

/// Limits of one address.
#[derive(Debug, Clone, Copy)]
pub struct BlockLimits {
    /// Refusals in a minute, beyond one for each session of the address; 0: no address is blocked.
    pub refusals_max: u32,
    /// The first block.
    pub first: Duration,
    /// The longest block, and the time without a block after which the next one is a first one.
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

/// What a refusal has led to.
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
    /// When each record may be forgotten, µs.
    ends: BTreeSet<(u64, K)>,
    /// Ends of blocks under way, µs.
    blocked: BTreeSet<(u64, K)>,
}

#[derive(Debug, Default)]
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
    /// What a refusal takes from the bucket, µs.
    cost_us: u64,
    first_us: u64,
    longest_us: u64,
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
        let Some(limits) = self.of(self.limits.refusals_max) else { return Refusal::default() };
        let mut tables = self.tables.lock();
        let Tables { addresses, networks } = &mut *tables;
        let mut refusal = Refusal::default();
        let was_blocked = addresses.was_blocked(key, limits.longest_us, now_us);
        refusal.forgotten = u64::from(addresses.make_room(key, limits.entries_max));
        refusal.address = addresses.refused(key, limits, sessions.address, now_us);
        let shared = self.of(self.limits.refusals_max.saturating_mul(NETWORK_SHARE));
        if let (Some(network), Some(limits), false) = (key.wider_network(), shared, was_blocked) {
            refusal.forgotten += u64::from(networks.make_room(network, limits.entries_max));
            refusal.network = networks.refused(network, limits, sessions.network, now_us);
        }
        self.blocked.store(tables.blocked(now_us), Ordering::Release);
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
        let blocked = self.tables.lock().blocked(now_us);
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
    fn of(&self, refusals_max: u32) -> Option<Limits> {
        Some(Limits {
            cost_us: MINUTE_US.checked_div(refusals_max.into())?.max(1),
            first_us: micros(self.limits.first),
            longest_us: micros(self.limits.longest),
            entries_max: self.limits.addresses_max,
        })
    }
}

impl Tables {
    fn blocked(&mut self, now_us: u64) -> usize {
        self.addresses.blocked(now_us) + self.networks.blocked(now_us)
    }
}

impl<K: Copy + Ord + Hash> Table<K> {
    fn was_blocked(&self, key: K, longest_us: u64, now_us: u64) -> bool {
        let record = self.records.get(&key).filter(|record| record.blocks > 0);
        record.is_some_and(|record| record.blocked_until_us + longest_us > now_us)
    }

    /// Makes room for a newcomer: the record that would be forgotten first goes. Of blocked ones that is the one whose
    /// block ends soonest. Returns whether one had to go.
    fn make_room(&mut self, key: K, entries_max: usize) -> bool {
        if self.records.len() < entries_max || self.records.contains_key(&key) {
            return false;
        }
        let Some((_, first)) = self.ends.pop_first() else { return false };
        let gone = self.records.remove(&first);
        gone.is_some_and(|gone| {
            self.blocked.remove(&(gone.blocked_until_us, first));
            true
        })
    }

    /// Counts a refusal. Returns the block that begins with it.
    fn refused(&mut self, key: K, limits: Limits, sessions: u32, now_us: u64) -> Option<Duration> {
        let record = match self.records.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Record::default()),
        };
        if record.blocked_until_us > now_us {
            return None; // refused before it was blocked
        }
        self.ends.remove(&(record.needed_until_us(limits.longest_us), key));
        let block_us = record.refused(limits, sessions, now_us);
        self.ends.insert((record.needed_until_us(limits.longest_us), key));
        if block_us.is_some() {
            self.blocked.insert((record.blocked_until_us, key));
        }
        block_us.map(Duration::from_micros)
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
        while let Some(&(end_us, key)) = self.ends.first().filter(|(end_us, _)| *end_us <= now_us) {
            self.ends.remove(&(end_us, key));
            self.records.remove(&key);
        }
        if self.records.capacity() > 4 * self.records.len().max(64) {
            self.records.shrink_to_fit();
        }
    }
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self { records: HashMap::new(), ends: BTreeSet::new(), blocked: BTreeSet::new() }
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
        if now_us >= self.blocked_until_us + limits.longest_us {
            self.blocks = 0;
        }
        let escalated = ESCALATION.saturating_pow(self.blocks);
        let block_us = limits.first_us.saturating_mul(escalated).min(limits.longest_us);
        let blocked_until_us = now_us + block_us;
        *self = Self { full_at_us: 0, blocked_until_us, blocks: self.blocks + 1 };
        Some(block_us)
    }

    fn needed_until_us(&self, longest_us: u64) -> u64 {
        match self.blocks {
            0 => self.full_at_us,
            _ => self.full_at_us.max(self.blocked_until_us + longest_us),
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
            first: Duration::from_secs(1),
            longest: Duration::from_secs(600),
            addresses_max,
        })
    }

    fn remembered(blocks: &Blocks) -> (usize, usize) {
        let tables = blocks.tables.lock();
        assert_eq!(tables.addresses.records.len(), tables.addresses.ends.len());
        assert_eq!(tables.networks.records.len(), tables.networks.ends.len());
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
            now_us += SECOND_US;
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
