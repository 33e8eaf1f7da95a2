//! Three masters, two nodes, two dispatchers, and a delayer.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use barid_core::{Incarnation, NodeId, Shard, ShardCount};
use tokio::time::Instant;

use super::Step;
use super::process::Process;
use crate::lease::life::Stamp;
use crate::lease::life::{Place, Wrote};
use crate::lease::record::Copy;
use crate::nodes::memory::{Memory, Own, Reading, Sight};
use crate::{NodeRecord, keys};

pub const MASTERS: usize = 3;
pub const NODES: usize = 2;
pub const READERS: usize = 2;
/// One in each shard, two shards at each master.
pub const USERS: usize = 6;
pub const TTL: Duration = Duration::from_secs(10);
pub const VOID_AFTER: Duration = Duration::from_secs(600);
/// Time passes in turns: each process renews and confirms, each reader reads, the delayer fires.
const TURN: Duration = Duration::from_secs(3);
const STALE: Duration = Duration::from_secs(12);
/// Masters' clocks differ by so many ms.
const CLOCKS: [u64; MASTERS] = [0, 4_000, 9_000];
const RETRY_MAX: Duration = Duration::from_secs(60);

type Checked = Result<(), String>;

pub fn shard(user: usize) -> Shard {
    ShardCount::new(USERS as u32).unwrap().all().nth(user).unwrap()
}

pub fn master_of(user: usize) -> usize {
    user % MASTERS
}

pub fn shards_of(master: usize) -> impl Iterator<Item = Shard> {
    (0..USERS).filter(move |user| master_of(*user) == master).map(shard)
}

pub fn own_master(node: usize) -> usize {
    node % MASTERS
}

fn id(node: usize) -> NodeId {
    NodeId::new(&format!("n{node}")).unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub node: usize,
    pub incarnation: Incarnation,
    pub connection: u64,
    pub attempt: u64,
}

/// What a master holds.
#[derive(Clone, Default)]
pub struct Master {
    pub number: usize,
    pub away: bool,
    /// Its connections are others since it was another one.
    pub link: u64,
    own: BTreeMap<usize, (Stamp, NodeRecord, u64)>,
    copies: BTreeMap<(Shard, usize), Copy>,
    pub routes: BTreeMap<usize, Route>,
    /// When a user is due, and how often nobody could be reached.
    pub timers: BTreeMap<usize, (Instant, u32)>,
    now_ms: u64,
}

impl Master {
    /// lease.lua and copy.lua.
    pub fn write(&mut self, place: Place, node: usize, stamp: Stamp, record: &NodeRecord) -> Wrote {
        let ends = self.now_ms + TTL.as_millis() as u64;
        let stood = match place {
            Place::Own => {
                self.own.get(&node).filter(|(.., ends)| *ends > self.now_ms).map(|(it, ..)| *it)
            }
            Place::Copy(shard) => self.copies.get(&(shard, node)).map(|copy| copy.stamp),
        };
        let refused = stood.is_some_and(|stood| stood > stamp);
        if !refused {
            let record = record.clone();
            match place {
                Place::Own => drop(self.own.insert(node, (stamp, record, ends))),
                Place::Copy(shard) => {
                    let (given_up, layout) = (false, None);
                    let copy = Copy { stamp, ends, given_up, layout, record: Some(record) };
                    self.copies.insert((shard, node), copy);
                }
            }
        }
        Wrote { done: !refused, stood }
    }

    fn give_up(&mut self, node: usize, stamp: Stamp) {
        self.own.remove(&node);
        for (_, copy) in self.copies.iter_mut().filter(|((_, of), _)| *of == node) {
            (copy.stamp, copy.given_up, copy.ends) = (stamp, true, self.now_ms);
        }
    }

    /// disconnect.lua
    fn remove(&mut self, user: usize, route: Route) -> bool {
        let same = self.routes.get(&user).is_some_and(|there| {
            let of = |route: &Route| (route.node, route.incarnation, route.connection);
            of(there) == of(&route)
        });
        if same {
            self.routes.remove(&user);
        }
        same
    }
}

#[derive(Default)]
struct Reader {
    memory: Memory,
    view: Vec<NodeRecord>,
}

pub struct World {
    now: Instant,
    turns: u64,
    masters: Vec<Master>,
    /// What each master held before, the latest last.
    before: Vec<VecDeque<Master>>,
    nodes: Vec<Option<Process>>,
    readers: Vec<Reader>,
    /// What reapers were told.
    to_reap: VecDeque<(usize, Route)>,
    /// Who has a message that was not handled.
    behind: [bool; USERS],
    attempts: u64,
}

