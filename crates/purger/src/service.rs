//! The loop: takes records while there is room, hears what is done, commits, answers the group.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use barid_bus::consumer::{Consumer, Done, Draining, Event, Partition};
use barid_bus::{DeadLetter, DeadLetters, Error as KafkaError, Held, Producer, Receipts, Stuck};
use barid_core::{LogPosition, SystemClock};
use barid_runtime::{Condition, Context, Sighting, Stopped};
use barid_wire::record::Refusal;
use barid_wire::v1::Receipt;
use futures::FutureExt as _;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use crate::config::Config;
use crate::errands::{Errand, Plan, Reaches, Refresh, Seeks};
use crate::error::Error;
use crate::flight::{Assignment, Flight, Parcel};
use crate::intake::{Intake, Taken};
use crate::lanes::{Away, Event as LaneEvent, Lane, Outbox, Question, Queue, Shared};
use crate::metrics::Metrics;
use crate::oldest::OldestWatch;
use crate::partitions::Partitions;
use crate::ports::{Handoff, Log, Mailboxes};
use crate::skips::Skips;

/// Records taken in one turn for each unit of weight.
const TURN: usize = 16;
/// How long the loop sleeps when nothing rings.
const TICK: Duration = Duration::from_millis(50);
/// How often readiness is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How often missing topics are looked for.
const MISSING_REFRESH: Duration = Duration::from_secs(1);
/// Receipts and dead letters that wait for longer fail readiness.
const HELD_AFTER: Duration = Duration::from_secs(10);
/// How long a commit may take when a partition is given back, or the process ends.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(3);
/// Events of lanes that wait for the loop.
const EVENTS_MAX: usize = 1024;
/// How long a partition waits for its shards to report their positions.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// A purger over some Redis and some dispatchers.
pub struct Service<M, H> {
    config: Config,
    mailboxes: M,
    handoff: H,
    producer: Producer,
    flow: Flow,
    events: mpsc::Receiver<LaneEvent>,
    workers: JoinSet<()>,
    conditions: Conditions,
    timers: Timers,
}

struct Conditions {
    kafka: Condition,
    redis: Condition,
    /// The loop turns.
    consumer: Condition,
    /// Records that were taken get finished.
    records: Condition,
    /// Every topic exists.
    topics: Condition,
    /// Every partition held can be read.
    fetching: Condition,
    /// Receipts and dead letters are taken.
    producing: Condition,
    /// Finished records get committed.
    commits: Condition,
    /// For how long a record may be under way.
    stalled_after: Duration,
    /// One was for longer.
    too_old: bool,
}

/// What is due when, and the requests under way.
struct Timers {
    commit: Instant,
    refresh: Refresh,
    ping: Instant,
    look: Instant,
    ids: Option<JoinHandle<Result<HashMap<String, String>, KafkaError>>>,
    missing: Option<JoinHandle<Result<Vec<String>, KafkaError>>>,
    pong: Option<JoinHandle<Option<String>>>,
    plan: Option<Plan>,
    seeks: Seeks,
    reaches: Reaches,
}

/// Partitions that are to be given back.
struct Revocation {
    partitions: Vec<Partition>,
    deadline: Instant,
    /// The last commit, and why it was made: `drained` or `cut`.
    commit: Option<(Errand<usize>, &'static str)>,
}

/// Records and partitions under way; everything of the service but its consumer.
struct Flow {
    intake: Intake,
    partitions: Partitions,
    revocations: Vec<Revocation>,
    queues: Vec<Arc<Queue>>,
    /// Which queue a shard goes to.
    by_shard: Vec<usize>,
    lane_messages_max: usize,
    /// Messages of a lane that wait for shards that are away.
    away_messages_max: usize,
    skipped_records_max: usize,
    skips: HashMap<Partition, Skips>,
    /// Records left out, over all partitions.
    skipped: usize,
    /// Whether the bound of records left out is reached.
    skips_full: bool,
    records: [usize; 3],
    bytes: [usize; 3],
    records_max: usize,
    bytes_max: usize,
    /// Whether each priority has reached its bound of bytes, and of records.
    at_bounds: [[bool; 2]; 3],
    weights: [usize; 3],
    outbox: Outbox,
    lane_events: mpsc::Sender<LaneEvent>,
    away: Arc<Away>,
    topics: Vec<Arc<str>>,
    metrics: Metrics,
    oldest: OldestWatch,
    /// Records were finished since readiness was looked at.
    finished: bool,
    /// A commit was asked for and not yet answered.
    committing: bool,
}

impl<M: Mailboxes, H: Handoff> Service<M, H> {
    /// A purger; it works once [`Self::run`] does.
    ///
    /// # Errors
    /// The configuration makes no sense to Kafka's client, or metrics are registered already.
    pub fn new(config: Config, mailboxes: M, handoff: H, context: &Context) -> Result<Self, Error> {
        config.check().map_err(Error::Config)?;
        let metrics = Metrics::new(&context.metrics)?;
        let producer = Producer::new(&config.kafka)?;
        let (lane_events, events) = mpsc::channel(EVENTS_MAX);
        let (handoff_in, handoff_out) = mpsc::channel(config.window.handoff_max);
        let dropped = metrics.receipts_dropped.clone();
        let dead_dropped = metrics.dead_letters_dropped.clone();
        let outbox = Outbox {
            receipts: Receipts::new(producer.clone(), &config.kafka, dropped),
            dead: DeadLetters::new(producer.clone(), &config.kafka, dead_dropped),
            handoff: handoff_in,
            handoff_wait: Duration::from_millis(config.window.handoff_wait_ms),
            clock: Arc::new(SystemClock),
            metrics: metrics.clone(),
            tracer: context.tracer.clone(),
        };
        let mut workers = JoinSet::new();
        workers.spawn(hand_on(handoff.clone(), handoff_out));
        let flow = Flow::new(&config, &mailboxes, outbox, lane_events, metrics, &mut workers)?;
        let conditions = Conditions::new(&config, context);
        let timers = Timers::new(Instant::now());
        Ok(Self { config, mailboxes, handoff, producer, flow, events, workers, conditions, timers })
    }

