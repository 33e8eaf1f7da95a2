//! Which sessions say next that they live: those whose routes may be gone or are void, as fast as is
//! allowed, and all of them in turn. It names no Redis and takes its time as an argument.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, Shard};
use tokio::time::Instant;

use super::events::LeaseEvent;

/// The sessions of a node, as far as their routes are concerned.
pub trait LiveSessions {
    /// One of them.
    type Session: LiveSession;

    /// All of them at this moment.
    fn all(&self) -> Vec<Arc<Self::Session>>;

    /// Where its route is written.
    fn shard_of(&self, session: &Self::Session) -> Shard;

    /// Routes that are written from now on name this life.
    fn begin_life(&self, incarnation: Incarnation);
}

/// A session that has a route.
pub trait LiveSession {
    /// Whether it has ended.
    fn is_over(&self) -> bool;

    /// The last life that an answered confirmation of it named.
    fn confirmed_life(&self) -> Incarnation;

    /// Has it confirm, soon, that it lives.
    fn confirm(&self);
}

/// Sessions to confirm, at a bounded rate.
pub struct Confirming<S> {
    /// Sessions to confirm before their turn.
    urgent: VecDeque<Weak<S>>,
    /// Sessions that were requested while `urgent` was not empty. `urgent` is finished first, so that
    /// repeated requests starve no session.
    again: Option<Whose>,
    /// Sessions of the regular round.
    calm: VecDeque<Weak<S>>,
    calm_per_pace: usize,
    per_pace: usize,
    pace: Duration,
    every: Duration,
    next: Instant,
    /// A new life, and those whose routes named another one when it began.
    life: Option<(Incarnation, VecDeque<Weak<S>>)>,
}

enum Whose {
    All,
    Of(BTreeSet<Shard>),
}

impl<S: LiveSession> Confirming<S> {
    /// [`Self::go_on`] will be called each `pace`; all sessions are confirmed once in `every`.
    pub fn new(per_second: u32, every: Duration, pace: Duration, now: Instant) -> Self {
        let per_pace = (f64::from(per_second) * pace.as_secs_f64()).ceil();
        Self {
            urgent: VecDeque::new(),
            again: None,
            calm: VecDeque::new(),
            calm_per_pace: 1,
            per_pace: (per_pace as usize).max(1),
            pace,
            every,
            next: now + every,
            life: None,
        }
    }

    /// Does what an event of the lease asks for.
    pub fn heed(&mut self, sessions: &impl LiveSessions<Session = S>, event: LeaseEvent) {
        match event {
            LeaseEvent::Lapsed => {}
            LeaseEvent::NewLife(incarnation) => {
                // Routes of the new life are written only after its lease.
                sessions.begin_life(incarnation);
                let all = sessions.all();
                self.life = Some((incarnation, all.iter().map(Arc::downgrade).collect()));
                self.ask(sessions, Whose::All);
            }
            LeaseEvent::WasGone => self.ask(sessions, Whose::All),
            LeaseEvent::Forgot(shards) => {
                tracing::info!(shards = shards.len(), "confirming the sessions of shards");
                self.ask(sessions, Whose::Of(shards.into_iter().collect()));
            }
        }
    }

    /// The last new life, once: no session has a route of an earlier one.
    pub fn finished_life(&mut self) -> Option<Incarnation> {
        let (incarnation, waiting) = self.life.as_mut()?;
        while let Some(first) = waiting.front() {
            let over =
                |session: &Arc<S>| session.is_over() || session.confirmed_life() >= *incarnation;
            if first.upgrade().as_ref().is_some_and(|session| !over(session)) {
                return None;
            }
            waiting.pop_front();
        }
        self.life.take().map(|(incarnation, _)| incarnation)
    }

    fn ask(&mut self, sessions: &impl LiveSessions<Session = S>, whose: Whose) {
        if self.urgent.is_empty() {
            self.urgent = of(sessions, &whose);
            return;
        }
        self.again = Some(match (self.again.take(), whose) {
            (Some(Whose::Of(mut known)), Whose::Of(more)) => {
                known.extend(more);
                Whose::Of(known)
            }
            (None, Whose::Of(shards)) => Whose::Of(shards),
            _ => Whose::All,
        });
    }

    /// Tells as many as one pace allows.
    pub fn go_on(&mut self, sessions: &impl LiveSessions<Session = S>, now: Instant) {
        if self.urgent.is_empty()
            && let Some(whose) = self.again.take()
        {
            self.urgent = of(sessions, &whose);
        }
        if self.calm.is_empty() && now >= self.next {
            self.calm = of(sessions, &Whose::All);
            self.next = now + self.every;
            // Spread over half the interval.
            let paces = (self.every.as_secs_f64() / 2.0 / self.pace.as_secs_f64()).max(1.0);
            let calm = (self.calm.len() as f64 / paces).ceil() as usize;
            self.calm_per_pace = calm.clamp(1, self.per_pace);
        }
        let half = if self.urgent.is_empty() { self.per_pace } else { self.per_pace.div_ceil(2) };
        let calm = self.calm_per_pace.min(half).min(self.calm.len());
        tell(&mut self.calm, calm);
        tell(&mut self.urgent, (self.per_pace - calm).max(1));
    }
}

fn of<T: LiveSessions>(sessions: &T, whose: &Whose) -> VecDeque<Weak<T::Session>> {
    let all = sessions.all();
    let wanted = |session: &&Arc<T::Session>| match whose {
        Whose::All => true,
        Whose::Of(shards) => shards.contains(&sessions.shard_of(session)),
    };
    all.iter().filter(wanted).map(Arc::downgrade).collect()
}

fn tell<S: LiveSession>(waiting: &mut VecDeque<Weak<S>>, count: usize) {
    for session in waiting.drain(..count.min(waiting.len())) {
        if let Some(session) = session.upgrade() {
            session.confirm();
        }
    }
}
