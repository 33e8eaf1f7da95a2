//! Fan-out: one record of a dispatcher goes to every session of an audience that is here: everyone of an
//! app, or one of its groups.
//!
//! Nothing is queued for a session. An audience has a short log, and each of its members a place in it: a
//! message is held once and encoded once, whoever reads at the same pace shares the frames, and a device
//! that does not keep up with the log misses what has left it. One task tells the members of all audiences
//! that there is something to read, some at a time, so that whatever else the node does comes in between.

mod audience;
mod listener;
mod sight;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use barid_core::{AppId, GroupId, limits};
use barid_wire::envelope::{self, EnvelopeError};
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::sync::Notify;
use tokio::task::yield_now;

use crate::config::LimitsConfig;
use crate::handle::Handle;
use crate::metrics::Metrics;
use crate::session::Seconds;
use audience::{Audience, Entry};

pub use audience::{Kind, Read};
pub use listener::{Listener, Refused};
pub use sight::Sight;

use audience::Member;

/// Sessions told at once, before other tasks have their turn: about what a worker's own queue takes twice.
const TOLD_AT_ONCE: usize = 128;

/// Who is to be told what, on this node.
pub struct Fanout {
    apps: Mutex<HashMap<AppId, App>>,
    /// Audiences some of whose members are not told yet, in turn.
    untold: Mutex<VecDeque<Arc<Audience>>>,
    more: Notify,
    /// Audiences whose logs hold something.
    holding: Mutex<Vec<Arc<Audience>>>,
    room: Arc<Room>,
    metrics: Metrics,
    seconds_max: Seconds,
}

/// The audiences of an app: there while it has a session here.
struct App {
    everyone: Arc<Audience>,
    groups: HashMap<GroupId, Arc<Audience>>,
}

/// What all logs together hold, bytes, and may hold.
#[derive(Debug)]
struct Room {
    held: AtomicU64,
    held_max: u64,
    log_bytes_max: usize,
    gauge: IntGauge,
}

impl Room {
    fn is_full(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.held_max
    }

    /// A log holds `now` bytes instead of `before`.
    fn changed(&self, before: usize, now: usize) {
        let (before, now) = (before as u64, now as u64);
        self.held.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
        self.gauge.add((now as i64).wrapping_sub(before as i64));
    }
}

/// What became of a message for an audience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is on its way to those who are here.
    Told,
    /// Nobody of them is here.
    Nobody,
    /// The logs of the node are full: everybody who is here misses it.
    NoRoom,
    /// Its time to live was over.
    Expired,
}

impl Taken {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Told, Self::Nobody, Self::NoRoom, Self::Expired];

    /// A word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Told => "told",
            Self::Nobody => "nobody",
            Self::NoRoom => "no_room",
            Self::Expired => "expired",
        }
    }
}

/// When a message for an audience came.
#[derive(Debug, Clone, Copy, Default)]
pub struct Came {
    /// Milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// By the coarse clock.
    pub now: Seconds,
    /// From its acceptance until its dispatcher queued it for this node, µs; `None`: not known.
    pub dispatched_after_us: Option<u32>,
}

impl Fanout {
    /// Without audiences.
    pub fn new(limits: &LimitsConfig, metrics: &Metrics) -> Self {
        Self {
            apps: Mutex::default(),
            untold: Mutex::default(),
            more: Notify::new(),
            holding: Mutex::default(),
            room: Arc::new(Room {
                held: AtomicU64::new(0),
                held_max: limits.node_fanout_bytes_max,
                log_bytes_max: limits.fanout_bytes_max,
                gauge: metrics.fanout_held_bytes.clone(),
            }),
            metrics: metrics.clone(),
            seconds_max: limits.fanout_seconds,
        }
    }

    /// A session begins: it reads what is for everyone of its app from now on.
    fn join(&self, handle: &Arc<Handle>) -> Member {
        let mut apps = self.apps.lock();
        Audience::join(&self.app(&mut apps, &handle.user().app).everyone, handle)
    }

