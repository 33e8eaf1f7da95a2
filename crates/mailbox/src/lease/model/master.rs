//! A master: its data, and what the scripts do with it.

use barid_core::{Incarnation, NodeId};

use super::ground::{NODES, RETRY_BASE_MS, RETRY_MAX_MS, SHARDS, TTL_MS, id, index};
use crate::NodeRecord;
use crate::lease::places::KEEP_ENDED;
use crate::lease::record::Copy;
use crate::lease::state::{Place, Stamp, Wrote};
use crate::nodes::memory::Own;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub node: usize,
    pub incarnation: Incarnation,
    pub connection: u64,
    pub attempt: u64,
}

impl Route {
    /// The fields that a script compares before it removes a route.
    pub fn session(&self) -> (usize, Incarnation, u64) {
        (self.node, self.incarnation, self.connection)
    }
}

#[derive(Debug, Clone, Copy)]
struct Timer {
    due_ms: u64,
    attempt: u32,
    defers: u32,
}

/// A call, which may be executed after its caller has stopped waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Write { node: usize, place: Place, stamp: Stamp, record: NodeRecord, released: bool },
    Confirm { user: usize, route: Route, behind: bool },
    Disconnect { user: usize, route: Route },
}

/// The answer to a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Wrote(Wrote),
    Confirmed,
    Superseded,
    Removed(Option<Route>),
}

/// A master's data, with places for all shards and users, of which only its own are used.
#[derive(Clone, Default)]
struct Held {
    own: [Option<(Stamp, NodeRecord, u64)>; NODES],
    copies: [[Option<Copy>; NODES]; SHARDS],
    routes: [Option<Route>; SHARDS],
    /// The highest attempt of each user's device.
    fences: [u64; SHARDS],
    timers: [Option<Timer>; SHARDS],
}

#[derive(Default)]
pub struct Master {
    pub away: bool,
    /// It accepts calls and executes none of them yet.
    stalled: Option<Vec<Call>>,
    /// Changes with each failover, which breaks all connections.
    pub link: u64,
    /// How often it has lost data.
    pub losses: u64,
    /// How far its clock is ahead.
    pub ahead_ms: u64,
    held: Held,
    replica: Held,
}

/// Maximum waiting calls; a stall ends before there are more.
const STALLED_MAX: usize = 64;

impl Master {
    pub fn answers(&self) -> bool {
        !self.away && self.stalled.is_none()
    }

    pub fn stall(&mut self) {
        self.stalled.get_or_insert_default();
    }

    pub fn resume(&mut self, now_ms: u64) -> Vec<Answer> {
        let late = self.stalled.take().unwrap_or_default();
        late.into_iter().map(|call| self.execute(call, now_ms)).collect()
    }

    pub fn replicate(&mut self) {
        self.replica = self.held.clone();
    }

    /// Its replica is promoted; waiting calls are lost.
    pub fn fail_over(&mut self) {
        self.held = self.replica.clone();
        (self.away, self.stalled) = (false, None);
        self.link += 1;
        self.losses += 1;
    }

    /// FLUSHALL: connections stay open.
    pub fn forget_all(&mut self) {
        if self.answers() {
            self.held = Held::default();
            self.losses += 1;
        }
    }

    /// `None`: no answer; it may be executed later.
    pub fn call(&mut self, call: Call, now_ms: u64) -> Option<Answer> {
        if self.away {
            return None;
        }
        if let Some(waiting) = &mut self.stalled {
            if waiting.len() < STALLED_MAX && !waiting.contains(&call) {
                waiting.push(call);
            }
            return None;
        }
        Some(self.execute(call, now_ms))
    }

    fn execute(&mut self, call: Call, now_ms: u64) -> Answer {
        match call {
            Call::Write { node, place, stamp, record, released } => {
                Answer::Wrote(self.write(node, place, stamp, record, released, now_ms))
            }
            Call::Confirm { user, route, behind } => self.confirm(user, route, behind, now_ms),
            Call::Disconnect { user, route } => Answer::Removed(self.disconnect(user, route)),
        }
    }

    /// lease.lua and copy.lua
    fn write(
        &mut self,
        node: usize,
        place: Place,
        stamp: Stamp,
        record: NodeRecord,
        released: bool,
        now_ms: u64,
    ) -> Wrote {
        let now_ms = now_ms + self.ahead_ms;
        let stood = self.stamp(node, place, now_ms);
        let done = stood.is_none_or(|stood| stood <= stamp);
        let ends = if released { now_ms } else { now_ms + TTL_MS };
        match place {
            _ if !done => {}
            Place::Own => self.held.own[node] = (!released).then_some((stamp, record, ends)),
            Place::Copy(shard) => {
                let (layout, record) = (None, Some(record));
                let copies = &mut self.held.copies[index(shard)];
                copies[node] = Some(Copy { stamp, ends, released, layout, record });
                if stamp.number == 1 {
                    let old = |copy: &Copy| copy.ends + (KEEP_ENDED.as_millis() as u64) < now_ms;
                    copies
                        .iter_mut()
                        .filter(|copy| copy.as_ref().is_some_and(old))
                        .for_each(|copy| *copy = None);
                }
            }
        }
        Wrote { done, before: stood }
    }

