//! Admission: the limits on connections, unfinished handshakes, connections without Hello and handshakes per second, for
//! the node, for one client address or network, for one user and for one app. An admitted connection holds an
//! [`Admitted`], which releases its share when dropped, and between handshake and Welcome an [`Unidentified`].
//! `docs/limits.md` lists all limits.

mod addresses;
mod blocks;
mod new_users;
mod origins;
mod rate;
mod room;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use barid_core::AppId;
use barid_mailbox::UserKey;
use parking_lot::Mutex;

pub use addresses::AddressKey;
use addresses::{AddressLimits, AddressRefused, Addresses, Entered, count_down};
use blocks::{BlockLimits, Blocks};
use new_users::NewUsers;
pub use origins::Origins;
pub use rate::Rate;
pub use room::Evicted;
use room::{PlaceId, Room, RoomFull, RoomLimits};

use crate::config::LimitsConfig;
use crate::labels::Limit;

/// Why a connection is refused. Every reason is temporary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The limit that was reached.
    pub limit: Limit,
    /// The client caused it (429), not the node's load (503).
    pub own: bool,
    /// Reason for the response's body.
    pub text: &'static str,
    /// When to try again; `None`: unknown.
    pub after: Option<Duration>,
}

impl Refused {
    const fn node(limit: Limit, text: &'static str) -> Self {
        Self { limit, own: false, text, after: None }
    }

    const fn own(limit: Limit, text: &'static str) -> Self {
        Self { limit, own: true, text, after: None }
    }
}

/// The limits of a node, and how much of them is in use.
#[derive(Debug)]
pub struct Admission {
    began: Instant,
    connections: Places,
    handshakes: Room,
    tls_keep_us: u64,
    unidentified: Room,
    turned_away: Places,
    rate: Rate,
    full_at_us: Mutex<u64>,
    memory_short: AtomicBool,
    addresses: Addresses,
    blocks: Blocks,
    app_connections_max: u32,
    new_users: NewUsers,
    apps: Mutex<HashMap<AppId, u32>>,
    user_unidentified_max: u32,
    users: Mutex<HashMap<UserKey, u32>>,
    hello_timeout: Duration,
    hello_timeout_min: Duration,
}

impl Admission {
    /// Creates the admission for these limits.
    pub fn new(limits: &LimitsConfig) -> Self {
        let burst = Duration::from_secs(limits.handshakes_burst_seconds);
        Self {
            began: Instant::now(),
            connections: Places::new(limits.connections_max),
            handshakes: Room::new(RoomLimits {
                places: limits.handshakes_max,
                address_places: limits.address_handshakes_max,
                network_places: limits.network_handshakes_max,
                keep_us: limits.first_byte_timeout_ms * 1000,
                keep_full_us: limits.handshake_keep_ms.min(limits.first_byte_timeout_ms) * 1000,
            }),
            tls_keep_us: limits.handshake_keep_tls_ms * 1000,
            unidentified: Room::new(RoomLimits {
                places: limits.unidentified_max,
                address_places: limits.address_unidentified_max,
                network_places: 0,
                keep_us: limits.hello_timeout_min_ms * 1000,
                keep_full_us: limits.hello_timeout_min_ms * 1000,
            }),
            turned_away: Places::new(limits.handshakes_max),
            rate: Rate::new(limits.handshakes_per_second.into(), burst),
            full_at_us: Mutex::default(),
            memory_short: AtomicBool::new(false),
            addresses: Addresses::new(AddressLimits {
                connections_max: limits.address_connections_max,
                rate: Rate::new(limits.address_handshakes_per_second.into(), burst),
                addresses_max: limits.addresses_max,
                counts: limits.address_refusals_max > 0,
            }),
            blocks: Blocks::new(BlockLimits {
                refusals_max: limits.address_refusals_max,
                network_refusals_max: limits.network_refusals_max,
                first: Duration::from_secs(limits.block_seconds),
                longest: Duration::from_secs(limits.block_seconds_max),
                addresses_max: limits.addresses_max,
            }),
            app_connections_max: limits.app_connections_max,
            new_users: NewUsers::new(Rate::new(limits.app_new_users_per_second.into(), burst)),
            apps: Mutex::default(),
            user_unidentified_max: limits.user_unidentified_max,
            users: Mutex::default(),
            hello_timeout: limits.hello_timeout(),
            hello_timeout_min: limits.hello_timeout().min(limits.hello_timeout_min()),
        }
    }

