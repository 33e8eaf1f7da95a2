//! The audiences of a node: receives messages for them, and wakes their members.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_core::{AppId, Audience as Name, AudienceKey, Epoch, GroupId, Seq};
use barid_mailbox::AudienceReadRequest;
use barid_session::Seconds;
use barid_wire::envelope::{self, Envelope, EnvelopeError, Header};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::config::LimitsConfig;
use crate::fanout::audience::{Audience, Entry, Member, Progress};
use crate::fanout::listings::{Due, Listings};
use crate::fanout::pages::{PAGE_BYTES, PAGE_ENTRIES, Pages};
use crate::fanout::place::{Page, Point};
use crate::fanout::room::Room;
use crate::handle::Handle;
use crate::labels::{Call, FanoutResult, PageResult};
use crate::mailboxes::Mailboxes;
use crate::metrics::Metrics;

/// Members that are woken before other tasks run. Far below the 256 tasks of a Tokio worker's local queue, because tasks
/// that overflow it wait in the global queue behind all members. Measured: with 128, a user's message waited 150 ms in a
/// burst of 350 ms; with 16, 17 ms, in a burst of the same length.
const NOTIFIED_AT_ONCE: usize = 16;

/// How long a record that is not the next one waits for those before it, which take another road.
const REORDERED: Duration = Duration::from_millis(100);
/// Pause before a reading that failed is repeated.
const RETRY: Duration = Duration::from_secs(1);

