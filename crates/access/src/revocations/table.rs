//! The revocations that are in force on a node: which tokens they hit, and which of them are dropped when there are too
//! many. Pure: the caller gives the time.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use barid_core::AppId;
use barid_mailbox::UserKey;
use barid_session::TokenFingerprint;
use barid_wire::revocation::{Revocation, Subject};

use crate::labels::RevokedBy;
use crate::revocations::fingerprint::{id_hash, key_hash};

/// Maximum entries that one [`Table::sweep`] removes: the caller holds a lock that handshakes wait for.
const SWEPT_MAX: usize = 1_000;

/// The revocations, up to a maximum.
#[derive(Debug)]
pub struct Table {
    entries: HashMap<EntryKey, Entry>,
    /// The entries, first the one to evict first.
    by_rank: BTreeMap<Rank, EntryKey>,
    /// The entries that have an end, s since the Unix epoch, first the one that ends first.
    by_end: BTreeSet<(u64, Rank)>,
    /// Number of entries of each kind.
    counts: Counts,
    entries_max: usize,
    arrivals: u64,
    /// While the topic is read from its beginning: entries that arrived up to here have not been read again.
    reading_since: Option<u64>,
}

/// A subject, with hashes for ids as fingerprints of tokens have them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum EntryKey {
    User(UserKey),
    App(AppId),
    Everyone,
    Token(u64),
    Key(u64),
}

type Counts = [usize; RevokedBy::VALUES.len()];

/// Which entry is evicted first: one of a user or a token rather than one of many users, then the one that arrived
/// first. The writer's clock does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    is_of_many: bool,
    arrival: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Tokens that were issued at this time or later are not hit, s; `u64::MAX`: all are hit.
    issued_before_s: u64,
    /// `u64::MAX`: never.
    until_s: u64,
    rank: Rank,
}

/// Whether a revocation hits a token at `now_s`, seconds since the Unix epoch.
pub fn revokes(
    revocation: &Revocation,
    user: &UserKey,
    token: &TokenFingerprint,
    now_s: u64,
) -> bool {
    let is_subject = match &revocation.subject {
        Subject::User(revoked) => revoked == user,
        Subject::App(app) => *app == user.app,
        Subject::Everyone => true,
        Subject::Token(app, jti) => id_hash(app, jti.as_str()) == token.id,
        Subject::Key(kid) => key_hash(kid.as_str()) == token.key,
    };
    let issued_s = u64::from(token.issued_s);
    let is_issued_before = revocation.issued_before_s.is_none_or(|before_s| issued_s < before_s);
    is_subject && is_issued_before && !revocation.is_over(now_s)
}

impl Table {
    /// Creates an empty table of at most `entries_max` revocations, for a topic that is being read from its beginning.
    pub fn new(entries_max: usize) -> Self {
        Self {
            entries: HashMap::new(),
            by_rank: BTreeMap::new(),
            by_end: BTreeSet::new(),
            counts: Counts::default(),
            entries_max,
            arrivals: 0,
            reading_since: Some(0),
        }
    }

    /// The topic is read from its beginning again. Entries stay in force meanwhile.
    pub fn restart(&mut self) {
        self.reading_since = Some(self.arrivals);
    }

    /// The topic has been read to its end: removes entries that are no longer in it. Returns how many were in force at
    /// `now_s`.
    pub fn caught_up(&mut self, now_s: u64) -> usize {
        let Some(since) = self.reading_since.take() else { return 0 };
        let mut gone = Vec::new();
        for is_of_many in [false, true] {
            let rank = |arrival| Rank { is_of_many, arrival };
            gone.extend(self.by_rank.range(rank(0)..=rank(since)).map(|(_, key)| key.clone()));
        }
        let removed = gone.iter().filter_map(|key| self.remove_key(key));
        removed.filter(|entry| now_s < entry.until_s).count()
    }

