//! Accepting: one task for some shards of one master, with one call under way. While it is, what
//! arrives is gathered; when it returns, all of that goes in the next. So batches grow only under
//! load, and what a shard gets stays in order.

mod history;
mod questions;
mod queue;
mod settle;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barid_core::{Backoff, Shard};
use barid_mailbox::{AcceptGroup, Error, GroupOutcome, LogPosition};
use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use self::history::History;
pub use self::questions::Answer;
pub use self::queue::{Question, Queue};
pub use self::settle::Outbox;
use crate::config::WindowConfig;
use crate::flight::{Flight, Parcel, Reading};
use crate::metrics::Metrics;
use crate::ports::Mailboxes;

/// What a lane tells the service.
#[derive(Debug)]
pub enum Event {
    /// Everything about these records is done.
    Finished(Vec<Arc<Flight>>),
    /// Redis has forgotten what this shard was given after `back_to`: read again from there.
    Gap {
        /// The reading in which it showed; it is over.
        reading: Arc<Reading>,
        /// The shard.
        shard: Shard,
        /// The last position that the shard knows; `None`: none of this partition.
        back_to: Option<LogPosition>,
    },
    /// Positions of shards that were asked or idle.
    Answered(Answer),
}

/// Why Redis does not take what it is given, and for how many shards; shared with the service.
#[derive(Debug, Default)]
pub struct Away {
    /// Shards that wait.
    pub shards: AtomicUsize,
    /// Which.
    failing: parking_lot::Mutex<HashSet<Shard>>,
    /// The last reason.
    pub reason: parking_lot::Mutex<String>,
}

impl Away {
    /// Whether a shard's last call failed.
    pub fn is_failing(&self, shard: Shard) -> bool {
        self.shards.load(Ordering::Relaxed) > 0 && self.failing.lock().contains(&shard)
    }
}

/// A lane's task.
pub struct Lane<M> {
    /// Redis.
    pub mailboxes: M,
    /// What there is to accept.
    pub queue: Arc<Queue>,
    /// Where outcomes go.
    pub outbox: Outbox,
    /// To the service.
    pub events: mpsc::Sender<Event>,
    /// Bounds.
    pub window: WindowConfig,
    /// Messages that one script call should carry for one shard.
    pub group_max: usize,
    /// Waits between failed calls.
    pub retry: Backoff,
    /// Shown to the service.
    pub away: Arc<Away>,
    /// Counted here.
    pub metrics: Metrics,
    /// Shards whose messages wait: the last call failed, or there were too many for one.
    held: HashMap<Shard, Held>,
    /// Those of them that are reported as failing.
    failing: HashSet<Shard>,
    history: History,
    probe_at: Instant,
    probe_every: Duration,
}

/// What a shard has waiting.
struct Held {
    parcels: VecDeque<Parcel>,
    until: Instant,
    failures: u32,
}

/// Parcels of one reading for one shard, in order.
struct Group {
    shard: Shard,
    reading: Arc<Reading>,
    parcels: Vec<Parcel>,
    /// An empty group raises the shard's stored position to here.
    raise: Option<LogPosition>,
}

impl Group {
    fn empty(shard: Shard, reading: Arc<Reading>, raise: Option<LogPosition>) -> Self {
        Self { shard, reading, parcels: Vec::new(), raise }
    }
}

