//! The audiences of a node: receives messages for them, and wakes their members.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use barid_core::{AppId, GroupId, limits};
use barid_session::Seconds;
use barid_wire::envelope::{self, EnvelopeError};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::yield_now;

use crate::config::LimitsConfig;
use crate::fanout::audience::{Audience, Entry, Member};
use crate::fanout::room::Room;
use crate::handle::Handle;
use crate::labels::FanoutResult;
use crate::metrics::Metrics;

/// Members that are woken before other tasks run. Far below the 256 tasks of a Tokio worker's local queue, because tasks
/// that overflow it wait in the global queue behind all members. Measured: with 128, a user's message waited 150 ms in a
/// burst of 350 ms; with 16, 17 ms, in a burst of the same length.
const NOTIFIED_AT_ONCE: usize = 16;

/// All audiences of this node.
pub struct Fanout {
    apps: Mutex<HashMap<AppId, App>>,
    /// Audiences with members that are still to be woken; served in turn.
    pending: Mutex<VecDeque<Arc<Audience>>>,
    more: Notify,
    /// Audiences whose logs hold messages.
    holding: Mutex<Vec<Arc<Audience>>>,
    room: Arc<Room>,
    metrics: Metrics,
    seconds_max: Seconds,
}

/// The audiences of an app. They exist while the app has a session on this node.
struct App {
    everyone: Arc<Audience>,
    groups: HashMap<GroupId, Arc<Audience>>,
}

/// When a message for an audience was received.
#[derive(Debug, Clone, Copy, Default)]
pub struct Received {
    /// Milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// The same time on the coarse clock.
    pub now: Seconds,
    /// Time from the message's acceptance until its dispatcher queued it for this node, µs; `None`: unknown.
    pub dispatched_after_us: Option<u32>,
}

impl Fanout {
    /// Creates a hub without audiences.
    pub fn new(limits: &LimitsConfig, metrics: &Metrics) -> Self {
        Self {
            apps: Mutex::default(),
            pending: Mutex::default(),
            more: Notify::new(),
            holding: Mutex::default(),
            room: Arc::new(Room::new(limits, metrics.fanout_held_bytes.clone())),
            metrics: metrics.clone(),
            seconds_max: limits.fanout_seconds,
        }
    }

    /// Adds a new session to the audience "everyone" of its app.
    pub(super) fn join(&self, handle: &Arc<Handle>) -> Member {
        let mut apps = self.apps.lock();
        Audience::join(&self.app(&mut apps, &handle.user().app).everyone, handle)
    }

    fn app<'a>(&self, apps: &'a mut HashMap<AppId, App>, app: &AppId) -> &'a mut App {
        apps.entry(app.clone()).or_insert_with(|| App {
            everyone: Arc::new(Audience::new(limits::EVERYONE, Arc::clone(&self.room))),
            groups: HashMap::new(),
        })
    }

    /// Removes a session that has ended.
    pub(super) fn leave(&self, app: &AppId, everyone: &Member) {
        let mut apps = self.apps.lock();
        everyone.leave();
        if apps.get(app).is_some_and(|app| app.everyone.is_empty()) {
            apps.remove(app);
        }
    }

    /// Adds a session, which has joined, to the audience of a group.
    pub(super) fn subscribe(&self, handle: &Arc<Handle>, group: &GroupId) -> Member {
        let mut apps = self.apps.lock();
        let app = self.app(&mut apps, &handle.user().app);
        let audience = app
            .groups
            .entry(group.clone())
            .or_insert_with(|| Arc::new(Audience::new(group.as_str(), Arc::clone(&self.room))));
        self.metrics.subscriptions.inc();
        Audience::join(audience, handle)
    }

    /// Removes a session from the audience of a group.
    pub(super) fn unsubscribe(&self, app: &AppId, group: &GroupId, member: &Member) {
        let mut apps = self.apps.lock();
        self.metrics.subscriptions.dec();
        member.leave();
        if let Some(app) = apps.get_mut(app)
            && app.groups.get(group).is_some_and(|audience| audience.is_empty())
        {
            app.groups.remove(group);
        }
    }

    /// Stores a message (an entry of the audience's mailbox) for everyone of an app, or for one of its groups. Call
    /// [`Self::wake`] afterwards, once for all messages of a batch.
    ///
    /// # Errors
    /// `entry` is not a valid envelope, or its payload cannot be decompressed.
    pub fn receive(
        &self,
        app: &AppId,
        group: Option<&GroupId>,
        entry: Bytes,
        received: Received,
    ) -> Result<FanoutResult, EnvelopeError> {
        let Some(audience) = self.audience(app, group) else { return Ok(FanoutResult::Nobody) };
        let (header, envelope) = envelope::decode(entry)?;
        if envelope::expired(&envelope, received.now_ms) {
            return Ok(FanoutResult::Expired);
        }
        let dispatched_us =
            received.dispatched_after_us.map(|us| header.accepted_at_us + u64::from(us));
        let entry = Entry::new(envelope, received.now, dispatched_us.unwrap_or(0))?;
        if self.room.is_full() {
            self.metrics.fanout_missed.inc_by(audience.len() as u64);
            return Ok(FanoutResult::NoRoom);
        }
        if audience.append(entry) {
            self.holding.lock().push(Arc::clone(&audience));
        }
        if audience.start_round() {
            self.pending.lock().push_back(audience);
        }
        Ok(FanoutResult::Told)
    }

    fn audience(&self, app: &AppId, group: Option<&GroupId>) -> Option<Arc<Audience>> {
        let apps = self.apps.lock();
        let app = apps.get(app)?;
        match group {
            None => Some(Arc::clone(&app.everyone)),
            Some(group) => app.groups.get(group).cloned(),
        }
    }

    /// Starts waking the members that have messages to read.
    pub fn wake(&self) {
        self.more.notify_one();
    }

    /// Wakes members. Never returns.
    pub async fn run(&self) {
        loop {
            let mut left = NOTIFIED_AT_ONCE;
            while left > 0 {
                let Some(audience) = self.pending.lock().pop_front() else { break };
                let (notified, took) = audience.notify(left);
                left = left.saturating_sub(notified.max(1));
                match took {
                    Some(took) => self.metrics.fanout_finished(took),
                    None => self.pending.lock().push_back(audience),
                }
            }
            match left {
                0 => yield_now().await,
                _ => self.more.notified().await,
            }
        }
    }

    /// Drops messages older than `limits.fanout_seconds`. Call it once a second.
    pub fn sweep(&self, now: Seconds) {
        let oldest = now.saturating_sub(self.seconds_max);
        self.holding.lock().retain(|audience| audience.forget_before(oldest));
    }
}

#[cfg(test)]
mod tests;
