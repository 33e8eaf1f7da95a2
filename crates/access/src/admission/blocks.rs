//! Blocks of addresses that are refused again and again, each ten times as long as the one before.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::admission::addresses::AddressKey;

/// The time in which refusals are counted, µs.
const MINUTE_US: u64 = 60_000_000;
/// A block is so many times as long as the one before.
const ESCALATION: u64 = 10;

/// Limits of one address.
#[derive(Debug, Clone, Copy)]
pub struct BlockLimits {
    /// Refusals in a minute, beyond one for each connection of the address; 0: no address is blocked.
    pub refusals_max: u32,
    /// The first block.
    pub first: Duration,
    /// The longest block, and the time without a block after which the next one is a first one.
    pub longest: Duration,
    /// Addresses in the table.
    pub addresses_max: usize,
}

/// The addresses that were refused in the last minute, or are blocked, or were not long ago.
#[derive(Debug)]
pub struct Blocks {
    limits: BlockLimits,
    table: Mutex<Table>,
    blocked: AtomicUsize,
}

#[derive(Debug, Default)]
struct Table {
    addresses: HashMap<AddressKey, Address>,
    /// The ends of blocks, µs.
    ends: BinaryHeap<Reverse<u64>>,
}

#[derive(Debug, Default)]
struct Address {
    /// When the bucket of refusals is full again.
    full_at_us: u64,
    /// End of the last block.
    blocked_until_us: u64,
    /// Blocks since it was last left alone.
    blocks: u32,
}

impl Blocks {
    /// Creates an empty table.
    pub fn new(limits: BlockLimits) -> Self {
        Self { limits, table: Mutex::default(), blocked: AtomicUsize::new(0) }
    }

    /// Counts a refusal of an address with so many connections. Returns the time for which it is now blocked.
    pub fn refused(&self, key: AddressKey, connections: u32, now_us: u64) -> Option<Duration> {
        let limits = &self.limits;
        let cost_us = MINUTE_US.checked_div(limits.refusals_max.into())?;
        let mut table = self.table.lock();
        let full = table.addresses.len() >= limits.addresses_max;
        let address = match table.addresses.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if full => return None,
            Entry::Vacant(entry) => entry.insert(Address::default()),
        };
        if address.blocked_until_us > now_us {
            return None; // refused before it was blocked
        }
        address.full_at_us = address.full_at_us.max(now_us) + cost_us;
        // Many devices share the address of a carrier: a few of them must not shut out the others.
        let tolerated_us = MINUTE_US + u64::from(connections) * cost_us;
        if address.full_at_us - now_us <= tolerated_us {
            return None;
        }
        let longest_us = micros(limits.longest);
        if now_us >= address.blocked_until_us + longest_us {
            address.blocks = 0;
        }
        let escalated = ESCALATION.saturating_pow(address.blocks);
        let block_us = micros(limits.first).saturating_mul(escalated).min(longest_us);
        let until_us = now_us + block_us;
        *address =
            Address { full_at_us: 0, blocked_until_us: until_us, blocks: address.blocks + 1 };
        table.ends.push(Reverse(until_us));
        self.blocked.fetch_add(1, Ordering::Release);
        Some(Duration::from_micros(block_us))
    }

    /// The rest of an address's block; `None`: it is not blocked.
    pub fn left(&self, key: AddressKey, now_us: u64) -> Option<Duration> {
        if self.blocked.load(Ordering::Acquire) == 0 {
            return None;
        }
        let until_us = self.table.lock().addresses.get(&key)?.blocked_until_us;
        let left_us = until_us.checked_sub(now_us).filter(|left_us| *left_us > 0)?;
        Some(Duration::from_micros(left_us))
    }

    /// Number of addresses that are blocked. Call it every second: it notes which blocks have ended.
    pub fn count(&self, now_us: u64) -> usize {
        let mut table = self.table.lock();
        while table.ends.peek().is_some_and(|Reverse(end_us)| *end_us <= now_us) {
            table.ends.pop();
        }
        self.blocked.store(table.ends.len(), Ordering::Release);
        table.ends.len()
    }

    /// Forgets addresses that were left alone for long enough.
    pub fn sweep(&self, now_us: u64) {
        let addresses = &mut self.table.lock().addresses;
        let longest_us = micros(self.limits.longest);
        addresses.retain(|_, address| {
            let was_blocked = address.blocks > 0;
            address.full_at_us > now_us
                || (was_blocked && address.blocked_until_us + longest_us > now_us)
        });
        if addresses.capacity() > 4 * addresses.len().max(64) {
            addresses.shrink_to_fit();
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

    /// Refuses an address until it is blocked. Returns the refusals and the seconds.
    fn until_blocked(
        blocks: &Blocks,
        key: AddressKey,
        connections: u32,
        now_us: u64,
    ) -> (u32, u64) {
        let mut refusals = 0;
        loop {
            refusals += 1;
            if let Some(block) = blocks.refused(key, connections, now_us) {
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
            assert_eq!(blocks.refused(a, 0, now_us), None, "those on their way do not count");
            assert_eq!(blocks.left(key("192.0.2.2"), now_us), None, "another address");
            assert_eq!(blocks.count(now_us), 1);
            now_us += seconds * SECOND_US;
            assert_eq!((blocks.left(a, now_us), blocks.count(now_us)), (None, 0));
        }
        // Left alone, it begins anew.
        now_us += 600 * SECOND_US;
        assert_eq!(until_blocked(&blocks, a, 0, now_us), (11, 1));
        blocks.sweep(now_us + 600 * SECOND_US);
        assert_eq!(blocks.table.lock().addresses.len(), 1);
        blocks.sweep(now_us + 602 * SECOND_US);
        assert_eq!(blocks.table.lock().addresses.len(), 0);
    }

    #[test]
    fn hazard_93_an_address_with_many_connections_and_a_slow_one_are_not_blocked() {
        let (a, b, blocks) = (key("192.0.2.1"), key("192.0.2.2"), blocks(10));
        assert_eq!(until_blocked(&blocks, a, 100, 0).0, 111);
        for n in 0..1_000 {
            assert_eq!(blocks.refused(b, 0, n * 6 * SECOND_US), None);
        }
    }

    #[test]
    fn hazard_93_the_table_is_bounded_and_forgets() {
        let blocks = blocks(2);
        for n in 1..=3 {
            blocks.refused(key(&format!("192.0.2.{n}")), 0, 0);
        }
        assert_eq!(blocks.table.lock().addresses.len(), 2);
        for _ in 0..99 {
            assert_eq!(blocks.refused(key("192.0.2.3"), 0, 0), None, "there is no room for it");
        }
        blocks.sweep(6 * SECOND_US);
        assert_eq!(blocks.table.lock().addresses.len(), 0);
        let limits = BlockLimits { refusals_max: 0, ..blocks.limits };
        assert_eq!(Blocks::new(limits).refused(key("192.0.2.1"), 0, 0), None);
    }
}