    /// Works until `context` drains; gives its partitions back; tells what was cut off.
    ///
    /// # Errors
    /// [`Error::Fatal`]: the consumer cannot go on.
    pub async fn run(mut self, context: &Context) -> Result<Stopped, Error> {
        let topics = self.config.kafka.topics.pushes();
        let mut consumer = Consumer::start(&self.config.kafka, &topics)?;
        let shutdown = context.shutdown.clone();
        let bell = consumer.bell();
        while !shutdown.is_draining() {
            self.turn(&mut consumer).await?;
            if self.flow.fill(&mut consumer) > 0 {
                // Others of this thread, and the lanes, get their turn.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                () = bell.notified() => {}
                Some(event) = self.events.recv() => self.flow.lane_event(event),
                () = sleep(TICK) => {}
                () = shutdown.draining() => {}
            }
        }
        let deadline = shutdown.deadline().unwrap_or_else(Instant::now);
        self.drain(consumer.drain(), deadline).await
    }

    /// Handles events of Kafka and the lanes, and what is due; takes no records.
    async fn turn<S>(&mut self, consumer: &mut Consumer<S>) -> Result<(), Error> {
        while let Some(event) = consumer.poll() {
            self.kafka_event(consumer, event)?;
        }
        while let Ok(event) = self.events.try_recv() {
            self.flow.lane_event(event);
        }
        self.assign(consumer);
        self.ask_shards();
        self.go_back(consumer);
        self.seek(consumer);
        self.give_back(consumer);
        self.due(consumer).await;
        Ok(())
    }

    fn kafka_event<S>(&mut self, consumer: &mut Consumer<S>, event: Event) -> Result<(), Error> {
        match event {
            Event::Assigned(partitions) => {
                self.timers.plan = Some(Plan { partitions, due: Instant::now(), errand: None });
            }
            Event::Revoked { partitions, lost: false } => {
                self.unplan(consumer, &partitions);
                self.flow.revoke(partitions, Duration::from_millis(self.config.revoke_drain_ms));
            }
            Event::Revoked { partitions, lost: true } => {
                self.unplan(consumer, &partitions);
                self.flow.lose(&partitions);
                if let Err(error) = consumer.release(&partitions) {
                    tracing::warn!(%error, "cannot release lost partitions");
                }
            }
            Event::Committed(result) => {
                let outcome = if result.is_ok() { "done" } else { "failed" };
                self.flow.metrics.commits.with_label_values(&[outcome]).inc();
                self.flow.committing = false;
                match result {
                    Ok(left_out) => {
                        self.flow.metrics.left_out.inc_by(left_out as u64);
                        self.conditions.commits.ready();
                    }
                    Err(error) => {
                        tracing::warn!(%error, "commit failed, trying again");
                        self.conditions.commits.failing(error.to_string());
                        self.flow.partitions.uncommit();
                    }
                }
            }
            Event::Trouble(error) => {
                self.conditions.kafka.failing(error.to_string());
                self.timers.refresh.within(TICK * 10, Instant::now());
            }
            Event::Fatal(reason) => return Err(Error::Fatal(reason)),
        }
        Ok(())
    }

    /// Answers an assignment; the coordinator may need a second attempt.
    fn assign<S>(&mut self, consumer: &mut Consumer<S>) {
        let Some(plan) = &mut self.timers.plan else { return };
        let Some(errand) = &mut plan.errand else {
            if plan.due <= Instant::now() {
                plan.errand = Some(Errand::new(consumer.plan(&plan.partitions), consumer.bell()));
            }
            return;
        };
        let Some(answer) = errand.answer() else { return };
        plan.errand = None;
        let taken_up = answer.and_then(|mut planned| {
            planned.retain(|assigned| plan.partitions.contains(&assigned.partition));
            consumer.take_up(&planned).map(|()| planned)
        });
        match taken_up {
            Ok(planned) => {
                self.timers.plan = None;
                tracing::info!(partitions = planned.len(), "assigned");
                self.conditions.kafka.ready();
                for assigned in planned {
                    let topic = &assigned.partition.topic;
                    let priority = self.flow.topics.iter().position(|known| known == topic);
                    self.flow.partitions.assign(assigned, priority.unwrap_or(2));
                }
            }
            Err(error) => {
                self.conditions.kafka.failing(format!("cannot take partitions: {error}"));
                plan.due = Instant::now() + Duration::from_millis(500);
            }
        }
    }

    /// Drops revoked partitions from a pending assignment. librdkafka waits for an answer to both.
    fn unplan<S>(&mut self, consumer: &mut Consumer<S>, partitions: &[Partition]) {
        let timers = &mut self.timers;
        timers.seeks.forget(partitions);
        timers.reaches.forget(partitions);
        let Some(plan) = &mut timers.plan else { return };
        let (gone, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut plan.partitions).into_iter().partition(|p| partitions.contains(p));
        plan.partitions = left;
        if plan.partitions.is_empty() {
            timers.plan = None;
        }
        if gone.is_empty() {
            return;
        }
        if let Err(error) = consumer.decline(&gone) {
            tracing::warn!(%error, "cannot decline partitions");
        }
    }