    /// Adds a revocation, in place of an earlier one of the same subject; one that is over at `now_s` only removes that.
    pub fn insert(&mut self, revocation: &Revocation, now_s: u64) {
        let key = EntryKey::of(&revocation.subject);
        self.remove_key(&key);
        if revocation.is_over(now_s) {
            return;
        }
        self.arrivals += 1;
        let is_of_many = !matches!(key, EntryKey::User(_) | EntryKey::Token(_));
        let rank = Rank { is_of_many, arrival: self.arrivals };
        let entry = Entry {
            issued_before_s: revocation.issued_before_s.unwrap_or(u64::MAX),
            until_s: revocation.until_s.unwrap_or(u64::MAX),
            rank,
        };
        self.counts[key.kind() as usize] += 1;
        if let Some(until_s) = revocation.until_s {
            self.by_end.insert((until_s, rank));
        }
        self.by_rank.insert(rank, key.clone());
        self.entries.insert(key, entry);
    }

    /// Evicts what is beyond the maximum, and returns how many were. While the topic is read from its beginning, twice
    /// the maximum may be held: tombstones follow the records that they withdraw.
    pub fn evict(&mut self, now_s: u64) -> u64 {
        let allowed = match self.reading_since {
            Some(_) => self.entries_max.saturating_mul(2),
            None => self.entries_max,
        };
        let mut evicted = 0;
        while self.len() > allowed {
            // No more than there is no room for: what is over takes as long to remove as it took to insert.
            if self.remove_over(now_s) {
                continue;
            }
            let Some((_, key)) = self.by_rank.pop_first() else { break };
            self.remove_key(&key);
            evicted += 1;
        }
        evicted
    }

    /// Removes a revocation that was withdrawn.
    pub fn remove(&mut self, subject: &Subject) {
        self.remove_key(&EntryKey::of(subject));
    }

    fn remove_key(&mut self, key: &EntryKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.by_rank.remove(&entry.rank);
        self.by_end.remove(&(entry.until_s, entry.rank));
        self.counts[key.kind() as usize] -= 1;
        Some(entry)
    }

    /// Removes the entry that ended first. Returns false if none has ended at `now_s`.
    fn remove_over(&mut self, now_s: u64) -> bool {
        let first = self.by_end.first().filter(|(until_s, _)| *until_s <= now_s);
        let Some(key) = first.and_then(|(_, rank)| self.by_rank.get(rank)).cloned() else {
            return false;
        };
        self.remove_key(&key).is_some()
    }

    /// Removes what is over at `now_s`, at most 1,000 entries. Returns whether there may be more.
    pub fn sweep(&mut self, now_s: u64) -> bool {
        let is_more = (0..SWEPT_MAX).all(|_| self.remove_over(now_s));
        if !is_more && self.entries.capacity() > 4 * self.entries.len().max(1_024) {
            self.entries.shrink_to(2 * self.entries.len());
        }
        is_more
    }

    /// The kind of revocation that hits a token at `now_s`; `None`: it is not revoked.
    pub fn hit(&self, user: &UserKey, token: &TokenFingerprint, now_s: u64) -> Option<RevokedBy> {
        let issued_s = u64::from(token.issued_s);
        let is_hit = |key: EntryKey| {
            let entry = self.entries.get(&key);
            entry.is_some_and(|entry| issued_s < entry.issued_before_s && now_s < entry.until_s)
        };
        // Kinds that hit few sessions first: these are closed at once.
        let kinds = [
            RevokedBy::User,
            RevokedBy::Token,
            RevokedBy::App,
            RevokedBy::Key,
            RevokedBy::Everyone,
        ];
        kinds.into_iter().filter(|kind| self.counts[*kind as usize] > 0).find(|kind| match kind {
            RevokedBy::User => is_hit(EntryKey::User(user.clone())),
            RevokedBy::Token => token.id != 0 && is_hit(EntryKey::Token(token.id)),
            RevokedBy::App => is_hit(EntryKey::App(user.app.clone())),
            RevokedBy::Key => token.key != 0 && is_hit(EntryKey::Key(token.key)),
            RevokedBy::Everyone => is_hit(EntryKey::Everyone),
        })
    }

