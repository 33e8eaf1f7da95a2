//! Follows a compacted topic: its newest value of each key, and every change from then on.
//!
//! A follower belongs to no consumer group and commits nothing. It reads all partitions from the beginning, so that
//! every process that follows the topic holds all of it. While Kafka is away it waits; what was read before stays with
//! the caller.
//!
//! Every 10 s it compares its positions with the bounds of the log and the topic's id, so that it notices a log that it
//! cannot read although Kafka answers, and a topic that was deleted and created again.
//!
//! Two records of one key are ordered only within a partition. Create such a topic with one partition, and keep the
//! number: with more, clients of other languages place a key elsewhere, and so does any client after a change.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::{Consumer as _, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};

use crate::context::Logged;
use crate::{Error, KafkaConfig, ffi};

/// Maximum changes of one event.
const CHANGES_MAX: usize = 1_000;
/// Keys and values of one event, after which no further change is added, bytes.
const CHANGES_BYTES: usize = 1 << 20;
/// Bound of what librdkafka fetches in advance, KiB.
const PREFETCH_KBYTES: &str = "4096";
/// Time between two requests for the topic's metadata, which also show whether Kafka answers.
const POLL: Duration = Duration::from_secs(10);
/// The same while something is wrong.
const POLL_DEGRADED: Duration = Duration::from_secs(1);
/// Pause before a poll because a connection was lost: many may be lost at once.
const POLL_LOST: Duration = Duration::from_millis(250);
/// How long each answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same after a connection was lost: most often Kafka is away.
const PATIENCE_LOST: Duration = Duration::from_millis(1_500);

/// Follows one topic.
pub struct Follower {
    /// `None` only while it is dropped.
    client: Option<Arc<Client>>,
    config: KafkaConfig,
    topic: Arc<str>,
    /// The topic's id; `None`: unknown.
    id: Option<String>,
    positions: BTreeMap<i32, Position>,
    /// The number of partitions that the caller knows of.
    partitions: usize,
    is_caught_up: bool,
    /// A record was read whose offset is behind the position: the log has begun again.
    went_back: bool,
    /// Another client has to be created before anything else.
    needs_client: bool,
    polling: Option<JoinHandle<Result<Polled, Error>>>,
    poll_at: Instant,
    /// A connection was lost since the last poll began.
    is_lost: bool,
    /// Why the last poll failed.
    unanswered: Option<Error>,
    /// Why a partition cannot be fetched, until one can.
    unfetched: Option<Error>,
    /// The log has records that do not arrive.
    stalled: Option<Error>,
    /// The error that the caller knows of.
    notified: Option<Error>,
    queued: VecDeque<Followed>,
}

/// How far a partition is read.
#[derive(Debug, Clone, Copy)]
struct Position {
    /// The next offset; `None`: the log's beginning.
    next: Option<i64>,
    /// The offset up to which the log has to be read: its end when it was polled, and `has_reached_end` was set.
    end: i64,
    has_reached_end: bool,
    /// `next` at the last poll.
    polled_next: Option<i64>,
    /// Whether the end of the log was reached since the last poll began.
    end_since_poll: bool,
}

/// The newest record of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key; empty for a record without one.
    pub key: Bytes,
    /// The value; `None`: a tombstone.
    pub value: Option<Bytes>,
}

/// An event of a follower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// Changes, in the order of the log; at most 1,000, and about 1 MiB.
    Changes(Vec<Change>),
    /// Everything that was in the topic when reading began has been returned. Once after the start, and once after each
    /// [`Self::Restarted`].
    CaughtUp,
    /// The topic was deleted and created again, or has lost its end, and is read from its beginning. Keys that are not
    /// returned again before [`Self::CaughtUp`] no longer exist.
    Restarted,
    /// The topic has this number of partitions. Whenever the number changes; not at the start if it has one.
    Partitions(usize),
    /// Changes do not arrive: Kafka is away, refuses, or holds what cannot be read. Once until the error changes.
    Degraded(Error),
    /// Changes arrive again.
    Recovered,
}

type Client = StreamConsumer<LogOnly>;

/// A topic's metadata.
struct Polled {
    /// `None`: the broker has no ids.
    id: Option<String>,
    /// The next offset of each known partition when the poll began.
    next: BTreeMap<i32, Option<i64>>,
    bounds: Vec<Bounds>,
}

