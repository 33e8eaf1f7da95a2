//! Three masters, three nodes, two dispatchers and a delayer. Time passes from one thing that is due to
//! the next.

use barid_core::Incarnation;

use super::ground::{
    Checked, MASTERS, NODES, READERS, REFRESH_MS, RETRY_MAX_MS, STALE, TTL_MS, USERS, master_of,
    users_of,
};
use super::master::{Answer, Call, Master, Route};
use super::process::Process;
use super::reader::Reader;
use super::steps::Step;
use crate::NodeRecord;
use crate::nodes::Standing;

const POLL_MS: u64 = 2_000;
const TRAFFIC_MS: u64 = 10_000;
/// From when all is well until nothing of what was before is left: copies and keys end, most nodes
/// vanished at once, routes are kept, readings and retries.
const HEALED_MS: u64 = TTL_MS + 30_000 + 120_000 + 4 * REFRESH_MS + RETRY_MAX_MS + 20_000;

pub struct World {
    now_ms: u64,
    masters: Vec<Master>,
    nodes: Vec<Option<Process>>,
    readers: Vec<Reader>,
    poll_at: u64,
    traffic_at: Option<u64>,
    /// Users with an unhandled message.
    behind: [bool; USERS],
    /// The last incarnation under each name.
    newest: [Incarnation; NODES],
    /// The last attempt of each user's device.
    attempts: [u64; USERS],
    pushes: usize,
}

impl World {
    pub fn new() -> Self {
        let mut masters: Vec<Master> = (0..MASTERS).map(|_| Master::default()).collect();
        for (master, ahead_ms) in masters.iter_mut().zip([0, 4_000, 9_000]) {
            master.ahead_ms = ahead_ms;
        }
        Self {
            now_ms: 0,
            masters,
            nodes: (0..NODES).map(|_| None).collect(),
            readers: [1_300, 3_700].map(|at_ms| Reader::new(at_ms, 0)).into(),
            poll_at: POLL_MS,
            traffic_at: None,
            behind: [false; USERS],
            newest: [Incarnation(0); NODES],
            attempts: [0; USERS],
            pushes: 0,
        }
    }

    pub fn step(&mut self, step: &Step) -> Checked {
        match *step {
            Step::Wait { ms } => return self.wait(ms),
            Step::Away { master } => self.masters[master].away = true,
            Step::Back { master } => self.masters[master].away = false,
            Step::Stall { master } => self.masters[master].stall(),
            Step::Resume { master } => return self.resume(master),
            Step::Replicate { master } => self.masters[master].replicate(),
            Step::FailOver { master } => self.masters[master].fail_over(),
            Step::Emptied { masters } => {
                (0..MASTERS).filter(|it| masters & (1 << it) != 0).for_each(|it| {
                    self.masters[it].forget_all();
                });
            }
            Step::Ahead { master, seconds } => self.masters[master].ahead_ms += seconds * 1000,
            Step::Cut { node, masters } => self.process(node, |it| it.cut = masters),
            Step::Deaf { node, masters } => self.process(node, |it| it.deaf = masters),
            Step::CutReader { reader, masters } => self.readers[reader].cut = masters,
            Step::Kill { node } => self.nodes[node] = None,
            Step::Start { node, clock_s, cut } => return self.start(node, clock_s, cut),
            Step::Drain { node } => return self.drain(node),
            Step::Freeze { node } => self.process(node, |it| it.frozen = true),
            Step::Thaw { node } => self.process(node, |it| it.frozen = false),
            Step::Connect { user, node, told } => self.connect(user, node, told),
            Step::Disconnect { user } => self.disconnect(user),
            Step::Message { user } => self.accept(user),
            Step::Push { user, reader, old } => {
                return self.push(user, reader, old);
            }
            Step::Traffic { on } => self.traffic_at = on.then_some(self.now_ms + TRAFFIC_MS),
            Step::Fresh { reader } => {
                self.readers[reader] = Reader::new(self.now_ms, self.readers[reader].cut);
            }
            Step::FreezeReader { reader } => self.readers[reader].frozen = true,
            Step::ThawReader { reader } => self.readers[reader].frozen = false,
            Step::HoldRemovals { reader } => self.readers[reader].holds_removals = true,
            Step::Remove { reader } => {
                self.readers[reader].holds_removals = false;
                return self.remove(reader);
            }
        }
        Ok(())
    }

