//! Places of connections whose users are not known yet: unfinished handshakes, and connections without Hello. When the
//! places of an address, of a network or of the node are taken, a newcomer gets the place of the one that has waited
//! longest, so that a few networks that hold theirs cannot shut out all others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU64;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::admission::addresses::{AddressKey, NetworkKey};

/// A network that holds more than this many times the places of a newcomer's gives one up, however young.
const GREEDY: usize = 4;

/// Bounds of a room. 0 for an address or a network: no bound.
#[derive(Debug, Clone, Copy)]
pub struct RoomLimits {
    /// Places.
    pub places: usize,
    /// Places of one address.
    pub address_places: u32,
    /// Places of one network.
    pub network_places: u32,
    /// Time for which a place is kept when its address or network has all of its own, µs.
    pub keep_us: u64,
    /// Time for which a place is kept when all are taken, except by a network that holds far more than the newcomer's,
    /// µs. With a long one, half requests from many networks keep newcomers out at little cost.
    pub keep_full_us: u64,
}

/// Bound whose places are all taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoomFull {
    /// Those of the address, or of its network.
    Address,
    /// All.
    Node,
}

/// Identifies a place.
pub type PlaceId = NonZeroU64;

/// Resolves when the place is given to another connection.
pub type Evicted = oneshot::Receiver<()>;

/// The places.
#[derive(Debug)]
pub struct Room {
    limits: RoomLimits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    last: u64,
    /// In the order of arrival.
    places: BTreeMap<PlaceId, Place>,
    addresses: HashMap<AddressKey, BTreeSet<PlaceId>>,
    networks: HashMap<NetworkKey, BTreeSet<PlaceId>>,
    by_count: BTreeSet<(usize, NetworkKey)>,
}

#[derive(Debug)]
struct Place {
    address: Option<AddressKey>,
    since_us: u64,
    /// Dropped when the place is given to another connection.
    _holder: oneshot::Sender<()>,
}

impl Room {
    /// Creates an empty room.
    pub fn new(limits: RoomLimits) -> Self {
        Self { limits, taken: Mutex::default() }
    }

    /// Takes a place. `address`: `None` while it is unknown.
    ///
    /// # Errors
    /// All places are taken, and none of them may be given away.
    pub fn enter(
        &self,
        address: Option<AddressKey>,
        now_us: u64,
    ) -> Result<(PlaceId, Evicted), RoomFull> {
        let mut taken = self.taken.lock();
        if let Some(address) = address {
            taken.make_share(&self.limits, address, now_us)?;
        }
        if taken.places.len() >= self.limits.places {
            taken.make_room(&self.limits, address, now_us)?;
        }
        let (holder, evicted) = oneshot::channel();
        let id = taken.next_id();
        taken.places.insert(id, Place { address: None, since_us: now_us, _holder: holder });
        if let Some(address) = address {
            taken.set_address(id, address);
        }
        Ok((id, evicted))
    }

    /// Sets the address of a place that was taken before it was known.
    ///
    /// # Errors
    /// The address has all its places.
    pub fn set_address(
        &self,
        id: PlaceId,
        address: AddressKey,
        now_us: u64,
    ) -> Result<(), RoomFull> {
        let mut taken = self.taken.lock();
        taken.make_share(&self.limits, address, now_us)?;
        taken.set_address(id, address);
        Ok(())
    }

    /// Gives a place back, unless another connection has it already.
    pub fn leave(&self, id: PlaceId) {
        self.taken.lock().remove(id);
    }

    /// Number of places that are taken.
    pub fn len(&self) -> usize {
        self.taken.lock().places.len()
    }

    /// Number of places.
    pub fn places(&self) -> usize {
        self.limits.places
    }
}

impl Taken {
    fn next_id(&mut self) -> PlaceId {
        self.last += 1;
        PlaceId::new(self.last).unwrap_or(PlaceId::MIN)
    }