/// The bounds of a partition's log.
struct Bounds {
    partition: i32,
    low: i64,
    high: i64,
}

impl Follower {
    /// Begins to follow `topic`. Neither the brokers nor the topic need to be there yet. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn start(config: &KafkaConfig, topic: &str) -> Result<Self, Error> {
        let client = Arc::new(create(config)?);
        Ok(Self {
            client: Some(client),
            topic: Arc::from(topic),
            config: config.clone(),
            id: None,
            positions: BTreeMap::new(),
            partitions: 1,
            is_caught_up: false,
            went_back: false,
            needs_client: false,
            polling: None,
            poll_at: Instant::now(),
            is_lost: false,
            unanswered: None,
            unfetched: None,
            stalled: None,
            notified: None,
            queued: VecDeque::new(),
        })
    }

    /// Waits for the next event. If the future is dropped, no event is lost.
    pub async fn next(&mut self) -> Followed {
        loop {
            if let Some(event) = self.queued.pop_front() {
                return event;
            }
            if std::mem::take(&mut self.needs_client) {
                self.replace_client();
            }
            let Some(client) = self.client.clone() else { return std::future::pending().await };
            tokio::select! {
                biased;
                polled = finished(&mut self.polling) => self.polled(polled),
                () = sleep_until(self.poll_at), if self.polling.is_none() => self.poll(&client),
                received = client.recv() => self.receive(&client, received),
            }
            self.notify();
        }
    }

    /// Queues a record, and the others that have arrived.
    fn receive(&mut self, client: &Client, first: Result<BorrowedMessage<'_>, KafkaError>) {
        let (mut changes, mut bytes, mut received) = (Vec::new(), 0, Some(first));
        while let Some(record) = received {
            match record {
                Ok(record) => {
                    (self.unfetched, self.stalled) = (None, None);
                    self.advance(record.partition(), record.offset());
                    let key = record.key().map(Bytes::copy_from_slice).unwrap_or_default();
                    let value = record.payload().map(Bytes::copy_from_slice);
                    bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
                    changes.push(Change { key, value });
                }
                // The last offsets of a log may have no record: what was there is compacted.
                Err(KafkaError::PartitionEOF(partition)) => {
                    (self.unfetched, self.stalled) = (None, None);
                    self.reach_end(partition);
                }
                Err(error) => self.cannot_fetch(error),
            }
            let is_full = changes.len() >= CHANGES_MAX || bytes >= CHANGES_BYTES;
            received = if is_full { None } else { at_once(client.recv()) };
        }
        if !changes.is_empty() {
            self.queued.push_back(Followed::Changes(changes));
        }
    }

    fn advance(&mut self, partition: i32, offset: i64) {
        let Some(position) = self.positions.get_mut(&partition) else { return };
        if position.next.is_some_and(|next| offset < next) {
            self.went_back = true;
            self.poll_at = Instant::now();
        }
        position.next = Some(offset + 1);
        position.has_reached_end |= offset + 1 >= position.end;
    }

    /// There is nothing more in the log of a partition now, whether or not its last offsets have records.
    fn reach_end(&mut self, partition: i32) {
        if let Some(position) = self.positions.get_mut(&partition) {
            position.has_reached_end = true;
            position.end_since_poll = true;
        }
    }

    fn cannot_fetch(&mut self, error: KafkaError) {
        match error.rdkafka_error_code() {
            // librdkafka looks for the group's coordinator, which a follower has no use for.
            Some(Code::GroupAuthorizationFailed) => {
                tracing::debug!(topic = &*self.topic, %error, "no right to use a group");
            }
            // librdkafka reports some outages that it has bridged: the next poll decides.
            Some(
                Code::BrokerTransportFailure
                | Code::AllBrokersDown
                | Code::Resolve
                | Code::OperationTimedOut
                | Code::RequestTimedOut
                | Code::NetworkException
                | Code::LeaderNotAvailable
                | Code::NotLeaderForPartition
                | Code::ReplicaNotAvailable
                | Code::FencedLeaderEpoch
                | Code::UnknownLeaderEpoch
                | Code::OffsetNotAvailable,
            ) => {
                tracing::debug!(topic = &*self.topic, %error, "fetch failed");
                // What is known to be away is polled at its pace, and for longer: it may answer slowly.
                if self.unanswered.is_none() {
                    self.poll_at = self.poll_at.min(Instant::now() + POLL_LOST);
                    self.is_lost = true;
                }
            }
            _ => {
                self.unfetched = Some(error.into());
                self.poll_at = self.poll_at.min(Instant::now() + POLL_DEGRADED);
            }
        }
    }

    fn poll(&mut self, client: &Arc<Client>) {
        let (client, topic) = (Arc::clone(client), self.topic.to_string());
        let (patience, next) = self.begin_poll();
        self.polling = Some(spawn_blocking(move || poll(&client, topic, next, patience)));
    }

    /// How long the answers of a poll are waited for, and the next offset of each partition.
    fn begin_poll(&mut self) -> (Duration, BTreeMap<i32, Option<i64>>) {
        self.positions.values_mut().for_each(|position| position.end_since_poll = false);
        let next = self.positions.iter().map(|(partition, position)| (*partition, position.next));
        let next = next.collect();
        let is_lost = std::mem::take(&mut self.is_lost);
        (if is_lost { PATIENCE_LOST } else { PATIENCE }, next)
    }

    fn polled(&mut self, polled: Result<Polled, Error>) {
        self.polling = None;
        match polled {
            Ok(polled) => {
                self.unanswered = None;
                self.compare(&polled);
            }
            Err(Error::Away(why)) => {
                self.unanswered =
                    Some(Error::Away(format!("{}: {why}", self.config.brokers.join(","))));
            }
            Err(error) => self.unanswered = Some(error),
        }
        // A connection that was lost during the poll may have been another one.
        let is_degraded = self.error().is_some() || self.is_lost;
        self.poll_at = Instant::now() + if is_degraded { POLL_DEGRADED } else { POLL };
    }

    /// Compares the positions with the log.
    fn compare(&mut self, polled: &Polled) {
        let is_other = self.id.is_some() && polled.id.is_some() && self.id != polled.id;
        // Positions of when the poll began: since then, records that are beyond these ends may have been read.
        let is_cut = polled.bounds.iter().any(|Bounds { partition, high, .. }| {
            polled.next.get(partition).is_some_and(|next| next.is_some_and(|next| next > *high))
        });
        if is_other || is_cut || self.went_back {
            tracing::warn!(
                topic = &*self.topic,
                is_other,
                is_cut,
                "the topic was created again or has lost its end: reading it from the beginning"
            );
            self.positions.clear();
            (self.is_caught_up, self.went_back, self.needs_client) = (false, false, true);
            self.queued.push_back(Followed::Restarted);
        }
        self.id = polled.id.clone().or(self.id.take());
        if self.partitions != polled.bounds.len() {
            self.partitions = polled.bounds.len();
            self.queued.push_back(Followed::Partitions(self.partitions));
        }
        // Partitions that are new, or of which it is unknown whether there is a record before their end.
        let mut must_fetch = false;
        self.stalled = None;
        for Bounds { partition, low, high } in &polled.bounds {
            let Some(position) = self.positions.get_mut(partition) else {
                must_fetch = true;
                let position = Position {
                    next: None,
                    end: *high,
                    has_reached_end: low >= high,
                    polled_next: None,
                    end_since_poll: false,
                };
                self.positions.insert(*partition, position);
                continue;
            };
            if position.has_reached_end && *high > position.end {
                position.end = *high;
                position.has_reached_end =
                    position.end_since_poll || position.next.is_some_and(|next| next >= *high);
                // The offsets up to the end may have no records: markers of a transaction, or records that compaction
                // has removed. librdkafka reported that end, if it has read it, before this poll, and does so once.
                must_fetch |= !position.has_reached_end;
            } else if !position.has_reached_end && position.next == position.polled_next {
                let next = position.next.unwrap_or(*low);
                self.stalled = Some(Error::Away(format!(
                    "partition {partition}: no record arrives from offset {next} on, and the log \
                     ends at {high}"
                )));
            }
            position.polled_next = position.next;
        }
        // Assigning again makes librdkafka fetch again what it could not, and report whether it can.
        if !self.needs_client && (must_fetch || self.unfetched.is_some()) {
            self.assign();
        }
    }

    /// librdkafka keeps the leader epochs of a deleted topic, and with them it cannot fetch the new one.
    fn replace_client(&mut self) {
        match create(&self.config) {
            Ok(client) => {
                close(self.client.replace(Arc::new(client)));
                self.unfetched = None;
                self.assign();
            }
            Err(error) => {
                self.unfetched = Some(error);
                self.needs_client = true;
            }
        }
    }

    fn assign(&mut self) {
        let mut list = TopicPartitionList::with_capacity(self.positions.len());
        let added = self.positions.iter().try_for_each(|(partition, position)| {
            let offset = position.next.map_or(Offset::Beginning, Offset::Offset);
            list.add_partition_offset(&self.topic, *partition, offset)
        });
        let assign = |client: &Arc<Client>| client.assign(&list);
        let assigned = added.and_then(|()| self.client.as_ref().map_or(Ok(()), assign));
        if let Err(error) = assigned {
            self.unfetched = Some(error.into());
        }
    }

    /// Queues events about catching up and about errors.
    fn notify(&mut self) {
        let is_read = self.positions.values().all(|position| position.has_reached_end);
        if !self.is_caught_up && !self.positions.is_empty() && is_read {
            self.is_caught_up = true;
            self.queued.push_back(Followed::CaughtUp);
        }
        let error = self.error().cloned();
        if error != self.notified {
            self.notified.clone_from(&error);
            self.queued.push_back(error.map_or(Followed::Recovered, Followed::Degraded));
        }
    }

    fn error(&self) -> Option<&Error> {
        self.unanswered.as_ref().or(self.unfetched.as_ref()).or(self.stalled.as_ref())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        close(self.client.take());
    }
}