    /// Asks the shards of a partition for their positions, when the partition is new here or one of them has
    /// forgotten something.
    fn ask_shards(&mut self) {
        let (shards, flow) = (self.mailboxes.shards(), &mut self.flow);
        let (queues, by_shard) = (&flow.queues, &flow.by_shard);
        for open in flow.partitions.iter_mut() {
            let assignment = Arc::clone(&open.assignment);
            if let Some(asked) = open.questions(shards) {
                let number = open.round.as_ref().map_or(0, |round| round.number);
                let asked = asked.into_iter().map(|shard| (shard, None));
                let missing = ask(queues, by_shard, &assignment, number, asked);
                open.asked(missing, Instant::now() + ANSWER_PATIENCE);
            }
        }
    }

    /// Raises the stored positions of shards whose repair is over.
    fn close_repairs(&mut self) {
        let flow = &mut self.flow;
        let (queues, by_shard) = (&flow.queues, &flow.by_shard);
        for open in flow.partitions.iter_mut() {
            let Some(shards) = open.closing() else { continue };
            let assignment = Arc::clone(&open.assignment);
            let lanes: HashSet<usize> =
                shards.iter().map(|(shard, _)| by_shard[usize::from(shard.get())]).collect();
            let round = open.close(lanes.len());
            let shards = shards.into_iter().map(|(shard, at)| (shard, Some(at)));
            ask(queues, by_shard, &assignment, round, shards);
        }
    }

    /// Rewinds partitions whose shards have forgotten something, as far as the log and mailboxes reach.
    fn go_back<S>(&mut self, consumer: &Consumer<S>) {
        let (now, bell) = (Instant::now(), consumer.bell());
        let ttl_ms = self.config.redis.ttl_seconds.saturating_mul(1000);
        for open in self.flow.partitions.iter_mut() {
            if !open.goes_back(now) {
                continue;
            }
            let redis = open.forgetful().and_then(|shard| self.mailboxes.redis_time(shard));
            let partition = open.assignment.partition.clone();
            let reach =
                self.timers.reaches.answer(&partition, (open.assignment.id, 0), &bell, || {
                    let now_ms = match redis {
                        Some(redis) => redis.us(now.into_std()) / 1000,
                        None => self.flow.outbox.clock.now_ms(),
                    };
                    let since_ms = i64::try_from(now_ms.saturating_sub(ttl_ms)).unwrap_or(i64::MAX);
                    consumer.reach(&partition, since_ms)
                });
            if let Some(reach) = reach {
                open.go_back(reach);
                self.flow.metrics.repairs.inc();
                let (topic, to) = (&*partition.topic, open.seek_to);
                let shards = open.repairing();
                tracing::warn!(
                    topic,
                    partition = partition.number,
                    shards,
                    ?to,
                    ?reach,
                    "redis has forgotten what shards confirmed, reading again"
                );
            }
        }
    }

    fn seek<S>(&mut self, consumer: &Consumer<S>) {
        for open in self.flow.partitions.iter_mut() {
            // Nothing more is taken of one that is being revoked.
            let Some(offset) = open.seek_to.filter(|_| !open.revoking) else { continue };
            let partition = &open.assignment.partition;
            let about = (open.assignment.id, offset);
            let ask = || consumer.seek(partition, offset);
            // A partition that was assigned a moment ago cannot seek yet; an error is retried.
            if self.timers.seeks.answer(partition, about, &consumer.bell(), ask).is_some() {
                open.seek_to = None;
            }
        }
    }

    /// Gives revoked partitions back once they are finished, or their time is over.
    fn give_back<S>(&mut self, consumer: &mut Consumer<S>) {
        let (now, flow) = (Instant::now(), &mut self.flow);
        for at in (0..flow.revocations.len()).rev() {
            let drained = flow.drained(&flow.revocations[at]);
            let revocation = &mut flow.revocations[at];
            let Some((errand, how)) = &mut revocation.commit else {
                if drained || revocation.deadline <= now {
                    let how = if drained { "drained" } else { "cut" };
                    let commits = flow.partitions.commits_of(&revocation.partitions);
                    let commit = consumer.commit_and_wait(commits, COMMIT_TIMEOUT);
                    revocation.commit = Some((Errand::new(commit, consumer.bell()), how));
                }
                continue;
            };
            let how = *how;
            let Some(committed) = errand.answer() else { continue };
            if let Err(error) = committed {
                tracing::warn!(%error, "cannot commit revoked partitions: their next owner repeats them");
            }
            let Revocation { partitions, .. } = flow.revocations.swap_remove(at);
            tracing::info!(partitions = partitions.len(), how, "gave partitions back");
            flow.metrics.revoked.with_label_values(&[how]).inc_by(partitions.len() as u64);
            for partition in &partitions {
                flow.partitions.remove(partition);
            }
            if let Err(error) = consumer.release(&partitions) {
                tracing::warn!(%error, "cannot release partitions");
            }
        }
    }