impl World {
    pub fn new() -> Self {
        let masters: Vec<Master> =
            (0..MASTERS).map(|number| Master { number, ..Master::default() }).collect();
        let mut world = Self {
            now: Instant::now(),
            turns: 0,
            before: masters.iter().map(|master| VecDeque::from([master.clone()])).collect(),
            masters,
            nodes: (0..NODES).map(|_| None).collect(),
            readers: (0..READERS).map(|_| Reader::default()).collect(),
            to_reap: VecDeque::new(),
            behind: [false; USERS],
            attempts: 0,
        };
        world.set_clocks();
        world
    }

    fn wall_ms(&self) -> u64 {
        1_000_000_000 + self.turns * TURN.as_millis() as u64
    }

    fn set_clocks(&mut self) {
        let now = self.wall_ms();
        self.masters.iter_mut().zip(CLOCKS).for_each(|(master, ahead)| master.now_ms = now + ahead);
    }

    pub fn step(&mut self, step: &Step) -> Checked {
        match *step {
            Step::Wait { seconds } => {
                for _ in 0..seconds.div_ceil(TURN.as_secs()) {
                    self.turn()?;
                }
            }
            Step::Away { master } => self.masters[master].away = true,
            Step::Back { master } => self.masters[master].away = false,
            Step::BackOlder { master, turns } => {
                let before = &self.before[master];
                let index = before.len().saturating_sub(turns);
                let (link, now_ms) = (self.masters[master].link + 1, self.masters[master].now_ms);
                self.masters[master] =
                    Master { away: false, link, now_ms, ..before[index].clone() };
            }
            Step::Emptied { master } if !self.masters[master].away => {
                let Master { number, link, now_ms, .. } = self.masters[master];
                self.masters[master] = Master { number, link, now_ms, ..Master::default() };
            }
            Step::Emptied { .. } => {}
            Step::Kill { node } => self.nodes[node] = None,
            Step::Start { node, behind_s } => {
                if self.nodes[node].is_none() {
                    // Only where a master answers can it be told of a later life before it.
                    let all = self.masters.iter().all(|master| !master.away);
                    let behind = Duration::from_secs(if all { behind_s } else { 0 });
                    let process =
                        Process::new(node, self.now, self.wall_ms(), behind, &self.masters);
                    self.nodes[node] = Some(process);
                    self.renew(node)?;
                }
            }
            Step::Drain { node } => self.drain(node),
            Step::Freeze { node } => self.freeze(node, true),
            Step::Thaw { node } => self.freeze(node, false),
            Step::Connect { user, node } => self.connect(user, node),
            Step::Disconnect { user } => self.disconnect(user),
            Step::Message { user } => self.accept(user),
            Step::Push { user, reader } => drop(self.push(user, reader)?),
            Step::Fresh { reader } => self.readers[reader] = Reader::default(),
            Step::Reap => {
                if let Some((user, route)) = self.to_reap.pop_front() {
                    self.reap(user, route)?;
                }
            }
        }
        self.check_fresh_reader()
    }

    fn turn(&mut self) -> Checked {
        for (before, master) in self.before.iter_mut().zip(&self.masters) {
            before.push_back(master.clone());
            if before.len() > 4 {
                before.pop_front();
            }
        }
        self.now += TURN;
        self.turns += 1;
        self.set_clocks();
        for node in 0..NODES {
            self.renew(node)?;
            if let Some(process) = self.nodes[node].as_mut().filter(|process| !process.frozen) {
                process.confirm(&mut self.masters, self.now, &self.behind);
            }
        }
        for reader in 0..READERS {
            let known = self.readers[reader].memory.known().cloned().collect();
            let reading = self.reading(known);
            self.readers[reader].view = self.readers[reader].memory.update(reading, self.now);
        }
        self.fire()?;
        while let Some((user, route)) = self.to_reap.pop_front() {
            self.reap(user, route)?;
        }
        self.check_fresh_reader()
    }

    fn renew(&mut self, node: usize) -> Checked {
        let wall_ms = self.wall_ms();
        match self.nodes[node].as_mut().filter(|process| !process.frozen) {
            Some(process) => process.renew(&mut self.masters, self.now, wall_ms),
            None => Ok(()),
        }
    }

    fn freeze(&mut self, node: usize, frozen: bool) {
        if let Some(process) = &mut self.nodes[node] {
            process.frozen = frozen;
        }
    }