/// Closes a client, which waits for its threads.
fn close(client: Option<Arc<Client>>) {
    std::thread::spawn(move || drop(client));
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// The callbacks of a follower's client: its log.
#[derive(Debug, Clone, Default)]
struct LogOnly(Logged);

impl ClientContext for LogOnly {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.error(error, reason);
    }
}

impl ConsumerContext for LogOnly {}

fn create(config: &KafkaConfig) -> Result<Client, Error> {
    let mut client = config.client();
    client
        // librdkafka asks for one, and only `subscribe` joins it.
        .set("group.id", "barid-follower")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("enable.partition.eof", "true")
        // After the topic was created again, its beginning.
        .set("auto.offset.reset", "earliest")
        .set("fetch.wait.max.ms", config.fetch_wait_max_ms.to_string())
        .set("fetch.error.backoff.ms", "100")
        // A full queue is fetched into again after this time: by default a second.
        .set("fetch.queue.backoff.ms", "5")
        // A hanging transaction must not hold back the records after it. Nobody writes this topic in transactions.
        .set("isolation.level", "read_uncommitted")
        .set("queued.max.messages.kbytes", PREFETCH_KBYTES);
    Ok(StreamConsumer::from_config_and_context(&config.overlay(client), LogOnly::default())?)
}

/// Requests the topic's metadata. Blocks.
fn poll(
    client: &Client,
    topic: String,
    next: BTreeMap<i32, Option<i64>>,
    patience: Duration,
) -> Result<Polled, Error> {
    let metadata = client.fetch_metadata(Some(&topic), patience)?;
    let found = metadata.topics().first().map(|topic| topic.partitions()).unwrap_or_default();
    if found.is_empty() {
        let why =
            format!("topic {topic} does not exist, or may not be read; `barid topics create`");
        return Err(Error::Refused(why));
    }
    let bounds = |partition| -> Result<Bounds, Error> {
        let (low, high) = client.fetch_watermarks(&topic, partition, patience)?;
        Ok(Bounds { partition, low, high })
    };
    let bounds = found.iter().map(|partition| bounds(partition.id())).collect::<Result<_, _>>()?;
    let id = match ffi::has_controller(client.client(), Some(&topic), patience)? {
        // Brokers before Kafka 3.1 have no ids.
        true => ffi::topic_ids(client.client(), std::slice::from_ref(&topic), patience)
            .unwrap_or_default()
            .remove(&topic),
        false => None,
    };
    Ok(Polled { id, next, bounds })
}

