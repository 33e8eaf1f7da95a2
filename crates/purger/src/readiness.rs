//! The conditions of `/readyz`, and the periodic checks that set them.

use std::time::Duration;

use barid_bus::consumer::{Consumer, Partition};
use barid_bus::{Held, Producer, Stuck};
use barid_runtime::{Condition, Context};
use futures::FutureExt as _;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::config::Config;
use crate::lanes::Away;
use crate::metrics::Metrics;
use crate::oldest::OldestWatch;
use crate::partitions::Partitions;
use crate::ports::Mailboxes;

/// Time between two checks.
const LOOK: Duration = Duration::from_millis(250);
/// Time between two pings of Redis.
const PING: Duration = Duration::from_secs(1);
/// How long Redis may take to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// If receipts or dead letters wait longer than this, readiness fails.
const HELD_AFTER: Duration = Duration::from_secs(10);

/// The conditions, and the state that they are derived from.
pub struct Readiness {
    /// A broker answers.
    pub kafka: Condition,
    /// Every topic exists.
    pub topics: Condition,
    /// Finished records are committed.
    pub commits: Condition,
    redis: Condition,
    /// The loop runs.
    consumer: Condition,
    /// Records in flight are finished.
    records: Condition,
    /// Every partition held can be read.
    fetching: Condition,
    /// Kafka accepts receipts and dead letters.
    producing: Condition,
    /// How long a record may be in flight.
    stalled_after: Duration,
    /// At the last check, a record was in flight for longer.
    too_old: bool,
    oldest: OldestWatch,
    look: Instant,
    ping: Instant,
    /// The ping under way; it returns why Redis did not answer.
    pong: Option<JoinHandle<Option<String>>>,
    metrics: Metrics,
}

impl Readiness {
    /// Adds the conditions, which fail as `starting`.
    pub fn new(config: &Config, context: &Context, metrics: Metrics) -> Self {
        let refresh = Duration::from_millis(config.topic_refresh_ms);
        let kafka = context.stalled_after + refresh;
        let now = Instant::now();
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
            oldest: OldestWatch::default(),
            look: now,
            ping: now,
            pong: None,
            metrics,
        }
    }

    /// Whether [`Self::update`] is due.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let due = self.look <= now;
        if due {
            self.look = now + LOOK;
        }
        due
    }

    /// Updates the conditions of the loop, the oldest record, fetching and producing. `finished`: records were
    /// finished since the last check.
    pub fn update<S>(
        &mut self,
        partitions: &Partitions,
        finished: bool,
        consumer: &mut Consumer<S>,
        producer: &Producer,
        now: Instant,
    ) {
        self.consumer.ready();
        self.look_at_records(partitions, finished, now);
        self.look_at_fetching(consumer);
        self.look_at_producing(producer.held());
    }

    fn look_at_records(&mut self, partitions: &Partitions, finished: bool, now: Instant) {
        let oldest = self.oldest.look(partitions, now);
        self.metrics.oldest_seconds.set(oldest.as_ref().map_or(0, |o| o.age.as_secs() as i64));
        match oldest {
            Some(oldest) if oldest.age > self.stalled_after => {
                self.records.failing(oldest.to_string());
                self.too_old = true;
            }
            oldest => {
                let moved = std::mem::take(&mut self.too_old);
                if finished || moved || oldest.is_none() {
                    self.records.ready();
                }
            }
        }
    }

    fn look_at_fetching<S>(&self, consumer: &mut Consumer<S>) {
        let stuck = consumer.stuck();
        self.metrics.partitions_stuck.set(stuck.len() as i64);
        match stuck.iter().min_by_key(|(partition, _)| *partition) {
            None => self.fetching.ready(),
            Some((Partition { topic, number }, Stuck { offset, cause, .. })) => {
                let offset =
                    offset.map_or_else(|| "an unknown offset".into(), |o| format!("offset {o}"));
                let others = match stuck.len() - 1 {
                    0 => String::new(),
                    more => format!("; and {more} more"),
                };
                let reason =
                    format!("{topic}/{number} cannot be fetched at {offset}: {cause}{others}");
                self.fetching.failing(reason);
            }
        }
    }

    fn look_at_producing(&self, held: Option<Held>) {
        self.metrics.produce_held.set(held.as_ref().map_or(0, |held| held.records as i64));
        match held {
            Some(Held { records, topic, reason, age }) if age > HELD_AFTER => {
                let age = age.as_secs();
                let reason =
                    format!("{records} records wait for {topic}, the oldest for {age} s: {reason}");
                self.producing.failing(reason);
            }
            Some(_) => {}
            None => self.producing.ready(),
        }
    }

    /// Handles the answer to the last ping of Redis, and sends the next.
    pub fn watch_redis<M: Mailboxes>(&mut self, mailboxes: &M, away: &Away, now: Instant) {
        let shards_away = away.count();
        if shards_away > 0 {
            self.redis.failing(format!("{shards_away} shards wait: {}", away.reason()));
        }
        if self.pong.is_none() && self.ping <= now {
            self.ping = now + PING;
            self.pong = Some(tokio::spawn(ping(mailboxes.clone())));
        }
        let Some(pong) = self.pong.take_if(|pong| pong.is_finished()) else { return };
        match pong.now_or_never() {
            Some(Ok(None)) if shards_away == 0 => self.redis.ready(),
            Some(Ok(Some(reason))) => self.redis.failing(reason),
            _ => {}
        }
    }
}

/// Pings Redis. Returns why it does not answer.
async fn ping<M: Mailboxes>(mailboxes: M) -> Option<String> {
    match timeout(PING_TIMEOUT, mailboxes.ping()).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some("redis does not answer".into()),
    }
}