    fn drain(&mut self, node: usize) {
        let Some(mut process) = self.nodes[node].take_if(|process| !process.frozen) else { return };
        let (stamp, _) = process.life.attempt(self.now, 0);
        for master in self.masters.iter_mut().filter(|master| !master.away) {
            master.give_up(node, stamp);
            master.routes.retain(|user, route| {
                route.node != node || !process.has(*user, route.incarnation, route.connection)
            });
        }
    }

    fn connect(&mut self, user: usize, node: usize) {
        let master = &mut self.masters[master_of(user)];
        let Some(process) = self.nodes[node].as_mut().filter(|process| !process.frozen) else {
            return;
        };
        if master.away {
            return;
        }
        self.attempts += 1;
        if let Some(route) = process.connect(user, self.attempts) {
            master.routes.insert(user, route);
            if self.behind[user] {
                master.timers.entry(user).or_insert((self.now, 0));
            }
        }
    }

    fn disconnect(&mut self, user: usize) {
        for process in self.nodes.iter_mut().flatten().filter(|process| !process.frozen) {
            let (node, incarnation) = (process.number, process.incarnation);
            let session = process.sessions.remove(&user);
            let master = &mut self.masters[master_of(user)];
            if let (Some(session), Some(incarnation), false) = (session, incarnation, master.away) {
                let connection = session.connection;
                master.remove(user, Route { node, incarnation, connection, attempt: 0 });
            }
        }
    }

    /// A purger has it accepted: the timer is armed where there is a route.
    fn accept(&mut self, user: usize) {
        let master = &mut self.masters[master_of(user)];
        if !master.away {
            self.behind[user] = true;
            if master.routes.contains_key(&user) {
                master.timers.entry(user).or_insert((self.now, 0));
            }
        }
    }

    /// The delayer claims what is due, and gives back what reached nobody.
    fn fire(&mut self) -> Checked {
        for user in 0..USERS {
            let master = &self.masters[master_of(user)];
            let due = master.timers.get(&user).filter(|(due, _)| *due <= self.now).copied();
            let Some((_, defers)) = due.filter(|_| !master.away) else { continue };
            let reader = (self.turns as usize + user) % READERS;
            let routed = master.routes.contains_key(&user) && self.behind[user];
            let reached = routed && self.push(user, reader)?;
            let timers = &mut self.masters[master_of(user)].timers;
            if reached || !routed {
                timers.remove(&user);
            } else {
                let wait = (TURN * 2_u32.pow(defers.min(10))).min(RETRY_MAX);
                timers.insert(user, (self.now + wait, defers + 1));
            }
        }
        Ok(())
    }

    /// Whether a session got it. A dispatcher sends to the life that it sees, and has routes reaped that
    /// are void, or of sessions that their node does not have.
    fn push(&mut self, user: usize, reader: usize) -> Result<bool, String> {
        let master = &self.masters[master_of(user)];
        let Some(route) = master.routes.get(&user).copied().filter(|_| !master.away) else {
            return Ok(false);
        };
        let Reader { memory, view } = &mut self.readers[reader];
        let name = id(route.node);
        let known =
            view.iter().any(|record| record.id == name && record.incarnation == route.incarnation);
        let process = self.nodes[route.node].as_ref();
        if known {
            let Some(process) = process.filter(|process| !process.frozen) else { return Ok(false) };
            if process.has(user, route.incarnation, route.connection) {
                self.behind[user] = false;
                return Ok(true);
            }
            self.to_reap.push_back((user, route)); // it said that it has none
            return Ok(false);
        }
        let void = memory.void_since(&name, route.incarnation, STALE, self.now);
        if void.is_some_and(|since| since >= VOID_AFTER) {
            // A life of which nothing was heard for as long as routes are kept may have a session yet.
            let renewed = process.is_some_and(|process| {
                process.has(user, route.incarnation, route.connection)
                    && process.written.is_some_and(|at| self.now - at < VOID_AFTER)
            });
            if renewed {
                return Err(format!("u{user}'s living route {route:?} is void for {void:?}"));
            }
            self.to_reap.push_back((user, route));
        }
        Ok(false)
    }

    fn reap(&mut self, user: usize, route: Route) -> Checked {
        let master = &mut self.masters[master_of(user)];
        if master.away || !master.remove(user, route) {
            return Ok(());
        }
        let current = self.nodes[route.node].as_ref().is_some_and(|process| {
            process.has(user, route.incarnation, route.connection)
                && process.incarnation == Some(route.incarnation)
                && process.is_fresh(self.now)
        });
        if current {
            return Err(format!("u{user}'s living route {route:?} was reaped"));
        }
        Ok(())
    }