    fn stamp(&self, node: usize, place: Place, now_ms: u64) -> Option<Stamp> {
        match place {
            Place::Own => self.held.own[node]
                .as_ref()
                .filter(|(.., ends)| *ends > now_ms)
                .map(|(stamp, ..)| *stamp),
            Place::Copy(shard) => self.copy(index(shard), node).map(|copy| copy.stamp),
        }
    }

    /// The stamp in a place of a node.
    pub fn stands(&self, node: usize, place: Place, now_ms: u64) -> Option<Stamp> {
        self.stamp(node, place, now_ms + self.ahead_ms)
    }

    fn copy(&self, shard: usize, node: usize) -> Option<&Copy> {
        self.held.copies[shard][node].as_ref()
    }

    /// The incarnation of a node in a valid copy.
    pub fn shows(&self, shard: usize, node: usize, now_ms: u64) -> Option<Incarnation> {
        let now_ms = now_ms + self.ahead_ms;
        let copy = self.copy(shard, node).filter(|copy| !copy.released && copy.ends > now_ms);
        copy.map(|copy| copy.stamp.incarnation)
    }

    /// copies.lua
    pub fn copies(&self, shard: usize, now_ms: u64) -> (u64, Vec<(NodeId, Copy)>) {
        let copies = self.held.copies[shard].iter().enumerate();
        let copies = copies.filter_map(|(node, copy)| Some((id(node).clone(), copy.clone()?)));
        (now_ms + self.ahead_ms, copies.collect())
    }

    pub fn own(&self, node: usize, now_ms: u64) -> Own {
        let now_ms = now_ms + self.ahead_ms;
        match &self.held.own[node] {
            Some((stamp, record, ends)) if *ends > now_ms => Own::Held(*stamp, record.clone()),
            _ => Own::Absent,
        }
    }

    pub fn route(&self, user: usize) -> Option<Route> {
        self.held.routes[user]
    }

    /// connect.lua; false: superseded by a newer attempt.
    pub fn connect(&mut self, user: usize, route: Route, behind: bool, now_ms: u64) -> bool {
        if self.held.fences[user] > route.attempt {
            return false;
        }
        self.held.fences[user] = route.attempt;
        self.held.routes[user] = Some(route);
        self.held.timers[user] = behind.then_some(Timer::new(now_ms));
        true
    }

    /// confirm.lua
    fn confirm(&mut self, user: usize, route: Route, behind: bool, now_ms: u64) -> Answer {
        let mine = |there: &Route| {
            (there.node, there.connection, there.attempt)
                == (route.node, route.connection, route.attempt)
        };
        let superseded = match &self.held.routes[user] {
            Some(there) => !mine(there) && there.attempt >= route.attempt,
            None => self.held.fences[user] > route.attempt,
        };
        if superseded {
            return Answer::Superseded;
        }
        self.held.fences[user] = route.attempt;
        self.held.routes[user] = Some(route);
        let timer = self.held.timers[user].filter(|timer| timer.defers == 0);
        self.held.timers[user] = behind.then(|| timer.unwrap_or(Timer::new(now_ms)));
        Answer::Confirmed
    }

    /// disconnect.lua
    fn disconnect(&mut self, user: usize, route: Route) -> Option<Route> {
        let there = self.held.routes[user].filter(|there| there.session() == route.session())?;
        (self.held.routes[user], self.held.timers[user]) = (None, None);
        Some(there)
    }

    /// accept.lua
    pub fn accept(&mut self, user: usize, now_ms: u64) {
        if self.held.routes[user].is_some() {
            self.held.timers[user].get_or_insert(Timer::new(now_ms));
        }
    }

    /// ack.lua
    pub fn ack(&mut self, user: usize) {
        self.held.timers[user] = None;
    }

    /// due.lua and fire.lua: the route to re-send to, if one is due.
    pub fn fire(&mut self, user: usize, now_ms: u64) -> Option<Route> {
        let timer = self.held.timers[user].as_mut().filter(|timer| timer.due_ms <= now_ms)?;
        let route = self.held.routes[user];
        if route.is_none() {
            self.held.timers[user] = None;
            return route;
        }
        timer.attempt += 1;
        timer.due_ms = now_ms + doubled(RETRY_BASE_MS, timer.attempt);
        route
    }

    /// defer.lua
    pub fn defer(&mut self, user: usize, void: bool, now_ms: u64) {
        let Some(timer) = &mut self.held.timers[user] else { return };
        let base = if void { RETRY_MAX_MS } else { RETRY_BASE_MS };
        timer.due_ms = now_ms + doubled(base, timer.defers);
        timer.attempt = timer.attempt.saturating_sub(1);
        timer.defers += 1;
    }
}

impl Timer {
    fn new(now_ms: u64) -> Self {
        Self { due_ms: now_ms + RETRY_BASE_MS, attempt: 0, defers: 0 }
    }
}

fn doubled(base_ms: u64, times: u32) -> u64 {
    (base_ms << times.min(16)).min(RETRY_MAX_MS)
}
