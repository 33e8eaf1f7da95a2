//! A lane: one task that accepts the messages of some shards of one master, with one call under way at a time. Messages
//! that arrive during a call are sent together in the next one. So batches grow only under load, and the messages of a
//! shard stay in order.

mod questions;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Backoff, LogPosition, Shard};
use barid_mailbox::{AcceptGroup, Error, GroupOutcome};
use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::away::Away;
use super::batch::{Batch, Group};
use super::event::Event;
use super::queue::{Handover, Queue};
use super::settle::Outbox;
use crate::config::WindowConfig;
use crate::flight::{Assignment, Parcel, Reading, last_parts};
use crate::history::{History, View};
use crate::metrics::Metrics;
use crate::ports::Mailboxes;
use crate::window::PRIORITIES;

/// State shared by all lanes.
#[derive(Clone)]
pub struct Shared<M> {
    /// The mailboxes in Redis.
    pub mailboxes: M,
    /// Handles the outcomes of calls.
    pub outbox: Outbox,
    /// Reports to the loop.
    pub events: mpsc::Sender<Event>,
    /// Bounds.
    pub window: WindowConfig,
    /// Bound of the messages for one shard in one script call.
    pub group_max: usize,
    /// Waits between failed calls.
    pub retry: Backoff,
    /// Shards whose last call failed.
    pub away: Arc<Away>,
    /// The purger's metrics.
    pub metrics: Metrics,
}

impl<M: Mailboxes> Shared<M> {
    /// Redis's time on a shard, by which messages expire, ms; this machine's if no shard is given or its time is
    /// unknown.
    pub fn now_ms(&self, shard: Option<Shard>, now: Instant) -> u64 {
        match shard.and_then(|shard| self.mailboxes.redis_time(shard)) {
            Some(redis) => redis.us(now.into_std()) / 1000,
            None => self.outbox.clock.now_ms(),
        }
    }
}

/// A lane's task.
pub struct Lane<M> {
    shared: Shared<M>,
    queue: Arc<Queue>,
    /// Messages that are held back, by shard: their call failed, or a call had no room for them.
    held: HashMap<Shard, Held>,
    /// Shards of `held` that are reported in [`Shared::away`].
    failing: HashSet<Shard>,
    history: History,
    /// The assignments in `history`.
    assignments: HashMap<u64, Weak<Assignment>>,
    probe_at: Instant,
    probe_every: Duration,
}

/// Messages of a shard that are held back.
struct Held {
    parcels: VecDeque<Parcel>,
    until: Instant,
    failures: u32,
}

impl<M: Mailboxes> Lane<M> {
    /// Creates a lane; [`Self::run`] starts its work.
    pub fn new(shared: Shared<M>, queue: Arc<Queue>) -> Self {
        let probe_every = Duration::from_millis(shared.window.probe_interval_ms);
        Self {
            shared,
            queue,
            held: HashMap::new(),
            failing: HashSet::new(),
            history: History::default(),
            assignments: HashMap::new(),
            probe_at: Instant::now() + probe_every,
            probe_every,
        }
    }

