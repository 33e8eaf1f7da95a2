//! A process of an access node, with the shipped [`LeaseState`], [`Pending`] and [`Confirming`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use barid_core::{Incarnation, Shard};

use super::ground::{
    Checked, LAPSE_MS, MASTERS, PACE_MS, SILENT_MS, TTL_MS, VOID_AFTER, at, id, master_of,
    own_master, shard, users_of,
};
use super::master::{Answer, Call, Master, Route};
use crate::lease::events::Pending;
use crate::lease::state::{LeaseState, News, Place, Wrote};
use crate::lease::{Confirming, LiveSession, LiveSessions};
use crate::{NodeRecord, NodeRole};

/// Confirmations per second.
const CONFIRMS_PER_SECOND: u32 = 1;
/// So rarely that the regular round repairs nothing here.
const CONFIRM_EVERY: Duration = Duration::from_secs(1_000_000);

pub struct Session {
    user: usize,
    pub connection: u64,
    pub attempt: u64,
    /// The incarnation in its last confirmed route.
    confirmed: AtomicU64,
    /// Its master's losses when its route was last written.
    losses: AtomicU64,
    over: AtomicBool,
    asked: AtomicBool,
}

impl LiveSession for Session {
    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    fn confirmed_incarnation(&self) -> Incarnation {
        Incarnation(self.confirmed.load(Relaxed))
    }

    fn confirm(&self) {
        self.asked.store(true, Relaxed);
    }
}

/// The incarnation in new routes, and the sessions by user.
pub struct Sessions {
    first: Incarnation,
    incarnation: AtomicU64,
    by_user: BTreeMap<usize, Arc<Session>>,
}

impl LiveSessions for Sessions {
    type Session = Session;

    fn all(&self) -> Vec<Arc<Session>> {
        self.by_user.values().cloned().collect()
    }

    fn shard_of(&self, session: &Session) -> Shard {
        shard(session.user)
    }

    fn begin_incarnation(&self, incarnation: Incarnation) {
        self.incarnation.store(incarnation.0, Relaxed);
    }
}

impl Sessions {
    fn incarnation(&self) -> Incarnation {
        Incarnation(self.incarnation.load(Relaxed))
    }
}

pub struct Process {
    pub number: usize,
    pub frozen: bool,
    /// Masters that it cannot reach, and those whose answers are lost.
    pub cut: u8,
    pub deaf: u8,
    pub renew_at: u64,
    pub pace_at: u64,
    pub record: NodeRecord,
    /// When it began to serve routes of its current incarnation.
    pub incarnation_began_ms: u64,
    /// The last incarnation whose sessions it has published as confirmed: earlier routes are void.
    pub all_confirmed: Incarnation,
    /// The last incarnation of which a master executed a write, and when it first did.
    first_executed: (Incarnation, u64),
    state: LeaseState,
    pending: Pending,
    confirming: Confirming<Session>,
    sessions: Sessions,
    connections: u64,
    writings: usize,
    /// Its connection to each master; one that differs from the master's own is broken.
    links: [u64; MASTERS],
    clock_s: i64,
    /// As the world knows it: when a write was last executed and answered, when one was last executed, and when the
    /// last silence ended in which readers may have considered it gone.
    answered_ms: u64,
    executed_ms: u64,
    silence_ended_ms: Option<u64>,
}

fn wall_ms(now_ms: u64, clock_s: i64) -> u64 {
    (1_000_000_000_i64 + now_ms as i64 + clock_s * 1000) as u64
}

