//! Admission: the limits on connections, concurrent handshakes and handshakes per second, for the node, for one client
//! address and for one app. An admitted connection holds an [`Admitted`], which releases its share when dropped.
//! `docs/limits.md` lists all limits.

mod addresses;
mod origins;
mod rate;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use barid_core::AppId;
use parking_lot::Mutex;

pub use addresses::AddressKey;
use addresses::{AddressLimits, AddressRefused, Addresses, Entered};
pub use origins::Origins;
pub use rate::Rate;

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
    handshakes: Places,
    turned_away: Places,
    rate: Rate,
    full_at_us: Mutex<u64>,
    memory_short: AtomicBool,
    addresses: Addresses,
    app_connections_max: u32,
    apps: Mutex<HashMap<AppId, u32>>,
}

impl Admission {
    /// Creates the admission for these limits.
    pub fn new(limits: &LimitsConfig) -> Self {
        let burst = Duration::from_secs(limits.handshakes_burst_seconds);
        Self {
            began: Instant::now(),
            connections: Places::new(limits.connections_max),
            handshakes: Places::new(limits.handshakes_max),
            turned_away: Places::new(limits.handshakes_max),
            rate: Rate::new(limits.handshakes_per_second.into(), burst),
            full_at_us: Mutex::default(),
            memory_short: AtomicBool::new(false),
            addresses: Addresses::new(AddressLimits {
                connections_max: limits.address_connections_max,
                handshakes_max: limits.address_handshakes_max,
                rate: Rate::new(limits.address_handshakes_per_second.into(), burst),
                addresses_max: limits.addresses_max,
            }),
            app_connections_max: limits.app_connections_max,
            apps: Mutex::default(),
        }
    }

    /// Admits an accepted socket.
    ///
    /// # Errors
    /// A limit of the node is reached.
    pub fn admit(self: &Arc<Self>) -> Result<Admitted, Refused> {
        if self.memory_short.load(Ordering::Relaxed) {
            return Err(Refused::node(Limit::Memory, "short of memory: come back later"));
        }
        if !self.connections.acquire() {
            return Err(Refused::node(Limit::Connections, "no room: come back later"));
        }
        let mut admitted =
            Admitted { admission: Arc::clone(self), address: None, app: None, handshaking: false };
        if !self.handshakes.acquire() {
            let text = "too many handshakes are under way: come back later";
            return Err(Refused::node(Limit::Handshakes, text));
        }
        admitted.handshaking = true;
        if self.rate.is_limited() {
            let taken = self.rate.acquire(&mut self.full_at_us.lock(), self.now_us(), 1);
            let text = "too many handshakes a second: come back later";
            taken.map_err(|after| Refused {
                after: Some(after),
                ..Refused::node(Limit::HandshakeRate, text)
            })?;
        }
        Ok(admitted)
    }

    /// Permits the caller to answer a refused connection; `None`: too many refusals are being answered already.
    pub fn turn_away(&self) -> Option<TurnedAway<'_>> {
        self.turned_away.acquire().then(|| TurnedAway(&self.turned_away))
    }

    /// While memory is short, no connection is admitted.
    pub fn set_memory_short(&self, short: bool) {
        self.memory_short.store(short, Ordering::Relaxed);
    }

    /// Forgets addresses without connections and with a full bucket. Call it every few seconds.
    pub fn sweep(&self) {
        self.addresses.sweep(self.now_us());
    }

    /// Number of addresses in the table.
    pub fn addresses(&self) -> usize {
        self.addresses.len()
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// An admitted connection. It counts as a handshake until [`Self::handshaken`].
#[derive(Debug)]
pub struct Admitted {
    admission: Arc<Admission>,
    address: Option<AddressKey>,
    app: Option<AppId>,
    handshaking: bool,
}

impl Admitted {
    /// Applies the limits of the client's address. Returns whether the table of addresses is full, in which case this
    /// one is not limited.
    ///
    /// # Errors
    /// A limit of the address is reached.
    pub fn coming_from(&mut self, address: IpAddr) -> Result<bool, Refused> {
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
            Err(AddressRefused::Handshakes) => Err(Refused::own(
                Limit::AddressHandshakes,
                "too many handshakes of your address are under way",
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

    /// Ends the handshake, and keeps the connection.
    pub fn handshaken(&mut self) {
        if std::mem::take(&mut self.handshaking) {
            self.admission.handshakes.release();
            if let Some(address) = self.address {
                self.admission.addresses.handshaken(address);
            }
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.handshaken();
        let admission = &self.admission;
        if let Some(address) = self.address {
            admission.addresses.leave(address, admission.now_us());
        }
        if let Some(app) = self.app.take() {
            let mut apps = admission.apps.lock();
            if let Some(connections) = apps.get_mut(&app) {
                *connections -= 1;
                if *connections == 0 {
                    apps.remove(&app);
                }
            }
        }
        admission.connections.release();
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
        let places = |places: &Places| places.taken.load(Ordering::Acquire);
        let apps = admission.apps.lock().len();
        let (connections, handshakes) = (&admission.connections, &admission.handshakes);
        (places(connections), places(handshakes), admission.addresses(), apps)
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
        });
        let mut one = admission.admit().unwrap();
        one.coming_from(address).unwrap();
        one.for_app(&demo).unwrap();
        let mut two = admission.admit().unwrap();
        two.coming_from(address).unwrap();
        assert_eq!(refused(two.for_app(&demo)), "app_connections");
        two.for_app(&shop).unwrap();
        let mut three = admission.admit().unwrap();
        assert_eq!(refused(three.coming_from(address)), "address_connections");
        assert_eq!(refused(admission.admit()), "handshakes");
        [&mut one, &mut two, &mut three].into_iter().for_each(Admitted::handshaken);
        one.handshaken();
        let four = admission.admit().unwrap();
        assert_eq!(refused(admission.admit()), "connections");
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
        drop(admission.admit().unwrap());
        let refused = admission.admit().unwrap_err();
        assert_eq!((refused.limit, refused.own), (Limit::HandshakeRate, false));
        assert!(refused.after.is_some_and(|after| after <= Duration::from_secs(1)));
        assert_eq!(taken(&admission), (0, 0, 0, 0));
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
}