    /// Commits, compares topic ids, pings Redis, shows the state.
    async fn due<S>(&mut self, consumer: &mut Consumer<S>) {
        let now = Instant::now();
        if self.timers.commit <= now {
            self.timers.commit = now + Duration::from_millis(self.config.commit_interval_ms);
            if !self.flow.committing {
                self.commit(consumer);
            }
            self.close_repairs();
            self.flow.show(consumer);
        }
        self.look(consumer, now);
        self.refresh(consumer, now);
        self.look_for_topics();
        self.watch_redis(now).await;
    }

    fn refresh<S>(&mut self, consumer: &Consumer<S>, now: Instant) {
        let suspect = self.flow.partitions.iter().any(|open| open.suspect.is_some());
        let timers = &mut self.timers;
        let every = Duration::from_millis(self.config.topic_refresh_ms);
        if timers.ids.is_none() && timers.refresh.is_due(now, every, suspect) {
            timers.ids = Some(tokio::spawn(consumer.topic_ids()));
            timers.missing.get_or_insert_with(|| {
                tokio::spawn(consumer.missing_topics(self.config.kafka.topics.all()))
            });
        }
        let Some(ids) = timers.ids.take_if(|ids| ids.is_finished()) else { return };
        match ids.now_or_never() {
            Some(Ok(Ok(ids))) => {
                self.conditions.kafka.ready();
                let (recreated, dropped) = self.flow.partitions.compare(&ids);
                self.flow.uncount(&dropped);
                self.flow.metrics.recreated.inc_by(recreated as u64);
                if recreated > 0 {
                    tracing::warn!(
                        partitions = recreated,
                        "topic created anew, reading from its start"
                    );
                }
            }
            Some(Ok(Err(error))) => self.conditions.kafka.failing(error.to_string()),
            _ => {}
        }
    }

    fn commit<S>(&mut self, consumer: &Consumer<S>) {
        let commits = self.flow.partitions.take_commits();
        if commits.is_empty() {
            self.conditions.commits.ready();
        } else {
            consumer.commit(commits);
            self.flow.committing = true;
        }
    }

    /// Names missing topics in readiness: librdkafka reports no error for them.
    fn look_for_topics(&mut self) {
        let Some(missing) = self.timers.missing.take_if(|missing| missing.is_finished()) else {
            return;
        };
        // `refresh` reports whether a broker answers at all.
        let Some(Ok(Ok(missing))) = missing.now_or_never() else { return };
        self.flow.metrics.topics_missing.set(missing.len() as i64);
        if missing.is_empty() {
            self.conditions.topics.ready();
        } else {
            // Topics that are created now are found within a second.
            self.timers.refresh.within(MISSING_REFRESH, Instant::now());
            let topics = missing.join(", ");
            self.conditions.topics.failing(format!("kafka has no topic {topics}: create it"));
        }
    }

    /// Updates readiness: the loop, the oldest record, partitions that cannot be fetched, held records.
    fn look<S>(&mut self, consumer: &mut Consumer<S>, now: Instant) {
        if self.timers.look > now {
            return;
        }
        self.timers.look = now + LOOK;
        self.conditions.consumer.ready();
        let finished = std::mem::take(&mut self.flow.finished);
        let oldest = self.flow.oldest.look(&self.flow.partitions, now);
        self.flow.metrics.oldest_seconds.set(oldest.as_ref().map_or(0, |o| o.age.as_secs() as i64));
        match oldest {
            Some(oldest) if oldest.age > self.conditions.stalled_after => {
                self.conditions.records.failing(oldest.to_string());
                self.conditions.too_old = true;
            }
            oldest => {
                let moved = std::mem::take(&mut self.conditions.too_old);
                if finished || moved || oldest.is_none() {
                    self.conditions.records.ready();
                }
            }
        }
        let stuck = consumer.stuck();
        self.flow.metrics.partitions_stuck.set(stuck.len() as i64);
        match stuck.iter().min_by_key(|(partition, _)| *partition) {
            None => self.conditions.fetching.ready(),
            Some((Partition { topic, number }, Stuck { offset, cause, .. })) => {
                let offset =
                    offset.map_or_else(|| "an unknown offset".into(), |o| format!("offset {o}"));
                let others = match stuck.len() - 1 {
                    0 => String::new(),
                    more => format!("; and {more} more"),
                };
                let reason =
                    format!("{topic}/{number} cannot be fetched at {offset}: {cause}{others}");
                self.conditions.fetching.failing(reason);
            }
        }
        let held = self.producer.held();
        self.flow.metrics.produce_held.set(held.as_ref().map_or(0, |held| held.records as i64));
        match held {
            Some(Held { records, topic, reason, age }) if age > HELD_AFTER => {
                let age = age.as_secs();
                let reason =
                    format!("{records} records wait for {topic}, the oldest for {age} s: {reason}");
                self.conditions.producing.failing(reason);
            }
            Some(_) => {}
            None => self.conditions.producing.ready(),
        }
    }

    async fn watch_redis(&mut self, now: Instant) {
        let away = self.flow.away.count();
        if away > 0 {
            let reason = self.flow.away.reason();
            self.conditions.redis.failing(format!("{away} shards wait: {reason}"));
        }
        if self.timers.pong.is_none() && self.timers.ping <= now {
            self.timers.ping = now + Duration::from_secs(1);
            let mailboxes = self.mailboxes.clone();
            self.timers.pong = Some(tokio::spawn(async move {
                match timeout(Duration::from_secs(3), mailboxes.ping()).await {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some("redis does not answer".into()),
                }
            }));
            let available = self.handoff.any_available().await;
            self.flow.metrics.dispatchers.set(i64::from(available));
        }
        let Some(pong) = self.timers.pong.take_if(|pong| pong.is_finished()) else { return };
        match pong.now_or_never() {
            Some(Ok(None)) if away == 0 => self.conditions.redis.ready(),
            Some(Ok(Some(reason))) => self.conditions.redis.failing(reason),
            _ => {}
        }
    }