    /// Runs until the queue is closed and empty.
    pub async fn run(mut self) {
        loop {
            self.adopt();
            self.answer().await;
            self.hand_over();
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

    /// Adds shards that other lanes have handed over.
    fn adopt(&mut self) {
        for Handover { tracks, assignments, .. } in self.queue.arrivals() {
            self.history.adopt(tracks);
            self.assignments.extend(assignments);
        }
    }

    /// Hands over shards that now belong to other lanes. Called between two calls.
    fn hand_over(&mut self) {
        let departures = self.queue.departures();
        if departures.is_empty() {
            return;
        }
        for (shard, to) in departures {
            let mut parcels = self.queue.release(shard);
            let held = self.held.remove(&shard).map_or_else(VecDeque::new, |held| held.parcels);
            // Held messages are older than queued ones.
            for parcel in held.into_iter().rev() {
                let priority = parcel.flight.reading.assignment.priority.min(PRIORITIES - 1);
                parcels[priority].push_front(parcel);
            }
            let count = parcels.iter().map(VecDeque::len).sum();
            let tracks = self.history.release(shard);
            let known = |id: u64| Some((id, self.assignments.get(&id)?.clone()));
            let assignments = tracks.assignments().filter_map(known).collect();
            to.deliver(Handover { shard, parcels, tracks, assignments });
            self.queue.done(count);
        }
        self.show_away();
    }

    /// Waits for work. Returns false if the queue is closed and empty.
    async fn wait(&self) -> bool {
        let due = self.held.values().map(|held| held.until).min();
        tokio::select! {
            () = sleep_until(due.unwrap_or(self.probe_at).min(self.probe_at)) => true,
            filled = self.queue.filled(), if due.is_none() || !self.queue.closed() => {
                filled || due.is_some()
            }
        }
    }

    /// Prepares the groups of the next call: held messages whose wait is over first, then new ones.
    async fn gather(&mut self) -> Vec<Group> {
        let mut batch = Batch::new(&self.shared.window, self.shared.group_max);
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
        for parcel in self.queue.pop_batch(
            &self.shared.window.weights,
            room,
            room_bytes,
            self.shared.group_max,
        ) {
            let again = parcel.flight.reading.was_finished(parcel.flight.record.offset);
            if parcel.flight.reading.ended() {
                ended.push(parcel);
            } else if again && self.has_confirmed(&parcel) {
                had.push(parcel);
            } else if again && parcel.flight.is_expired(self.shared.now_ms(Some(parcel.shard), now))
            {
                expired.push(parcel);
            } else if self.held.get(&parcel.shard).is_some_and(|held| held.blocks(now)) {
                self.hold(parcel.shard, now).parcels.push_back(parcel);
            } else if let Some(parcel) = batch.add(parcel) {
                self.hold(parcel.shard, now).parcels.push_back(parcel);
            }
        }
        self.drop_ended(ended).await;
        self.queue.done(had.len() + expired.len());
        self.shared.outbox.settle_again(had, expired, &self.shared.events).await;
        batch.into_groups()
    }

    /// Removes the held messages of readings that have ended.
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
        // An entry is empty while its messages are in a call.
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

    /// Drops parcels of readings that have ended: their records will be taken again, by this or another purger.
    async fn drop_ended(&self, parcels: Vec<Parcel>) {
        self.queue.done(parcels.len());
        let finished: Vec<_> = last_parts(parcels.into_iter().map(|parcel| parcel.flight));
        if !finished.is_empty() {
            let _ = self.shared.events.send(Event::Finished(finished)).await;
        }
    }

    async fn call(&mut self, groups: Vec<Group>) {
        for answers in self.exchange(groups).await {
            self.answered(answers).await;
        }
        self.show_away();
    }

    /// Makes one call per master (mostly there is only one), and returns the answers.
    async fn exchange(
        &mut self,
        groups: Vec<Group>,
    ) -> Vec<Vec<(Group, Result<GroupOutcome, Error>)>> {
        let mut by_lane: HashMap<usize, Vec<Group>> = HashMap::new();
        for group in groups {
            by_lane.entry(self.shared.mailboxes.lane_of(group.shard)).or_default().push(group);
        }
        let calls: Vec<(Vec<Group>, Vec<AcceptGroup>)> = by_lane
            .into_values()
            .map(|groups| {
                let requests = groups.iter().map(|group| self.request(group)).collect();
                (groups, requests)
            })
            .collect();
        let begun = Instant::now();
        let answers =
            join_all(calls.iter().map(|(_, requests)| self.shared.mailboxes.accept(requests)))
                .await;
        self.shared.metrics.call_seconds.observe(begun.elapsed().as_secs_f64());
        let mut answered = Vec::with_capacity(calls.len());
        for ((groups, _), answers) in calls.into_iter().zip(answers) {
            let parcels: usize = groups.iter().map(|group| group.parcels.len()).sum();
            self.shared.metrics.call_messages.observe(parcels as f64);
            // Groups without an answer have failed.
            let missing = || Err(Error::Unexpected("an answer is missing".into()));
            let answers = answers.into_iter().chain(std::iter::repeat_with(missing));
            let answers: Vec<_> = groups.into_iter().zip(answers).collect();
            for (_, answer) in &answers {
                self.shared.metrics.calls.with_label_values(&[word(answer)]).inc();
            }
            answered.push(answers);
        }
        answered
    }

    /// The script's argument for a group.
    fn request(&mut self, group: &Group) -> AcceptGroup {
        let view = self.view(group.shard, &group.reading);
        if !group.parcels.is_empty() {
            self.history.mark_active(group.shard, view);
        }
        AcceptGroup {
            shard: group.shard,
            source: group.reading.assignment.source.clone(),
            prev: self.history.confirmed(group.shard, view),
            raise: group.raise,
            messages: group.parcels.iter().map(|parcel| parcel.message.clone()).collect(),
        }
    }

    /// Records that the group was executed.
    fn confirm(&mut self, group: &Group) {
        let view = self.view(group.shard, &group.reading);
        self.history.confirm(group.shard, view, group.last());
    }

    /// Whether the shard has confirmed this parcel already: the reading went back for other shards.
    fn has_confirmed(&mut self, parcel: &Parcel) -> bool {
        let view = self.view(parcel.shard, &parcel.flight.reading);
        self.history.confirmed(parcel.shard, view) >= Some(parcel.message.position)
    }

    fn view(&mut self, shard: Shard, reading: &Reading) -> View {
        let assignment = &reading.assignment;
        let known = self.assignments.entry(assignment.id);
        known.or_insert_with(|| Arc::downgrade(assignment));
        reading.view(shard)
    }

    async fn answered(&mut self, answers: Vec<(Group, Result<GroupOutcome, Error>)>) {
        let mut done = Vec::new();
        // In reverse, because failed groups are put back in front, and have to keep their order.
        for (group, answer) in answers.into_iter().rev() {
            match answer {
                Ok(GroupOutcome::Done(outcomes)) if outcomes.len() == group.parcels.len() => {
                    self.held.get_mut(&group.shard).into_iter().for_each(|held| held.failures = 0);
                    self.confirm(&group);
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
        let clock =
            done.first().and_then(|(parcel, _)| self.shared.mailboxes.redis_time(parcel.shard));
        self.shared.outbox.settle(done, clock, &self.shared.events).await;
    }

    async fn gap(&mut self, group: Group, back_to: Option<LogPosition>) {
        self.gap_seen(&group, back_to);
        let Group { shard, reading, parcels, .. } = group;
        reading.end();
        let _ = self.shared.events.send(Event::Gap { reading, shard, back_to }).await;
        self.drop_ended(parcels).await;
    }

    fn gap_seen(&self, group: &Group, back_to: Option<LogPosition>) {
        self.shared.metrics.gaps.inc();
        let partition = &group.reading.assignment.partition;
        tracing::debug!(
            topic = &*partition.topic,
            partition = partition.number,
            shard = %group.shard,
            ?back_to,
            "shard has forgotten confirmed messages"
        );
    }

    /// Holds a failed group, to send it again after a pause and in the same order: it is unknown whether it was
    /// executed.
    fn failed(&mut self, group: Group, error: Error) {
        if matches!(error, Error::Unexpected(_)) {
            tracing::error!(%error, shard = %group.shard, "accept failed, repeating it");
        }
        if group.parcels.is_empty() {
            return; // a probe, which is repeated by the next one
        }
        self.shared.away.set_reason(error.to_string());
        let retry = self.shared.retry;
        let held = self.hold(group.shard, Instant::now());
        if matches!(error, Error::Newer(_)) && held.failures == 0 {
            tracing::warn!(%error, shard = %group.shard, "shard was written by a newer version, waiting");
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
        let all = self.shared.away.replace(&self.failing, &failing);
        self.shared.metrics.shards_away.set(all as i64);
        self.failing = failing;
    }
}

impl Held {
    /// Whether new parcels of the shard have to wait behind the held ones.
    fn blocks(&self, now: Instant) -> bool {
        !self.parcels.is_empty() || self.until > now
    }
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
