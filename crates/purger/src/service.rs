//! The purger's loop. It takes records while there is room, handles events of Kafka and the lanes, commits, and
//! answers the consumer group. A turn never waits: requests that may take longer run as errands, whose answers the
//! loop polls.

use std::sync::Arc;
use std::time::Duration;

use barid_bus::consumer::{Consumer, Done, Draining, Event};
use barid_bus::{DeadLetters, Error as KafkaError, Producer, Receipts};
use barid_core::SystemClock;
use barid_runtime::{Context, Shutdown, Spawner, Stopped, Tasks};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::client_watch::ClientWatch;
use crate::config::Config;
use crate::errands::Errand;
use crate::error::Error;
use crate::lanes::{Event as LaneEvent, HandOn, Outbox, Shared};
use crate::membership::{COMMIT_TIMEOUT, Membership};
use crate::metrics::Metrics;
use crate::pipeline::Pipeline;
use crate::ports::{Handoff, Mailboxes};
use crate::readiness::Readiness;
use crate::repairs::{self, Repairs};
use crate::topics::TopicWatch;

/// How long the loop sleeps if no event wakes it.
const TICK: Duration = Duration::from_millis(50);
/// How soon the topics' ids are requested after an error of Kafka.
const TROUBLE_REFRESH: Duration = Duration::from_millis(500);
/// How often missing topics are requested.
const MISSING_REFRESH: Duration = Duration::from_secs(1);
/// Bound of the lanes' events that are queued for the loop.
const EVENTS_MAX: usize = 1024;

/// A purger.
pub struct Service<M, H> {
    config: Config,
    context: Context,
    handoff: H,
    producer: Producer,
    hand_on: HandOn,
    /// The lanes' reports.
    events: mpsc::Receiver<LaneEvent>,
    pipeline: Pipeline<M>,
    membership: Membership,
    repairs: Repairs,
    topics: TopicWatch,
    client: ClientWatch,
    readiness: Readiness,
    metrics: Metrics,
    commit_due: Instant,
    /// A commit is under way.
    committing: bool,
    tasks: Tasks,
}

impl<M: Mailboxes, H: Handoff> Service<M, H> {
    /// Starts the lanes. [`Self::work`] starts to consume.
    ///
    /// # Errors
    /// The configuration is invalid, or a metric is registered already.
    pub fn start(
        config: Config,
        mailboxes: M,
        handoff: H,
        context: Context,
    ) -> Result<Self, Error> {
        config.check().map_err(Error::Config)?;
        let metrics = Metrics::new(&context.metrics)?;
        let producer = Producer::new(&config.kafka)?;
        let (lane_events, events) = mpsc::channel(EVENTS_MAX);
        let wait = Duration::from_millis(config.window.handoff_wait_ms);
        let tasks = Tasks::new(&context);
        let hand_on = HandOn::new(
            handoff.clone(),
            config.window.handoff_max,
            wait,
            metrics.clone(),
            tasks.spawner(),
        );
        let dropped = metrics.receipts_dropped.clone();
        let dead_dropped = metrics.dead_letters_dropped.clone();
        let outbox = Outbox {
            receipts: Receipts::new(producer.clone(), &config.kafka, dropped),
            dead: DeadLetters::new(producer.clone(), &config.kafka, dead_dropped),
            hand_on: hand_on.clone(),
            clock: Arc::new(SystemClock),
            metrics: metrics.clone(),
            tracer: context.tracer.clone(),
            tasks: tasks.spawner(),
        };
        let shared = Shared {
            mailboxes,
            outbox,
            events: lane_events,
            window: config.window.clone(),
            group_max: config.redis.accept_batch_max,
            retry: config.retry().map_err(Error::Config)?,
            away: Arc::default(),
            metrics: metrics.clone(),
        };
        let now = Instant::now();
        let drain = Duration::from_millis(config.revoke_drain_ms);
        let refresh = Duration::from_millis(config.topic_refresh_ms);
        Ok(Self {
            events,
            pipeline: Pipeline::start(&config, shared),
            membership: Membership::new(drain, metrics.clone()),
            repairs: Repairs::new(config.redis.ttl_seconds.saturating_mul(1000), metrics.clone()),
            topics: TopicWatch::new(config.kafka.topics.of_purgers(), refresh, now),
            readiness: Readiness::new(&config, &context, metrics.clone()),
            client: ClientWatch::default(),
            metrics,
            commit_due: now,
            committing: false,
            config,
            context,
            handoff,
            producer,
            hand_on,
            tasks,
        })
    }