impl Process {
    /// Starts a process; it holds no lease if no master confirmed its write.
    pub fn start(
        number: usize,
        clock_s: i64,
        cut: u8,
        masters: &mut [Master],
        now_ms: u64,
    ) -> Result<Self, String> {
        let incarnation = Incarnation(wall_ms(now_ms, clock_s));
        let record = NodeRecord::new(NodeRole::Access, id(number).clone(), incarnation, "");
        let pace = Duration::from_millis(PACE_MS);
        let mut process = Self {
            number,
            frozen: false,
            cut,
            deaf: 0,
            renew_at: 0,
            pace_at: now_ms + PACE_MS,
            state: LeaseState::new(
                record.incarnation,
                Duration::from_millis(TTL_MS),
                VOID_AFTER,
                at(now_ms),
            ),
            record,
            incarnation_began_ms: now_ms,
            all_confirmed: Incarnation(0),
            first_executed: (Incarnation(0), now_ms),
            pending: Pending::default(),
            confirming: Confirming::new(CONFIRMS_PER_SECOND, CONFIRM_EVERY, pace, at(now_ms)),
            sessions: Sessions {
                first: Incarnation(0),
                incarnation: AtomicU64::new(0),
                by_user: BTreeMap::new(),
            },
            connections: 0,
            writings: 0,
            links: std::array::from_fn(|master| masters[master].link),
            clock_s,
            answered_ms: now_ms,
            executed_ms: now_ms,
            silence_ended_ms: None,
        };
        while !process.state.is_held() {
            let before = process.state.incarnation();
            process.renew(masters, now_ms)?;
            if !process.state.is_held() && process.state.incarnation() == before {
                return Ok(process);
            }
        }
        process.state.begin_work();
        process.pending = Pending::default();
        process.sessions.first = process.record.incarnation;
        process.sessions.begin_incarnation(process.record.incarnation);
        Ok(process)
    }

    pub fn is_held(&self) -> bool {
        self.state.is_held()
    }

    fn reaches(&self, master: usize) -> bool {
        self.cut & (1 << master) == 0
    }

    /// The incarnation in new routes.
    pub fn incarnation(&self) -> Incarnation {
        self.sessions.incarnation()
    }

    /// Whether a route with this incarnation and connection leads to a session.
    pub fn has(&self, user: usize, incarnation: Incarnation, connection: u64) -> bool {
        self.lived_as(incarnation)
            && self.session(user).is_some_and(|session| session.connection == connection)
    }

    pub fn lived_as(&self, incarnation: Incarnation) -> bool {
        (self.sessions.first..=self.incarnation()).contains(&incarnation)
    }

    pub fn session(&self, user: usize) -> Option<&Session> {
        self.sessions.by_user.get(&user).map(|session| &**session)
    }

    /// Connects the device with `attempt`; returns whether a master executed it.
    pub fn connect(
        &mut self,
        user: usize,
        attempt: u64,
        behind: bool,
        masters: &mut [Master],
        now_ms: u64,
    ) -> bool {
        let master = &mut masters[master_of(user)];
        let hears = (self.cut | self.deaf) & (1 << master_of(user)) == 0;
        if self.frozen || !hears || !master.answers() {
            return false;
        }
        let connection = self.connections + 1;
        let route =
            Route { node: self.number, incarnation: self.incarnation(), connection, attempt };
        if !master.connect(user, route, behind, now_ms) {
            return false;
        }
        self.end(user);
        self.connections = connection;
        let session = Session {
            user,
            connection,
            attempt,
            confirmed: AtomicU64::new(0),
            losses: AtomicU64::new(master.losses),
            over: AtomicBool::new(false),
            asked: AtomicBool::new(false),
        };
        self.sessions.by_user.insert(user, Arc::new(session));
        true
    }

    /// Ends a session; returns its route.
    pub fn end(&mut self, user: usize) -> Option<Route> {
        let session = self.sessions.by_user.remove(&user)?;
        session.over.store(true, Relaxed);
        Some(self.route(&session))
    }

    fn route(&self, session: &Session) -> Route {
        let Session { connection, attempt, .. } = *session;
        Route { node: self.number, incarnation: self.incarnation(), connection, attempt }
    }

