//! Connections and handshakes by client address, in a table of bounded size.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU64;
use std::time::Duration;

use parking_lot::Mutex;

use crate::admission::blocks::Sessions;
use crate::admission::rate::Rate;

/// The first 96 bits of `64:ff9b::/96`, in which a translator puts all of IPv4 (RFC 6052, 2.1).
const NAT64: u128 = 0x0064_ff9b << 64;

/// The unit of address limits: an IPv4 address, or the /64 network of an IPv6 address, which usually belongs to one
/// customer. IPv4 addresses are mapped into `::/32`, which no IPv6 client uses. An IPv6 address that stands for an IPv4
/// one (`::ffff:192.0.2.1`, and NAT64's `64:ff9b::192.0.2.1`) counts as that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressKey(NonZeroU64);

/// The network of an address: the /48 of an IPv6 address, which one customer may hold in whole, or the IPv4 address
/// itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkKey(AddressKey);

impl AddressKey {
    /// The key of an address; `None` for the unspecified address (0.0.0.0).
    pub fn of(address: IpAddr) -> Option<Self> {
        let key = match address.to_canonical() {
            IpAddr::V4(v4) => u64::from(v4.to_bits()),
            IpAddr::V6(v6) => match v6.to_bits() {
                bits if bits >> 32 == NAT64 && bits as u32 != 0 => u64::from(bits as u32),
                bits => (bits >> 64) as u64,
            },
        };
        NonZeroU64::new(key).map(Self)
    }

    /// The network that the address is in.
    pub fn network(self) -> NetworkKey {
        let network = NonZeroU64::new(self.0.get() & !0xffff).filter(|_| !self.is_v4());
        NetworkKey(network.map_or(self, Self))
    }

    /// The /48 that an IPv6 address is in; `None`: an IPv4 address is a network of its own.
    pub fn wider_network(self) -> Option<NetworkKey> {
        (!self.is_v4()).then(|| self.network())
    }

    fn is_v4(self) -> bool {
        self.0.get() >> 32 == 0
    }
}

impl fmt::Display for AddressKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_v4() {
            true => Ipv4Addr::from_bits(self.0.get() as u32).fmt(f),
            false => write!(f, "{}/64", Ipv6Addr::from_bits(u128::from(self.0.get()) << 64)),
        }
    }
}

impl fmt::Display for NetworkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.is_v4() {
            true => self.0.fmt(f),
            false => write!(f, "{}/48", Ipv6Addr::from_bits(u128::from(self.0.0.get()) << 64)),
        }
    }
}

/// Limits of one address; 0: no limit.
#[derive(Debug, Clone, Copy)]
pub struct AddressLimits {
    /// Concurrent connections, handshakes included.
    pub connections_max: u32,
    /// Handshakes per second.
    pub rate: Rate,
    /// Addresses in the table.
    pub addresses_max: usize,
    /// Connections are counted, also without a limit.
    pub counts: bool,
}

/// The limit that an address has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressRefused {
    /// Too many connections.
    Connections,
    /// Too many handshakes per second; the next one is allowed after this time.
    Rate(Duration),
}

/// How a handshake was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// In the table: [`Addresses::leave`] must follow.
    Counted,
    /// The table is full: this address is not limited.
    NoRoom,
    /// No limit is configured.
    Unlimited,
}

/// The table of addresses. An address is forgotten once it has no connection and its bucket is full.
#[derive(Debug)]
pub struct Addresses {
    limits: AddressLimits,
    table: Mutex<HashMap<AddressKey, Address>>,
    /// Sessions of addresses in the table, by IPv6 /48.
    networks: Mutex<HashMap<NetworkKey, u32>>,
}

#[derive(Debug, Default)]
struct Address {
    connections: u32,
    /// Those that have their Welcome.
    sessions: u32,
    full_at_us: u64,
}

impl Address {
    fn is_needed(&self, now_us: u64) -> bool {
        self.connections > 0 || self.full_at_us > now_us
    }
}

impl Addresses {
    /// Creates an empty table.
    pub fn new(limits: AddressLimits) -> Self {
        Self { limits, table: Mutex::default(), networks: Mutex::default() }
    }

