//! The state machine of a lease. It names no Redis and takes its time as an argument.
//!
//! A lease is written in several places: its own key, and a copy beside each shard. It is held while any of them
//! confirms writes, so no single master ends it. Each place returns the stamp that it had before: one older than the
//! last confirmed write shows that the place has lost data.

use std::collections::HashMap;
use std::time::Duration;

use barid_core::{Incarnation, Shard};
use tokio::time::Instant;

use super::node::NodeRecord;

/// Why an incarnation ends that another process has outbid.
pub(crate) const NAME_TAKEN: &str = "another process has this node's name";

/// Identifies a write of a lease; a later one is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Stamp {
    pub incarnation: Incarnation,
    /// Counts the writes of a process.
    pub number: u64,
}

/// Where a lease is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// `barid:node:<id>`
    Own,
    /// The copy beside a shard.
    Copy(Shard),
}

/// A place's answer to a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wrote {
    /// False: refused, because a later write is there.
    pub done: bool,
    /// The stamp that was there before.
    pub before: Option<Stamp>,
}

/// A change that the owner of the lease must act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// This incarnation has ended, and why: another process has the name, or no write was confirmed for too long.
    Lapsed(&'static str),
    /// This incarnation's lease was taken.
    Taken(Incarnation),
    /// A place has lost what was confirmed there.
    Forgot(Place),
    /// The copy beside a shard may have been lost: it can have expired, or a write that was not answered hides it.
    Uncertain(Shard),
}

/// An incarnation of a node, from its first write to the next incarnation.
#[derive(Debug)]
pub(crate) struct LeaseState {
    stamp: Stamp,
    held: bool,
    /// The process may have sessions. Before, outbidding another incarnation is not reported.
    works: bool,
    /// When the last confirmed write began; before one, when this incarnation began.
    held_at: Instant,
    /// How long a write is valid for others.
    ttl: Duration,
    /// After this time without a confirmed write, another incarnation begins: others may soon consider its routes void,
    /// and remove them while they are valid again.
    lapse_max: Duration,
    /// Number of the write by which this incarnation was taken.
    taken: u64,
    /// The last write that each place confirmed in this incarnation.
    confirmed: HashMap<Place, Confirmed>,
}

#[derive(Debug, Clone, Copy)]
struct Confirmed {
    number: u64,
    /// When it began.
    sent: Instant,
}

impl LeaseState {
    /// An incarnation that is not written yet. `void_after`: how long others keep the routes of a node that is gone.
    pub fn new(
        incarnation: Incarnation,
        ttl: Duration,
        void_after: Duration,
        now: Instant,
    ) -> Self {
        Self {
            stamp: Stamp { incarnation, number: 0 },
            held: false,
            works: false,
            held_at: now,
            ttl,
            lapse_max: void_after / 2,
            taken: 0,
            confirmed: HashMap::new(),
        }
    }

    pub fn incarnation(&self) -> Incarnation {
        self.stamp.incarnation
    }

    /// Whether a write of this incarnation was confirmed.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Whether others may consider the lease expired: no write within its time to live was confirmed.
    pub fn has_expired(&self, now: Instant) -> bool {
        self.held && now.saturating_duration_since(self.held_at) > self.ttl
    }

    /// From now on the process may have sessions, which continue when this incarnation ends.
    pub fn begin_work(&mut self) {
        self.works = true;
    }

    /// Updates `record` to this incarnation and `news`. Returns whether its incarnation has changed.
    pub fn enter(&self, record: &mut NodeRecord, news: Option<News>) -> bool {
        let has_changed = record.incarnation != self.stamp.incarnation;
        record.incarnation = self.stamp.incarnation;
        // After a lapse, sessions have routes of the earlier incarnation.
        record.confirmed &= !matches!(news, Some(News::Lapsed(_)));
        has_changed
    }