    /// Finishes the records that were taken, commits, leaves the group.
    async fn drain(
        mut self,
        mut consumer: Consumer<Draining>,
        deadline: Instant,
    ) -> Result<Stopped, Error> {
        tracing::info!(unfinished = self.flow.unfinished(), "draining");
        self.flow.stop_taking();
        // The last part of the time is for committing and leaving.
        let left = deadline.saturating_duration_since(Instant::now());
        let enough = deadline - (left / 3).min(COMMIT_TIMEOUT);
        while self.flow.unfinished() > 0 && Instant::now() < enough {
            self.turn(&mut consumer).await?;
            tokio::select! {
                Some(event) = self.events.recv() => self.flow.lane_event(event),
                () = sleep(TICK) => {}
            }
        }
        let cut = self.flow.unfinished();
        self.flow.partitions.uncommit();
        let commits = self.flow.partitions.take_commits();
        let patience = deadline.saturating_duration_since(Instant::now()).min(COMMIT_TIMEOUT);
        if let Err(error) = consumer.commit_and_wait(commits, patience).await {
            tracing::warn!(%error, "last commit failed: what it covers is delivered again");
        }
        // Ended readings: the lanes drop what is not finished, and end.
        self.flow.partitions.iter().for_each(|open| open.reading.end());
        let left = deadline.saturating_duration_since(Instant::now());
        let leaving = consumer.finish(left.max(Duration::from_millis(500)));
        let handoff = self.handoff.clone();
        let closing = self.close(deadline);
        let (done, unhanded, ()) = tokio::join!(leaving, handoff.flush(deadline), closing);
        if done == Done::Abandoned {
            tracing::warn!("left the group without its answer");
        }
        if unhanded > 0 {
            tracing::info!(unhanded, "pushes without answer: their timers are armed");
        }
        Ok(match cut {
            0 => Stopped::Clean,
            count => Stopped::Cut { what: "records".into(), count: count as u64 },
        })
    }

    /// Ends the lanes; events are heard until they have.
    async fn close(self, deadline: Instant) {
        let Self { flow, mut events, mut workers, producer, .. } = self;
        flow.queues.iter().for_each(|queue| queue.close());
        drop(flow);
        let ended = async {
            while events.recv().await.is_some() {}
            while workers.join_next().await.is_some() {}
        };
        let _ = tokio::time::timeout_at(deadline, ended).await;
        producer.flush(deadline).await;
    }
}

impl Conditions {
    fn new(config: &Config, context: &Context) -> Self {
        let refresh = Duration::from_millis(config.topic_refresh_ms);
        let kafka = context.stalled_after + refresh;
        Self {
            kafka: context.health.lapsing("kafka", "answer of a broker", kafka),
            redis: context.progress("redis", "answer"),
            consumer: context.progress("consumer", "poll"),
            records: context.progress("records", "record finished of those in flight"),
            topics: context.health.condition("topics"),
            fetching: context.health.condition("fetching"),
            producing: context.health.condition("producing"),
            commits: context.progress("commits", "commit"),
            stalled_after: context.stalled_after,
            too_old: false,
        }
    }
}

impl Timers {
    fn new(now: Instant) -> Self {
        Self {
            commit: now,
            refresh: Refresh::new(now),
            ping: now,
            look: now,
            ids: None,
            missing: None,
            pong: None,
            plan: None,
            seeks: Seeks::default(),
            reaches: Reaches::default(),
        }
    }
}

impl Flow {
    fn new<M: Mailboxes>(
        config: &Config,
        mailboxes: &M,
        outbox: Outbox,
        lane_events: mpsc::Sender<LaneEvent>,
        metrics: Metrics,
        workers: &mut JoinSet<()>,
    ) -> Result<Self, Error> {
        let window = &config.window;
        let retry = config.retry().map_err(Error::Config)?;
        let away = Arc::new(Away::default());
        let count = mailboxes.lanes().max(1) * window.calls_per_lane;
        let queues: Vec<Arc<Queue>> = (0..count).map(|_| Arc::default()).collect();
        let shared = Shared {
            mailboxes: mailboxes.clone(),
            outbox: outbox.clone(),
            events: lane_events.clone(),
            window: window.clone(),
            group_max: config.redis.accept_batch_max,
            retry,
            away: Arc::clone(&away),
            metrics: metrics.clone(),
        };
        for queue in &queues {
            workers.spawn(Lane::new(shared.clone(), Arc::clone(queue)).run());
        }
        // Fixed for good, so that a shard stays in order even while masters change.
        let place = |shard: barid_core::Shard| {
            let within = usize::from(shard.get()) % window.calls_per_lane;
            (mailboxes.lane_of(shard) * window.calls_per_lane + within) % count
        };
        let by_shard = mailboxes.shards().all().map(place).collect();
        let topics: Vec<Arc<str>> =
            config.kafka.topics.pushes().iter().map(|topic| Arc::from(*topic)).collect();
        // Every label is exported from the start, as zero.
        topics.iter().for_each(|topic| drop(metrics.taken.with_label_values(&[topic])));
        Ok(Self {
            intake: Intake::new(config, mailboxes.shards(), metrics.traces_ignored.clone()),
            partitions: Partitions::new(mailboxes.shards()),
            revocations: Vec::new(),
            queues,
            by_shard,
            lane_messages_max: window.lane_messages_max,
            away_messages_max: window
                .away_messages_max
                .min(window.records_max / (2 * count))
                .max(1),
            skipped_records_max: window.skipped_records_max,
            skips: HashMap::new(),
            skipped: 0,
            skips_full: false,
            records: [0; 3],
            bytes: [0; 3],
            records_max: window.records_max,
            bytes_max: window.bytes_max,
            at_bounds: [[false; 2]; 3],
            weights: window.weights,
            outbox,
            lane_events,
            away,
            topics,
            metrics,
            oldest: OldestWatch::default(),
            finished: false,
            committing: false,
        })
    }