    fn app<'a>(&self, apps: &'a mut HashMap<AppId, App>, app: &AppId) -> &'a mut App {
        apps.entry(app.clone()).or_insert_with(|| App {
            everyone: Arc::new(Audience::new(limits::EVERYONE, Arc::clone(&self.room))),
            groups: HashMap::new(),
        })
    }

    /// The session is over.
    fn leave(&self, app: &AppId, everyone: &Member) {
        let mut apps = self.apps.lock();
        everyone.leave();
        if apps.get(app).is_some_and(|app| app.everyone.is_empty()) {
            apps.remove(app);
        }
    }

    /// A session reads what is for a group from now on. It has joined.
    fn subscribe(&self, handle: &Arc<Handle>, group: &GroupId) -> Member {
        let mut apps = self.apps.lock();
        let app = self.app(&mut apps, &handle.user().app);
        let audience = app
            .groups
            .entry(group.clone())
            .or_insert_with(|| Arc::new(Audience::new(group.as_str(), Arc::clone(&self.room))));
        self.metrics.subscriptions.inc();
        Audience::join(audience, handle)
    }

    /// And no longer.
    fn unsubscribe(&self, app: &AppId, group: &GroupId, member: &Member) {
        let mut apps = self.apps.lock();
        self.metrics.subscriptions.dec();
        member.leave();
        if let Some(app) = apps.get_mut(app)
            && app.groups.get(group).is_some_and(|audience| audience.is_empty())
        {
            app.groups.remove(group);
        }
    }

    /// Takes a message (an entry of the audience's mailbox) for everyone of an app, or for a group of it.
    /// [`Self::go`] has it told.
    ///
    /// # Errors
    /// It is no entry, or its payload is broken.
    pub fn take(
        &self,
        app: &AppId,
        group: Option<&GroupId>,
        entry: Bytes,
        came: Came,
    ) -> Result<Taken, EnvelopeError> {
        let taken = self.put(app, group, entry, came)?;
        self.metrics.fanout(taken);
        Ok(taken)
    }

    fn put(
        &self,
        app: &AppId,
        group: Option<&GroupId>,
        entry: Bytes,
        came: Came,
    ) -> Result<Taken, EnvelopeError> {
        let Some(audience) = self.audience(app, group) else { return Ok(Taken::Nobody) };
        let (header, envelope) = envelope::decode(entry)?;
        if envelope::expired(&envelope, came.now_ms) {
            return Ok(Taken::Expired);
        }
        let dispatched_us =
            came.dispatched_after_us.map(|us| header.accepted_at_us + u64::from(us));
        let entry = Entry::new(envelope, came.now, dispatched_us.unwrap_or(0))?;
        if self.room.is_full() {
            self.metrics.fanout_missed.inc_by(audience.len() as u64);
            return Ok(Taken::NoRoom);
        }
        if audience.append(entry) {
            self.holding.lock().push(Arc::clone(&audience));
        }
        if audience.to_tell() {
            self.untold.lock().push_back(audience);
        }
        Ok(Taken::Told)
    }

    fn audience(&self, app: &AppId, group: Option<&GroupId>) -> Option<Arc<Audience>> {
        let apps = self.apps.lock();
        let app = apps.get(app)?;
        match group {
            None => Some(Arc::clone(&app.everyone)),
            Some(group) => app.groups.get(group).cloned(),
        }
    }

    /// Has what was taken told.
    pub fn go(&self) {
        self.more.notify_one();
    }

    /// Tells members, for as long as the node lives.
    pub async fn tell(&self) {
        loop {
            let mut left = TOLD_AT_ONCE;
            while left > 0 {
                let Some(audience) = self.untold.lock().pop_front() else { break };
                let (told, took) = audience.tell(left);
                left = left.saturating_sub(told.max(1));
                match took {
                    Some(took) => self.metrics.fanout_told(took),
                    None => self.untold.lock().push_back(audience),
                }
            }
            match left {
                0 => yield_now().await,
                _ => self.more.notified().await,
            }
        }
    }

    /// Forgets what members had time enough to read. Once a second.
    pub fn sweep(&self, now: Seconds) {
        let oldest = now.saturating_sub(self.seconds_max);
        self.holding.lock().retain(|audience| audience.forget_before(oldest));
    }
}

#[cfg(test)]
mod tests;
