//! Schedules the confirmation of sessions: first those whose routes may be missing or void, as fast as allowed, and
//! all of them in turn. It names no Redis and takes its time as an argument.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, Shard};
use tokio::time::Instant;

use super::events::LeaseEvent;

/// The sessions of a node, for confirmation.
pub trait LiveSessions {
    /// A session with a route.
    type Session: LiveSession;

    /// All current sessions.
    fn all(&self) -> Vec<Arc<Self::Session>>;

    /// The shard of its route.
    fn shard_of(&self, session: &Self::Session) -> Shard;

    /// Uses this incarnation in all routes that are written from now on.
    fn begin_incarnation(&self, incarnation: Incarnation);
}

/// A session, for confirmation.
pub trait LiveSession {
    /// Whether it has ended.
    fn is_over(&self) -> bool;

    /// The incarnation in its last successful confirmation.
    fn confirmed_incarnation(&self) -> Incarnation;

    /// Requests that it confirms soon.
    fn confirm(&self);
}

/// Confirms sessions at a bounded rate.
pub struct Confirming<S> {
    /// Sessions to confirm before their turn.
    urgent: VecDeque<Weak<S>>,
    /// Sessions that were requested while `urgent` was not empty. `urgent` is finished first, so that repeated
    /// requests starve no session.
    again: Option<Selection>,
    /// Sessions of the regular round.
    regular: VecDeque<Weak<S>>,
    regular_per_tick: usize,
    per_tick: usize,
    tick: Duration,
    every: Duration,
    /// When the next regular round begins.
    next: Instant,
    /// A new incarnation, and the sessions with routes of earlier ones.
    pending: Option<(Incarnation, VecDeque<Weak<S>>)>,
}

enum Selection {
    All,
    Shards(BTreeSet<Shard>),
}

impl<S: LiveSession> Confirming<S> {
    /// [`Self::tick`] must be called once per `tick`. All sessions are confirmed once in `every`.
    pub fn new(per_second: u32, every: Duration, tick: Duration, now: Instant) -> Self {
        let per_tick = (f64::from(per_second) * tick.as_secs_f64()).ceil();
        Self {
            urgent: VecDeque::new(),
            again: None,
            regular: VecDeque::new(),
            regular_per_tick: 1,
            per_tick: (per_tick as usize).max(1),
            tick,
            every,
            next: now + every,
            pending: None,
        }
    }

    /// Schedules the confirmations that an event of the lease requires.
    pub fn handle(&mut self, sessions: &impl LiveSessions<Session = S>, event: LeaseEvent) {
        match event {
            LeaseEvent::Lapsed => {}
            LeaseEvent::NewIncarnation(incarnation) => {
                // Routes of the new incarnation are written only after its lease.
                sessions.begin_incarnation(incarnation);
                let all = sessions.all();
                self.pending = Some((incarnation, all.iter().map(Arc::downgrade).collect()));
                self.request(sessions, Selection::All);
            }
            LeaseEvent::WasGone => self.request(sessions, Selection::All),
            LeaseEvent::Forgot(shards) => {
                tracing::info!(shards = shards.len(), "confirming sessions of shards");
                self.request(sessions, Selection::Shards(shards.into_iter().collect()));
            }
        }
    }

    /// Returns a new incarnation, once, when no session has a route of an earlier one any longer.
    pub fn finished_incarnation(&mut self) -> Option<Incarnation> {
        let (incarnation, waiting) = self.pending.as_mut()?;
        while let Some(first) = waiting.front() {
            let over = |session: &Arc<S>| {
                session.is_over() || session.confirmed_incarnation() >= *incarnation
            };
            if first.upgrade().as_ref().is_some_and(|session| !over(session)) {
                return None;
            }
            waiting.pop_front();
        }
        self.pending.take().map(|(incarnation, _)| incarnation)
    }

    fn request(&mut self, sessions: &impl LiveSessions<Session = S>, selection: Selection) {
        if self.urgent.is_empty() {
            self.urgent = select(sessions, &selection);
            return;
        }
        self.again = Some(match (self.again.take(), selection) {
            (Some(Selection::Shards(mut known)), Selection::Shards(more)) => {
                known.extend(more);
                Selection::Shards(known)
            }
            (None, Selection::Shards(shards)) => Selection::Shards(shards),
            _ => Selection::All,
        });
    }

    /// Requests as many confirmations as the rate allows in one tick.
    pub fn tick(&mut self, sessions: &impl LiveSessions<Session = S>, now: Instant) {
        if self.urgent.is_empty()
            && let Some(selection) = self.again.take()
        {
            self.urgent = select(sessions, &selection);
        }
        if self.regular.is_empty() && now >= self.next {
            self.regular = select(sessions, &Selection::All);
            self.next = now + self.every;
            // Spread over half the interval.
            let ticks = (self.every.as_secs_f64() / 2.0 / self.tick.as_secs_f64()).max(1.0);
            let regular = (self.regular.len() as f64 / ticks).ceil() as usize;
            self.regular_per_tick = regular.clamp(1, self.per_tick);
        }
        let half = if self.urgent.is_empty() { self.per_tick } else { self.per_tick.div_ceil(2) };
        let regular = self.regular_per_tick.min(half).min(self.regular.len());
        confirm_next(&mut self.regular, regular);
        confirm_next(&mut self.urgent, (self.per_tick - regular).max(1));
    }
}

fn select<T: LiveSessions>(sessions: &T, selection: &Selection) -> VecDeque<Weak<T::Session>> {
    let all = sessions.all();
    let is_selected = |session: &&Arc<T::Session>| match selection {
        Selection::All => true,
        Selection::Shards(shards) => shards.contains(&sessions.shard_of(session)),
    };
    all.iter().filter(is_selected).map(Arc::downgrade).collect()
}

fn confirm_next<S: LiveSession>(waiting: &mut VecDeque<Weak<S>>, count: usize) {
    for session in waiting.drain(..count.min(waiting.len())) {
        if let Some(session) = session.upgrade() {
            session.confirm();
        }
    }
}
