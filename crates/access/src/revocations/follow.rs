//! Follows the topic of revocations: keeps the node's table, and closes the open sessions that a revocation hits.
//!
//! Sessions of a revoked user or token are closed at once. Those of an app, a key or everyone are paced, as kicks are:
//! their devices reconnect.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_bus::{Change, Followed, Follower};
use barid_core::CloseCode;
use barid_runtime::{Condition, repeats};
use barid_session::Close;
use barid_wire::revocation::{Revocation, Revoked};
use tokio::task::yield_now;
use tokio::time::{Instant, interval, sleep_until};

use crate::handle::Handle;
use crate::labels::{RevokedAt, RevokedBy};
use crate::node::Node;
use crate::revocations::REVOKED;

/// Time between two looks at all sessions.
const SCAN: Duration = Duration::from_millis(100);
/// Sessions that are looked at in one turn.
const SCANNED_MAX: usize = 4_096;
/// Time between two removals of revocations that are over.
const SWEEP: Duration = Duration::from_secs(10);

/// Keeps the revocations of a node. Never returns.
pub async fn run(node: Arc<Node>, mut follower: Follower, condition: Condition) {
    let mut closing = Closing::new(&node);
    let mut sweep = interval(SWEEP);
    condition.failing("the topic of revocations is being read");
    let mut is_read = false;
    loop {
        tokio::select! {
            () = closing.due() => closing.step(&node).await,
            event = follower.next() => match event {
                Followed::Changes(changes) => closing.look_for(&node, take(&node, &changes)),
                Followed::CaughtUp => {
                    node.revocations.set_read();
                    is_read = true;
                    node.metrics.revocations_current.set(1);
                    condition.ready();
                    tracing::info!(revocations = node.revocations.table().len(), "revocations read");
                }
                Followed::Trouble(error) => {
                    node.metrics.revocations_current.set(0);
                    let error = error.to_string();
                    if let Some(repeated) = repeats::due(&error) {
                        tracing::warn!(
                            error,
                            repeated,
                            is_read,
                            "new revocations do not arrive; those that were read stay in force"
                        );
                    }
                    if !is_read {
                        condition.failing(error);
                    }
                }
                Followed::Healed => {
                    node.metrics.revocations_current.set(is_read.into());
                    tracing::info!("new revocations arrive again");
                    if !is_read {
                        condition.failing("the topic of revocations is being read");
                    }
                }
            },
            _ = sweep.tick() => node.revocations.change(|table| table.sweep(node.clock.now_s())),
        }
        node.metrics.revocations(node.revocations.table().counts());
    }
}

/// Puts changes into the table. Returns what is revoked now.
fn take(node: &Node, changes: &[Change]) -> Vec<Revoked> {
    let mut taken = Vec::with_capacity(changes.len());
    for change in changes {
        match read(change) {
            Ok(step) => taken.push(step),
            Err(error) => {
                node.metrics.revocations_malformed.inc();
                let key = String::from_utf8_lossy(&change.key);
                let key = barid_wire::cut(&key, 64);
                if let Some(repeated) = repeats::due("malformed revocation") {
                    tracing::warn!(key, error, repeated, "malformed revocation: not in force");
                }
            }
        }
    }
    let now_s = node.clock.now_s();
    let mut evicted = 0;
    node.revocations.change(|table| {
        for step in &taken {
            match step {
                Step::Revoke(revocation) => evicted += u64::from(table.insert(revocation, now_s)),
                Step::Withdraw(revoked) => table.remove(revoked),
            }
        }
    });
    if evicted > 0 {
        node.metrics.revocations_evicted.inc_by(evicted);
        tracing::warn!(evicted, "too many revocations: the oldest are no longer in force");
    }
    let revoked = |step| match step {
        Step::Revoke(revocation) => {
            tracing::debug!(key = %revocation.revoked, reason = revocation.reason, "revoked");
            Some(revocation.revoked)
        }
        Step::Withdraw(_) => None,
    };
    taken.into_iter().filter_map(revoked).collect()
}

enum Step {
    Revoke(Revocation),
    Withdraw(Revoked),
}

fn read(change: &Change) -> Result<Step, String> {
    match &change.value {
        Some(value) => Revocation::decode(&change.key, value).map(Step::Revoke),
        None => String::from_utf8_lossy(&change.key).parse().map(Step::Withdraw),
    }
    .map_err(|error| error.to_string())
}

/// The sessions to close.
struct Closing {
    /// When to look at all sessions.
    scan_at: Option<Instant>,
    scanned: Option<Instant>,
    /// Sessions that the last look has found, to be closed one after the other.
    paced: VecDeque<Weak<Handle>>,
    close_at: Instant,
    gap: Duration,
}

impl Closing {
    fn new(node: &Node) -> Self {
        let per_second = f64::from(node.policy.limits.kicks_per_second);
        let gap = Duration::from_secs_f64(1.0 / per_second);
        Self { scan_at: None, scanned: None, paced: VecDeque::new(), close_at: Instant::now(), gap }
    }

    /// Closes the sessions of revoked users, and notes if all sessions have to be looked at.
    fn look_for(&mut self, node: &Node, revoked: Vec<Revoked>) {
        for revoked in revoked {
            let Revoked::User(user) = revoked else {
                let now = Instant::now();
                let earliest = self.scanned.map_or(now, |scanned| (scanned + SCAN).max(now));
                self.scan_at.get_or_insert(earliest);
                continue;
            };
            let mut found = Vec::new();
            node.sessions.registry.each(&user, |handle| found.push(Arc::clone(handle)));
            found.iter().for_each(|handle| close(node, handle));
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

    async fn step(&mut self, node: &Node) {
        if self.scan_at.is_some_and(|at| at <= Instant::now()) {
            self.scan_at = None;
            self.scan(node).await;
            self.scanned = Some(Instant::now());
        }
        let now = Instant::now();
        while self.close_at <= now {
            let Some(handle) = self.paced.pop_front() else { break };
            if let Some(handle) = handle.upgrade() {
                close(node, &handle);
                self.close_at += self.gap;
            }
        }
    }

    /// Looks at all sessions. What an earlier look has found and is still open is found again.
    async fn scan(&mut self, node: &Node) {
        let was_idle = self.paced.is_empty();
        self.paced.clear();
        let handles = node.sessions.registry.all();
        for some in handles.chunks(SCANNED_MAX) {
            let now_s = node.clock.now_s();
            let mut at_once = Vec::new();
            {
                let table = node.revocations.table();
                for handle in some {
                    match table.hit(handle.user(), &handle.token(), now_s) {
                        None => {}
                        Some(RevokedBy::User | RevokedBy::Token) => at_once.push(handle),
                        Some(_) => self.paced.push_back(Arc::downgrade(handle)),
                    }
                }
            }
            at_once.into_iter().for_each(|handle| close(node, handle));
            yield_now().await;
        }
        if was_idle {
            self.close_at = Instant::now();
        }
        if !self.paced.is_empty() {
            tracing::info!(sessions = self.paced.len(), "closing sessions of revoked tokens");
        }
    }
}

/// Closes a session if its token is revoked now: a Refresh may have replaced it, or the revocation been withdrawn.
fn close(node: &Node, handle: &Handle) {
    let hit = node.revocations.hit(handle.user(), &handle.token(), node.clock.now_s());
    let Some(by) = hit else { return };
    if handle.close(Close::new(CloseCode::TokenExpired, REVOKED)) {
        node.metrics.revoked(RevokedAt::Session);
        let session = node.sessions.reference(handle.connection);
        tracing::debug!(%session, by = by.as_str(), "closing the session of a revoked token");
    }
}