    /// Counts a new handshake from this address.
    ///
    /// # Errors
    /// A limit is reached; nothing is counted.
    pub fn enter(&self, key: AddressKey, now_us: u64) -> Result<Entered, AddressRefused> {
        let limits = &self.limits;
        if limits.connections_max == 0 && !limits.rate.is_limited() && !limits.counts {
            return Ok(Entered::Unlimited);
        }
        let mut table = self.table.lock();
        let full = table.len() >= limits.addresses_max;
        let address = match table.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if full => return Ok(Entered::NoRoom),
            Entry::Vacant(entry) => entry.insert(Address::default()),
        };
        if limits.connections_max > 0 && address.connections >= limits.connections_max {
            return Err(AddressRefused::Connections);
        }
        limits.rate.acquire(&mut address.full_at_us, now_us, 1).map_err(AddressRefused::Rate)?;
        address.connections += 1;
        Ok(Entered::Counted)
    }

    /// Sessions of an address and of its network, as far as they are counted.
    pub fn sessions(&self, key: AddressKey) -> Sessions {
        let network = key.wider_network();
        Sessions {
            address: self.table.lock().get(&key).map_or(0, |address| address.sessions),
            network: network
                .map_or(0, |key| self.networks.lock().get(&key).copied().unwrap_or_default()),
        }
    }

    /// A counted connection has its Welcome.
    pub fn welcome(&self, key: AddressKey) {
        if let Some(address) = self.table.lock().get_mut(&key) {
            address.sessions += 1;
        }
        if let Some(network) = key.wider_network() {
            *self.networks.lock().entry(network).or_default() += 1;
        }
    }

    /// Ends a counted connection. `welcomed`: it had its Welcome.
    pub fn leave(&self, key: AddressKey, welcomed: bool, now_us: u64) {
        if let Some(network) = key.wider_network().filter(|_| welcomed) {
            count_down(&mut self.networks.lock(), &network);
        }
        if let Entry::Occupied(mut entry) = self.table.lock().entry(key) {
            let address = entry.get_mut();
            address.connections = address.connections.saturating_sub(1);
            address.sessions = address.sessions.saturating_sub(u32::from(welcomed));
            if !address.is_needed(now_us) {
                entry.remove();
            }
        }
    }

    /// Forgets addresses without connections and with a full bucket.
    pub fn sweep(&self, now_us: u64) {
        let mut table = self.table.lock();
        table.retain(|_, address| address.is_needed(now_us));
        if table.capacity() > 4 * table.len().max(64) {
            table.shrink_to_fit();
        }
    }

    /// Number of addresses in the table.
    pub fn len(&self) -> usize {
        self.table.lock().len()
    }
}