/// All audiences of this node.
pub struct Fanout {
    apps: Mutex<HashMap<AppId, App>>,
    /// Audiences with members that are still to be woken; served in turn.
    pending: Mutex<VecDeque<Arc<Audience>>>,
    more: Notify,
    /// Audiences whose logs hold messages.
    holding: Mutex<Vec<Arc<Audience>>>,
    /// Where Redis lists this node. Locked while `apps` is, never the other way round.
    listings: Mutex<Listings>,
    /// There are requests to send to Redis.
    unlisted: Notify,
    /// Mailboxes to read, in the order of when to.
    reads: Mutex<VecDeque<(Instant, AudienceKey)>>,
    more_reads: Notify,
    pages: Pages,
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
    /// Creates a hub without audiences. Listings in Redis are confirmed every `confirm_every` seconds.
    pub fn new(limits: &LimitsConfig, confirm_every: Seconds, metrics: &Metrics) -> Self {
        Self {
            apps: Mutex::default(),
            pending: Mutex::default(),
            more: Notify::new(),
            holding: Mutex::default(),
            listings: Mutex::new(Listings::new(confirm_every)),
            unlisted: Notify::new(),
            reads: Mutex::default(),
            more_reads: Notify::new(),
            pages: Pages::default(),
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
            everyone: self.create(app, Name::Everyone),
            groups: HashMap::new(),
        })
    }

    /// Creates an audience, for its first member.
    fn create(&self, app: &AppId, name: Name) -> Arc<Audience> {
        let audience = Audience::new(name.as_str(), Arc::clone(&self.room));
        self.listings.lock().enter(&AudienceKey { app: app.clone(), audience: name });
        self.unlisted.notify_one();
        Arc::new(audience)
    }

    fn abandon(&self, app: &AppId, name: Name) {
        self.listings.lock().leave(&AudienceKey { app: app.clone(), audience: name });
    }

    /// Removes a session that has ended.
    pub(super) fn leave(&self, app: &AppId, everyone: &Member) {
        let mut apps = self.apps.lock();
        everyone.leave();
        if apps.get(app).is_some_and(|app| app.everyone.is_empty()) {
            apps.remove(app);
            self.abandon(app, Name::Everyone);
        }
    }

    /// Adds a session, which has joined, to the audience of a group.
    pub(super) fn subscribe(&self, handle: &Arc<Handle>, group: &GroupId) -> Member {
        let mut apps = self.apps.lock();
        let name = &handle.user().app;
        let app = self.app(&mut apps, name);
        let audience = app
            .groups
            .entry(group.clone())
            .or_insert_with(|| self.create(name, Name::Group(group.clone())));
        self.metrics.subscriptions.inc();
        Audience::join(audience, handle)
    }

    /// Removes a session from the audience of a group.
    pub(super) fn unsubscribe(&self, app: &AppId, group: &GroupId, member: &Member) {
        let mut apps = self.apps.lock();
        self.metrics.subscriptions.dec();
        member.leave();
        if let Some(of_app) = apps.get_mut(app)
            && of_app.groups.get(group).is_some_and(|audience| audience.is_empty())
        {
            of_app.groups.remove(group);
            self.abandon(app, Name::Group(group.clone()));
        }
    }

    /// The next request to Redis; waits for one.
    pub(super) async fn next_due(&self) -> Due {
        loop {
            if let Some(due) = self.listings.lock().next() {
                return due;
            }
            self.unlisted.notified().await;
        }
    }

    /// Redis has executed a request; the audience's mailbox ends at `head`.
    pub(super) fn listed(&self, due: &Due, head: Point) {
        let mut listings = self.listings.lock();
        listings.done(due);
        self.metrics.audiences.set(i64::try_from(listings.listed()).unwrap_or(i64::MAX));
        drop(listings);
        self.unlisted.notify_one();
        let audience = self.audience(&due.audience.app, &due.audience.audience);
        if let Some(audience) = audience.filter(|_| due.has_members) {
            let progress = audience.open(head);
            let opened = progress.opened;
            self.follow(&due.audience, &audience, progress, REORDERED);
            if opened {
                // Also without messages: the members are told that their subscription has begun.
                self.tell(audience);
            }
            self.wake();
        }
    }

    /// Handles what has changed in an audience. If its mailbox has to be read, that waits for `pause`.
    fn follow(
        &self,
        key: &AudienceKey,
        audience: &Arc<Audience>,
        progress: Progress,
        pause: Duration,
    ) {
        let Progress { appended, dropped, begun, read, .. } = progress;
        self.metrics.fanout_missed.inc_by((dropped * audience.len()) as u64);
        if begun {
            self.holding.lock().push(Arc::clone(audience));
        }
        if appended > 0 {
            self.tell(Arc::clone(audience));
        }
        if read {
            self.read_later(key.clone(), pause);
        }
    }

    fn read_later(&self, key: AudienceKey, after: Duration) {
        let mut reads = self.reads.lock();
        let at = Instant::now() + after;
        let place = reads.partition_point(|(due, _)| *due <= at);
        reads.insert(place, (at, key));
        drop(reads);
        self.more_reads.notify_one();
    }

    /// The next mailbox to read, with the seq before the first entry wanted; waits for one.
    pub(super) async fn next_read(&self) -> (AudienceKey, Seq) {
        loop {
            let due = self.reads.lock().front().map(|(due, _)| *due);
            match due {
                Some(due) if due <= Instant::now() => {
                    let Some((_, key)) = self.reads.lock().pop_front() else { continue };
                    let audience = self.audience(&key.app, &key.audience);
                    if let Some(after) = audience.and_then(|audience| audience.read_after()) {
                        return (key, after);
                    }
                }
                due => {
                    let until = due.map_or(Duration::from_secs(3_600), |due| {
                        due.saturating_duration_since(Instant::now())
                    });
                    tokio::select! {
                        () = self.more_reads.notified() => (),
                        () = sleep(until) => (),
                    }
                }
            }
        }
    }

    /// An audience's mailbox was read.
    pub(super) fn page(
        &self,
        key: &AudienceKey,
        after: Seq,
        read: barid_mailbox::Page,
        received: Received,
    ) {
        let Some(audience) = self.audience(&key.app, &key.audience) else { return };
        self.metrics.audience_reads.inc();
        let entries = read.entries.into_iter().filter_map(|entry| read_entry(entry, received));
        let progress = audience.page(Page {
            epoch: read.epoch,
            after,
            oldest: read.oldest,
            chain_before_oldest: read.chain_before_oldest,
            newest: read.newest,
            entries: entries.collect(),
        });
        // A page that shows nothing new is not followed by another one at once.
        let pause = if progress.appended > 0 { Duration::ZERO } else { REORDERED };
        self.follow(key, &audience, progress, pause);
        self.wake();
    }

    /// A page of an audience's mailbox, for a device that catches up; devices share them, unless it was asked for before
    /// `not_before`.
    pub async fn page_for(
        &self,
        mailboxes: &Mailboxes,
        audience: &AudienceKey,
        after: Seq,
        not_before: Option<tokio::time::Instant>,
    ) -> Arc<barid_mailbox::Page> {
        let request = AudienceReadRequest {
            audience: audience.clone(),
            after,
            entries_max: PAGE_ENTRIES,
            bytes_max: PAGE_BYTES,
        };
        let call = || mailboxes.store().read_audience(request.clone());
        let read = async || mailboxes.until_answered(Call::Read, call).await;
        let (page, is_reader) = self.pages.get(audience, after, not_before, read).await;
        let result = if is_reader { PageResult::Read } else { PageResult::Shared };
        self.metrics.audience_page(result);
        if is_reader {
            self.hear_of(audience, page.epoch, page.newest);
        }
        page
    }

    /// An audience's mailbox was read for a device, up to here.
    fn hear_of(&self, key: &AudienceKey, epoch: Epoch, newest: Seq) {
        if let Some(audience) = self.audience(&key.app, &key.audience) {
            let progress = audience.hear_of(epoch, newest);
            self.follow(key, &audience, progress, REORDERED);
        }
    }

    /// An audience's mailbox could not be read.
    pub(super) fn not_read(&self, key: AudienceKey) {
        self.read_later(key, RETRY);
    }

    /// Redis has not answered a request, or refused it as out of date.
    pub(super) fn not_listed(&self, due: Due) {
        self.listings.lock().failed(due);
    }

    /// The audiences of this node.
    pub(super) fn audiences(&self) -> Vec<AudienceKey> {
        self.listings.lock().audiences().cloned().collect()
    }

    /// These audiences have messages with these numbers: asks where those stand of which the node does not know that it
    /// has them.
    pub(super) fn changed(&self, changed: Vec<(AudienceKey, u64)>) {
        let unknown = changed.into_iter().filter(|(key, number)| {
            let audience = self.audience(&key.app, &key.audience);
            audience.is_some_and(|audience| !audience.is_numbered(*number))
        });
        let unknown: Vec<AudienceKey> = unknown.map(|(key, _)| key).collect();
        self.listings.lock().ask_again(unknown);
        self.unlisted.notify_one();
    }

    /// Redis may have forgotten the listings of these audiences.
    pub(super) fn forgotten(&self, of: impl Fn(&AudienceKey) -> bool) {
        self.listings.lock().forgotten(of);
        self.unlisted.notify_one();
    }

    /// Stores a message (an entry of the audience's mailbox) for everyone of an app, or for one of its groups. Call
    /// [`Self::wake`] afterwards, once for all messages of a batch.
    ///
    /// # Errors
    /// `entry` is not a valid envelope.
    pub fn receive(
        &self,
        app: &AppId,
        name: &Name,
        entry: Bytes,
        received: Received,
    ) -> Result<FanoutResult, EnvelopeError> {
        let Some(audience) = self.audience(app, name) else { return Ok(FanoutResult::Nobody) };
        let (header, envelope) = envelope::decode(entry)?;
        let expired = envelope::expired(&envelope, received.now_ms);
        let entry = entry_of(&header, envelope, received);
        let progress = audience.receive(header, entry);
        let result = match progress {
            _ if expired => FanoutResult::Expired,
            Progress { appended: 1.., .. } => FanoutResult::Told,
            Progress { dropped: 1.., .. } => FanoutResult::NoRoom,
            _ => FanoutResult::NotNext,
        };
        let key = AudienceKey { app: app.clone(), audience: name.clone() };
        self.follow(&key, &audience, progress, REORDERED);
        Ok(result)
    }

    /// Has the members woken by the next [`Self::wake`].
    fn tell(&self, audience: Arc<Audience>) {
        if audience.start_round() {
            self.pending.lock().push_back(audience);
        }
    }

    fn audience(&self, app: &AppId, name: &Name) -> Option<Arc<Audience>> {
        let apps = self.apps.lock();
        let app = apps.get(app)?;
        match name {
            Name::Everyone => Some(Arc::clone(&app.everyone)),
            Name::Group(group) => app.groups.get(group).cloned(),
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

    /// Drops messages older than `limits.fanout_seconds`, and makes requests to Redis due. Call it once a second.
    pub fn sweep(&self, now: Seconds) {
        self.pages.sweep();
        self.listings.lock().tick(now);
        self.unlisted.notify_one();
        let oldest = now.saturating_sub(self.seconds_max);
        self.holding.lock().retain(|audience| audience.forget_before(oldest));
    }
}

/// An entry of a page. One that cannot be read is not delivered; `None`: without a header.
fn read_entry(entry: Bytes, received: Received) -> Option<(Header, Entry)> {
    let header = Header::parse(&entry).ok()?;
    let entry = match envelope::decode(entry) {
        Ok((_, envelope)) => entry_of(&header, envelope, received),
        Err(error) => undeliverable(&header, received.now, &error),
    };
    Some((header, entry))
}

/// A message that was voided, has expired, or cannot be decompressed or written keeps its place, and is not delivered.
fn entry_of(header: &Header, envelope: Envelope, received: Received) -> Entry {
    let Received { now_ms, now, dispatched_after_us } = received;
    if envelope.voided != 0 || envelope::expired(&envelope, now_ms) {
        return Entry::void(header, now);
    }
    let dispatched_us = dispatched_after_us.map(|us| header.accepted_at_us + u64::from(us));
    Entry::new(header, envelope, now, dispatched_us.unwrap_or(0))
        .unwrap_or_else(|error| undeliverable(header, now, &error))
}

fn undeliverable(header: &Header, now: Seconds, error: &EnvelopeError) -> Entry {
    tracing::warn!(seq = header.seq.0, %error, "entry cannot be delivered");
    Entry::void(header, now)
}

#[cfg(test)]
mod tests;