    /// Starts further tasks of the role.
    pub fn spawner(&self) -> Spawner {
        self.tasks.spawner()
    }

    /// Runs until draining begins, then finishes the records in flight and leaves the group.
    ///
    /// # Errors
    /// The consumer cannot continue.
    pub async fn work(mut self) -> Result<Stopped, Error> {
        let topics = self.config.kafka.topics.pushes();
        let mut consumer = Consumer::start(&self.config.kafka, &topics)?;
        let (shutdown, bell) = (self.context.shutdown.clone(), consumer.bell());
        while !shutdown.is_draining() {
            self.turn(&mut consumer)?;
            if self.pipeline.fill(&mut consumer) > 0 {
                self.client.answered();
                // Lets the lanes run.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                () = bell.notified() => {}
                Some(event) = self.events.recv() => self.pipeline.lane_event(event),
                () = sleep(TICK) => {}
                () = shutdown.draining() => {}
            }
        }
        self.drain(consumer.drain(), shutdown).await
    }

    /// Handles events and everything that is due; takes no records.
    fn turn<S>(&mut self, consumer: &mut Consumer<S>) -> Result<(), Error> {
        while let Some(event) = consumer.poll() {
            self.kafka_event(consumer, event)?;
        }
        while let Ok(event) = self.events.try_recv() {
            self.pipeline.lane_event(event);
        }
        self.join(consumer);
        self.repairs.advance(consumer, &mut self.pipeline);
        self.membership.give_back(consumer, &mut self.pipeline);
        let now = Instant::now();
        self.commit(consumer, now);
        self.look(consumer, now);
        self.watch_topics(consumer, now);
        let ask =
            || Errand::new(barid_bus::describe_topics_anew(&self.config.kafka), consumer.bell());
        self.client.broken(now, ask).map_or(Ok(()), |silent| Err(Error::BrokenClient(silent)))
    }

    fn kafka_event<S>(&mut self, consumer: &mut Consumer<S>, event: Event) -> Result<(), Error> {
        match event {
            Event::Assigned(partitions) => self.membership.assigned(partitions),
            Event::Revoked { partitions, lost } => {
                self.repairs.forget(&partitions);
                if lost {
                    self.membership.lost(consumer, &mut self.pipeline, &partitions);
                } else {
                    self.membership.revoked(consumer, &mut self.pipeline, partitions);
                }
            }
            Event::Committed(result) => self.committed(result),
            Event::Trouble(error) => {
                self.readiness.kafka.failing(error.to_string());
                self.topics.within(TROUBLE_REFRESH, Instant::now());
            }
            Event::Fatal(reason) => return Err(Error::Fatal(reason)),
        }
        Ok(())
    }

    fn join<S>(&mut self, consumer: &mut Consumer<S>) {
        match self.membership.join(consumer, &mut self.pipeline) {
            None => {}
            Some(Ok(())) => self.readiness.kafka.ready(),
            Some(Err(error)) => {
                self.readiness.kafka.failing(format!("cannot take partitions: {error}"));
            }
        }
    }

    /// Commits finished records, completes repairs, and updates the metrics.
    fn commit<S>(&mut self, consumer: &Consumer<S>, now: Instant) {
        if self.commit_due > now {
            return;
        }
        self.commit_due = now + Duration::from_millis(self.config.commit_interval_ms);
        if !self.committing {
            let commits = self.pipeline.partitions.begin_commits();
            if commits.is_empty() {
                self.readiness.commits.ready();
            } else {
                consumer.commit(commits);
                self.committing = true;
            }
        }
        repairs::close(&mut self.pipeline);
        self.pipeline.show(|partition| consumer.high_watermark(partition));
        self.metrics.assignor_missing.set(i64::from(!consumer.is_range()));
    }

    fn committed(&mut self, result: Result<usize, KafkaError>) {
        let outcome = if result.is_ok() { "done" } else { "failed" };
        self.metrics.commits.with_label_values(&[outcome]).inc();
        self.committing = false;
        match result {
            Ok(left_out) => {
                self.client.answered();
                self.metrics.left_out.inc_by(left_out as u64);
                self.readiness.commits.ready();
            }
            Err(error) => {
                tracing::warn!(%error, "commit failed, repeating it");
                self.readiness.commits.failing(error.to_string());
                self.pipeline.partitions.uncommit();
            }
        }
    }