    /// Admits an accepted socket, whose handshake begins. `address` is the client's; `None` while it is unknown:
    /// [`Admitted::coming_from`] follows. The handshake ends early when [`Evicted`] resolves.
    ///
    /// # Errors
    /// A limit of the node, or of the address, is reached.
    pub fn admit(
        self: &Arc<Self>,
        address: Option<AddressKey>,
    ) -> Result<(Admitted, Evicted), Refused> {
        if self.memory_short.load(Ordering::Relaxed) {
            return Err(Refused::node(Limit::Memory, "short of memory: come back later"));
        }
        if !self.connections.acquire() {
            return Err(Refused::node(Limit::Connections, "no room: come back later"));
        }
        let stage = Stage::OPEN;
        let mut admitted =
            Admitted { admission: Arc::clone(self), address: None, app: None, stage };
        // Before the place, which may be another client's. Without a limit nothing is locked.
        let mut full_at_us = self.rate.is_limited().then(|| self.full_at_us.lock());
        if let Some(full_at_us) = &mut full_at_us {
            let text = "too many handshakes a second: come back later";
            let taken = self.rate.acquire(full_at_us, self.now_us(), 1);
            taken.map_err(|after| Refused {
                after: Some(after),
                ..Refused::node(Limit::HandshakeRate, text)
            })?;
        }
        let entered = self.handshakes.enter(address, self.now_us()).inspect_err(|_| {
            if let Some(full_at_us) = &mut full_at_us {
                self.rate.give_back(full_at_us, 1);
            }
        });
        drop(full_at_us);
        let (place, evicted) = entered.map_err(handshake_refused)?;
        admitted.stage = Stage::handshake(place);
        Ok((admitted, evicted))
    }

    /// Counts a refusal that an address has brought upon itself, and blocks it, or its IPv6 /48, if there are too many.
    /// Returns how many addresses and networks were forgotten because the table of blocks is full.
    pub fn count_refusal(&self, address: AddressKey) -> u64 {
        let sessions = self.addresses.sessions(address);
        let refusal = self.blocks.refused(address, sessions, self.now_us());
        if let Some(block) = refusal.address {
            let seconds = block.as_secs();
            tracing::warn!(%address, seconds, "address blocked: it was refused too often");
        }
        if let Some(block) = refusal.network {
            let (network, seconds) = (address.network(), block.as_secs());
            tracing::warn!(%network, seconds, "network blocked: its addresses were refused too often");
        }
        refusal.forgotten
    }

    /// The rest of the block of an address, or of its network; `None`: it is not blocked.
    pub fn blocked(&self, address: AddressKey) -> Option<Duration> {
        self.blocks.left(address, self.now_us())
    }

    /// Number of addresses and networks that are blocked. Call it every second.
    pub fn count_blocked(&self) -> usize {
        self.blocks.count(self.now_us())
    }