    /// Whether it has the revocation of a subject.
    pub fn holds(&self, subject: &Subject) -> bool {
        self.entries.contains_key(&EntryKey::of(subject))
    }

    /// Number of revocations.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of revocations of each kind, in the order of [`RevokedBy::VALUES`].
    pub fn counts(&self) -> [usize; RevokedBy::VALUES.len()] {
        self.counts
    }
}

impl EntryKey {
    fn of(subject: &Subject) -> Self {
        match subject {
            Subject::User(user) => Self::User(user.clone()),
            Subject::App(app) => Self::App(app.clone()),
            Subject::Everyone => Self::Everyone,
            Subject::Token(app, jti) => Self::Token(id_hash(app, jti.as_str())),
            Subject::Key(kid) => Self::Key(key_hash(kid.as_str())),
        }
    }

    fn kind(&self) -> RevokedBy {
        match self {
            Self::User(_) => RevokedBy::User,
            Self::App(_) => RevokedBy::App,
            Self::Everyone => RevokedBy::Everyone,
            Self::Token(_) => RevokedBy::Token,
            Self::Key(_) => RevokedBy::Key,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::UserId;
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    fn revocation(subject: &str) -> Revocation {
        let subject: Subject = subject.parse().unwrap();
        let issued_before_s = subject.has_time().then_some(NOW);
        Revocation { subject, issued_before_s, until_s: None, reason: String::new(), at_s: 1 }
    }

    fn user(app: &str, user: &str) -> UserKey {
        UserKey { app: AppId::new(app).unwrap(), user: UserId::new(user).unwrap() }
    }

    fn token(issued_s: u64, app: &str, jti: &str, kid: &str) -> TokenFingerprint {
        let id = id_hash(&AppId::new(app).unwrap(), jti);
        TokenFingerprint { issued_s: issued_s as u32, id, key: key_hash(kid) }
    }

    #[test]
    fn each_kind_hits_its_tokens_and_no_others() {
        let old = token(NOW - 1, "a", "t1", "k1");
        let new = token(NOW, "a", "t1", "k1");
        let undated = TokenFingerprint { issued_s: 0, ..new };
        let mine = user("a", "u");
        for (revoked, by, is_timeless) in [
            ("user:a:u", RevokedBy::User, false),
            ("app:a", RevokedBy::App, false),
            ("everyone:", RevokedBy::Everyone, false),
            ("token:a:t1", RevokedBy::Token, true),
            ("key:k1", RevokedBy::Key, true),
        ] {
            let mut table = Table::new(10);
            assert_eq!(table.hit(&mine, &old, NOW), None);
            table.insert(&revocation(revoked), NOW);
            for hit in [old, undated] {
                assert_eq!(table.hit(&mine, &hit, NOW), Some(by), "{revoked}");
            }
            let hit = table.hit(&mine, &new, NOW);
            assert_eq!(hit, is_timeless.then_some(by), "{revoked}: issued since");
            let other = token(NOW - 1, "b", "t1", "k2");
            let hit = table.hit(&user("b", "u"), &other, NOW);
            assert_eq!(hit, (by == RevokedBy::Everyone).then_some(by), "{revoked}: others");
            assert_eq!((table.len(), table.counts()[by as usize]), (1, 1));
            table.remove(&revoked.parse().unwrap());
            assert_eq!((table.hit(&mine, &old, NOW), table.len()), (None, 0));
        }
        let mut table = Table::new(10);
        table.insert(&revocation("token:a:t1"), NOW);
        assert_eq!(
            table.hit(&mine, &TokenFingerprint { id: 0, ..old }, NOW),
            None,
            "without an id"
        );
    }

    #[test]
    fn a_later_one_replaces_an_earlier_one_and_ends_in_time() {
        let (mine, old) = (user("a", "u"), token(NOW - 10, "a", "t", "k"));
        let mut table = Table::new(10);
        table.insert(&revocation("user:a:u"), NOW);
        let early = Revocation { issued_before_s: Some(NOW - 10), ..revocation("user:a:u") };
        table.insert(&early, NOW);
        assert_eq!((table.hit(&mine, &old, NOW), table.len()), (None, 1));
        let short = Revocation { until_s: Some(NOW + 5), ..revocation("user:a:u") };
        table.insert(&short, NOW);
        assert!(table.hit(&mine, &old, NOW + 4).is_some());
        assert_eq!(table.hit(&mine, &old, NOW + 5), None);
        table.sweep(NOW + 4);
        assert_eq!(table.len(), 1);
        table.sweep(NOW + 5);
        assert_eq!((table.len(), table.by_rank.len(), table.by_end.len()), (0, 0, 0));
        table.insert(&revocation("user:a:u"), NOW);
        table.insert(&Revocation { until_s: Some(NOW), ..revocation("user:a:u") }, NOW);
        assert_eq!(table.len(), 0, "what is over replaces, too");
    }

    fn full(entries_max: usize) -> Table {
        let mut table = Table::new(entries_max);
        table.caught_up(NOW);
        table
    }

    #[test]
    fn hazard_98_beyond_its_bound_what_hits_fewest_is_evicted_in_the_order_of_arrival() {
        let mut table = full(4);
        let short = Revocation { until_s: Some(NOW + 5), ..revocation("token:a:t") };
        table.insert(&short, NOW);
        // The writer's clock may be wrong.
        table.insert(&Revocation { at_s: NOW, ..revocation("user:a:u1") }, NOW);
        ["key:k", "user:a:u2"].iter().for_each(|key| table.insert(&revocation(key), NOW));
        assert_eq!(table.evict(NOW), 0);
        table.insert(&revocation("user:a:u1"), NOW);
        assert_eq!(table.evict(NOW), 0, "a repeat takes no room");
        table.insert(&revocation("user:a:u3"), NOW);
        assert_eq!((table.evict(NOW + 5), table.len()), (0, 4), "what is over makes room");
        table.insert(&revocation("user:a:u4"), NOW);
        assert_eq!(table.evict(NOW), 1);
        let hits =
            |name: &str| table.hit(&user("a", name), &TokenFingerprint::default(), NOW).is_some();
        assert_eq!(["u1", "u2", "u3", "u4"].map(hits), [true, false, true, true]);
        assert!(table.hit(&user("b", "x"), &token(NOW, "b", "", "k"), NOW).is_some(), "the key");
        assert_eq!((table.len(), table.by_rank.len()), (4, 4));
    }

    #[test]
    fn hazard_149_a_step_at_the_bound_or_of_the_sweep_takes_no_time_in_proportion_to_the_table() {
        let mut table = full(5_000);
        let ends = |subject: &str, seconds: u64| Revocation {
            until_s: Some(NOW + seconds),
            ..revocation(subject)
        };
        (0..5_000).for_each(|n| table.insert(&ends(&format!("user:a:u{n}"), 1), NOW));
        // All are over, and one place is missing.
        table.insert(&revocation("user:a:new"), NOW + 1);
        assert_eq!((table.evict(NOW + 1), table.len()), (0, 5_000));
        let mut steps = 1;
        while table.sweep(NOW + 1) {
            steps += 1;
            assert_eq!(table.len(), 5_000 - 1_000 * (steps - 1));
        }
        assert_eq!((steps, table.len()), (5, 1));
    }

    #[test]
    fn hazard_98_tombstones_that_follow_make_room_before_any_is_evicted() {
        let mut table = Table::new(2);
        for n in 0..4 {
            table.insert(&revocation(&format!("user:a:u{n}")), NOW);
            assert_eq!(table.evict(NOW), 0);
        }
        (0..2).for_each(|n| table.remove(&format!("user:a:u{n}").parse().unwrap()));
        table.caught_up(NOW);
        assert_eq!((table.evict(NOW), table.len()), (0, 2));
        // Even then it is bounded.
        table.restart();
        (0..9).for_each(|n| table.insert(&revocation(&format!("user:a:v{n}")), NOW));
        assert_eq!((table.evict(NOW), table.len()), (7, 4));
    }

    #[test]
    fn hazard_134_what_a_topic_no_longer_has_is_gone_once_it_is_read_again() {
        let mut table = full(10);
        ["user:a:old", "user:a:kept"].iter().for_each(|key| table.insert(&revocation(key), NOW));
        table.restart();
        let hits = |table: &Table, name: &str| {
            table.hit(&user("a", name), &TokenFingerprint::default(), NOW).is_some()
        };
        assert!(hits(&table, "old") && hits(&table, "kept"), "meanwhile all stays in force");
        ["user:a:kept", "user:a:new"].iter().for_each(|key| table.insert(&revocation(key), NOW));
        assert_eq!(table.caught_up(NOW), 1, "one was lost");
        assert_eq!(["old", "kept", "new"].map(|name| hits(&table, name)), [false, true, true]);
        assert_eq!((table.caught_up(NOW), table.len()), (0, 2));
        // One that is over is not lost.
        table.insert(&Revocation { until_s: Some(NOW + 1), ..revocation("key:k") }, NOW);
        table.restart();
        ["user:a:kept", "user:a:new"].iter().for_each(|key| table.insert(&revocation(key), NOW));
        assert_eq!((table.caught_up(NOW + 1), table.len()), (0, 2));
    }

    proptest! {
        #[test]
        fn it_agrees_with_its_revocations_whatever_arrives(
            steps in prop::collection::vec((0..8_usize, prop::option::of(0..6_u64), 0..8_u8), 0..60),
        ) {
            let names = [
                "everyone:", "app:a", "app:b", "key:k", "key:l", "token:a:t", "user:a:u", "user:b:u",
            ];
            let mut table = full(4);
            let mut held: Vec<Revocation> = Vec::new();
            for (which, until, what) in steps {
                let name = names[which];
                let until_s = until.map(|until| NOW - 3 + until);
                let next = Revocation { until_s, ..revocation(name) };
                held.retain(|other| what == 1 || other.subject != next.subject);
                match what {
                    0 => table.remove(&name.parse().unwrap()),
                    1 => while table.sweep(NOW) {},
                    _ => {
                        table.insert(&next, NOW);
                        held.push(next);
                    }
                }
                let is_full = table.len() > 4;
                table.evict(NOW);
                if is_full {
                    held.retain(|held| table.entries.contains_key(&EntryKey::of(&held.subject)));
                }
                prop_assert!(table.len() <= 4);
                prop_assert_eq!(table.by_rank.len(), table.len());
                let ends = table.entries.values().filter(|entry| entry.until_s < u64::MAX);
                prop_assert_eq!(table.by_end.len(), ends.count());
                let mut counts = Counts::default();
                table.entries.keys().for_each(|key| counts[key.kind() as usize] += 1);
                prop_assert_eq!(table.counts(), counts);
                for (app, jti, kid) in [("a", "t", "k"), ("b", "t", "l"), ("c", "t", "m")] {
                    for issued_s in [NOW - 1, NOW] {
                        let (user, token) = (user(app, "u"), token(issued_s, app, jti, kid));
                        let is_hit = held.iter().any(|held| revokes(held, &user, &token, NOW));
                        prop_assert_eq!(table.hit(&user, &token, NOW).is_some(), is_hit);
                    }
                }
            }
        }
    }
}
