//! The revocations that are in force on a node: which tokens they hit, and which of them is dropped when there are too
//! many. Pure: the caller gives the time.

use std::collections::{BTreeMap, HashMap};

use barid_core::AppId;
use barid_mailbox::UserKey;
use barid_session::TokenFacts;
use barid_wire::revocation::{Revocation, Revoked};

use crate::labels::RevokedBy;
use crate::revocations::facts::{id_hash, key_hash};

/// The revocations, up to a maximum.
#[derive(Debug)]
pub struct Table {
    entries: HashMap<Subject, Entry>,
    /// The subjects by age: when their revocation was made, and the order of arrival.
    by_age: BTreeMap<Age, Subject>,
    /// Number of entries of each kind.
    counts: Counts,
    entries_max: usize,
    arrivals: u64,
}

/// What is revoked, as facts of a token name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    User(UserKey),
    App(AppId),
    Everyone,
    Token(u64),
    Key(u64),
}

type Age = (u64, u64);
type Counts = [usize; RevokedBy::VALUES.len()];

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Tokens that were issued at this time or later are not hit, s; `u64::MAX`: all are hit.
    issued_before_s: u64,
    /// `u64::MAX`: never.
    until_s: u64,
    age: Age,
}

impl Table {
    /// Creates an empty table of at most `entries_max` revocations.
    pub fn new(entries_max: usize) -> Self {
        Self {
            entries: HashMap::new(),
            by_age: BTreeMap::new(),
            counts: Counts::default(),
            entries_max,
            arrivals: 0,
        }
    }

    /// Adds a revocation, in place of an earlier one of the same subject; one that is over at `now_s` only removes that.
    /// Returns whether the oldest was evicted to make room.
    pub fn insert(&mut self, revocation: &Revocation, now_s: u64) -> bool {
        let subject = Subject::of(&revocation.revoked);
        self.remove_subject(&subject);
        if revocation.is_over(now_s) {
            return false;
        }
        self.arrivals += 1;
        let age = (revocation.at_s, self.arrivals);
        let has_time = revocation.revoked.has_time();
        let entry = Entry {
            issued_before_s: if has_time { revocation.issued_before_s } else { u64::MAX },
            until_s: revocation.until_s.unwrap_or(u64::MAX),
            age,
        };
        self.counts[subject.kind() as usize] += 1;
        self.by_age.insert(age, subject.clone());
        self.entries.insert(subject, entry);
        let is_full = self.entries.len() > self.entries_max;
        if is_full && let Some((_, oldest)) = self.by_age.first_key_value() {
            let oldest = oldest.clone();
            self.remove_subject(&oldest);
        }
        is_full
    }

    /// Removes a revocation that was withdrawn.
    pub fn remove(&mut self, revoked: &Revoked) {
        self.remove_subject(&Subject::of(revoked));
    }

    fn remove_subject(&mut self, subject: &Subject) {
        if let Some(entry) = self.entries.remove(subject) {
            self.by_age.remove(&entry.age);
            self.counts[subject.kind() as usize] -= 1;
        }
    }

    /// Removes what is over at `now_s`. Takes time in proportion to the table.
    pub fn sweep(&mut self, now_s: u64) {
        let (by_age, counts) = (&mut self.by_age, &mut self.counts);
        self.entries.retain(|subject, entry| {
            let stays = now_s < entry.until_s;
            if !stays {
                by_age.remove(&entry.age);
                counts[subject.kind() as usize] -= 1;
            }
            stays
        });
        if self.entries.capacity() > 4 * self.entries.len().max(1_024) {
            self.entries.shrink_to(2 * self.entries.len());
        }
    }

    /// By what a token is revoked at `now_s`; `None`: it is not.
    pub fn hit(&self, user: &UserKey, token: &TokenFacts, now_s: u64) -> Option<RevokedBy> {
        if self.is_empty() {
            return None;
        }
        let issued_s = u64::from(token.issued_s);
        let is_hit = |subject: &Subject| {
            let entry = self.entries.get(subject);
            entry.is_some_and(|entry| issued_s < entry.issued_before_s && now_s < entry.until_s)
        };
        let named = |hash: u64, subject: fn(u64) -> Subject| hash != 0 && is_hit(&subject(hash));
        // What hits fewer sessions first: these are closed at once.
        if is_hit(&Subject::User(user.clone())) {
            Some(RevokedBy::User)
        } else if named(token.id, Subject::Token) {
            Some(RevokedBy::Token)
        } else if is_hit(&Subject::App(user.app.clone())) {
            Some(RevokedBy::App)
        } else if named(token.key, Subject::Key) {
            Some(RevokedBy::Key)
        } else {
            is_hit(&Subject::Everyone).then_some(RevokedBy::Everyone)
        }
    }

    /// Number of revocations.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of revocations of each kind, in the order of [`RevokedBy::VALUES`].
    pub fn counts(&self) -> [usize; RevokedBy::VALUES.len()] {
        self.counts
    }
}