    /// Permits the caller to answer a refused connection; `None`: too many refusals are being answered already.
    pub fn turn_away(&self) -> Option<TurnedAway<'_>> {
        self.turned_away.acquire().then(|| TurnedAway(&self.turned_away))
    }

    /// While memory is short, no connection is admitted.
    pub fn set_memory_short(&self, short: bool) {
        self.memory_short.store(short, Ordering::Relaxed);
    }

    /// Time that a connection has for its Hello now. It shrinks while more than half of the places for such
    /// connections are taken.
    pub fn hello_timeout(&self) -> Duration {
        let (taken, places) = (self.unidentified.len(), self.unidentified.places());
        let crowded = (2.0 * taken as f64 / places as f64 - 1.0).clamp(0.0, 1.0);
        self.hello_timeout - (self.hello_timeout - self.hello_timeout_min).mul_f64(crowded)
    }

    /// Whether most places of connections without Hello are free: the time for Hello is the full one.
    pub fn is_roomy(&self) -> bool {
        2 * self.unidentified.len() < self.unidentified.places()
    }

    /// Forgets addresses without connections, and full buckets. Call it every few seconds.
    pub fn sweep(&self) {
        self.addresses.sweep(self.now_us());
        self.blocks.sweep(self.now_us());
        self.new_users.sweep(self.now_us());
    }

    /// Whether new users are limited at all.
    pub fn limits_new_users(&self) -> bool {
        self.new_users.is_limited()
    }

    /// Permits one user of an app to be new. Returns whether it may: the app may have too many.
    pub fn permit_new_user(&self, app: &AppId) -> bool {
        self.new_users.acquire(app, self.now_us())
    }

    /// Number of addresses in the table.
    pub fn addresses(&self) -> usize {
        self.addresses.len()
    }

    /// Number of connections without Hello.
    pub fn unidentified(&self) -> usize {
        self.unidentified.len()
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

fn handshake_refused(full: RoomFull) -> Refused {
    match full {
        RoomFull::Address => Refused::own(
            Limit::AddressHandshakes,
            "too many handshakes of your address or network are under way",
        ),
        RoomFull::Node => {
            Refused::node(Limit::Handshakes, "too many handshakes are under way: come back later")
        }
    }
}

/// An admitted connection. It counts as a handshake until [`Self::handshaken`].
#[derive(Debug)]
pub struct Admitted {
    admission: Arc<Admission>,
    /// Set while the table of addresses counts the connection.
    address: Option<AddressKey>,
    app: Option<AppId>,
    stage: Stage,
}

/// How far a connection is, in eight bytes, because every session holds one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stage(u64);

impl Stage {
    /// The handshake is over.
    const OPEN: Self = Self(0);
    /// The session has its Welcome, and its address counts it. No place has this number.
    const WELCOMED: Self = Self(u64::MAX);

    fn handshake(place: PlaceId) -> Self {
        Self(place.get())
    }

    /// The place of a handshake that is under way.
    fn place(self) -> Option<PlaceId> {
        PlaceId::new(self.0).filter(|_| self != Self::WELCOMED)
    }
}

impl Admitted {
    /// Sets the client's address, which was unknown when the handshake began.
    ///
    /// # Errors
    /// The address is blocked, or too many handshakes of it are under way.
    pub fn coming_from(&mut self, address: AddressKey) -> Result<(), Refused> {
        if let Some(left) = self.admission.blocked(address) {
            let text = "your address was refused too often";
            return Err(Refused { after: Some(left), ..Refused::own(Limit::Blocked, text) });
        }
        let Some(place) = self.stage.place() else { return Ok(()) };
        let handshakes = &self.admission.handshakes;
        handshakes.set_address(place, address, self.admission.now_us()).map_err(handshake_refused)
    }

    /// Applies the limits on connections and rate of the client's address. Returns whether the table of addresses is
    /// full, in which case this one is not limited.
    ///
    /// # Errors
    /// A limit of the address is reached.
    pub fn count_address(&mut self, address: IpAddr) -> Result<bool, Refused> {
        let Some(key) = AddressKey::of(address) else { return Ok(false) };
        match self.admission.addresses.enter(key, self.admission.now_us()) {
            Ok(Entered::Counted) => {
                self.address = Some(key);
                Ok(false)
            }
            Ok(Entered::Unlimited) => Ok(false),
            Ok(Entered::NoRoom) => Ok(true),
            Err(AddressRefused::Connections) => Err(Refused::own(
                Limit::AddressConnections,
                "your address has too many connections",
            )),
            Err(AddressRefused::Rate(after)) => {
                let text = "your address connects too often";
                Err(Refused { after: Some(after), ..Refused::own(Limit::AddressRate, text) })
            }
        }
    }

    /// Applies the limit of the token's app.
    ///
    /// # Errors
    /// The app has too many connections.
    pub fn for_app(&mut self, app: &AppId) -> Result<(), Refused> {
        let max = self.admission.app_connections_max;
        if max == 0 {
            return Ok(());
        }
        let mut apps = self.admission.apps.lock();
        let connections = apps.entry(app.clone()).or_default();
        if *connections >= max {
            return Err(Refused::own(Limit::AppConnections, "the app has too many connections"));
        }
        *connections += 1;
        drop(apps);
        self.app = Some(app.clone());
        Ok(())
    }

    /// Applies the limits on connections without Hello, for a connection that is about to be upgraded. `user`: whom
    /// the token is for; `None` for a connection that is closed at once. It ends early when [`Evicted`] resolves.
    ///
    /// # Errors
    /// A limit is reached.
    pub fn await_hello(
        &self,
        address: Option<AddressKey>,
        user: Option<&UserKey>,
    ) -> Result<(Unidentified, Evicted), Refused> {
        let admission = &self.admission;
        let mut unidentified =
            Unidentified { admission: Arc::clone(admission), place: None, user: None };
        if let Some(user) = user.filter(|_| admission.user_unidentified_max > 0) {
            let mut users = admission.users.lock();
            let connections = users.entry(user.clone()).or_default();
            if *connections >= admission.user_unidentified_max {
                let text = "too many connections of this user wait for Hello or Welcome";
                return Err(Refused::own(Limit::UserUnidentified, text));
            }
            *connections += 1;
            unidentified.user = Some(user.clone());
        }
        let entered = admission.unidentified.enter(address, admission.now_us());
        let (place, evicted) = entered.map_err(|full| match full {
            RoomFull::Address => Refused::own(
                Limit::AddressUnidentified,
                "too many connections of your address wait for Hello",
            ),
            RoomFull::Node => Refused::node(
                Limit::Unidentified,
                "too many connections wait for Hello: come back later",
            ),
        })?;
        unidentified.place = Some(place);
        Ok((unidentified, evicted))
    }

    /// The connection has its Welcome: from now on its address is blocked later.
    pub fn welcomed(&mut self) {
        self.handshaken();
        if let Some(address) = self.address.filter(|_| self.stage != Stage::WELCOMED) {
            self.admission.addresses.welcome(address);
            self.stage = Stage::WELCOMED;
        }
    }

    /// The client's first TLS message has arrived: from now on the handshake keeps its place for a round trip, and for
    /// the node's own work. Returns whether it still has its place.
    pub fn tls_begins(&self) -> bool {
        let admission = &self.admission;
        let keep =
            |place| admission.handshakes.keep(place, admission.tls_keep_us, admission.now_us());
        self.stage.place().is_none_or(keep)
    }

    /// Ends the handshake, and keeps the connection.
    pub fn handshaken(&mut self) {
        if let Some(place) = self.stage.place() {
            self.admission.handshakes.leave(place);
            self.stage = Stage::OPEN;
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.handshaken();
        let admission = &self.admission;
        if let Some(address) = self.address {
            let welcomed = self.stage == Stage::WELCOMED;
            admission.addresses.leave(address, welcomed, admission.now_us());
        }
        if let Some(app) = self.app.take() {
            count_down(&mut admission.apps.lock(), &app);
        }
        admission.connections.release();
    }
}

/// A connection between its handshake and Welcome. Its user counts it until it is dropped.
#[derive(Debug)]
pub struct Unidentified {
    admission: Arc<Admission>,
    place: Option<PlaceId>,
    user: Option<UserKey>,
}

impl Unidentified {
    /// Hello has arrived: the connection waits for its mailbox.
    pub fn identified(&mut self) {
        if let Some(place) = self.place.take() {
            self.admission.unidentified.leave(place);
        }
    }
}

impl Drop for Unidentified {
    fn drop(&mut self) {
        self.identified();
        if let Some(user) = self.user.take() {
            count_down(&mut self.admission.users.lock(), &user);
        }
    }
}

/// Permission to answer a refused connection; released on drop.
#[derive(Debug)]
pub struct TurnedAway<'a>(&'a Places);

impl Drop for TurnedAway<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// A bounded counter.
#[derive(Debug)]
struct Places {
    taken: AtomicUsize,
    max: usize,
}

impl Places {
    fn new(max: usize) -> Self {
        Self { taken: AtomicUsize::new(0), max }
    }

    fn acquire(&self) -> bool {
        let add = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, add).is_ok()
    }

    fn release(&self) {
        self.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::blocks::Sessions;

    fn admission(change: impl FnOnce(&mut LimitsConfig)) -> Arc<Admission> {
        let mut limits = LimitsConfig { handshakes_per_second: 0, ..Default::default() };
        change(&mut limits);
        Arc::new(Admission::new(&limits))
    }

    fn refused<T>(result: Result<T, Refused>) -> &'static str {
        result.err().map_or("", |refused| refused.limit.as_str())
    }

    /// Everything that was taken.
    fn taken(admission: &Admission) -> (usize, usize, usize, usize) {
        let connections = admission.connections.taken.load(Ordering::Acquire);
        let apps = admission.apps.lock().len();
        (connections, admission.handshakes.len(), admission.addresses(), apps)
    }

    fn admit(admission: &Arc<Admission>) -> Result<Admitted, Refused> {
        admission.admit(None).map(|(admitted, _)| admitted)
    }

    fn user(name: &str) -> UserKey {
        let app = AppId::new("demo").unwrap();
        UserKey { app, user: barid_core::UserId::new(name).unwrap() }
    }

    #[test]
    fn everything_is_given_back_whatever_was_refused() {
        let address = IpAddr::from([192, 0, 2, 1]);
        let (demo, shop) = (AppId::new("demo").unwrap(), AppId::new("shop").unwrap());
        let admission = admission(|limits| {
            limits.connections_max = 4;
            limits.handshakes_max = 3;
            limits.address_connections_max = 2;
            limits.app_connections_max = 1;
            limits.address_refusals_max = 0;
        });
        let mut one = admit(&admission).unwrap();
        one.count_address(address).unwrap();
        one.for_app(&demo).unwrap();
        let mut two = admit(&admission).unwrap();
        two.count_address(address).unwrap();
        assert_eq!(refused(two.for_app(&demo)), "app_connections");
        two.for_app(&shop).unwrap();
        let mut three = admit(&admission).unwrap();
        assert_eq!(refused(three.count_address(address)), "address_connections");
        assert_eq!(refused(admit(&admission)), "handshakes");
        [&mut one, &mut two, &mut three].into_iter().for_each(Admitted::handshaken);
        one.handshaken();
        let four = admit(&admission).unwrap();
        assert_eq!(refused(admit(&admission)), "connections");
        assert_eq!(taken(&admission), (4, 1, 1, 2));
        drop((one, two, three, four));
        assert_eq!(taken(&admission), (0, 0, 0, 0));
    }

    #[test]
    fn the_rate_says_when_to_come_back() {
        let admission = admission(|limits| {
            limits.handshakes_per_second = 1;
            limits.handshakes_burst_seconds = 1;
        });
        drop(admit(&admission).unwrap());
        let refused = admit(&admission).unwrap_err();
        assert_eq!((refused.limit, refused.own), (Limit::HandshakeRate, false));
        assert!(refused.after.is_some_and(|after| after <= Duration::from_secs(1)));
        assert_eq!(taken(&admission), (0, 0, 0, 0));
    }

    #[test]
    fn without_a_rate_handshakes_do_not_wait_for_its_bucket() {
        let admission = admission(|_| ());
        let _held = admission.full_at_us.lock();
        let (done, is_done) = std::sync::mpsc::sync_channel(1);
        let other = Arc::clone(&admission);
        std::thread::spawn(move || {
            let _admitted = admit(&other);
            let _ = done.send(());
        });
        assert!(is_done.recv_timeout(Duration::from_secs(10)).is_ok(), "it waits for the lock");
    }

    #[tokio::test]
    async fn hazard_142_above_the_rate_a_handshake_takes_no_place_and_without_a_place_no_token() {
        let admission = admission(|limits| {
            limits.handshakes_max = 1;
            limits.handshake_keep_ms = 50;
            limits.handshakes_per_second = 1;
            limits.handshakes_burst_seconds = 2;
        });
        let (_first, mut evicted) = admission.admit(None).unwrap();
        for _ in 0..5 {
            assert_eq!(refused(admit(&admission)), "handshakes", "it is young");
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        let (_second, mut second) = admission.admit(None).unwrap();
        assert!(evicted.try_recv().is_ok());
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(refused(admit(&admission)), "handshake_rate");
        assert!(second.try_recv().is_err(), "it keeps its place");
    }

    #[test]
    fn hazard_102_only_welcomed_sessions_make_an_address_blocked_later() {
        let address = IpAddr::from([192, 0, 2, 1]);
        let key = AddressKey::of(address).unwrap();
        let refusals_until_blocked = |unfinished: usize, welcomed: usize| {
            let admission = admission(|limits| limits.address_refusals_max = 10);
            let mut open: Vec<_> = (0..unfinished + welcomed)
                .map(|_| {
                    let mut admitted = admit(&admission).unwrap();
                    admitted.count_address(address).unwrap();
                    admitted
                })
                .collect();
            open[unfinished..].iter_mut().for_each(Admitted::welcomed);
            let counted = (1..).find(|_| {
                admission.count_refusal(key);
                admission.blocked(key).is_some()
            });
            drop(open);
            assert_eq!(admission.addresses.sessions(key), Sessions::default());
            counted
        };
        assert_eq!(refusals_until_blocked(0, 0), Some(11));
        assert_eq!(refusals_until_blocked(100, 0), Some(11), "handshakes that do not end");
        assert_eq!(refusals_until_blocked(100, 50), Some(61));
    }

    #[test]
    fn so_many_are_turned_away_at_once_and_no_more() {
        let admission = admission(|limits| limits.handshakes_max = 1);
        let one = admission.turn_away();
        assert!(one.is_some() && admission.turn_away().is_none());
        assert!(admission.turn_away().is_none(), "who got no place gives none back");
        drop(one);
        assert!(admission.turn_away().is_some());
    }

    #[test]
    fn hazard_89_a_user_has_so_many_connections_without_hello_and_welcome() {
        let admission = admission(|limits| limits.user_unidentified_max = 2);
        let one = admit(&admission).unwrap();
        let enter = |name| one.await_hello(None, Some(&user(name))).map(|(waiting, _)| waiting);
        let (mut first, second) = (enter("alice").unwrap(), enter("alice").unwrap());
        assert_eq!(refused(enter("alice")), "user_unidentified");
        let _bob = enter("bob").unwrap();
        first.identified();
        assert_eq!(admission.unidentified(), 2, "bob, and the second one of alice");
        assert_eq!(refused(enter("alice")), "user_unidentified", "its mailbox has not answered");
        drop(first);
        let again = enter("alice").unwrap();
        drop((second, again, _bob));
        assert_eq!((admission.unidentified(), admission.users.lock().len()), (0, 0));
    }

    #[test]
    fn hazard_89_the_more_connections_wait_for_hello_the_less_time_each_has() {
        let admission = admission(|limits| {
            limits.unidentified_max = 100;
            limits.user_unidentified_max = 0;
        });
        let one = admit(&admission).unwrap();
        let mut waiting = Vec::new();
        let mut times = Vec::new();
        for n in 0..=100_u64 {
            if [0, 50, 75, 100].contains(&n) {
                times.push(admission.hello_timeout().as_millis());
            }
            waiting.extend(one.await_hello(None, Some(&user("alice"))));
        }
        assert_eq!(times, [10_000, 10_000, 6_000, 2_000]);
        assert_eq!(waiting.len(), 100);
        assert_eq!(refused(one.await_hello(None, None)), "unidentified");
    }
}