    /// Makes a place of the address, and of its network, free.
    fn make_share(
        &mut self,
        limits: &RoomLimits,
        address: AddressKey,
        now_us: u64,
    ) -> Result<(), RoomFull> {
        let reached = |max: u32, held: usize| max > 0 && held >= max as usize;
        let (held, oldest) = self
            .addresses
            .get(&address)
            .map_or((0, None), |places| (places.len(), places.first().copied()));
        let network = address.network();
        if reached(limits.address_places, held) {
            self.evict_if_old(oldest, limits.keep_us, now_us).ok_or(RoomFull::Address)?;
        }
        if reached(limits.network_places, self.held(network)) {
            let oldest = self.oldest(network);
            self.evict_if_old(oldest, limits.keep_us, now_us).ok_or(RoomFull::Address)?;
        }
        Ok(())
    }

    /// Makes any place free for a newcomer of this address.
    fn make_room(
        &mut self,
        limits: &RoomLimits,
        address: Option<AddressKey>,
        now_us: u64,
    ) -> Result<(), RoomFull> {
        let own = 1 + address.map_or(0, |address| self.held(address.network()));
        let worst = self.by_count.last().copied();
        if let Some((held, network)) = worst {
            let oldest = self.oldest(network);
            if held > GREEDY * own {
                oldest.into_iter().for_each(|id| self.remove(id));
                return Ok(());
            }
            if held >= own && self.evict_if_old(oldest, limits.keep_full_us, now_us).is_some() {
                return Ok(());
            }
        }
        let oldest = self.places.keys().next().copied();
        self.evict_if_old(oldest, limits.keep_full_us, now_us).ok_or(RoomFull::Node)
    }

    fn evict_if_old(&mut self, id: Option<PlaceId>, keep_us: u64, now_us: u64) -> Option<()> {
        let id = id?;
        let since_us = self.places.get(&id)?.since_us;
        (now_us.saturating_sub(since_us) >= keep_us).then(|| self.remove(id))
    }

    fn held(&self, network: NetworkKey) -> usize {
        self.networks.get(&network).map_or(0, BTreeSet::len)
    }

    fn oldest(&self, network: NetworkKey) -> Option<PlaceId> {
        self.networks.get(&network)?.first().copied()
    }

    fn set_address(&mut self, id: PlaceId, address: AddressKey) {
        let Some(place) = self.places.get_mut(&id) else { return };
        place.address = Some(address);
        self.addresses.entry(address).or_default().insert(id);
        let network = address.network();
        let held = self.networks.entry(network).or_default();
        self.by_count.remove(&(held.len(), network));
        held.insert(id);
        self.by_count.insert((held.len(), network));
    }