    fn look<S>(&mut self, consumer: &mut Consumer<S>, now: Instant) {
        if self.readiness.is_due(now) {
            self.pipeline.lanes.follow_masters();
            let finished = self.pipeline.has_finished();
            let partitions = &self.pipeline.partitions;
            self.readiness.update(partitions, finished, consumer, &self.producer, now);
        }
        let lanes = &self.pipeline.lanes;
        self.metrics.dispatchers.set(self.handoff.any_available().into());
        self.readiness.watch_redis(lanes.mailboxes(), lanes.away(), now);
    }

    fn watch_topics<S>(&mut self, consumer: &Consumer<S>, now: Instant) {
        self.topics.ask(consumer, self.pipeline.partitions.is_any_suspect(), now);
        match self.topics.ids() {
            None => {}
            Some(Ok(ids)) => {
                self.client.answered();
                self.readiness.kafka.ready();
                let partitions = self.pipeline.compare_topics(&ids);
                if partitions > 0 {
                    tracing::warn!(partitions, "topic was recreated, reading it from its start");
                }
            }
            Some(Err(error)) => {
                self.client.failed(now);
                self.readiness.kafka.failing(error.to_string());
            }
        }
        // An error is reported by the request for the ids, too.
        if let Some(Ok(missing)) = self.topics.missing() {
            self.missing_topics(&missing, now);
        }
    }

    /// Fails readiness for missing topics, for which librdkafka reports no error.
    fn missing_topics(&mut self, missing: &[String], now: Instant) {
        self.metrics.topics_missing.set(missing.len() as i64);
        if missing.is_empty() {
            self.readiness.topics.ready();
        } else {
            // Finds a topic within a second of its creation.
            self.topics.within(MISSING_REFRESH, now);
            let topics = missing.join(", ");
            self.readiness.topics.failing(format!("kafka has no topic {topics}: create it"));
        }
    }

    /// Finishes the records in flight, commits, and leaves the group.
    async fn drain(
        mut self,
        mut consumer: Consumer<Draining>,
        shutdown: Shutdown,
    ) -> Result<Stopped, Error> {
        tracing::info!(unfinished = self.pipeline.unfinished(), "draining");
        self.pipeline.stop_all();
        // Reserves time for the last commit and for leaving.
        let left = || shutdown.deadline().saturating_duration_since(Instant::now());
        let reserve = (left() / 3).min(COMMIT_TIMEOUT);
        while self.pipeline.unfinished() > 0 && left() > reserve {
            self.turn(&mut consumer)?;
            tokio::select! {
                Some(event) = self.events.recv() => self.pipeline.lane_event(event),
                () = sleep(TICK) => {}
            }
        }
        let cut = self.pipeline.unfinished();
        self.pipeline.partitions.uncommit();
        let commits = self.pipeline.partitions.begin_commits();
        let committing = consumer.commit_and_wait(commits, left().min(COMMIT_TIMEOUT));
        match shutdown.cut(Duration::ZERO, committing).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::warn!(%error, "last commit failed: its records will be read again");
            }
            None => tracing::warn!("last commit was cut off: its records will be read again"),
        }
        // The lanes drop the records of readings that have ended, and end.
        self.pipeline.partitions.iter().for_each(|open| open.reading.end());
        let leaving = consumer.finish(left().max(Duration::from_millis(500)));
        let (handoff, deadline) = (self.handoff.clone(), shutdown.deadline());
        let closing = shutdown.cut(Duration::ZERO, self.close(deadline));
        let (done, _) = tokio::join!(leaving, closing);
        // The lanes and the hand-on have ended, so no further pushes are queued.
        let flushing = shutdown.cut(Duration::ZERO, handoff.flush(deadline));
        let unhanded = flushing.await.unwrap_or_default();
        if done == Done::Abandoned {
            tracing::warn!("left the group without waiting for its answer");
        }
        if unhanded > 0 {
            tracing::info!(unhanded, "pushes were not answered: their retry timers are armed");
        }
        Ok(match cut {
            0 => Stopped::Clean,
            count => Stopped::Cut { what: "records".into(), count: count as u64 },
        })
    }

    /// Ends the lanes, and then the hand-on.
    async fn close(self, deadline: Instant) {
        let Self { pipeline, mut events, producer, hand_on, tasks, .. } = self;
        pipeline.close();
        let ended = async {
            // The channel closes once all lanes have ended.
            while events.recv().await.is_some() {}
            hand_on.close();
            tasks.finished().await;
        };
        let _ = tokio::time::timeout_at(deadline, ended).await;
        producer.flush(deadline).await;
    }
}