    fn process(&mut self, node: usize, change: impl FnOnce(&mut Process)) {
        if let Some(process) = &mut self.nodes[node] {
            change(process);
        }
    }

    /// Until then, one thing that is due after the other.
    fn wait(&mut self, ms: u64) -> Checked {
        let until = self.now_ms + ms;
        while let Some((at, due)) = self.next_due().filter(|(at, _)| *at <= until) {
            self.now_ms = self.now_ms.max(at);
            self.happen(due)?;
        }
        self.now_ms = until;
        Ok(())
    }

    fn next_due(&self) -> Option<(u64, Due)> {
        let processes = self.nodes.iter().flatten().filter(|process| !process.frozen);
        let processes = processes.flat_map(|it| {
            [(it.renew_at, Due::Renew(it.number)), (it.pace_at, Due::Pace(it.number))]
        });
        let readers = self.readers.iter().enumerate().filter(|(_, reader)| !reader.frozen);
        let readers = readers.map(|(number, reader)| (reader.read_at, Due::Read(number)));
        let traffic = self.traffic_at.map(|at| (at, Due::Traffic));
        let others = [(self.poll_at, Due::Poll)].into_iter().chain(traffic);
        processes.chain(readers).chain(others).min()
    }

    fn happen(&mut self, due: Due) -> Checked {
        match due {
            Due::Renew(node) => match &mut self.nodes[node] {
                Some(process) => {
                    let renewed = process.renew(&mut self.masters, self.now_ms);
                    self.newest[node] = self.newest[node].max(process.record.incarnation);
                    renewed
                }
                None => Ok(()),
            },
            Due::Pace(node) => match &mut self.nodes[node] {
                Some(process) => process.pace(&mut self.masters, &self.behind, self.now_ms),
                None => Ok(()),
            },
            Due::Read(reader) => self.read(reader),
            Due::Poll => {
                self.poll_at = self.now_ms + POLL_MS;
                self.fire()
            }
            Due::Traffic => {
                self.traffic_at = Some(self.now_ms + TRAFFIC_MS);
                self.push_all()
            }
        }
    }

    fn start(&mut self, node: usize, clock_s: i64, cut: u8) -> Checked {
        if self.nodes[node].is_some() {
            return Ok(());
        }
        let process = Process::start(node, clock_s, cut, &mut self.masters, self.now_ms)?;
        // A clock that is behind the last process's, and no master to tell it so: that is not provided
        // for. The process dies of it at once.
        let (incarnation, behind) =
            (process.record.incarnation, process.record.incarnation <= self.newest[node]);
        self.newest[node] = self.newest[node].max(incarnation);
        if process.is_held() {
            process.check_outbid(&self.masters, self.now_ms)?;
            self.nodes[node] = Some(process).filter(|_| !behind);
        }
        Ok(())
    }

    fn drain(&mut self, node: usize) -> Checked {
        let Some(mut process) = self.nodes[node].take_if(|process| !process.frozen) else {
            return Ok(());
        };
        for user in 0..USERS {
            self.end_session(&mut process, user);
        }
        process.release(&mut self.masters, self.now_ms)?;
        self.newest[node] = self.newest[node].max(process.record.incarnation);
        Ok(())
    }

    fn end_session(&mut self, process: &mut Process, user: usize) {
        if let Some(route) = process.end(user)
            && process.cut & (1 << master_of(user)) == 0
        {
            self.masters[master_of(user)].call(Call::Disconnect { user, route }, self.now_ms);
        }
    }

    /// `told`: the nodes that had a session of the device close it.
    fn connect(&mut self, user: usize, node: usize, told: bool) {
        let (attempt, behind) = (self.attempts[user] + 1, self.behind[user]);
        let Some(process) = &mut self.nodes[node] else { return };
        if !process.connect(user, attempt, behind, &mut self.masters, self.now_ms) {
            return;
        }
        self.attempts[user] = attempt;
        for other in 0..NODES {
            let Some(mut process) =
                self.nodes[other].take_if(|it| told && other != node && !it.frozen)
            else {
                continue;
            };
            self.end_session(&mut process, user);
            self.nodes[other] = Some(process);
        }
    }

    /// The device goes; a node that holds still does not notice.
    fn disconnect(&mut self, user: usize) {
        for node in 0..NODES {
            let newest = |it: &Process| it.session(user).map(|it| it.attempt);
            let Some(mut process) = self.nodes[node]
                .take_if(|it| !it.frozen && newest(it) == Some(self.attempts[user]))
            else {
                continue;
            };
            self.end_session(&mut process, user);
            self.nodes[node] = Some(process);
        }
    }