    fn remove(&mut self, id: PlaceId) {
        let Some(place) = self.places.remove(&id) else { return };
        let Some(address) = place.address else { return };
        if let Some(places) = self.addresses.get_mut(&address) {
            places.remove(&id);
            if places.is_empty() {
                self.addresses.remove(&address);
            }
        }
        let network = address.network();
        let Some(held) = self.networks.get_mut(&network) else { return };
        self.by_count.remove(&(held.len(), network));
        held.remove(&id);
        if held.is_empty() {
            self.networks.remove(&network);
        } else {
            self.by_count.insert((held.len(), network));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;

    fn key(text: &str) -> Option<AddressKey> {
        AddressKey::of(text.parse().unwrap())
    }

    fn room(places: usize, address_places: u32, network_places: u32) -> Room {
        let (keep_us, keep_full_us) = (2 * SECOND_US, 2 * SECOND_US);
        Room::new(RoomLimits { places, address_places, network_places, keep_us, keep_full_us })
    }

    fn is_evicted(evicted: &mut Evicted) -> bool {
        evicted.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    fn is_empty(room: &Room) -> bool {
        let taken = room.taken.lock();
        let Taken { places, addresses, networks, by_count, .. } = &*taken;
        (places.len(), addresses.len(), networks.len(), by_count.len()) == (0, 0, 0, 0)
    }

    #[test]
    fn a_full_share_gives_its_oldest_place_away_once_that_is_old() {
        let room = room(100, 2, 0);
        let a = key("192.0.2.1");
        let (first, mut evicted) = room.enter(a, 0).unwrap();
        let (second, _kept) = room.enter(a, SECOND_US).unwrap();
        assert_eq!(room.enter(a, SECOND_US).unwrap_err(), RoomFull::Address);
        assert!(room.enter(key("192.0.2.2"), SECOND_US).is_ok(), "another address");
        let (third, _kept) = room.enter(a, 2 * SECOND_US).unwrap();
        assert!(is_evicted(&mut evicted));
        assert_eq!(room.enter(a, 2 * SECOND_US).unwrap_err(), RoomFull::Address);
        // Whoever was evicted gives nothing back.
        room.leave(first);
        assert_eq!(room.enter(a, 2 * SECOND_US).unwrap_err(), RoomFull::Address);
        [second, third].into_iter().for_each(|id| room.leave(id));
        assert_eq!(room.len(), 1);
    }

    #[test]
    fn a_network_of_ipv6_has_a_share_whatever_its_addresses() {
        let room = room(100, 2, 3);
        for n in 0..3 {
            room.enter(key(&format!("2001:db8:1:{n}::1")), 0).unwrap();
        }
        assert_eq!(room.enter(key("2001:db8:1:9::1"), 0).unwrap_err(), RoomFull::Address);
        assert!(room.enter(key("2001:db8:2::1"), 0).is_ok(), "another /48");
        assert!(room.enter(key("2001:db8:1:9::1"), 2 * SECOND_US).is_ok(), "the oldest one goes");
    }

    #[test]
    fn when_all_is_taken_the_greediest_network_gives_way_and_equals_keep_theirs() {
        let room = room(6, 0, 0);
        let greedy: Vec<_> = (0..5).map(|_| room.enter(key("192.0.2.1"), 0).unwrap()).collect();
        let (_, mut honest) = room.enter(key("192.0.2.2"), 0).unwrap();
        let mut greedy = greedy.into_iter().map(|(_, evicted)| evicted).collect::<Vec<_>>();
        room.enter(key("192.0.2.3"), 1).unwrap();
        assert!(is_evicted(&mut greedy[0]) && !is_evicted(&mut greedy[1]));
        assert_eq!(room.enter(key("192.0.2.4"), 1).unwrap_err(), RoomFull::Node, "4 of 6");
        assert_eq!(room.enter(key("192.0.2.1"), 1).unwrap_err(), RoomFull::Node);
        room.enter(key("192.0.2.4"), 2 * SECOND_US).unwrap();
        assert!(is_evicted(&mut greedy[1]) && !is_evicted(&mut honest), "the greedy one first");
        assert_eq!(room.len(), 6);
    }

    #[test]
    fn among_many_networks_the_one_that_has_waited_longest_gives_way() {
        let room = room(3, 0, 0);
        let mut first = room.enter(None, 0).unwrap().1;
        for n in 1..3 {
            room.enter(key(&format!("192.0.2.{n}")), n).unwrap();
        }
        assert_eq!(room.enter(key("192.0.2.9"), 5).unwrap_err(), RoomFull::Node);
        let late = 2 * SECOND_US;
        assert!(room.enter(key("192.0.2.9"), late).is_ok());
        assert!(is_evicted(&mut first), "although its address is unknown");
    }

    #[test]
    fn hazard_90_half_requests_of_as_many_networks_as_places_keep_one_for_a_short_time() {
        let (keep_us, keep_full_us) = (2 * SECOND_US, SECOND_US / 4);
        let limits =
            RoomLimits { places: 4, address_places: 2, network_places: 0, keep_us, keep_full_us };
        let room = Room::new(limits);
        let address = |n: u64| key(&format!("192.0.2.{n}"));
        let mut first = room.enter(address(1), 0).unwrap().1;
        for n in 2..5 {
            room.enter(address(n), n).unwrap();
        }
        assert_eq!(room.enter(address(9), keep_full_us - 1).unwrap_err(), RoomFull::Node);
        room.enter(address(9), keep_full_us).unwrap();
        assert!(is_evicted(&mut first));
        // An address that has its own share waits for longer.
        room.enter(address(9), keep_full_us + 2).unwrap();
        assert_eq!(room.enter(address(9), SECOND_US).unwrap_err(), RoomFull::Address);
    }

    #[test]
    fn an_address_that_is_learnt_later_counts_from_then_on() {
        let room = room(9, 1, 0);
        let a = key("192.0.2.1").unwrap();
        let (one, two) = (room.enter(None, 0).unwrap().0, room.enter(None, 0).unwrap().0);
        room.set_address(one, a, 1).unwrap();
        assert_eq!(room.set_address(two, a, 1), Err(RoomFull::Address));
        room.leave(one);
        room.set_address(two, a, 1).unwrap();
        room.leave(two);
        assert!(is_empty(&room));
    }
}