    fn lane_event(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Finished(flights) => {
                for flight in &flights {
                    self.partitions.finish(flight);
                }
                self.uncount(&flights);
                self.finished = true;
            }
            LaneEvent::Gap { reading, shard, back_to } => {
                let dropped = self.partitions.gap(&reading, shard, back_to);
                self.uncount(&dropped);
            }
            LaneEvent::Answered(answer) => {
                let dropped = self.partitions.answered(&answer);
                self.uncount(&dropped);
            }
        }
    }

    /// Takes a turn's records of each priority, as far as there is room; how many.
    fn fill(&mut self, log: &mut impl Log) -> usize {
        self.take_skipped();
        self.admit_stalled();
        let mut taken = 0;
        for priority in 0..self.weights.len() {
            let full = self.bytes[priority] >= self.bytes_max;
            self.stalled(priority, 0, "bytes", full);
            if full {
                continue;
            }
            let room = self.records_max.saturating_sub(self.records[priority]);
            self.stalled(priority, 1, "records", room == 0);
            let max = room.min(self.weights[priority] * TURN);
            let mut records = Vec::new();
            let wants = |p: &Partition| {
                self.partitions.get(p).is_some_and(|open| open.wants())
                    && self.skips.get(p).is_none_or(|skips| !skips.returning)
            };
            if max > 0 {
                taken += log.take(priority, max, wants, &mut records);
            }
            records.into_iter().for_each(|record| self.taken(record));
        }
        taken
    }

    /// Counts a bound of a priority when it is reached, not for as long as it is.
    fn stalled(&mut self, priority: usize, bound: usize, limit: &str, now: bool) {
        let before = std::mem::replace(&mut self.at_bounds[priority][bound], now);
        if now && !before {
            self.metrics.stalls.with_label_values(&[limit]).inc();
        }
    }

    fn taken(&mut self, record: barid_bus::consumer::Record) {
        let partition = Partition { topic: Arc::clone(&record.topic), number: record.partition };
        let Some(open) = self.partitions.get_mut(&partition) else { return };
        // Records behind one whose offset went back are taken again later.
        if open.suspect.is_some() || !open.take(record.offset, record.leader_epoch) {
            return;
        }
        let now_ms = self.outbox.clock.now_ms();
        self.metrics.taken.with_label_values(&[&record.topic]).inc();
        let offset = record.offset;
        let reading = (open.assignment.id, open.reading.number());
        let again = |skips: &mut Skips| skips.of(reading).is_again(offset);
        let told =
            open.reading.was_finished(offset) || self.skips.get_mut(&partition).is_some_and(again);
        match self.intake.take(&open.reading, record, now_ms) {
            // Its dead letter and its receipt were written the first time.
            Taken::Refused(..) if told => {
                open.ledger.finish(offset, []);
            }
            Taken::Refused(flight, refusal) => {
                self.outbox.tracer.saw(Sighting {
                    id: &refusal.id,
                    app: &refusal.app,
                    how: refusal.code.as_str(),
                    ..flight.sighting("refused", &refusal.user, now_ms * 1000)
                });
                self.count(&flight);
                self.refuse(flight, refusal, now_ms);
            }
            Taken::Parcels(parcels) => {
                if let Some(parcel) = parcels.first() {
                    let flight = Arc::clone(&parcel.flight);
                    self.outbox.tracer.saw(flight.sighting("taken", "", now_ms * 1000));
                    self.count(&flight);
                }
                self.admit(&partition, parcels);
            }
        }
    }

    /// Queues a record's parcels if every lane has room; else it waits, and its partition with it.
    fn admit(&mut self, partition: &Partition, parcels: Vec<Parcel>) {
        let parcels = self.without_accepted(partition, parcels);
        let waits = self.partitions.get(partition).is_none_or(|open| !open.stalled.is_empty());
        let left = if waits { Some(parcels) } else { self.try_admit(partition, parcels) };
        let (Some(parcels), Some(open)) = (left, self.partitions.get_mut(partition)) else {
            return;
        };
        if parcels.is_empty() {
            return;
        }
        if open.stalled.is_empty() {
            self.metrics.stalls.with_label_values(&["lane"]).inc();
        }
        open.stalled.push_back(parcels);
    }

    fn admit_stalled(&mut self) {
        let stalled = self.partitions.iter().filter(|open| !open.stalled.is_empty());
        let partitions: Vec<Partition> =
            stalled.map(|open| open.assignment.partition.clone()).collect();
        for partition in partitions {
            while let Some(parcels) =
                self.partitions.get_mut(&partition).and_then(|open| open.stalled.pop_front())
            {
                if let Some(parcels) = self.try_admit(&partition, parcels) {
                    if let Some(open) = self.partitions.get_mut(&partition) {
                        open.stalled.push_front(parcels);
                    }
                    break;
                }
            }
        }
    }