    fn accept(&mut self, user: usize) {
        let master = &mut self.masters[master_of(user)];
        if master.answers() {
            self.behind[user] = true;
            master.accept(user, self.now_ms);
        }
    }

    fn read(&mut self, reader: usize) -> Checked {
        let before = std::mem::take(&mut self.readers[reader].view);
        self.readers[reader].read(&self.masters, self.now_ms);
        let it = &self.readers[reader];
        for process in self.nodes.iter().flatten() {
            let (record, node) = (&process.record, process.number);
            if it.view.iter().any(|seen| seen.id == record.id) {
                continue;
            }
            if it.is_shown(record, &self.masters, self.now_ms) {
                return Err(format!("d{reader} has read that n{node} lives"));
            }
            let of = |seen: &NodeRecord| {
                (&seen.id, seen.incarnation) == (&record.id, record.incarnation)
            };
            if before.iter().any(of) && it.is_hidden(record, &self.masters, self.now_ms) {
                return Err(format!("d{reader} cannot read n{node} and holds it for gone"));
            }
        }
        if it.holds_removals { Ok(()) } else { self.remove(reader) }
    }

    fn push_all(&mut self) -> Checked {
        for user in 0..USERS {
            for reader in 0..READERS {
                self.push(user, reader, false)?;
            }
        }
        Ok(())
    }

    /// The delayer claims what is due, and gives back what reached nobody.
    fn fire(&mut self) -> Checked {
        self.pushes += 1;
        let living = |it: &usize| !self.readers[*it].frozen;
        let Some(reader) = (0..READERS).map(|it| (it + self.pushes) % READERS).find(living) else {
            return Ok(());
        };
        for user in 0..USERS {
            let master = &mut self.masters[master_of(user)];
            if !master.answers() {
                continue;
            }
            if !self.behind[user] {
                master.ack(user);
            }
            let Some(route) = master.fire(user, self.now_ms) else { continue };
            let standing = self.send(user, reader, route)?;
            let master = &mut self.masters[master_of(user)];
            if let Some(standing) = standing {
                master.defer(user, standing != Standing::Unsure, self.now_ms);
            }
        }
        Ok(())
    }

    /// A push takes the route that the dispatcher read last (`old`), or reads it.
    fn push(&mut self, user: usize, reader: usize, old: bool) -> Result<(), String> {
        let (it, master) = (&mut self.readers[reader], &self.masters[master_of(user)]);
        if it.frozen {
            return Ok(());
        }
        if !old && master.answers() && it.reaches(master_of(user)) {
            it.cached[user] = master.route(user);
        }
        match it.cached[user] {
            Some(route) => self.send(user, reader, route).map(|_| ()),
            None => Ok(()),
        }
    }

    /// A dispatcher sends to the incarnation that it sees, and has routes removed that are over, or of sessions
    /// that their node does not have. Returns what the route is worth if nobody was sent to.
    fn send(
        &mut self,
        user: usize,
        reader: usize,
        route: Route,
    ) -> Result<Option<Standing>, String> {
        let it = &mut self.readers[reader];
        if !it.knows(&route) {
            let standing = it.standing(&route, self.now_ms);
            self.check_standing(reader, user, &route, standing)?;
            if standing == Standing::Over {
                self.readers[reader].to_remove.push_back((user, route));
            }
            return Ok(Some(standing));
        }
        let Some(process) = &mut self.nodes[route.node] else { return Ok(Some(Standing::Unsure)) };
        if process.frozen {
            return Ok(None); // its socket takes it
        }
        if process.has(user, route.incarnation, route.connection) {
            let master = &mut self.masters[master_of(user)];
            if process.cut & (1 << master_of(user)) == 0 && master.answers() {
                self.behind[user] = false;
                master.ack(user);
            }
            return Ok(None);
        }
        // It says that it has none. Both have it removed.
        it.to_remove.push_back((user, route));
        if process.lived_as(route.incarnation) && process.cut & (1 << master_of(user)) == 0 {
            let call = Call::Disconnect { user, route };
            let answer = self.masters[master_of(user)].call(call, self.now_ms);
            self.check_removed(user, answer)?;
        }
        Ok(None)
    }

