//! Places of connections whose users are not known yet: unfinished handshakes, and connections without Hello. When the
//! places of an address, of a network or of the node are taken, a newcomer gets the place of the one that has waited
//! longest, so that a few networks that hold theirs cannot shut out all others.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
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

/// The order in which places are given away: the one that has waited longest first.
type Waiting = (u64, PlaceId);

#[derive(Debug, Default)]
struct Taken {
    last: u64,
    places: HashMap<PlaceId, Place>,
    waiting: BTreeSet<Waiting>,
    addresses: HashMap<AddressKey, BTreeSet<Waiting>>,
    networks: HashMap<NetworkKey, BTreeSet<Waiting>>,
    /// Networks by their number of places; among equals, the one with the oldest place last.
    by_count: BTreeSet<(usize, Reverse<Waiting>, NetworkKey)>,
}

#[derive(Debug)]
struct Place {
    address: Option<AddressKey>,
    /// When it was taken, or later if it is kept for longer.
    since_us: u64,
    holder: oneshot::Sender<()>,
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
        taken.insert(id, Place { address, since_us: now_us, holder });
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
        if let Some(place) = taken.remove(id) {
            taken.insert(id, Place { address: Some(address), ..place });
        }
        Ok(())
    }

    /// Keeps a place for `keep_us` from now when all are taken, or for as long as it is kept anyway. Returns whether
    /// the connection still has it.
    pub fn keep(&self, id: PlaceId, keep_us: u64, now_us: u64) -> bool {
        let mut taken = self.taken.lock();
        let Some(place) = taken.remove(id) else { return false };
        let later_us = (now_us + keep_us).saturating_sub(self.limits.keep_full_us);
        let since_us = place.since_us.max(later_us);
        taken.insert(id, Place { since_us, ..place });
        true
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
        let reached = |max: u32, held: Option<&BTreeSet<Waiting>>| {
            held.filter(|held| max > 0 && held.len() >= max as usize)?.first().copied()
        };
        if let Some(oldest) = reached(limits.address_places, self.addresses.get(&address)) {
            let is_old = self.evict_if_old(oldest, limits.keep_us, now_us);
            is_old.ok_or(RoomFull::Address)?;
        }
        let network = self.networks.get(&address.network());
        if let Some(oldest) = reached(limits.network_places, network) {
            let is_old = self.evict_if_old(oldest, limits.keep_us, now_us);
            is_old.ok_or(RoomFull::Address)?;
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
        let network = address.and_then(|address| self.networks.get(&address.network()));
        let own = 1 + network.map_or(0, BTreeSet::len);
        // A network with no more than the newcomer's has no claim to give way first.
        if let Some(&(held, Reverse(oldest), _)) = self.by_count.last()
            && held > own
        {
            if held > GREEDY * own {
                self.evict(oldest.1);
                return Ok(());
            }
            if self.evict_if_old(oldest, limits.keep_full_us, now_us).is_some() {
                return Ok(());
            }
        }
        let oldest = self.waiting.first().copied().ok_or(RoomFull::Node)?;
        let is_old = self.evict_if_old(oldest, limits.keep_full_us, now_us);
        is_old.ok_or(RoomFull::Node)
    }

    fn evict_if_old(&mut self, (since_us, id): Waiting, keep_us: u64, now_us: u64) -> Option<()> {
        (now_us.saturating_sub(since_us) >= keep_us).then(|| self.evict(id))
    }

    fn evict(&mut self, id: PlaceId) {
        if let Some(place) = self.remove(id) {
            // Nobody listens if the connection ends at the same time.
            let _ = place.holder.send(());
        }
    }

    fn insert(&mut self, id: PlaceId, place: Place) {
        let waiting = (place.since_us, id);
        self.waiting.insert(waiting);
        if let Some(address) = place.address {
            self.addresses.entry(address).or_default().insert(waiting);
            self.change_network(address.network(), |held| held.insert(waiting));
        }
        self.places.insert(id, place);
    }

    fn remove(&mut self, id: PlaceId) -> Option<Place> {
        let place = self.places.remove(&id)?;
        let waiting = (place.since_us, id);
        self.waiting.remove(&waiting);
        if let Some(address) = place.address {
            if let Entry::Occupied(mut entry) = self.addresses.entry(address) {
                entry.get_mut().remove(&waiting);
                if entry.get().is_empty() {
                    entry.remove();
                }
            }
            self.change_network(address.network(), |held| held.remove(&waiting));
        }
        Some(place)
    }

    /// Changes the places of a network, and its position among the networks.
    fn change_network(
        &mut self,
        network: NetworkKey,
        change: impl FnOnce(&mut BTreeSet<Waiting>) -> bool,
    ) {
        let position = |held: &BTreeSet<Waiting>| {
            held.first().map(|oldest| (held.len(), Reverse(*oldest), network))
        };
        let held = self.networks.entry(network).or_default();
        if let Some(before) = position(held) {
            self.by_count.remove(&before);
        }
        change(held);
        match position(held) {
            Some(after) => drop(self.by_count.insert(after)),
            None => drop(self.networks.remove(&network)),
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
        evicted.try_recv().is_ok()
    }

    fn is_empty(room: &Room) -> bool {
        let taken = room.taken.lock();
        let Taken { last: _, places, waiting, addresses, networks, by_count } = &*taken;
        let (all, shares) = (places.len() + waiting.len(), addresses.len() + networks.len());
        (all, shares, by_count.len()) == (0, 0, 0)
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
        assert_eq!(evicted.try_recv(), Ok(()));
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
        assert_eq!(first.try_recv(), Ok(()));
        // An address that has its own share waits for longer.
        room.enter(address(9), keep_full_us + 2).unwrap();
        assert_eq!(room.enter(address(9), SECOND_US).unwrap_err(), RoomFull::Address);
    }

    #[test]
    fn hazard_90_a_tie_goes_to_whoever_has_waited_longest_whatever_its_address() {
        for honest in ["2001:db8::1", "1.0.0.1"] {
            let room = room(4, 0, 0);
            let attackers: Vec<_> =
                (1..5).map(|n| room.enter(key(&format!("192.0.2.{n}")), n).unwrap().1).collect();
            let (_, mut honest) = room.enter(key(honest), 3 * SECOND_US).unwrap();
            // All are old. Newcomers come from above and below the others.
            let late = 9 * SECOND_US;
            for newcomer in ["2001:db8:9::1", "0.0.0.9", "2001:db8:8::1"] {
                room.enter(key(newcomer), late).unwrap();
                assert!(!is_evicted(&mut honest), "{newcomer}");
            }
            assert!(attackers.into_iter().all(|mut attacker| is_evicted(&mut attacker)));
            room.enter(key("0.0.0.8"), late).unwrap();
            assert!(is_evicted(&mut honest), "now it has waited longest");
        }
    }

    #[test]
    fn hazard_129_a_place_that_is_kept_for_longer_gives_way_after_newer_ones_of_its_network_too() {
        let room = room(2, 0, 0);
        let (kept, mut kept_evicted) = room.enter(key("192.0.2.1"), 0).unwrap();
        let (_, mut newer) = room.enter(key("192.0.2.1"), 1).unwrap();
        assert!(room.keep(kept, 5 * SECOND_US, SECOND_US));
        let (gone, mut third) = room.enter(key("192.0.2.2"), 3 * SECOND_US).unwrap();
        assert!(is_evicted(&mut newer) && !is_evicted(&mut kept_evicted));
        room.enter(key("192.0.2.3"), 5 * SECOND_US).unwrap();
        assert!(is_evicted(&mut third) && !room.keep(gone, 5 * SECOND_US, 5 * SECOND_US));
        room.enter(key("192.0.2.4"), 6 * SECOND_US).unwrap();
        assert!(is_evicted(&mut kept_evicted));
        assert!(!room.keep(kept, 9 * SECOND_US, 6 * SECOND_US), "it is too late");
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