    /// What a reader sees now: the copies beside one shard of each master, and own keys where they leave
    /// it open.
    fn reading(&self, known: Vec<NodeId>) -> Reading {
        let mut reading = Reading { complete: true, ..Reading::default() };
        reading.nodes.extend(known.into_iter().map(|id| (id, Sight::default())));
        for master in &self.masters {
            if master.away {
                reading.complete = false;
                continue;
            }
            reading.any = true;
            let asked = shards_of(master.number).nth(self.turns as usize % 2).unwrap();
            for ((shard, node), copy) in &master.copies {
                if *shard == asked {
                    reading.nodes.entry(id(*node)).or_default().add(copy.clone(), master.now_ms);
                }
            }
        }
        for node in 0..NODES {
            let Some(sight) = reading.nodes.get_mut(&id(node)).filter(|sight| sight.is_open())
            else {
                continue;
            };
            let master = &self.masters[own_master(node)];
            let own = master.own.get(&node).filter(|(.., ends)| *ends > master.now_ms);
            sight.own = match own {
                _ if master.away => Own::Unreadable,
                Some((stamp, record, _)) => Own::Held(*stamp, record.clone()),
                None => Own::Absent,
            };
            reading.complete &= !master.away;
        }
        reading
    }

    /// Whoever wrote to a master that answers, and that has kept it, is seen by who starts now.
    fn check_fresh_reader(&self) -> Checked {
        let view = Memory::default().update(self.reading(Vec::new()), self.now);
        for process in self.nodes.iter().flatten() {
            let Some(incarnation) = process.incarnation.filter(|_| process.is_fresh(self.now))
            else {
                continue;
            };
            let copied = self.masters.iter().filter(|master| !master.away).any(|master| {
                let mut own = shards_of(master.number)
                    .map(|shard| master.copies.get(&(shard, process.number)));
                own.all(|copy| {
                    copy.is_some_and(|copy| {
                        copy.stamp.incarnation == incarnation && copy.ends > master.now_ms
                    })
                })
            });
            let seen = view.iter().any(|it| it.id == id(process.number));
            if copied && !seen {
                return Err(format!("a fresh reader does not see n{}", process.number));
            }
        }
        Ok(())
    }

    /// All masters are there, and those who held still go on: after a while everything is right.
    pub fn settle(&mut self) -> Checked {
        self.masters.iter_mut().for_each(|master| master.away = false);
        (0..NODES).for_each(|node| self.freeze(node, false));
        let turns = |time: Duration| (time.as_secs() / TURN.as_secs()) as usize + 1;
        for turn in 0..turns(VOID_AFTER * 3) {
            self.turn()?;
            // Who gets messages is reaped by them.
            if turn % 10 == 0 {
                for user in 0..USERS {
                    self.push(user, turn / 10 % READERS)?;
                }
            }
        }
        for user in 0..USERS {
            self.check_settled(user)?;
        }
        let running: Vec<_> = self
            .nodes
            .iter()
            .flatten()
            .map(|process| (process.record.id.clone(), process.life.incarnation()))
            .collect();
        for reader in &self.readers {
            let seen: Vec<_> =
                reader.view.iter().map(|it| (it.id.clone(), it.incarnation)).collect();
            if seen != running {
                return Err(format!("a reader sees {seen:?}, and {running:?} run"));
            }
        }
        Ok(())
    }

    fn check_settled(&self, user: usize) -> Checked {
        let route = self.masters[master_of(user)].routes.get(&user);
        let sessions: Vec<(&Process, u64)> = self
            .nodes
            .iter()
            .flatten()
            .filter_map(|process| Some((process, process.sessions.get(&user)?.connection)))
            .collect();
        let key = keys::timers(shard(user));
        match (sessions.as_slice(), route) {
            ([], None) => Ok(()),
            ([], Some(route)) => Err(format!("u{user} ({key}) has a dead route, {route:?}")),
            ([(process, connection)], Some(route))
                if route.node == process.number
                    && route.connection == *connection
                    && Some(route.incarnation) == process.incarnation =>
            {
                if self.behind[user] {
                    return Err(format!("u{user} is connected and waits for a message"));
                }
                Ok(())
            }
            (sessions, route) => {
                let sessions: Vec<_> = sessions.iter().map(|(it, c)| (it.number, *c)).collect();
                Err(format!("u{user} has sessions {sessions:?} and the route {route:?}"))
            }
        }
    }
}