    /// Writes the lease in all places, and acts on the answers.
    pub fn renew(&mut self, masters: &mut [Master], now_ms: u64) -> Checked {
        let (stamp, news) = self.state.attempt(at(now_ms), wall_ms(now_ms, self.clock_s));
        self.act_on(news, None, now_ms)?;
        let record = self.record.clone();
        let released = false;
        self.everywhere(masters, |process, master, place, masters| {
            let (node, record) = (process.number, record.clone());
            let call = Call::Write { node, place, stamp, record, released };
            let Some(Answer::Wrote(wrote)) = masters[master].call(call, now_ms) else {
                return Ok(());
            };
            if wrote.done {
                process.was_executed(now_ms);
                if process.first_executed.0 != stamp.incarnation {
                    process.first_executed = (stamp.incarnation, now_ms);
                }
            }
            if process.deaf & (1 << master) != 0 {
                return Ok(());
            }
            if wrote.done && stamp.incarnation == process.state.incarnation() {
                process.answered_ms = now_ms;
            }
            let wall_ms = wall_ms(now_ms, process.clock_s);
            let news = process.state.answered(place, stamp, wrote, at(now_ms), wall_ms);
            process.act_on(news, Some(wrote), now_ms)
        })?;
        let renewed = self.state.is_held() && self.state.held_at() >= at(now_ms);
        self.renew_at = now_ms + if renewed { TTL_MS / 3 } else { TTL_MS / 10 };
        Ok(())
    }

    pub fn release(&mut self, masters: &mut [Master], now_ms: u64) -> Checked {
        let (stamp, news) = self.state.attempt(at(now_ms), wall_ms(now_ms, self.clock_s));
        self.act_on(news, None, now_ms)?;
        let record = self.record.clone();
        let released = true;
        self.everywhere(masters, |process, master, place, masters| {
            let (node, record) = (process.number, record.clone());
            masters[master].call(Call::Write { node, place, stamp, record, released }, now_ms);
            Ok(())
        })
    }

    /// Calls `each` for all places that it reaches, in rotated order.
    fn everywhere(
        &mut self,
        masters: &mut [Master],
        mut each: impl FnMut(&mut Self, usize, Place, &mut [Master]) -> Checked,
    ) -> Checked {
        self.writings += 1;
        for nth in 0..MASTERS {
            let master = (nth + self.writings) % MASTERS;
            self.notice_link(master, masters);
            if !self.reaches(master) {
                continue;
            }
            if master == own_master(self.number) {
                each(self, master, Place::Own, masters)?;
            }
            for user in users_of(master) {
                each(self, master, Place::Copy(shard(user)), masters)?;
            }
        }
        Ok(())
    }

    fn notice_link(&mut self, master: usize, masters: &[Master]) {
        let other = self.links[master] != masters[master].link;
        if other && self.reaches(master) && masters[master].answers() {
            self.links[master] = masters[master].link;
            self.pending.forget(users_of(master).map(shard));
        }
    }

    fn was_executed(&mut self, now_ms: u64) {
        if now_ms - self.executed_ms >= SILENT_MS {
            self.silence_ended_ms = Some(now_ms);
        }
        self.executed_ms = now_ms;
    }

    /// Whether readers may consider it gone: nothing of it could be read for long, or until a moment ago.
    pub fn was_silent(&self, now_ms: u64, moment_ms: u64) -> bool {
        now_ms - self.executed_ms >= SILENT_MS
            || self.silence_ended_ms.is_some_and(|ended| now_ms - ended <= moment_ms)
    }

    /// Whether its incarnation has just begun. An incarnation that was written without an answer, and not renewed
    /// within a lease's validity, may have been seen to end before.
    pub fn is_young(&self, now_ms: u64) -> bool {
        let unheard_ms = self.incarnation_began_ms.saturating_sub(self.first_executed.1);
        // An incarnation that a later one has followed is not young either.
        let latest = self.first_executed.0 == self.incarnation();
        latest && now_ms - self.incarnation_began_ms < 2_000 && unheard_ms < TTL_MS
    }

    /// Whether its lease is written somewhere.
    pub fn is_fresh(&self, now_ms: u64) -> bool {
        now_ms - self.executed_ms < TTL_MS
    }