    /// Checks that a living route's incarnation is not considered over.
    fn check_standing(
        &self,
        reader: usize,
        user: usize,
        route: &Route,
        standing: Standing,
    ) -> Checked {
        let Some(process) = self.nodes[route.node]
            .as_ref()
            .filter(|it| it.has(user, route.incarnation, route.connection))
        else {
            return Ok(());
        };
        let current = route.incarnation == process.incarnation();
        let young = current && process.is_young(self.now_ms);
        // Once all are confirmed, what names an earlier incarnation is a failover's: it is confirmed again.
        let valid = current || route.incarnation >= process.all_confirmed;
        let silent = process.was_silent(self.now_ms, STALE.as_millis() as u64);
        let wrong = match standing {
            Standing::Over => valid && !silent,
            Standing::Void => young,
            Standing::Unsure => false,
        };
        if wrong {
            return Err(format!(
                "d{reader} holds u{user}'s living route {route:?} for {standing:?}"
            ));
        }
        Ok(())
    }

    /// A reaper gets to what it was told.
    fn remove(&mut self, reader: usize) -> Checked {
        while let Some((user, route)) = self.readers[reader].to_remove.pop_front() {
            if self.readers[reader].reaches(master_of(user)) {
                let call = Call::Disconnect { user, route };
                let answer = self.masters[master_of(user)].call(call, self.now_ms);
                self.check_removed(user, answer)?;
            }
        }
        Ok(())
    }

    fn resume(&mut self, master: usize) -> Checked {
        for answer in self.masters[master].resume(self.now_ms) {
            if let Answer::Removed(Some(route)) = answer {
                let user = users_of(master).find(|it| {
                    let of =
                        |process: &Process| process.has(*it, route.incarnation, route.connection);
                    self.nodes[route.node].as_ref().is_some_and(of)
                });
                if let Some(user) = user {
                    self.check_removed(user, Some(answer))?;
                }
            }
        }
        Ok(())
    }

    fn check_removed(&self, user: usize, answer: Option<Answer>) -> Checked {
        let Some(Answer::Removed(Some(route))) = answer else { return Ok(()) };
        let current = self.nodes[route.node].as_ref().is_some_and(|process| {
            process.has(user, route.incarnation, route.connection)
                && process.record.incarnation == route.incarnation
                && process.is_fresh(self.now_ms)
        });
        if current {
            return Err(format!("u{user}'s living route {route:?} was removed"));
        }
        Ok(())
    }

    /// All masters are there and reached, and those who held still go on: after a while all is right.
    pub fn settle(&mut self) -> Checked {
        for master in 0..MASTERS {
            self.masters[master].away = false;
            self.resume(master)?;
        }
        for node in 0..NODES {
            self.process(node, |it| (it.cut, it.deaf, it.frozen) = (0, 0, false));
        }
        for reader in &mut self.readers {
            (reader.cut, reader.frozen, reader.holds_removals) = (0, false, false);
        }
        self.traffic_at = Some(self.now_ms + TRAFFIC_MS);
        self.wait(HEALED_MS)?;
        for user in 0..USERS {
            self.check_settled(user)?;
        }
        let running: Vec<_> = self
            .nodes
            .iter()
            .flatten()
            .map(|process| (&process.record.id, process.incarnation()))
            .collect();
        for reader in &self.readers {
            let seen: Vec<_> = reader.view.iter().map(|it| (&it.id, it.incarnation)).collect();
            if seen != running {
                return Err(format!("a reader sees {seen:?}, and {running:?} run"));
            }
        }
        Ok(())
    }

    fn check_settled(&self, user: usize) -> Checked {
        let route = self.masters[master_of(user)].route(user);
        let leads = route.is_some_and(|route| {
            let of = |it: &Process| {
                it.has(user, route.incarnation, route.connection)
                    && it.incarnation() == route.incarnation
            };
            self.nodes[route.node].as_ref().is_some_and(of)
        });
        if route.is_some() && !leads {
            return Err(format!("u{user} has a dead route, {route:?}"));
        }
        let newest = self.nodes.iter().flatten().find(|process| {
            process.session(user).is_some_and(|it| it.attempt == self.attempts[user])
        });
        let Some(process) = newest else { return Ok(()) };
        if route.is_none_or(|route| route.attempt != self.attempts[user]) {
            return Err(format!("u{user} is connected to n{} and has {route:?}", process.number));
        }
        if self.behind[user] {
            return Err(format!("u{user} is connected and waits for a message"));
        }
        Ok(())
    }
}

/// The next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Renew(usize),
    Pace(usize),
    Read(usize),
    Poll,
    Traffic,
}
