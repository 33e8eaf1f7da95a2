//! The independent checker of a run: what was produced against what the applications were shown.
//!
//! It knows nothing of Barid: no positions, no acknowledgements, no metrics, no clock. [`Books`]
//! hold what Kafka took, what each application was shown, in that order, when its connections began
//! and ended, and which nodes the test itself harmed when. [`Books::faults`] tells from these alone
//! every way in which a promise was broken. That P2 lets a mailbox skip what expired or did not fit
//! is not modelled: runs that are checked let nothing expire and stay below the mailbox's length.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

/// Where Kafka put a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The partition; no order is promised across two of them.
    pub partition: i32,
    /// The record's number in it.
    pub offset: i64,
}

/// In which way a promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Produced for this user, never shown on this device.
    Lost,
    /// Shown after one that was produced behind it.
    OutOfOrder,
    /// Shown before.
    Repeated,
    /// Produced, but for other users.
    WrongUser,
    /// Never produced for anybody.
    Foreign,
    /// The payload is not the one that was produced.
    Altered,
    /// A session ended although nobody harmed its node, or ended for good.
    Closed,
}

/// One broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// In which way.
    pub kind: Kind,
    /// Whose application saw it.
    pub user: String,
    /// On which device.
    pub device: String,
    /// The message's id; for [`Kind::Closed`] the node.
    pub what: String,
    /// For people.
    pub detail: String,
}

/// Names one application: a device of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Application(usize);

/// What happened, as it was seen from outside.
#[derive(Debug, Default)]
pub struct Books {
    /// By user and id.
    produced: BTreeMap<String, HashMap<String, Produced>>,
    applications: Vec<Account>,
    harms: Vec<Span>,
    /// Counts the entries: which came first is all that the checker asks of time.
    moment: u64,
}

#[derive(Debug)]
struct Produced {
    place: Place,
    payload: String,
}

#[derive(Debug)]
struct Account {
    user: String,
    device: String,
    shown: Vec<(String, String)>,
    sessions: Vec<Session>,
}

#[derive(Debug)]
struct Session {
    span: Span,
    ended: Option<End>,
}

#[derive(Debug)]
struct End {
    why: String,
    for_good: bool,
}

/// From when to when something was so at a node. An open end is still so.
#[derive(Debug)]
struct Span {
    node: String,
    from: u64,
    to: Option<u64>,
}

impl Span {
    fn meets(&self, other: &Self) -> bool {
        let begins_before = |a: &Self, b: &Self| b.to.is_none_or(|end| a.from <= end);
        self.node == other.node && begins_before(self, other) && begins_before(other, self)
    }
}

impl Books {
    /// Opens the account of an application, which is owed everything that is ever produced for
    /// `user`: so it is one of the user's first devices, or was there before the first record.
    pub fn application(&mut self, user: &str, device: &str) -> Application {
        self.applications.push(Account {
            user: user.into(),
            device: device.into(),
            shown: Vec::new(),
            sessions: Vec::new(),
        });
        Application(self.applications.len() - 1)
    }

    /// Kafka took a record for `user` and said where it is. A record for several users is entered
    /// for each.
    ///
    /// # Panics
    /// The id was produced for this user before: what is a repeat would not be known.
    pub fn produced(&mut self, user: &str, place: Place, id: &str, payload: &str) {
        let record = Produced { place, payload: payload.into() };
        let before = self.produced.entry(user.into()).or_default().insert(id.into(), record);
        assert!(before.is_none(), "{id} is produced for {user} a second time");
    }

    /// The application was given a message.
    pub fn shown(&mut self, to: Application, id: &str, payload: &str) {
        self.applications[to.0].shown.push((id.into(), payload.into()));
    }

    /// A session of the application began at `node`.
    pub fn connected(&mut self, application: Application, node: &str) {
        let span = Span { node: node.into(), from: self.tick(), to: None };
        self.applications[application.0].sessions.push(Session { span, ended: None });
    }

    /// The application's session ended, not by its own wish; `for_good`: it will not come back by
    /// itself. Without a session: an attempt failed, which alone breaks no promise unless it was
    /// the last.
    pub fn disconnected(&mut self, application: Application, why: &str, for_good: bool) {
        let now = self.tick();
        let sessions = &mut self.applications[application.0].sessions;
        if for_good && sessions.last().is_none_or(|last| last.ended.is_some()) {
            let span = Span { node: "(no session)".into(), from: now, to: None };
            sessions.push(Session { span, ended: None });
        }
        if let Some(last) = sessions.last_mut().filter(|last| last.ended.is_none()) {
            last.span.to = Some(now);
            last.ended = Some(End { why: why.into(), for_good });
        }
    }