impl Subject {
    fn of(revoked: &Revoked) -> Self {
        match revoked {
            Revoked::User(user) => Self::User(user.clone()),
            Revoked::App(app) => Self::App(app.clone()),
            Revoked::Everyone => Self::Everyone,
            Revoked::Token(app, jti) => Self::Token(id_hash(app, jti.as_str())),
            Revoked::Key(kid) => Self::Key(key_hash(kid.as_str())),
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

    fn revocation(revoked: &str, at_s: u64) -> Revocation {
        let revoked: Revoked = revoked.parse().unwrap();
        let issued_before_s = if revoked.has_time() { NOW } else { 0 };
        Revocation { revoked, issued_before_s, until_s: None, reason: String::new(), at_s }
    }

    fn user(app: &str, user: &str) -> UserKey {
        UserKey { app: AppId::new(app).unwrap(), user: UserId::new(user).unwrap() }
    }

    fn token(issued_s: u64, app: &str, jti: &str, kid: &str) -> TokenFacts {
        let id = id_hash(&AppId::new(app).unwrap(), jti);
        TokenFacts { issued_s: issued_s as u32, id, key: key_hash(kid) }
    }

    #[test]
    fn each_kind_hits_its_tokens_and_no_others() {
        let old = token(NOW - 1, "a", "t1", "k1");
        let new = token(NOW, "a", "t1", "k1");
        let undated = TokenFacts { issued_s: 0, ..new };
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
            assert!(!table.insert(&revocation(revoked, 1), NOW));
            for hit in [old, undated] {
                assert_eq!(table.hit(&mine, &hit, NOW), Some(by), "{revoked}");
            }
            let told = table.hit(&mine, &new, NOW);
            assert_eq!(told, is_timeless.then_some(by), "{revoked}: issued since");
            let other = token(NOW - 1, "b", "t1", "k2");
            let told = table.hit(&user("b", "u"), &other, NOW);
            assert_eq!(told, (by == RevokedBy::Everyone).then_some(by), "{revoked}: others");
            assert_eq!((table.len(), table.counts()[by as usize]), (1, 1));
            table.remove(&revoked.parse().unwrap());
            assert_eq!((table.hit(&mine, &old, NOW), table.len()), (None, 0));
        }
        let mut table = Table::new(10);
        table.insert(&revocation("token:a:t1", 1), NOW);
        assert_eq!(table.hit(&mine, &TokenFacts { id: 0, ..old }, NOW), None, "without an id");
    }

    #[test]
    fn a_later_one_replaces_an_earlier_one_and_ends_in_time() {
        let (mine, old) = (user("a", "u"), token(NOW - 10, "a", "t", "k"));
        let mut table = Table::new(10);
        table.insert(&revocation("user:a:u", 1), NOW);
        let early = Revocation { issued_before_s: NOW - 10, ..revocation("user:a:u", 2) };
        table.insert(&early, NOW);
        assert_eq!((table.hit(&mine, &old, NOW), table.len()), (None, 1));
        let short = Revocation { until_s: Some(NOW + 5), ..revocation("user:a:u", 3) };
        table.insert(&short, NOW);
        assert!(table.hit(&mine, &old, NOW + 4).is_some());
        assert_eq!(table.hit(&mine, &old, NOW + 5), None);
        table.sweep(NOW + 4);
        assert_eq!(table.len(), 1);
        table.sweep(NOW + 5);
        assert_eq!((table.len(), table.by_age.len()), (0, 0));
        table.insert(&revocation("user:a:u", 1), NOW);
        table.insert(&Revocation { until_s: Some(NOW), ..revocation("user:a:u", 4) }, NOW);
        assert_eq!(table.len(), 0, "what is over replaces, too");
    }

    #[test]
    fn hazard_98_beyond_its_bound_the_oldest_is_evicted() {
        let mut table = Table::new(3);
        for (revoked, at_s) in [("app:b", 20), ("app:a", 10), ("app:c", 30)] {
            assert!(!table.insert(&revocation(revoked, at_s), NOW));
        }
        assert!(!table.insert(&revocation("app:a", 40), NOW), "a repeat takes no room");
        assert!(table.insert(&revocation("app:d", 50), NOW));
        let hits = |app: &str| table.hit(&user(app, "u"), &TokenFacts::default(), NOW).is_some();
        assert_eq!(["a", "b", "c", "d"].map(hits), [true, false, true, true]);
        assert_eq!((table.len(), table.by_age.len()), (3, 3));
    }

    proptest! {
        #[test]
        fn its_parts_agree_whatever_arrives(
            steps in prop::collection::vec(
                (0..12_u8, 0..5_u64, prop::option::of(0..6_u64), 0..5_u8),
                0..60,
            ),
        ) {
            let mut table = Table::new(4);
            for (which, at_s, until, what) in steps {
                let names = ["everyone:", "app:a", "app:b", "key:k", "key:l", "token:a:t"];
                let user = format!("user:a:u{which}");
                let revoked = names.get(usize::from(which)).copied().unwrap_or(&user);
                match what {
                    0 => table.remove(&revoked.parse().unwrap()),
                    1 => table.sweep(NOW + at_s),
                    _ => {
                        let until_s = until.map(|until| NOW - 3 + until);
                        table.insert(&Revocation { until_s, ..revocation(revoked, at_s) }, NOW);
                    }
                }
                prop_assert!(table.len() <= 4);
                prop_assert_eq!(table.by_age.len(), table.len());
                let mut counts = Counts::default();
                table.entries.keys().for_each(|subject| counts[subject.kind() as usize] += 1);
                prop_assert_eq!(table.counts(), counts);
            }
        }
    }
}