impl<M: Mailboxes> Lane<M> {
    /// A lane; it works once [`Self::run`] does.
    #[allow(
        clippy::too_many_arguments,
        reason = "every part has a name in the one place that calls"
    )]
    pub fn new(
        mailboxes: M,
        queue: Arc<Queue>,
        outbox: Outbox,
        events: mpsc::Sender<Event>,
        window: WindowConfig,
        group_max: usize,
        retry: Backoff,
        away: Arc<Away>,
        metrics: Metrics,
    ) -> Self {
        let probe_every = Duration::from_millis(window.probe_interval_ms);
        Self {
            mailboxes,
            queue,
            outbox,
            events,
            window,
            group_max,
            retry,
            away,
            metrics,
            held: HashMap::new(),
            failing: HashSet::new(),
            history: History::default(),
            probe_at: Instant::now() + probe_every,
            probe_every,
        }
    }

    /// Works until the queue is closed and empty.
    pub async fn run(mut self) {
        loop {
            self.answer().await;
            let groups = self.gather().await;
            if !groups.is_empty() {
                self.call(groups).await;
            } else if self.probe_at <= Instant::now() {
                self.probe().await;
            } else if !self.wait().await {
                return;
            }
        }
    }

    /// Waits for something to do. False: nothing will come.
    async fn wait(&self) -> bool {
        let due = self.held.values().map(|held| held.until).min();
        tokio::select! {
            () = sleep_until(due.unwrap_or(self.probe_at).min(self.probe_at)) => true,
            filled = self.queue.filled(), if due.is_none() || !self.queue.closed() => {
                filled || due.is_some()
            }
        }
    }

    /// The next call's groups: shards that waited long enough first, then what is new.
    async fn gather(&mut self) -> Vec<Group> {
        let mut batch = Batch::new(&self.window, self.group_max);
        let now = Instant::now();
        let mut ended = self.held_ended();
        for held in self.held.values_mut().filter(|held| held.until <= now) {
            while let Some(parcel) = held.parcels.pop_front() {
                if let Some(parcel) = batch.add(parcel) {
                    held.parcels.push_front(parcel);
                    break;
                }
            }
        }
        let (room, room_bytes) = (batch.room(), batch.room_bytes());
        let (mut had, mut expired) = (Vec::new(), Vec::new());
        for parcel in self.queue.take(&self.window.weights, room, room_bytes, self.group_max) {
            let again = parcel.flight.reading.was_finished(parcel.flight.record.offset);
            if parcel.flight.reading.ended() {
                ended.push(parcel);
            } else if again && self.history.has(&parcel) {
                had.push(parcel);
            } else if again && parcel.flight.is_expired(self.now_ms(parcel.shard, now)) {
                expired.push(parcel);
            } else if self.held.get(&parcel.shard).is_some_and(|held| held.blocks(now)) {
                self.hold(parcel.shard, now).parcels.push_back(parcel);
            } else if let Some(parcel) = batch.add(parcel) {
                self.hold(parcel.shard, now).parcels.push_back(parcel);
            }
        }
        self.drop_ended(ended).await;
        self.queue.done(had.len() + expired.len());
        self.outbox.settle_again(had, expired, &self.events).await;
        batch.groups
    }

    /// Redis's time, by which devices are told what has expired, ms; ours while that is not known.
    fn now_ms(&self, shard: Shard, now: Instant) -> u64 {
        match self.mailboxes.redis_time(shard) {
            Some(redis) => redis.us(now.into_std()) / 1000,
            None => self.outbox.clock.now_ms(),
        }
    }

    /// What waits for nothing any more, as its partition was given back.
    fn held_ended(&mut self) -> Vec<Parcel> {
        let mut ended = Vec::new();
        for held in self.held.values_mut() {
            let over = |parcel: &Parcel| parcel.flight.reading.ended();
            if held.parcels.iter().any(over) {
                let parcels = std::mem::take(&mut held.parcels);
                let (over, kept): (Vec<_>, Vec<_>) = parcels.into_iter().partition(over);
                ended.extend(over);
                held.parcels = kept.into();
            }
        }
        // An entry is empty only while its parcels are in a call.
        self.held.retain(|_, held| !held.parcels.is_empty());
        self.show_away();
        ended
    }

    fn hold(&mut self, shard: Shard, until: Instant) -> &mut Held {
        self.held.entry(shard).or_insert_with(|| Held {
            parcels: VecDeque::new(),
            until,
            failures: 0,
        })
    }

    /// Parcels of a reading that is over: they will be taken again, here or elsewhere.
    async fn drop_ended(&self, parcels: Vec<Parcel>) {
        self.queue.done(parcels.len());
        let finished: Vec<_> = last_parts(parcels.into_iter().map(|parcel| parcel.flight));
        if !finished.is_empty() {
            let _ = self.events.send(Event::Finished(finished)).await;
        }
    }

    async fn call(&mut self, groups: Vec<Group>) {
        for answers in self.exchange(groups).await {
            self.answered(answers).await;
        }
        self.show_away();
    }

    /// One call a master; nearly always that is one. What each answered.
    async fn exchange(
        &mut self,
        groups: Vec<Group>,
    ) -> Vec<Vec<(Group, Result<GroupOutcome, Error>)>> {
        let mut by_lane: HashMap<usize, Vec<Group>> = HashMap::new();
        for group in groups {
            by_lane.entry(self.mailboxes.lane_of(group.shard)).or_default().push(group);
        }
        let calls: Vec<(Vec<Group>, Vec<AcceptGroup>)> = by_lane
            .into_values()
            .map(|groups| {
                let requests = groups.iter().map(|group| self.history.request(group)).collect();
                (groups, requests)
            })
            .collect();
        let begun = Instant::now();
        let answers =
            join_all(calls.iter().map(|(_, requests)| self.mailboxes.accept(requests))).await;
        self.metrics.call_seconds.observe(begun.elapsed().as_secs_f64());
        let mut answered = Vec::with_capacity(calls.len());
        for ((groups, _), answers) in calls.into_iter().zip(answers) {
            let parcels: usize = groups.iter().map(|group| group.parcels.len()).sum();
            self.metrics.call_messages.observe(parcels as f64);
            // A store that answers fewer groups than it was asked failed the others.
            let missing = || Err(Error::Unexpected("an answer is missing".into()));
            let answers = answers.into_iter().chain(std::iter::repeat_with(missing));
            let answers: Vec<_> = groups.into_iter().zip(answers).collect();
            for (_, answer) in &answers {
                self.metrics.calls.with_label_values(&[word(answer)]).inc();
            }
            answered.push(answers);
        }
        answered
    }

    async fn answered(&mut self, answers: Vec<(Group, Result<GroupOutcome, Error>)>) {
        let mut done = Vec::new();
        // Back to front, so that what failed is put before what waits in the order that it had.
        for (group, answer) in answers.into_iter().rev() {
            match answer {
                Ok(GroupOutcome::Done(outcomes)) if outcomes.len() == group.parcels.len() => {
                    self.held.get_mut(&group.shard).into_iter().for_each(|held| held.failures = 0);
                    self.history.done(&group);
                    done.extend(group.parcels.into_iter().zip(outcomes));
                }
                Ok(GroupOutcome::Done(outcomes)) => {
                    let got = outcomes.len();
                    self.failed(group, Error::Unexpected(format!("{got} outcomes")));
                }
                Ok(GroupOutcome::Gap(back_to)) => self.gap(group, back_to).await,
                Err(error) => self.failed(group, error),
            }
        }
        self.queue.done(done.len());
        let clock = done.first().and_then(|(parcel, _)| self.mailboxes.redis_time(parcel.shard));
        self.outbox.settle(done, clock, &self.events).await;
    }

    async fn gap(&mut self, group: Group, back_to: Option<LogPosition>) {
        self.gap_seen(&group, back_to);
        let Group { shard, reading, parcels, .. } = group;
        reading.end();
        let _ = self.events.send(Event::Gap { reading, shard, back_to }).await;
        self.drop_ended(parcels).await;
    }

    fn gap_seen(&self, group: &Group, back_to: Option<LogPosition>) {
        self.metrics.gaps.inc();
        let partition = &group.reading.assignment.partition;
        tracing::debug!(
            topic = &*partition.topic,
            partition = partition.number,
            shard = %group.shard,
            ?back_to,
            "a shard has forgotten what it confirmed"
        );
    }

    /// Nothing is known of the effect: the same again, in the same order, after a while.
    fn failed(&mut self, group: Group, error: Error) {
        if matches!(error, Error::Unexpected(_)) {
            tracing::error!(%error, shard = %group.shard, "accept failed, trying again");
        }
        if group.parcels.is_empty() {
            return; // a probe: the next one asks again
        }
        *self.away.reason.lock() = error.to_string();
        let retry = self.retry;
        let held = self.hold(group.shard, Instant::now());
        if matches!(error, Error::Newer(_)) && held.failures == 0 {
            tracing::warn!(%error, shard = %group.shard, "this shard waits");
        }
        held.until = Instant::now() + retry.delay(held.failures);
        held.failures = held.failures.saturating_add(1);
        for parcel in group.parcels.into_iter().rev() {
            held.parcels.push_front(parcel);
        }
    }

    fn show_away(&mut self) {
        let failing = self.held.iter().filter(|(_, held)| held.failures > 0);
        let failing: HashSet<Shard> = failing.map(|(shard, _)| *shard).collect();
        if failing == self.failing {
            return;
        }
        let mut all = self.away.failing.lock();
        all.retain(|shard| !self.failing.contains(shard));
        all.extend(&failing);
        self.away.shards.store(all.len(), Ordering::Relaxed);
        self.metrics.shards_away.set(all.len() as i64);
        drop(all);
        self.failing = failing;
    }
}

