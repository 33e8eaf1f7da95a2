//! A mailbox's devices: cursors, routes, retries. Each script has a function.

use barid_core::Chain;
use barid_mailbox::Unreached;

use super::{
    DEFER_BASE, DEFER_FULL, DEVICES_MAX, Due, Life, Mailbox, RETRY_BASE, RETRY_MAX, Timer,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub name: &'static str,
    /// Cursor.
    pub seq: u64,
    pub generation: u32,
    pub due: Due,
    /// Number of re-sends.
    pub resends: u32,
    /// When it was last seen, ms; `None` if by the last call.
    pub used: Option<u64>,
    /// Its last connection attempt.
    pub fence: u64,
    /// Re-sends in a row that did not reach its node.
    pub defers: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub number: u64,
    /// Incarnation of its node.
    pub incarnation: u64,
    pub attempt: u64,
}

/// A position that a call names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub epoch: u64,
    pub generation: u32,
    pub seq: u64,
    pub chain: Option<Chain>,
}

/// The session that connects or confirms.
#[derive(Debug, Clone, Copy)]
pub struct Hello {
    pub device: &'static str,
    pub route: Route,
    pub at: Option<Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connected {
    Superseded,
    TooMany,
    /// The position to read from, and the session that it replaced.
    At {
        seq: u64,
        /// `None` if the entries behind it are gone.
        chain: Option<Chain>,
        generation: u32,
        reset: bool,
        replaced: Option<u64>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acked {
    Stale,
    Advanced(u64),
    Reset { generation: u32, seq: u64, chain: Option<Chain> },
}

impl Mailbox {
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// Arms the retry of every connected device whose retry is not armed.
    pub(super) fn arm(&mut self) {
        // If all are armed the timer stays, even if it is that of a forgotten device.
        for name in self.routes.keys().copied().collect::<Vec<_>>() {
            if self.device(name).is_none() {
                self.devices.push(self.unknown(name, 0)); // forgotten under a living route
            }
            let device = self.devices.iter_mut().find(|device| device.name == name);
            let device = device.expect("it was added");
            if device.due == Due::Never {
                (device.due, device.resends) = (Due::In(RETRY_BASE), 0);
                self.timer = Timer::Earliest;
            }
        }
    }

    pub fn connect(&mut self, hello: &Hello, now: u64) -> Connected {
        let name = hello.device;
        let old = self.routes.get(name).copied();
        if old.is_some_and(|old| old.attempt > hello.route.attempt) {
            return Connected::Superseded;
        }
        self.open(now);
        let known = self.device(name).cloned();
        if old.is_none() && known.as_ref().is_some_and(|d| d.fence > hello.route.attempt) {
            return Connected::Superseded;
        }
        let mut device = known.clone().unwrap_or_else(|| {
            // It may be a forgotten device.
            let others = self.devices.iter().filter(|_| !self.keeps_all);
            let furthest = others.map(|other| other.seq).max().unwrap_or(0);
            Device { seq: furthest.max(self.oldest - 1), ..self.unknown(name, 0) }
        });
        if known.is_none() && !self.make_room() {
            return Connected::TooMany;
        }
        let (read_from, reset) = match hello.at {
            Some(at) => self.resume(&mut device, known.is_some(), at),
            None => (device.seq, false),
        };
        device.due = if device.seq < self.newest() { Due::In(RETRY_BASE) } else { Due::Never };
        (device.resends, device.used, device.fence) = (0, None, hello.route.attempt);
        device.defers = 0;
        let chain = self.kept_chain_at(read_from);
        let generation = device.generation;
        self.save(device);
        self.route(name, hello.route, now);
        self.timer = Timer::Earliest;
        let same = |old: &Route| {
            (old.number, old.incarnation) == (hello.route.number, hello.route.incarnation)
        };
        let replaced = old.filter(|old| !same(old)).map(|old| old.number);
        Connected::At { seq: read_from, chain, generation, reset, replaced }
    }

    /// Moves the device to the position that it names, if that is in this history. Returns the position to read from,
    /// and whether the device is reset.
    fn resume(&self, device: &mut Device, known: bool, at: Place) -> (u64, bool) {
        let forked = match (self.kept_chain_at(at.seq), at.chain) {
            (Some(ours), Some(theirs)) => ours != theirs,
            _ => false,
        };
        let another = self.is_another(at.epoch);
        if another || at.seq > self.newest() || forked {
            self.reset(device, at.generation, another && !known);
            return (device.seq, true);
        }
        if at.seq + 1 < self.oldest {
            device.seq = self.oldest - 1;
            device.generation = device.generation.max(at.generation);
            return (at.seq, false);
        }
        if at.chain.is_none() && known && at.generation < device.generation {
            return (device.seq, true); // it does not know of its reset
        }
        device.seq = at.seq;
        device.generation = device.generation.max(at.generation);
        (at.seq, false)
    }

    /// Returns whether the route was missing; `None` if the session was superseded.
    pub fn confirm(&mut self, hello: &Hello, now: u64) -> Option<bool> {
        let name = hello.device;
        let old = self.routes.get(name).copied();
        if let Some(old) = old {
            let mine = (old.number, old.attempt) == (hello.route.number, hello.route.attempt);
            if !mine && old.attempt >= hello.route.attempt {
                return None;
            }
        }
        self.open(now);
        let known = self.device(name).cloned();
        if old.is_none() && known.as_ref().is_some_and(|d| d.fence > hello.route.attempt) {
            return None;
        }
        let at = hello.at.expect("a session stands somewhere");
        if known.is_some() || self.make_room() {
            let mut device = known.unwrap_or_else(|| self.remember(name, at));
            (device.used, device.fence) = (None, hello.route.attempt);
            if device.seq >= self.newest() {
                (device.due, device.resends) = (Due::Never, 0);
            } else if device.due == Due::Never {
                (device.due, device.resends) = (Due::In(RETRY_BASE), 0);
            } else if device.defers > 0 {
                device.due = device.due.or_sooner(RETRY_BASE);
            }
            device.defers = 0;
            self.save(device);
        }
        self.route(name, hello.route, now);
        self.timer = Timer::Earliest;
        Some(old.is_none())
    }

    /// A forgotten device at its session's position, if that is in this history.
    fn remember(&self, name: &'static str, at: Place) -> Device {
        let before = self.oldest - 1;
        let seq = match self.kept_chain_at(at.seq) {
            _ if self.is_another(at.epoch) => 0,
            Some(ours) if at.chain.is_none_or(|theirs| theirs == ours) => at.seq,
            _ => at.seq.min(before), // even if the entries behind its position are gone
        };
        Device { seq, ..self.unknown(name, at.generation) }
    }

    /// Whether a position is of another epoch of the mailbox.
    fn is_another(&self, epoch: u64) -> bool {
        self.life != Life::Known(barid_core::Epoch(epoch))
    }

    pub fn ack(&mut self, name: &'static str, route: (u64, u64), at: Place, now: u64) -> Acked {
        self.open(now);
        let known = self.device(name).cloned();
        let unknown = known.is_none();
        let from_another = known.is_none() && self.is_another(at.epoch);
        if known.as_ref().is_some_and(|device| device.generation > at.generation) {
            return Acked::Stale;
        }
        if known.is_none() && !self.make_room() {
            return Acked::Advanced(at.seq);
        }
        let mut device = known.unwrap_or_else(|| self.unknown(name, at.generation));
        let ours = self.kept_chain_at(at.seq);
        let forked = ours.is_some() && ours != at.chain;
        let reset = self.is_another(at.epoch) || at.seq > self.newest() || forked;
        let progress = !reset && ours.is_some() && at.seq > device.seq;
        if reset {
            self.reset(&mut device, at.generation, from_another);
        } else {
            device.generation = at.generation;
        }
        if progress {
            device.seq = at.seq;
        }
        device.used = None;
        // A reset begins the retries, unless they are those of another session; so does an ack that makes the device
        // known.
        let begins = self.routes.get(name).is_some_and(|here| {
            device.due == Due::Never || (here.number, here.incarnation) == route
        });
        let before = device.due;
        if device.seq >= self.newest() {
            (device.due, device.resends, device.defers) = (Due::Never, 0, 0);
        } else if progress && device.due != Due::Never || (reset || unknown) && begins {
            (device.due, device.resends, device.defers) = (Due::In(RETRY_BASE), 0, 0);
        }
        if device.due != before {
            self.timer = Timer::Earliest;
        }
        let cursor = device.seq;
        let generation = device.generation;
        self.save(device);
        if progress && !self.keeps_all {
            let lowest = self.devices.iter().map(|device| device.seq).min().unwrap_or(0);
            self.leave(self.oldest.max(lowest + 1));
        }
        if reset {
            let chain = self.kept_chain_at(cursor);
            return Acked::Reset { generation, seq: cursor, chain };
        }
        Acked::Advanced(cursor)
    }

    pub fn disconnect(&mut self, name: &'static str, route: (u64, u64)) {
        let Some(here) = self.routes.get(name) else { return };
        if (here.number, here.incarnation) != route {
            return;
        }
        self.routes.remove(name);
        if let Some(device) = self.devices.iter_mut().find(|device| device.name == name) {
            (device.used, device.due, device.resends) = (None, Due::Never, 0);
            device.defers = 0;
            self.timer = Timer::Earliest;
        }
    }

    /// Makes the retries of these devices due (`None`: all).
    pub fn make_due(&mut self, who: Option<&str>) {
        for device in &mut self.devices {
            if device.due != Due::Never && who.is_none_or(|who| device.name == who) {
                device.due = Due::At(1);
            }
        }
        if self.timer != Timer::None {
            self.timer = Timer::At(1);
        }
    }

    /// The re-sends: device, session, number.
    pub fn fire(&mut self) -> Vec<(&'static str, u64, u32)> {
        if self.timer != Timer::At(1) {
            return Vec::new();
        }
        self.timer = if self.life == Life::None { Timer::None } else { Timer::Earliest };
        let mut due = Vec::new();
        let newest = self.newest();
        for device in &mut self.devices {
            let route = self.routes.get(device.name);
            match (route, device.due) {
                (Some(route), Due::At(1)) if device.seq < newest => {
                    device.resends += 1;
                    device.due = Due::In((RETRY_BASE << device.resends).min(RETRY_MAX));
                    due.push((device.name, route.number, device.resends));
                }
                (Some(_), Due::Never) if device.seq < newest => {
                    (device.due, device.resends) = (Due::In(RETRY_BASE), 0);
                }
                (Some(_), _) if device.seq < newest => (),
                _ => (device.due, device.resends, device.defers) = (Due::Never, 0, 0),
            }
        }
        due
    }

    /// A claim is given back, unless the timer was moved since.
    pub fn defer(&mut self, score: u64, names: &[String], why: Unreached) {
        if self.timer != Timer::At(score) || self.life == Life::None {
            return;
        }
        for device in &mut self.devices {
            let given = names.iter().any(|name| name == device.name);
            if given && device.due != Due::Never && device.resends > 0 {
                let (first, times) = match why {
                    Unreached::Away => (DEFER_BASE, 0),
                    Unreached::Down => (DEFER_BASE, device.defers),
                    Unreached::Full => (DEFER_FULL, device.defers),
                    Unreached::Void => (RETRY_MAX, 0),
                };
                device.resends -= 1;
                device.due = Due::In((first << times.min(10)).min(RETRY_MAX));
                device.defers += u32::from(why != Unreached::Away);
            }
        }
        self.timer = Timer::Earliest;
    }

    fn route(&mut self, name: &'static str, route: Route, now: u64) {
        self.routes.insert(name, route);
        self.unrouted.remove(name);
        self.routed = now;
    }

    /// A device without state, before everything that is kept.
    fn unknown(&self, name: &'static str, generation: u32) -> Device {
        let seq = self.oldest - 1;
        Device {
            name,
            seq,
            generation,
            due: Due::Never,
            resends: 0,
            used: None,
            fence: 0,
            defers: 0,
        }
    }

    /// Resets the cursor to before the oldest entry, or further if the device was not told of a removed one.
    fn reset(&self, device: &mut Device, generation: u32, from_another_life: bool) {
        device.generation = device.generation.max(generation) + 1;
        device.seq = if from_another_life { 0 } else { device.seq.min(self.oldest - 1) };
    }

    /// Forgets the devices that were offline for longest, until there is room for another. Returns false if all are
    /// online.
    fn make_room(&mut self) -> bool {
        while self.devices.len() >= DEVICES_MAX {
            let away = self.devices.iter().filter(|d| !self.routes.contains_key(d.name));
            // `min_by_key` takes the first of several, as the script does.
            let Some(gone) = away.min_by_key(|device| device.used).map(|device| device.name) else {
                return false;
            };
            self.devices.retain(|device| device.name != gone);
        }
        true
    }

    fn save(&mut self, device: Device) {
        self.devices.retain(|other| other.name != device.name);
        self.devices.push(device);
    }
}