    /// When the last confirmed write began, if the lease is held.
    pub fn held_at(&self) -> Instant {
        self.held_at
    }

    /// The stamp of the next write, to be sent to every place. `wall_ms` becomes the incarnation if another incarnation
    /// begins.
    pub fn attempt(&mut self, now: Instant, wall_ms: u64) -> (Stamp, Option<News>) {
        let mut news = None;
        // Also an incarnation without a confirmed write: it may have been written, and have expired for others.
        if now.saturating_duration_since(self.held_at) > self.lapse_max {
            news = self.held.then_some(News::Lapsed("not renewed for too long"));
            self.begin(self.stamp.incarnation, wall_ms, now);
        }
        self.stamp.number += 1;
        (self.stamp, news)
    }

    /// Handles a place's answer to the write `stamp`, which began at `sent`.
    pub fn answered(
        &mut self,
        place: Place,
        stamp: Stamp,
        wrote: Wrote,
        sent: Instant,
        wall_ms: u64,
    ) -> Option<News> {
        if stamp.incarnation != self.stamp.incarnation {
            return None; // of an earlier incarnation
        }
        if !wrote.done {
            let before = wrote.before.unwrap_or_default();
            let known = self.confirmed.contains_key(&place);
            // The same incarnation with a higher number: a write of ours that overtook this one, unless
            // another process began in the same millisecond.
            let ours = before.incarnation == stamp.incarnation && (self.held || known);
            return if ours { None } else { self.outbid(before, wall_ms, sent) };
        }
        let expired = self.has_expired(sent);
        self.held_at = self.held_at.max(sent);
        let confirmed = self.confirmed.insert(place, Confirmed { number: stamp.number, sent });
        if !self.held {
            self.held = true;
            self.taken = stamp.number;
            return Some(News::Taken(stamp.incarnation));
        }
        // The own key need not show it: its master may answer later than others, or have executed an earlier write
        // late. Meanwhile others acted on what they saw.
        if expired {
            return Some(News::Forgot(Place::Own));
        }
        let before = wrote.before.filter(|before| before.incarnation == stamp.incarnation);
        match (place, confirmed) {
            // A later write than the confirmed one was executed without an answer.
            (Place::Own, Some(confirmed)) => before
                .is_none_or(|before| before.number < confirmed.number)
                .then_some(News::Forgot(place)),
            (Place::Own, None) => None,
            (Place::Copy(shard), Some(confirmed)) => match before {
                Some(before) if before.number == confirmed.number => None,
                // That later write may have been executed after everything was lost, and hide that.
                Some(before) if before.number > confirmed.number => Some(News::Uncertain(shard)),
                None if self.can_have_expired(confirmed, sent) => Some(News::Uncertain(shard)),
                _ => Some(News::Forgot(place)),
            },
            // No write of this incarnation was confirmed there.
            (Place::Copy(shard), None) => {
                (stamp.number != self.taken).then_some(News::Uncertain(shard))
            }
        }
    }

    /// Whether a copy can have expired before a write that began at `sent` was executed. An answer that takes longer
    /// than a third of the time to live is not waited for.
    fn can_have_expired(&self, confirmed: Confirmed, sent: Instant) -> bool {
        sent.saturating_duration_since(confirmed.sent) + self.ttl / 3 > self.ttl
    }

    fn outbid(&mut self, by: Stamp, wall_ms: u64, now: Instant) -> Option<News> {
        let is_reported = self.held && self.works;
        self.begin(by.incarnation, wall_ms, now);
        is_reported.then_some(News::Lapsed(NAME_TAKEN))
    }

