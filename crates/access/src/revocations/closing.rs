//! Closes the open sessions of revoked tokens. Sessions of a revoked user or token are closed at once; those of an app,
//! a key or everyone are paced as kicks are, because their devices reconnect.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{CloseCode, ConnectionId};
use barid_mailbox::UserKey;
use barid_session::Close;
use barid_wire::revocation::{Revocation, Subject};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};

use crate::handle::Handle;
use crate::labels::{RevokedAt, RevokedBy};
use crate::node::Node;
use crate::revocations::{REVOKED, Table};

/// Time between two scans of all sessions.
const SCAN: Duration = Duration::from_millis(100);
/// Sessions that are scanned before other tasks run.
const SCANNED_MAX: usize = 4_096;
/// Revocations that are kept for a scan. With more, sessions are compared with all that the node holds.
const UNSCANNED_MAX: usize = 10_000;

/// Revocations since the last scan: only these can hit a session that was not hit before.
#[derive(Debug)]
pub struct Unscanned {
    pending: Mutex<Pending>,
    arrived: Notify,
}

#[derive(Debug)]
enum Pending {
    /// At most [`UNSCANNED_MAX`].
    These(Table),
    /// There were more.
    All,
}

impl Pending {
    fn none() -> Self {
        Self::These(Table::new(usize::MAX))
    }
}

impl Unscanned {
    /// Creates an empty set.
    pub fn new() -> Self {
        Self { pending: Mutex::new(Pending::none()), arrived: Notify::new() }
    }

    /// Adds revocations, except those of users, whose sessions are found without a scan ([`close_user`]).
    pub fn add(&self, revocations: &[Revocation], now_s: u64) {
        let mut pending = self.pending.lock();
        for revocation in revocations {
            let Pending::These(table) = &mut *pending else { break };
            if !matches!(revocation.subject, Subject::User(_)) {
                table.insert(revocation, now_s);
            }
            if table.len() > UNSCANNED_MAX {
                *pending = Pending::All;
            }
        }
        if !matches!(&*pending, Pending::These(table) if table.is_empty()) {
            self.arrived.notify_one();
        }
    }

    fn take(&self) -> Pending {
        std::mem::replace(&mut self.pending.lock(), Pending::none())
    }
}

/// Closes the sessions that arriving revocations hit. Never returns.
pub async fn run(node: &Node, unscanned: &Unscanned) {
    let mut closer = Closer::new(node, unscanned);
    loop {
        tokio::select! {
            () = unscanned.arrived.notified() => closer.plan_scan(),
            () = closer.due() => closer.step().await,
        }
    }
}

/// Closes the sessions of a revoked user.
pub fn close_user(node: &Node, user: &UserKey) {
    let mut sessions = Vec::new();
    node.sessions.registry.each(user, |handle| sessions.push(Arc::clone(handle)));
    for handle in &sessions {
        close(node, handle);
    }
}

/// Closes a session if its token is revoked now: a Refresh may have replaced it, or the revocation been withdrawn.
/// Returns whether it was closed.
fn close(node: &Node, handle: &Handle) -> bool {
    let hit = node.revocations.hit(handle.user(), &handle.token(), node.clock.now_s());
    let Some(by) = hit else { return false };
    let is_closed = handle.close(Close::new(CloseCode::TokenExpired, REVOKED));
    if is_closed {
        node.metrics.revoked(RevokedAt::Session);
        let session = node.sessions.reference(handle.connection);
        tracing::debug!(%session, by = by.as_str(), "closing the session of a revoked token");
    }
    is_closed
}

struct Closer<'a> {
    node: &'a Node,
    unscanned: &'a Unscanned,
    /// When to scan all sessions.
    scan_at: Option<Instant>,
    scanned_at: Option<Instant>,
    /// Sessions to close one after the other.
    paced: BTreeMap<ConnectionId, Weak<Handle>>,
    close_at: Instant,
    gap: Duration,
}

impl<'a> Closer<'a> {
    fn new(node: &'a Node, unscanned: &'a Unscanned) -> Self {
        let per_second = f64::from(node.policy.limits.kicks_per_second);
        Self {
            node,
            unscanned,
            scan_at: None,
            scanned_at: None,
            paced: BTreeMap::new(),
            close_at: Instant::now(),
            gap: Duration::from_secs_f64(1.0 / per_second),
        }
    }

    fn plan_scan(&mut self) {
        let now = Instant::now();
        let earliest = self.scanned_at.map_or(now, |scanned_at| (scanned_at + SCAN).max(now));
        self.scan_at.get_or_insert(earliest);
    }

    async fn due(&self) {
        let close_at = (!self.paced.is_empty()).then_some(self.close_at);
        match (self.scan_at, close_at) {
            (Some(scan), Some(close)) => sleep_until(scan.min(close)).await,
            (Some(at), None) | (None, Some(at)) => sleep_until(at).await,
            (None, None) => std::future::pending().await,
        }
    }

    async fn step(&mut self) {
        if self.scan_at.is_some_and(|at| at <= Instant::now()) {
            self.scan_at = None;
            self.scan().await;
            self.scanned_at = Some(Instant::now());
        }
        let now = Instant::now();
        while self.close_at <= now
            && let Some((_, handle)) = self.paced.pop_first()
        {
            // Sessions that have ended, or are closing, take no time.
            if handle.upgrade().is_some_and(|handle| close(self.node, &handle)) {
                self.close_at += self.gap;
            }
        }
    }

    /// Finds the sessions that the revocations since the last scan hit.
    async fn scan(&mut self) {
        let made = self.unscanned.take();
        let queued = self.paced.len();
        if queued == 0 {
            self.close_at = Instant::now();
        }
        let handles = self.node.sessions.registry.all();
        for some in handles.chunks(SCANNED_MAX) {
            let now_s = self.node.clock.now_s();
            for handle in some {
                let (user, token) = (handle.user(), handle.token());
                let hit = match &made {
                    Pending::These(table) => table.hit(user, &token, now_s),
                    Pending::All => self.node.revocations.hit(user, &token, now_s),
                };
                match hit {
                    None => {}
                    Some(RevokedBy::User | RevokedBy::Token) => {
                        close(self.node, handle);
                    }
                    Some(_) => {
                        self.paced.insert(handle.connection, Arc::downgrade(handle));
                    }
                }
            }
            yield_now().await;
        }
        let found = self.paced.len() - queued;
        if found > 0 {
            tracing::info!(sessions = found, "closing sessions of revoked tokens");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_revocations_than_are_kept_for_a_scan_are_all() {
        let unscanned = Unscanned::new();
        let revocation = |subject: String| Revocation {
            subject: subject.parse().unwrap(),
            issued_before_s: None,
            until_s: None,
            reason: String::new(),
            at_s: 1,
        };
        let tokens = |count| (0..count).map(|n| revocation(format!("token:a:{n}")));
        unscanned.add(&tokens(UNSCANNED_MAX).collect::<Vec<_>>(), 1);
        unscanned.add(&[revocation("user:a:u".into())], 1);
        let Pending::These(table) = unscanned.take() else { panic!("too many") };
        assert_eq!(table.len(), UNSCANNED_MAX);
        for _ in 0..2 {
            unscanned.add(&tokens(UNSCANNED_MAX + 1).collect::<Vec<_>>(), 1);
        }
        assert!(matches!(unscanned.take(), Pending::All));
        assert!(matches!(unscanned.take(), Pending::These(table) if table.is_empty()));
    }
}