async fn finished(
    polling: &mut Option<JoinHandle<Result<Polled, Error>>>,
) -> Result<Polled, Error> {
    match polling {
        Some(polling) => polling
            .await
            .unwrap_or_else(|error| Err(Error::Away(format!("worker thread: {error}")))),
        None => std::future::pending().await,
    }
}

/// The value of a future that is ready.
fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut cx) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polled(follower: &mut Follower, id: &str, high: i64) -> Polled {
        let (_, next) = follower.begin_poll();
        Polled { id: Some(id.into()), next, bounds: vec![Bounds { partition: 0, low: 0, high }] }
    }

    /// A poll that finds a log with these bounds.
    fn poll_finds(follower: &mut Follower, id: &str, high: i64) {
        let polled = polled(follower, id, high);
        follower.compare(&polled);
    }

    /// A follower that has read a log of three records.
    async fn caught_up() -> Follower {
        let config = KafkaConfig { brokers: vec!["127.0.0.1:1".into()], ..Default::default() };
        let mut follower = Follower::start(&config, "barid.revocations").unwrap();
        poll_finds(&mut follower, "one", 3);
        (0..3).for_each(|offset| follower.advance(0, offset));
        follower.notify();
        assert_eq!(follower.next().await, Followed::CaughtUp);
        follower
    }

    #[tokio::test]
    async fn hazard_136_records_that_do_not_arrive_although_kafka_answers_are_an_error() {
        let mut follower = caught_up().await;
        for _ in 0..3 {
            poll_finds(&mut follower, "one", 3);
            assert_eq!(follower.error(), None, "nothing is missing");
        }
        // The second poll in a row: the records may have been on their way.
        poll_finds(&mut follower, "one", 9);
        assert_eq!(follower.error(), None);
        poll_finds(&mut follower, "one", 9);
        let error = follower.error().unwrap().to_string();
        assert!(error.contains("from offset 3 on, and the log ends at 9"), "{error}");
        // Slow is not still.
        follower.advance(0, 3);
        poll_finds(&mut follower, "one", 9);
        assert_eq!(follower.error(), None);
    }

    #[tokio::test]
    async fn a_lost_connection_is_looked_at_soon_and_only_the_first_time_in_a_hurry() {
        let mut follower = caught_up().await;
        follower.poll_at = Instant::now() + POLL;
        let lost = || KafkaError::MessageConsumption(Code::BrokerTransportFailure);
        follower.cannot_fetch(lost());
        assert!(follower.poll_at <= Instant::now() + POLL_LOST);
        assert_eq!(follower.begin_poll().0, PATIENCE_LOST);
        follower.polled(Err(Error::Away("no answer".into())));
        // A broker that is away, or answers slowly, has time.
        follower.cannot_fetch(lost());
        assert!(follower.poll_at > Instant::now());
        assert_eq!(follower.begin_poll().0, PATIENCE);
    }

    #[tokio::test]
    async fn other_numbers_of_partitions_than_one_are_told_when_they_change() {
        let mut follower = caught_up().await;
        for (partitions, event) in [(1, None), (3, Some(3)), (3, None), (1, Some(1))] {
            let mut polled = polled(&mut follower, "one", 3);
            polled.bounds = (0..partitions)
                .map(|partition| Bounds {
                    partition,
                    low: 0,
                    high: if partition == 0 { 3 } else { 0 },
                })
                .collect();
            follower.compare(&polled);
            assert_eq!(follower.queued.pop_front(), event.map(Followed::Partitions));
        }
    }

    #[tokio::test]
    async fn hazard_134_another_id_or_a_shorter_log_is_read_from_the_beginning() {
        for (id, high) in [("two", 3), ("one", 2)] {
            let mut follower = caught_up().await;
            poll_finds(&mut follower, id, high);
            follower.notify();
            assert_eq!(follower.next().await, Followed::Restarted, "{id}, {high}");
            assert_eq!(follower.positions[&0].next, None);
            (0..high).for_each(|offset| follower.advance(0, offset));
            follower.notify();
            assert_eq!(follower.next().await, Followed::CaughtUp);
        }
        let mut follower = caught_up().await;
        follower.advance(0, 0);
        poll_finds(&mut follower, "one", 4);
        assert_eq!(follower.queued.pop_front(), Some(Followed::Restarted));
    }
}
