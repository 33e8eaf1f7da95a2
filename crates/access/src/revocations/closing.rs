//! Closes the open sessions of revoked tokens. Sessions of a revoked user or token are closed at once; those of an app,
//! a key or everyone are paced as kicks are, because their devices reconnect.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{CloseCode, ConnectionId};
use barid_mailbox::UserKey;
use barid_session::Close;
use barid_wire::revocation::{Revocation, Subject};
use tokio::sync::mpsc::UnboundedReceiver;
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

/// Closes the sessions that arriving revocations hit, except those of [`Subject::User`]. Never returns.
pub async fn run(node: &Node, mut arriving: UnboundedReceiver<Vec<Revocation>>) {
    let mut closer = Closer::new(node);
    loop {
        tokio::select! {
            Some(revocations) = arriving.recv() => closer.add(&revocations),
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
    /// Revocations since the last scan: only these can hit a session that was not hit before.
    made: Table,
    /// When to scan all sessions.
    scan_at: Option<Instant>,
    scanned_at: Option<Instant>,
    /// Sessions to close one after the other.
    paced: BTreeMap<ConnectionId, Weak<Handle>>,
    close_at: Instant,
    gap: Duration,
}

impl<'a> Closer<'a> {
    fn new(node: &'a Node) -> Self {
        let per_second = f64::from(node.policy.limits.kicks_per_second);
        Self {
            node,
            made: Table::new(usize::MAX),
            scan_at: None,
            scanned_at: None,
            paced: BTreeMap::new(),
            close_at: Instant::now(),
            gap: Duration::from_secs_f64(1.0 / per_second),
        }
    }

    fn add(&mut self, revocations: &[Revocation]) {
        let now_s = self.node.clock.now_s();
        for revocation in revocations {
            if !matches!(revocation.subject, Subject::User(_)) {
                self.made.insert(revocation, now_s);
            }
        }
        if !self.made.is_empty() {
            let now = Instant::now();
            let earliest = self.scanned_at.map_or(now, |scanned_at| (scanned_at + SCAN).max(now));
            self.scan_at.get_or_insert(earliest);
        }
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
        let made = std::mem::replace(&mut self.made, Table::new(usize::MAX));
        let queued = self.paced.len();
        if queued == 0 {
            self.close_at = Instant::now();
        }
        let handles = self.node.sessions.registry.all();
        for some in handles.chunks(SCANNED_MAX) {
            let now_s = self.node.clock.now_s();
            for handle in some {
                match made.hit(handle.user(), &handle.token(), now_s) {
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
