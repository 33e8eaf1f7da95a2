//! A process of a node: the shipped [`Life`], and its sessions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use barid_core::{Incarnation, NodeId, Shard};
use tokio::time::Instant;

use super::world::{MASTERS, Master, Route, TTL, VOID_AFTER, shard, shards_of};
use crate::lease::life::{Life, News, Place, Stamp, Wrote};
use crate::{NodeRecord, NodeRole};

/// Sessions confirmed a turn.
const CONFIRMS: usize = 2;
/// All sessions are confirmed once in so long.
const CONFIRM_EVERY: Duration = Duration::from_secs(600);

pub struct Session {
    pub connection: u64,
    pub attempt: u64,
    /// The life that its route is known to name.
    pub confirmed: Incarnation,
}

pub struct Process {
    pub number: usize,
    pub life: Life,
    pub record: NodeRecord,
    pub frozen: bool,
    /// By user.
    pub sessions: BTreeMap<usize, Session>,
    /// What routes name now, and what they named first.
    pub incarnation: Option<Incarnation>,
    first: Incarnation,
    connections: u64,
    to_confirm: BTreeSet<usize>,
    round: Option<(Incarnation, BTreeSet<usize>)>,
    calm: Instant,
    /// Which connection it has to each master: another one than the master's own is broken.
    links: [u64; MASTERS],
    /// When a writing was taken anywhere, by the world's own account.
    pub written: Option<Instant>,
    behind: Duration,
    /// It takes its first life: it may be outbid, and has nothing to confirm.
    begins: bool,
}

impl Process {
    pub fn new(
        number: usize,
        now: Instant,
        wall_ms: u64,
        behind: Duration,
        masters: &[Master],
    ) -> Self {
        let wall_ms = wall_ms - behind.as_millis() as u64;
        let record = NodeRecord {
            id: NodeId::new(&format!("n{number}")).unwrap(),
            role: NodeRole::Access,
            address: String::new(),
            incarnation: Incarnation(wall_ms),
            load: 0,
            draining: false,
            zone: String::new(),
            admin: String::new(),
            devices: String::new(),
            confirmed: true,
        };
        Self {
            number,
            life: Life::new(record.incarnation, VOID_AFTER, now),
            record,
            frozen: false,
            sessions: BTreeMap::new(),
            incarnation: None,
            first: Incarnation(0),
            connections: 0,
            to_confirm: BTreeSet::new(),
            round: None,
            calm: now + CONFIRM_EVERY,
            links: std::array::from_fn(|master| masters[master].link),
            written: None,
            behind,
            begins: true,
        }
    }

    /// Whether a route with this incarnation and connection leads to a session.
    pub fn has(&self, user: usize, incarnation: Incarnation, connection: u64) -> bool {
        let lived = self.incarnation.is_some_and(|now| (self.first..=now).contains(&incarnation));
        lived && self.sessions.get(&user).is_some_and(|session| session.connection == connection)
    }

    pub fn connect(&mut self, user: usize, attempt: u64) -> Option<Route> {
        let incarnation = self.incarnation?;
        self.connections += 1;
        let connection = self.connections;
        self.sessions.insert(user, Session { connection, attempt, confirmed: incarnation });
        Some(Route { node: self.number, incarnation, connection, attempt })
    }

    /// One writing everywhere, and what follows from the answers.
    pub fn renew(
        &mut self,
        masters: &mut [Master],
        now: Instant,
        wall_ms: u64,
    ) -> Result<(), String> {
        let wall_ms = wall_ms - self.behind.as_millis() as u64;
        let (stamp, news) = self.life.attempt(now, wall_ms);
        self.heed(news, now)?;
        self.record.incarnation = self.life.incarnation();
        let mut places = vec![(super::world::own_master(self.number), Place::Own)];
        places.extend(
            (0..MASTERS).flat_map(|master| {
                shards_of(master).map(move |shard| (master, Place::Copy(shard)))
            }),
        );
        for (master, place) in places {
            let Some(wrote) = self.write(&mut masters[master], place, stamp) else { continue };
            if wrote.done {
                self.written = Some(now);
            }
            let news = self.life.answered(place, stamp, wrote, now, wall_ms);
            self.heed(news, now)?;
        }
        self.record.incarnation = self.life.incarnation();
        self.begins &= !self.life.is_held();
        Ok(())
    }

    /// `None`: it does not answer.
    fn write(&mut self, master: &mut Master, place: Place, stamp: Stamp) -> Option<Wrote> {
        if master.away {
            return None;
        }
        let link = &mut self.links[master.number];
        if *link != master.link {
            *link = master.link;
            self.doubt(shards_of(master.number));
        }
        Some(master.write(place, self.number, stamp, &self.record))
    }

    fn doubt(&mut self, shards: impl IntoIterator<Item = Shard>) {
        let shards: Vec<Shard> = shards.into_iter().collect();
        let of = self.sessions.keys().filter(|user| shards.contains(&shard(**user)));
        self.to_confirm.extend(of);
    }

    fn heed(&mut self, news: Option<News>, now: Instant) -> Result<(), String> {
        match news {
            Some(News::Lapsed(_)) if self.begins => self.incarnation = None,
            Some(News::Lapsed(why)) => {
                let silent = self.written.is_none_or(|at| now - at > VOID_AFTER / 2);
                if !silent {
                    return Err(format!("n{} begins another life: {why}", self.number));
                }
                self.record.confirmed = false;
            }
            Some(News::Taken(incarnation)) => {
                if self.incarnation.is_none() {
                    self.first = incarnation;
                } else {
                    self.round = Some((incarnation, self.sessions.keys().copied().collect()));
                    self.to_confirm.extend(self.sessions.keys());
                }
                self.incarnation = Some(incarnation);
            }
            Some(News::Forgot(Place::Own)) => self.to_confirm.extend(self.sessions.keys()),
            Some(News::Forgot(Place::Copy(shard))) => self.doubt([shard]),
            None => {}
        }
        Ok(())
    }

    /// Confirms as many sessions as a turn allows; `behind`: who waits for a message.
    pub fn confirm(&mut self, masters: &mut [Master], now: Instant, behind: &[bool]) {
        if now >= self.calm {
            self.calm = now + CONFIRM_EVERY;
            self.to_confirm.extend(self.sessions.keys());
        }
        let Some(incarnation) = self.incarnation else { return };
        let mut left = CONFIRMS;
        for user in std::mem::take(&mut self.to_confirm) {
            let master = &mut masters[super::world::master_of(user)];
            let Some(session) = self.sessions.get_mut(&user) else { continue };
            if left == 0 || master.away {
                self.to_confirm.insert(user); // it is asked again until it answers
                continue;
            }
            left -= 1;
            let (connection, attempt) = (session.connection, session.attempt);
            if master.routes.get(&user).is_some_and(|route| route.attempt > attempt) {
                self.sessions.remove(&user);
                continue;
            }
            session.confirmed = incarnation;
            master
                .routes
                .insert(user, Route { node: self.number, incarnation, connection, attempt });
            if behind[user] {
                master.timers.entry(user).or_insert((now, 0));
            }
        }
        if let Some((life, waiting)) = &mut self.round {
            waiting.retain(|user| {
                self.sessions.get(user).is_some_and(|session| session.confirmed < *life)
            });
            if waiting.is_empty() {
                self.record.confirmed |= self.life.incarnation() == *life;
                self.round = None;
            }
        }
    }

    /// Whether others must see it: something was written so lately that no copy has ended.
    pub fn is_fresh(&self, now: Instant) -> bool {
        self.incarnation.is_some() && self.written.is_some_and(|at| now - at < TTL)
    }
}
