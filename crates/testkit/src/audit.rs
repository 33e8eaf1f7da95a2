//! The audit of a run: what was produced against what the applications were shown.
//!
//! It knows nothing of Barid: no positions, no acknowledgements, no metrics, no clock. An [`Audit`] holds what
//! Kafka stored, what each application was shown, in that order, when its connections began and ended, and
//! which nodes the test itself disturbed when. [`Audit::faults`] finds every broken promise from these alone.
//! It does not model that a mailbox may skip expired or oversized messages (P2): audited runs let nothing
//! expire and stay below the mailbox's length.
//!
//! The load tool counts with [`Order`], which judges order and repeats, and keeps no records: it watches
//! hundreds of thousands of devices.

mod order;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

pub use self::order::{Order, Shown};

/// The position of a record in its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The partition; order is promised within a partition only.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

/// A kind of broken promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Produced for this user, never shown on this device.
    Lost,
    /// Shown after a record that was produced later.
    OutOfOrder,
    /// Shown more than once.
    Repeated,
    /// Produced for other users.
    WrongUser,
    /// Never produced.
    Foreign,
    /// Shown with another payload.
    Altered,
    /// A session ended although the test did not disturb its node, or ended for good.
    Closed,
}

/// One broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Its kind.
    pub kind: Kind,
    /// The application's user.
    pub user: String,
    /// The application's device.
    pub device: String,
    /// The message's id; for [`Kind::Closed`] the node.
    pub what: String,
    /// Further explanation.
    pub detail: String,
}

/// The handle of an application: a device of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Application(usize);

/// The observed events of a run: records produced, deliveries, faults.
#[derive(Debug, Default)]
pub struct Audit {
    /// Keyed by user, then message id.
    produced: BTreeMap<String, HashMap<String, Produced>>,
    applications: Vec<Deliveries>,
    harms: Vec<Span>,
    /// Counts the entries. The audit needs to know which came first, not when.
    moment: u64,
}

#[derive(Debug)]
struct Produced {
    place: Place,
    payload: String,
}

#[derive(Debug)]
struct Deliveries {
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

impl Audit {
    /// Adds an application. It must be shown everything that is ever produced for `user`: it is one of the
    /// user's first devices, or was connected before the first record.
    pub fn application(&mut self, user: &str, device: &str) -> Application {
        self.applications.push(Deliveries {
            user: user.into(),
            device: device.into(),
            shown: Vec::new(),
            sessions: Vec::new(),
        });
        Application(self.applications.len() - 1)
    }

    /// Kafka stored a record for `user`. A record for several users is entered for each.
    ///
    /// # Panics
    /// Panics if the id was produced for this user before: repeats could not be told.
    pub fn produced(&mut self, user: &str, place: Place, id: &str, payload: &str) {
        let record = Produced { place, payload: payload.into() };
        let before = self.produced.entry(user.into()).or_default().insert(id.into(), record);
        assert!(before.is_none(), "{id} is produced for {user} a second time");
    }

    /// The application was shown a message.
    pub fn shown(&mut self, to: Application, id: &str, payload: &str) {
        self.applications[to.0].shown.push((id.into(), payload.into()));
    }

    /// A session of the application began at `node`.
    pub fn connected(&mut self, application: Application, node: &str) {
        let span = Span { node: node.into(), from: self.tick(), to: None };
        self.applications[application.0].sessions.push(Session { span, ended: None });
    }

    /// The application's session ended, or an attempt to connect failed. `for_good`: the application will
    /// not connect again by itself. A failed attempt alone breaks no promise, unless it was the last.
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

    /// The test is about to kill or drain `node`: its sessions may end from now on.
    pub fn harm(&mut self, node: &str) {
        let from = self.tick();
        self.harms.push(Span { node: node.into(), from, to: None });
    }

    /// The node is ready again: sessions that begin from now on must not end.
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

    /// The number of sessions that the application has had.
    pub fn sessions_of(&self, application: Application) -> usize {
        self.applications[application.0].sessions.len()
    }

    /// The number of messages shown to all applications.
    pub fn shown_count(&self) -> usize {
        self.applications.iter().map(|deliveries| deliveries.shown.len()).sum()
    }

    /// The number of messages that applications have not been shown yet.
    pub fn missing_count(&self) -> usize {
        self.applications.iter().map(|deliveries| self.missing(deliveries).len()).sum()
    }

    /// Every broken promise, by application. Messages that are still on their way count as lost: to be
    /// called at the end of a run.
    pub fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        for deliveries in &self.applications {
            self.check_shown(deliveries, &mut faults);
            for (id, record) in self.missing(deliveries) {
                let detail = format!("produced at {:?}", record.place);
                faults.push(deliveries.fault(Kind::Lost, id, detail));
            }
            self.check_sessions(deliveries, &mut faults);
        }
        faults
    }

    fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// Records produced for the application's user and not shown to it, in Kafka's order.
    fn missing(&self, deliveries: &Deliveries) -> Vec<(&String, &Produced)> {
        let shown: HashSet<&str> = deliveries.shown.iter().map(|(id, _)| id.as_str()).collect();
        let produced = self.produced.get(&deliveries.user).into_iter().flatten();
        let mut missing: Vec<_> = produced.filter(|(id, _)| !shown.contains(id.as_str())).collect();
        missing.sort_by_key(|(_, record)| record.place);
        missing
    }

    fn check_shown(&self, deliveries: &Deliveries, faults: &mut Vec<Fault>) {
        // By partition.
        let mut orders: HashMap<i32, Order> = HashMap::new();
        for (number, (id, payload)) in deliveries.shown.iter().enumerate() {
            let Some(record) = self.produced.get(&deliveries.user).and_then(|of| of.get(id)) else {
                faults.push(self.not_the_users(deliveries, id));
                continue;
            };
            if *payload != record.payload {
                let detail = format!("{:?} for {:?}", short(payload), short(&record.payload));
                faults.push(deliveries.fault(Kind::Altered, id, detail));
            }
            let Place { partition, offset } = record.place;
            let kind = match orders.entry(partition).or_default().shown(offset.unsigned_abs()) {
                Shown::InOrder { .. } => continue,
                Shown::OutOfOrder => Kind::OutOfOrder,
                Shown::Repeated => Kind::Repeated,
            };
            let detail = format!("shown as no. {number}, produced at {:?}", record.place);
            faults.push(deliveries.fault(kind, id, detail));
        }
    }

    fn not_the_users(&self, deliveries: &Deliveries, id: &str) -> Fault {
        let has = |(user, of): (&String, &HashMap<_, _>)| of.contains_key(id).then(|| user.clone());
        let users: Vec<String> = self.produced.iter().filter_map(has).collect();
        if users.is_empty() {
            return deliveries.fault(Kind::Foreign, id, "nobody produced it".into());
        }
        deliveries.fault(Kind::WrongUser, id, format!("it was for {users:?}"))
    }

    fn check_sessions(&self, deliveries: &Deliveries, faults: &mut Vec<Fault>) {
        for session in &deliveries.sessions {
            let Some(end) = &session.ended else { continue };
            let excused = self.harms.iter().any(|harm| harm.meets(&session.span));
            if end.for_good || !excused {
                faults.push(deliveries.fault(Kind::Closed, &session.span.node, end.why.clone()));
            }
        }
    }
}

impl Deliveries {
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