    /// The test is about to kill or drain `node`: its sessions may end, those of others may not.
    pub fn harm(&mut self, node: &str) {
        let from = self.tick();
        self.harms.push(Span { node: node.into(), from, to: None });
    }

    /// The node is well again: sessions that begin from now on must hold.
    pub fn heal(&mut self, node: &str) {
        let now = self.tick();
        for harm in self.harms.iter_mut().filter(|harm| harm.node == node && harm.to.is_none()) {
            harm.to = Some(now);
        }
    }

    /// The ids that the application was shown, in order.
    pub fn shown_to(&self, application: Application) -> Vec<&str> {
        self.applications[application.0].shown.iter().map(|(id, _)| id.as_str()).collect()
    }

    /// How many sessions the application has had.
    pub fn sessions_of(&self, application: Application) -> usize {
        self.applications[application.0].sessions.len()
    }

    /// How many times any application was shown something.
    pub fn shown_count(&self) -> usize {
        self.applications.iter().map(|account| account.shown.len()).sum()
    }

    /// How many messages some application is still owed.
    pub fn owed(&self) -> usize {
        self.applications.iter().map(|account| self.missing(account).len()).sum()
    }

    /// Every broken promise, by application. What is still on its way counts as lost: to be asked
    /// at the end.
    pub fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        for account in &self.applications {
            self.check_shown(account, &mut faults);
            for (id, record) in self.missing(account) {
                let detail = format!("produced at {:?}", record.place);
                faults.push(account.fault(Kind::Lost, id, detail));
            }
            self.check_sessions(account, &mut faults);
        }
        faults
    }

    fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// What was produced for the application's user and not shown to it, in Kafka's order.
    fn missing(&self, account: &Account) -> Vec<(&String, &Produced)> {
        let shown: HashSet<&str> = account.shown.iter().map(|(id, _)| id.as_str()).collect();
        let produced = self.produced.get(&account.user).into_iter().flatten();
        let mut missing: Vec<_> = produced.filter(|(id, _)| !shown.contains(id.as_str())).collect();
        missing.sort_by_key(|(_, record)| record.place);
        missing
    }

    fn check_shown(&self, account: &Account, faults: &mut Vec<Fault>) {
        let mut seen = HashSet::new();
        // Of each partition, the furthest that was shown.
        let mut furthest: HashMap<i32, (i64, &str)> = HashMap::new();
        for (number, (id, payload)) in account.shown.iter().enumerate() {
            let Some(record) = self.produced.get(&account.user).and_then(|of| of.get(id)) else {
                faults.push(self.not_the_users(account, id));
                continue;
            };
            if *payload != record.payload {
                let detail = format!("{:?} for {:?}", short(payload), short(&record.payload));
                faults.push(account.fault(Kind::Altered, id, detail));
            }
            if !seen.insert(id) {
                faults.push(account.fault(Kind::Repeated, id, format!("as its no. {number}")));
                continue;
            }
            let Place { partition, offset } = record.place;
            let last = furthest.entry(partition).or_insert((offset, id));
            if offset < last.0 {
                faults.push(account.fault(Kind::OutOfOrder, id, format!("after {}", last.1)));
            } else {
                *last = (offset, id);
            }
        }
    }

    fn not_the_users(&self, account: &Account, id: &str) -> Fault {
        let has = |(user, of): (&String, &HashMap<_, _>)| of.contains_key(id).then(|| user.clone());
        let users: Vec<String> = self.produced.iter().filter_map(has).collect();
        if users.is_empty() {
            return account.fault(Kind::Foreign, id, "nobody produced it".into());
        }
        account.fault(Kind::WrongUser, id, format!("it was for {users:?}"))
    }

    fn check_sessions(&self, account: &Account, faults: &mut Vec<Fault>) {
        for session in &account.sessions {
            let Some(end) = &session.ended else { continue };
            let excused = self.harms.iter().any(|harm| harm.meets(&session.span));
            if end.for_good || !excused {
                faults.push(account.fault(Kind::Closed, &session.span.node, end.why.clone()));
            }
        }
    }
}

impl Account {
    fn fault(&self, kind: Kind, what: &str, detail: String) -> Fault {
        let (user, device) = (self.user.clone(), self.device.clone());
        Fault { kind, user, device, what: what.into(), detail }
    }
}

fn short(payload: &str) -> String {
    payload.chars().take(40).collect()
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, user, device, what, detail } = self;
        write!(f, "{kind:?}: {what} at {user}'s {device} ({detail})")
    }
}

#[cfg(test)]
mod tests;