    /// Queues parcels of a record, except those that are left in the log for a master that is away. Returns
    /// all of them if a lane has no room.
    fn try_admit(&mut self, partition: &Partition, parcels: Vec<Parcel>) -> Option<Vec<Parcel>> {
        let (Some(first), Some(open)) = (parcels.first(), self.partitions.get(partition)) else {
            return None;
        };
        let (offset, flight) = (first.flight.record.offset, Arc::clone(&first.flight));
        let priority = open.assignment.priority;
        let reading = (open.assignment.id, open.reading.number());
        let full = self.skipped >= self.skipped_records_max;
        if full && !self.skips_full {
            self.metrics.stalls.with_label_values(&["skipped"]).inc();
        }
        self.skips_full = full;
        // Only while other shards can be served.
        let some_away = self.away.count();
        let some_live = some_away < self.by_shard.len();
        let much = self.bytes[priority] >= self.bytes_max / 2;
        let skips = self.skips.entry(partition.clone()).or_default().of(reading);
        let leaves = |parcel: &Parcel| {
            let load = self.queues[self.by_shard[usize::from(parcel.shard.get())]].load();
            skips.blocks(parcel.shard)
                || (some_live
                    && (load >= self.away_messages_max || much)
                    && self.away.is_failing(parcel.shard))
        };
        let (left, queued): (Vec<Parcel>, Vec<Parcel>) = parcels.into_iter().partition(leaves);
        let room = has_room(&self.queues, &self.by_shard, self.lane_messages_max, &queued);
        if !room || (full && !left.is_empty()) {
            let mut parcels = [left, queued].concat();
            parcels.sort_by_key(|parcel| parcel.message.position);
            return Some(parcels);
        }
        if !left.is_empty() {
            self.skipped += 1;
            skips.leave(offset, left.iter().map(|parcel| parcel.shard));
            if !queued.is_empty() {
                skips.leave_part(Arc::clone(&flight), left.len());
            }
            // This flight is never finished: its left-out messages are taken again as another one.
            self.uncount(&[flight]);
        }
        enqueue(&self.queues, &self.by_shard, priority, queued);
        None
    }

    /// For a record that is read again for shards that were away: finishes the messages of other shards.
    fn without_accepted(&mut self, partition: &Partition, parcels: Vec<Parcel>) -> Vec<Parcel> {
        let Some(open) = self.partitions.get(partition) else { return parcels };
        let reading = (open.assignment.id, open.reading.number());
        let Some(skips) = self.skips.get_mut(partition) else { return parcels };
        let skips = skips.of(reading);
        let (wanted, done): (Vec<Parcel>, Vec<Parcel>) = parcels
            .into_iter()
            .partition(|parcel| skips.wants(parcel.message.position.offset, parcel.shard));
        let finished = done.into_iter().filter(|parcel| parcel.flight.part_done());
        let finished: Vec<Arc<Flight>> = finished.map(|parcel| parcel.flight).collect();
        for flight in &finished {
            self.partitions.finish(flight);
        }
        self.uncount(&finished);
        wanted
    }

    /// Reads again what was left in the log for masters that are back.
    fn take_skipped(&mut self) {
        self.skips.retain(|partition, _| self.partitions.get(partition).is_some());
        let others_away = self.away.count() > 0;
        let mut dropped = Vec::new();
        for open in self.partitions.iter_mut() {
            let Some(skips) = self.skips.get_mut(&open.assignment.partition) else { continue };
            let skips = skips.of((open.assignment.id, open.reading.number()));
            skips.returning = skips.records() > 0
                && !open.revoking
                && open.seek_to.is_none()
                && open.suspect.is_none()
                && open.round.is_none()
                && !open.reading.ended()
                && !skips.shards().any(|shard| self.away.is_failing(shard));
            let waiting = skips.records() + open.stalled.len();
            let drained = skips.is_settled() && open.ledger.open() == waiting;
            if !skips.returning || (!drained && !others_away) {
                continue;
            }
            // Not before: the master may be away again in the next turn, which would take what lies behind.
            dropped.extend(open.drop_stalled());
            let count = skips.records();
            let again = open.ledger.next().and_then(|next| skips.read_again(next));
            let Some(mut from) = again else { continue };
            if !drained {
                // Messages for another master that is away would never be finished: everything unfinished is
                // taken again; what was accepted is answered "accepted before".
                from = from.min(open.ledger.committable().unwrap_or(from));
                open.reading.end();
                open.reading = open.reading.repairing(HashMap::new(), from);
            }
            tracing::info!(
                topic = &*open.assignment.partition.topic,
                partition = open.assignment.partition.number,
                from,
                records = count,
                "masters are back, reading what was left for them"
            );
            open.read_from(from);
        }
        self.uncount(&dropped);
        self.skipped = self.skips.values().map(Skips::records).sum();
        self.metrics.skipped.set(self.skipped as i64);
    }

    /// A refused record becomes a dead letter and a receipt; the partition goes on (P6).
    fn refuse(&self, flight: Arc<Flight>, refusal: Refusal, now_ms: u64) {
        self.metrics.refused.with_label_values(&[refusal.code.as_str()]).inc();
        let (outbox, events) = (self.outbox.clone(), self.lane_events.clone());
        // Bounded: the flight counts in the window until this is done.
        tokio::spawn(async move {
            let (code, reason) = (refusal.code.as_str(), refusal.reason.as_str());
            outbox.dead.write(&DeadLetter { record: &flight.record, code, reason }).await;
            let receipt = Receipt {
                id: refusal.id.clone(),
                app: refusal.app.clone(),
                ..flight.refusal(&refusal.user, code, reason, now_ms)
            };
            outbox.receipts.tell(&receipt).await;
            let _ = events.send(LaneEvent::Finished(vec![flight])).await;
        });
    }