/// Takes one off a count, and forgets it at 0.
pub fn count_down<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;

    fn key(text: &str) -> AddressKey {
        AddressKey::of(text.parse().unwrap()).unwrap()
    }

    fn addresses(connections_max: u32, per_second: u64) -> Addresses {
        let rate = Rate::new(per_second, Duration::from_secs(1));
        let limits = AddressLimits { connections_max, rate, addresses_max: 3, counts: false };
        Addresses::new(limits)
    }

    #[test]
    fn an_ipv6_customer_is_one_and_an_ipv4_address_is_the_same_in_both_notations() {
        assert_eq!(key("2001:db8:1:2::3"), key("2001:db8:1:2:ffff::"));
        assert_ne!(key("2001:db8:1:2::3"), key("2001:db8:1:3::3"));
        assert_eq!(key("192.0.2.1"), key("::ffff:192.0.2.1"));
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
        assert_eq!(AddressKey::of("0.0.0.0".parse().unwrap()), None);
        assert_eq!(key("2001:db8:1:2::3").network(), key("2001:db8:1:ffff::").network());
        assert_ne!(key("2001:db8:1:2::3").network(), key("2001:db8:2:2::3").network());
        assert_ne!(key("192.0.2.1").network(), key("192.0.2.2").network());
        assert_eq!(key("192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(key("2001:db8:1:2::3").to_string(), "2001:db8:1:2::/64");
        assert_eq!(key("2001:db8:1:2::3").network().to_string(), "2001:db8:1::/48");
    }

    #[test]
    fn hazard_145_clients_behind_a_nat64_translator_count_by_their_ipv4_addresses() {
        assert_eq!(key("64:ff9b::192.0.2.1"), key("192.0.2.1"));
        assert_ne!(key("64:ff9b::192.0.2.1"), key("64:ff9b::192.0.2.2"));
        let network = |text: &str| key(text).wider_network();
        assert_eq!(network("64:ff9b::192.0.2.1"), None, "nobody shares a /48");
        assert_eq!(key("64:ff9b::192.0.2.1").to_string(), "192.0.2.1");
        // Outside of the prefix, and without an address, it is IPv6 as any other.
        for other in ["64:ff9b::1:0:0", "64:ff9b:1::192.0.2.1", "64:ff9b::"] {
            assert!(network(other).is_some(), "{other}");
        }
    }

    #[test]
    fn each_limit_bites_and_gives_way() {
        let (a, b) = (key("192.0.2.1"), key("192.0.2.2"));
        let table = addresses(2, 0);
        assert_eq!(table.enter(a, 0), Ok(Entered::Counted));
        assert_eq!(table.enter(a, 0), Ok(Entered::Counted));
        assert_eq!(table.enter(a, 0), Err(AddressRefused::Connections));
        assert_eq!(table.enter(b, 0), Ok(Entered::Counted), "another address");
        table.leave(a, false, 0);
        assert_eq!(table.enter(a, 0), Ok(Entered::Counted));
    }

    #[test]
    fn who_waits_for_its_rate_is_remembered_and_forgotten_when_it_need_not() {
        let a = key("192.0.2.1");
        let table = addresses(0, 2);
        for _ in 0..2 {
            assert_eq!(table.enter(a, 0), Ok(Entered::Counted));
            table.leave(a, false, 0);
        }
        let wait = Duration::from_millis(500);
        assert_eq!(table.enter(a, 0), Err(AddressRefused::Rate(wait)), "although none is open");
        table.sweep(SECOND_US / 2);
        assert_eq!(table.len(), 1);
        table.sweep(SECOND_US);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_full_table_limits_whom_it_knows_and_grows_no_more() {
        let table = addresses(1, 0);
        for n in 1..=3 {
            assert_eq!(table.enter(key(&format!("192.0.2.{n}")), 0), Ok(Entered::Counted));
        }
        assert_eq!(table.enter(key("192.0.2.4"), 0), Ok(Entered::NoRoom));
        assert_eq!(table.enter(key("192.0.2.1"), 0), Err(AddressRefused::Connections));
        assert_eq!(table.len(), 3);
        table.leave(key("192.0.2.2"), false, 0);
        assert_eq!(table.enter(key("192.0.2.4"), 0), Ok(Entered::Counted));
    }

    #[test]
    fn sessions_count_for_their_address_and_its_48() {
        let (a, b, v4) = (key("2001:db8:1:1::1"), key("2001:db8:1:2::1"), key("192.0.2.1"));
        let table = addresses(9, 0);
        for key in [a, a, b, v4] {
            table.enter(key, 0).unwrap();
        }
        [a, b, v4].into_iter().for_each(|key| table.welcome(key));
        assert_eq!(table.sessions(a), Sessions { address: 1, network: 2 });
        assert_eq!(table.sessions(v4), Sessions { address: 1, network: 0 });
        table.leave(a, false, 0);
        assert_eq!(table.sessions(a), Sessions { address: 1, network: 2 });
        [a, b, v4].into_iter().for_each(|key| table.leave(key, true, 0));
        assert_eq!((table.len(), table.networks.lock().len()), (0, 0));
    }

    #[test]
    fn without_limits_nothing_is_kept() {
        let table = addresses(0, 0);
        assert_eq!(table.enter(key("192.0.2.1"), 0), Ok(Entered::Unlimited));
        assert_eq!(table.len(), 0);
    }
}