    fn act_on(&mut self, news: Option<News>, wrote: Option<Wrote>, now_ms: u64) -> Checked {
        let before = self.record.incarnation;
        self.state.enter(&mut self.record, news);
        if self.record.incarnation < before {
            return Err(format!("n{} begins an incarnation before its last one", self.number));
        }
        let Some(news) = news else { return Ok(()) };
        self.pending.add(news);
        if let News::Lapsed(why) = news {
            let silent = now_ms - self.answered_ms > LAPSE_MS;
            let outbid =
                wrote.is_some_and(|it| it.before.is_some_and(|it| it.incarnation > before));
            if !silent && !outbid {
                return Err(format!("n{} begins another incarnation: {why}", self.number));
            }
        }
        Ok(())
    }

    /// One tick: handles the lease's events, and confirms sessions.
    pub fn pace(&mut self, masters: &mut [Master], behind: &[bool], now_ms: u64) -> Checked {
        self.pace_at = now_ms + PACE_MS;
        for master in 0..MASTERS {
            self.notice_link(master, masters);
        }
        while let Some(event) = self.pending.next() {
            let before = self.incarnation();
            self.confirming.handle(&self.sessions, event);
            if self.incarnation() < before {
                return Err(format!("n{} goes on in an incarnation before its last", self.number));
            }
            if self.incarnation() > before {
                self.incarnation_began_ms = now_ms;
            }
        }
        self.confirming.tick(&self.sessions, at(now_ms));
        for session in self.sessions.all() {
            if session.asked.load(Relaxed) && self.reaches(master_of(session.user)) {
                self.confirm(&session, &mut masters[master_of(session.user)], behind, now_ms);
            }
        }
        match self.confirming.finished_incarnation() {
            Some(incarnation) if self.record.set_confirmed(incarnation) => {
                self.all_confirmed = incarnation;
                self.check_confirmed(masters)?;
                self.renew(masters, now_ms)
            }
            _ => Ok(()),
        }
    }

    fn confirm(&mut self, session: &Session, master: &mut Master, behind: &[bool], now_ms: u64) {
        let (user, route) = (session.user, self.route(session));
        let answer = master.call(Call::Confirm { user, route, behind: behind[user] }, now_ms);
        let heard = self.deaf & (1 << master_of(user)) == 0;
        match answer.filter(|_| heard) {
            Some(Answer::Confirmed) => {
                session.asked.store(false, Relaxed);
                session.confirmed.fetch_max(route.incarnation.0, Relaxed);
                session.losses.store(master.losses, Relaxed);
            }
            Some(_) => {
                self.end(user);
            }
            None => {} // repeated until it is answered
        }
    }

    /// Checks that every session has written its route in this incarnation, unless the master has lost data since.
    fn check_confirmed(&self, masters: &[Master]) -> Checked {
        for session in self.sessions.by_user.values() {
            let master = &masters[master_of(session.user)];
            let kept = master.losses == session.losses.load(Relaxed);
            let route = master.route(session.user).filter(|route| {
                kept && route.node == self.number && route.connection == session.connection
            });
            if let Some(route) = route.filter(|route| route.incarnation != self.incarnation()) {
                return Err(format!(
                    "n{} says that all is confirmed, and u{} has {route:?}",
                    self.number, session.user
                ));
            }
        }
        Ok(())
    }

    /// Checks, after it took its lease, that no place that answered has another incarnation of its node.
    pub fn check_outbid(&self, masters: &[Master], now_ms: u64) -> Checked {
        for master in (0..MASTERS).filter(|it| self.reaches(*it) && masters[*it].answers()) {
            for place in users_of(master).map(|user| Place::Copy(shard(user))) {
                let stood = masters[master].stands(self.number, place, now_ms);
                if stood.is_some_and(|stood| stood.incarnation != self.record.incarnation) {
                    return Err(format!(
                        "n{} began in the incarnation of another process",
                        self.number
                    ));
                }
            }
        }
        Ok(())
    }
}