    fn count(&mut self, flight: &Flight) {
        let priority = flight.reading.assignment.priority;
        self.records[priority] += 1;
        self.bytes[priority] += flight.bytes;
    }

    fn uncount(&mut self, flights: &[Arc<Flight>]) {
        for flight in flights {
            let priority = flight.reading.assignment.priority;
            self.records[priority] = self.records[priority].saturating_sub(1);
            self.bytes[priority] = self.bytes[priority].saturating_sub(flight.bytes);
        }
    }

    fn revoke(&mut self, partitions: Vec<Partition>, drain: Duration) {
        for partition in &partitions {
            self.stop(partition);
        }
        let deadline = Instant::now() + drain;
        self.revocations.push(Revocation { partitions, deadline, commit: None });
    }

    fn lose(&mut self, partitions: &[Partition]) {
        tracing::warn!(partitions = partitions.len(), "partitions lost");
        self.metrics.revoked.with_label_values(&["lost"]).inc_by(partitions.len() as u64);
        for partition in partitions {
            self.stop(partition);
            self.partitions.remove(partition);
        }
        for revocation in &mut self.revocations {
            revocation.partitions.retain(|partition| !partitions.contains(partition));
        }
        self.revocations.retain(|revocation| !revocation.partitions.is_empty());
    }

    /// Records under way. What was left in the log for a master is not.
    fn unfinished(&self) -> usize {
        self.partitions.unfinished().saturating_sub(self.skipped)
    }

    fn stop(&mut self, partition: &Partition) {
        let Some(open) = self.partitions.get_mut(partition) else { return };
        open.revoking = true;
        let dropped = open.drop_stalled();
        self.uncount(&dropped);
    }

    fn stop_taking(&mut self) {
        let all: Vec<Partition> =
            self.partitions.iter().map(|open| open.assignment.partition.clone()).collect();
        all.iter().for_each(|partition| self.stop(partition));
    }

    fn drained(&self, revocation: &Revocation) -> bool {
        let open =
            revocation.partitions.iter().filter_map(|partition| self.partitions.get(partition));
        let skipped = revocation.partitions.iter().filter_map(|p| self.skips.get(p));
        let skipped = skipped.map(Skips::records).sum::<usize>();
        open.map(|open| open.ledger.open()).sum::<usize>() <= skipped
    }

    fn show<S>(&self, consumer: &Consumer<S>) {
        for (priority, topic) in self.topics.iter().enumerate() {
            let metrics = &self.metrics;
            metrics.in_flight.with_label_values(&[topic]).set(self.records[priority] as i64);
            metrics.in_flight_bytes.with_label_values(&[topic]).set(self.bytes[priority] as i64);
        }
        let (mut held, mut paused, mut lag, mut repairing) = ([0; 3], 0, 0, 0);
        for open in self.partitions.iter() {
            held[open.assignment.priority] += 1;
            repairing += open.repairing();
            let full = self.records[open.assignment.priority] >= self.records_max;
            paused += i64::from(!open.wants() || full);
            if let Some(committed) = open.committed() {
                lag += (consumer.high_watermark(&open.assignment.partition) - committed).max(0);
            }
        }
        for (topic, held) in self.topics.iter().zip(held) {
            self.metrics.partitions.with_label_values(&[topic]).set(held);
        }
        self.metrics.assignor_missing.set(i64::from(!consumer.is_range()));
        self.metrics.paused.set(paused);
        self.metrics.lag.set(lag);
        self.metrics.repairing.set(repairing as i64);
    }
}

fn has_room(queues: &[Arc<Queue>], by_shard: &[usize], max: usize, parcels: &[Parcel]) -> bool {
    parcels.iter().all(|p| queues[by_shard[usize::from(p.shard.get())]].load() < max)
}

fn enqueue(queues: &[Arc<Queue>], by_shard: &[usize], priority: usize, parcels: Vec<Parcel>) {
    for parcel in parcels {
        queues[by_shard[usize::from(parcel.shard.get())]].push(priority, parcel);
    }
}

/// Asks shards of an assignment, each by its lane; how many lanes will answer.
fn ask(
    queues: &[Arc<Queue>],
    by_shard: &[usize],
    assignment: &Arc<Assignment>,
    round: u64,
    shards: impl Iterator<Item = (barid_core::Shard, Option<LogPosition>)>,
) -> usize {
    let mut by_lane: HashMap<usize, Vec<_>> = HashMap::new();
    for (shard, raise) in shards {
        by_lane.entry(by_shard[usize::from(shard.get())]).or_default().push((shard, raise));
    }
    let lanes = by_lane.len();
    for (lane, shards) in by_lane {
        queues[lane].ask(Question { assignment: Arc::clone(assignment), round, shards });
    }
    lanes
}

/// Hands on in order; what waits here is bounded by the channel.
async fn hand_on<H: Handoff>(
    handoff: H,
    mut pushes: mpsc::Receiver<(barid_core::Shard, barid_wire::internal::Push)>,
) {
    while let Some((shard, push)) = pushes.recv().await {
        handoff.push(shard, push).await;
    }
}

#[cfg(test)]
mod tests;