    /// Begins an incarnation after `last`: the incarnations of a node are ordered, whatever the machines' clocks say.
    fn begin(&mut self, last: Incarnation, wall_ms: u64, now: Instant) {
        self.stamp.incarnation = Incarnation(wall_ms.max(last.0 + 1));
        (self.held, self.held_at) = (false, now);
        self.confirmed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(100);
    const VOID_AFTER: Duration = Duration::from_secs(600);
    const OWN: Place = Place::Own;

    fn copy(shard: usize) -> Place {
        let mut all = barid_core::ShardCount::new(8).unwrap().all();
        Place::Copy(all.nth(shard).unwrap())
    }

    fn uncertain(shard: usize) -> News {
        let Place::Copy(shard) = copy(shard) else { unreachable!() };
        News::Uncertain(shard)
    }

    fn stood(incarnation: u64, number: u64) -> Option<Stamp> {
        Some(Stamp { incarnation: Incarnation(incarnation), number })
    }

    fn done(before: Option<Stamp>) -> Wrote {
        Wrote { done: true, before }
    }

    struct Walk {
        state: LeaseState,
        now: Instant,
        stamp: Stamp,
    }

    impl Walk {
        /// Held at its own key and beside shard 0, both at number 1.
        fn new() -> Self {
            let now = Instant::now();
            let state = LeaseState::new(Incarnation(100), TTL, VOID_AFTER, now);
            let mut walk = Self { state, now, stamp: Stamp::default() };
            walk.state.begin_work();
            assert_eq!(walk.attempt(0), None);
            assert_eq!(walk.answer(OWN, done(None)), Some(News::Taken(Incarnation(100))));
            assert_eq!(walk.answer(copy(0), done(stood(90, 7))), None, "a former incarnation");
            walk
        }

        fn attempt(&mut self, after_s: u64) -> Option<News> {
            self.now += Duration::from_secs(after_s);
            let (stamp, news) = self.state.attempt(self.now, 500);
            self.stamp = stamp;
            news
        }

        fn answer(&mut self, place: Place, wrote: Wrote) -> Option<News> {
            self.state.answered(place, self.stamp, wrote, self.now, 500)
        }
    }

    #[test]
    fn hazard_27_any_place_holds_the_lease_and_a_gone_key_is_written_again_in_the_same_incarnation()
    {
        let mut walk = Walk::new();
        // Its own key's master is away for an hour; a copy is written.
        for _ in 0..60 {
            assert_eq!(walk.attempt(60), None);
            let before = walk.stamp.number - 1;
            assert_eq!(walk.answer(copy(0), done(stood(100, before))), None);
        }
        assert_eq!(walk.attempt(60), None);
        assert_eq!(walk.answer(OWN, done(None)), Some(News::Forgot(OWN)));
        assert_eq!(walk.state.incarnation(), Incarnation(100));
    }

    #[test]
    fn a_lapse_of_half_the_time_for_which_routes_are_kept_begins_another_incarnation() {
        let mut walk = Walk::new();
        assert_eq!(walk.attempt(300), None, "not yet");
        assert!(matches!(walk.attempt(1), Some(News::Lapsed(_))));
        assert_eq!(walk.stamp.incarnation, Incarnation(500));
        assert!(!walk.state.is_held());
        assert_eq!(walk.answer(copy(0), done(None)), Some(News::Taken(Incarnation(500))));
        assert_eq!(walk.answer(OWN, done(stood(100, 1))), None, "the incarnation before was there");
    }

    #[test]
    fn hazard_35_a_place_that_went_back_or_lost_everything_is_told() {
        let mut walk = Walk::new();
        walk.attempt(3);
        assert_eq!(walk.answer(copy(0), done(stood(100, 1))), None);
        // An attempt whose answer was lost was not executed.
        walk.attempt(3);
        walk.attempt(3);
        let known = walk.stamp.number - 2;
        assert_eq!(walk.answer(copy(0), done(stood(100, known))), None);
        for forgotten in [None, stood(100, 2), stood(90, 99)] {
            walk.attempt(3);
            assert_eq!(walk.answer(copy(0), done(forgotten)), Some(News::Forgot(copy(0))));
        }
    }

    #[test]
    fn hazard_63_a_writing_without_an_answer_may_hide_that_a_shard_forgot() {
        let mut walk = Walk::new();
        // The shard is emptied. The second writing is executed there, and its answer is lost.
        walk.attempt(3);
        walk.attempt(3);
        assert_eq!(walk.answer(copy(0), done(stood(100, 2))), Some(uncertain(0)));
        // The lease's own key holds nothing else.
        assert_eq!(walk.answer(OWN, done(stood(100, 2))), None);
    }

    #[test]
    fn hazard_83_a_lease_that_expired_is_told_though_its_own_key_shows_nothing_of_it() {
        let mut walk = Walk::new();
        // Stopped for longer than the lease holds; the master of its own key answers later than the others.
        assert_eq!(walk.attempt(101), None);
        assert!(walk.state.has_expired(walk.now));
        assert_eq!(walk.answer(copy(0), done(stood(100, 1))), Some(News::Forgot(OWN)));
        assert!(!walk.state.has_expired(walk.now));
        assert_eq!(walk.answer(OWN, done(stood(100, 1))), None, "once");
    }

    #[test]
    fn a_copy_that_can_have_expired_is_not_called_lost() {
        let mut walk = Walk::new();
        // The master hangs. What is executed afterwards may have been sent a third of the time to live before.
        walk.attempt(67);
        assert_eq!(walk.answer(copy(0), done(None)), Some(uncertain(0)));
        walk.attempt(66);
        assert_eq!(walk.answer(copy(0), done(None)), Some(News::Forgot(copy(0))));
    }

    #[test]
    fn hazard_65_a_shard_that_is_reached_later_than_others_may_have_forgotten() {
        let mut walk = Walk::new();
        assert_eq!(walk.answer(copy(1), done(None)), None, "nothing can be there yet");
        walk.attempt(3);
        // A session was written there meanwhile, and the shard was emptied.
        assert_eq!(walk.answer(copy(2), done(None)), Some(uncertain(2)));
        walk.attempt(3);
        assert_eq!(walk.answer(copy(2), done(stood(100, 2))), None);
    }

    #[test]
    fn hazard_77_a_life_that_nobody_confirmed_ends_as_others_do() {
        let mut walk = Walk::new();
        walk.attempt(301);
        let unheard = walk.stamp.incarnation;
        walk.attempt(300);
        assert_eq!(walk.stamp.incarnation, unheard, "not yet");
        assert_eq!(walk.attempt(1), None, "it was not held");
        assert!(walk.stamp.incarnation > unheard);
    }

    #[test]
    fn only_a_newer_life_is_a_conflict() {
        let mut walk = Walk::new();
        walk.attempt(3);
        let late = Wrote { done: false, before: stood(100, 9) };
        assert_eq!(walk.answer(OWN, late), None, "a later writing of its own overtook this one");
        let usurped = Wrote { done: false, before: stood(700, 1) };
        assert!(matches!(walk.answer(OWN, usurped), Some(News::Lapsed(_))));
        assert_eq!(walk.answer(copy(0), usurped), None, "an answer to the incarnation before");
        walk.attempt(0);
        assert_eq!(walk.stamp.incarnation, Incarnation(701), "above it, whatever the clock says");
    }

    #[test]
    fn a_process_that_begins_outbids_what_it_finds() {
        let now = Instant::now();
        let mut state = LeaseState::new(Incarnation(100), TTL, VOID_AFTER, now);
        let (stamp, _) = state.attempt(now, 100);
        // The clock of the process before was ahead; or it began in the same millisecond.
        for found in [900, 901] {
            let wrote = Wrote { done: false, before: stood(found, 1) };
            let stamp = Stamp { incarnation: state.incarnation(), ..stamp };
            assert_eq!(state.answered(OWN, stamp, wrote, now, 100), None);
            assert_eq!(state.incarnation(), Incarnation(found + 1));
        }
    }
}