impl Held {
    /// Whether new parcels of the shard have to queue behind these.
    fn blocks(&self, now: Instant) -> bool {
        !self.parcels.is_empty() || self.until > now
    }
}

/// Groups being gathered, within the bounds of a call.
struct Batch {
    groups: Vec<Group>,
    index: HashMap<(Shard, u64, u64), usize>,
    room: usize,
    room_bytes: usize,
    group_max: usize,
}

impl Batch {
    fn new(window: &WindowConfig, group_max: usize) -> Self {
        Self {
            groups: Vec::new(),
            index: HashMap::new(),
            room: window.call_messages_max,
            room_bytes: window.call_bytes_max,
            group_max,
        }
    }

    /// Adds a parcel, or gives it back where there is no room for it.
    fn add(&mut self, parcel: Parcel) -> Option<Parcel> {
        if self.room == 0 || self.room_bytes == 0 {
            return Some(parcel);
        }
        let reading = &parcel.flight.reading;
        let key = (parcel.shard, reading.assignment.id, reading.number());
        let at = *self.index.entry(key).or_insert_with(|| {
            let reading = Arc::clone(reading);
            self.groups.push(Group::empty(parcel.shard, reading, None));
            self.groups.len() - 1
        });
        let group = &mut self.groups[at];
        if group.parcels.len() >= self.group_max {
            return Some(parcel);
        }
        self.room -= 1;
        self.room_bytes = self.room_bytes.saturating_sub(parcel.message.body.len());
        group.parcels.push(parcel);
        None
    }

    fn room(&self) -> usize {
        self.room
    }

    fn room_bytes(&self) -> usize {
        self.room_bytes
    }
}

/// Those flights whose last part this was.
fn last_parts(flights: impl Iterator<Item = Arc<Flight>>) -> Vec<Arc<Flight>> {
    flights.filter(|flight| flight.part_done()).collect()
}

fn word(answer: &Result<GroupOutcome, Error>) -> &'static str {
    match answer {
        Ok(GroupOutcome::Done(_)) => "done",
        Ok(GroupOutcome::Gap(_)) => "gap",
        Err(Error::Unreplicated { .. }) => "unreplicated",
        Err(Error::Full(_)) => "full",
        Err(Error::Newer(_)) => "newer",
        Err(Error::Unexpected(_)) => "unexpected",
        Err(_) => "away",
    }
}

#[cfg(test)]
pub(crate) mod tests;
