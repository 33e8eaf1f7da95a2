//! Follows a compacted topic: its newest value of each key, and every change from then on.
//!
//! A follower belongs to no consumer group and commits nothing. It reads all partitions from the beginning, so that
//! every process that follows the topic holds all of it. While Kafka is away it waits; what was read before stays with
//! the caller.
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
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};

use crate::context::Logged;
use crate::{Error, KafkaConfig};

/// Maximum changes of one event.
const CHANGES_MAX: usize = 1_000;
/// Keys and values of one event, after which no further change is added, bytes.
const CHANGES_BYTES: usize = 1 << 20;
/// Bound of what librdkafka fetches in advance, KiB.
const PREFETCH_KBYTES: &str = "4096";
/// Time between two looks at the topic's partitions, which also show whether Kafka answers.
const LOOK: Duration = Duration::from_secs(10);
/// The same while something is wrong.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long a look waits for each answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Follows one topic.
pub struct Follower {
    /// `None` only while it is dropped.
    client: Option<Arc<Client>>,
    topic: Arc<str>,
    brokers: String,
    /// The next offset of each assigned partition; `None`: its beginning.
    next: BTreeMap<i32, Option<i64>>,
    /// Partitions that were there at the first look, and are not read to the end that they had then.
    unread: BTreeMap<i32, i64>,
    is_caught_up: bool,
    looking: Option<JoinHandle<Result<Vec<Seen>, Error>>>,
    look_at: Instant,
    /// Why the last look failed.
    unseen: Option<Error>,
    /// Why a partition cannot be fetched, until one can.
    unfetched: Option<Error>,
    /// The trouble that the caller knows of.
    told: Option<Error>,
    queued: VecDeque<Followed>,
}

/// The newest record of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key; empty for a record without one.
    pub key: Bytes,
    /// The value; `None`: a tombstone.
    pub value: Option<Bytes>,
}

/// What a follower has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// Changes, in the order of the log; at most 1,000, and about 1 MiB.
    Changes(Vec<Change>),
    /// Everything that was in the topic at the start has been told. Told once.
    CaughtUp,
    /// Kafka is away, or refuses. What was told before may be out of date. Told once until it changes.
    Trouble(Error),
    /// The trouble is over.
    Healed,
}

type Client = StreamConsumer<Quiet>;

/// A partition that is new to the follower, with the bounds of its log.
struct Seen {
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
            brokers: config.brokers.join(","),
            next: BTreeMap::new(),
            unread: BTreeMap::new(),
            is_caught_up: false,
            looking: None,
            look_at: Instant::now(),
            unseen: None,
            unfetched: None,
            told: None,
            queued: VecDeque::new(),
        })
    }

    /// Waits for the next event. If the future is dropped, no event is lost.
    pub async fn next(&mut self) -> Followed {
        loop {
            if let Some(event) = self.queued.pop_front() {
                return event;
            }
            let Some(client) = self.client.clone() else { return std::future::pending().await };
            tokio::select! {
                biased;
                seen = finished(&mut self.looking) => self.seen(seen),
                () = sleep_until(self.look_at), if self.looking.is_none() => self.look(&client),
                received = client.recv() => self.take(&client, received),
            }
            self.tell();
        }
    }

    /// Takes a record, and what else has arrived.
    fn take(&mut self, client: &Client, first: Result<BorrowedMessage<'_>, KafkaError>) {
        let (mut changes, mut bytes, mut received) = (Vec::new(), 0, Some(first));
        while let Some(record) = received {
            match record {
                Ok(record) => {
                    self.unfetched = None;
                    let (partition, next) = (record.partition(), record.offset() + 1);
                    self.next.insert(partition, Some(next));
                    if self.unread.get(&partition).is_some_and(|end| next >= *end) {
                        self.unread.remove(&partition);
                    }
                    let key = record.key().map(Bytes::copy_from_slice).unwrap_or_default();
                    let value = record.payload().map(Bytes::copy_from_slice);
                    bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
                    changes.push(Change { key, value });
                }
                // The last offsets of a log may have no record: what was there is compacted.
                Err(KafkaError::PartitionEOF(partition)) => {
                    self.unfetched = None;
                    self.unread.remove(&partition);
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

    fn cannot_fetch(&mut self, error: KafkaError) {
        // librdkafka looks for the group's coordinator, which a follower has no use for.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::GroupAuthorizationFailed) {
            return tracing::debug!(topic = &*self.topic, %error, "no right to use a group");
        }
        match Error::from(error) {
            // librdkafka reports some outages that it has bridged: the next look decides.
            Error::Away(why) => {
                tracing::debug!(topic = &*self.topic, why, "fetch failed");
                self.look_at = self.look_at.min(Instant::now() + LOOK_AGAIN);
            }
            error => self.unfetched = Some(error),
        }
    }

    fn look(&mut self, client: &Arc<Client>) {
        let (client, topic) = (Arc::clone(client), Arc::clone(&self.topic));
        let known: Vec<i32> = self.next.keys().copied().collect();
        self.looking = Some(spawn_blocking(move || look(&client, &topic, &known)));
    }

    fn seen(&mut self, seen: Result<Vec<Seen>, Error>) {
        self.looking = None;
        match seen {
            Ok(new) => {
                self.unseen = None;
                let is_first = self.next.is_empty();
                for Seen { partition, low, high } in &new {
                    self.next.insert(*partition, None);
                    if is_first && low < high {
                        self.unread.insert(*partition, *high);
                    }
                }
                // Assigning again makes librdkafka fetch again what it could not, and report whether it can.
                if !new.is_empty() || self.unfetched.is_some() {
                    self.assign();
                }
            }
            Err(Error::Away(why)) => {
                self.unseen = Some(Error::Away(format!("{}: {why}", self.brokers)));
            }
            Err(error) => self.unseen = Some(error),
        }
        let is_well = self.unseen.is_none() && self.unfetched.is_none();
        self.look_at = Instant::now() + if is_well { LOOK } else { LOOK_AGAIN };
    }

    fn assign(&mut self) {
        let mut list = TopicPartitionList::with_capacity(self.next.len());
        let added = self.next.iter().try_for_each(|(partition, next)| {
            let offset = next.map_or(Offset::Beginning, Offset::Offset);
            list.add_partition_offset(&self.topic, *partition, offset)
        });
        let assign = |client: &Arc<Client>| client.assign(&list);
        let assigned = added.and_then(|()| self.client.as_ref().map_or(Ok(()), assign));
        if let Err(error) = assigned {
            self.unfetched = Some(error.into());
        }
    }

    /// Queues what has become of the catching up and of the trouble.
    fn tell(&mut self) {
        if !self.is_caught_up && !self.next.is_empty() && self.unread.is_empty() {
            self.is_caught_up = true;
            self.queued.push_back(Followed::CaughtUp);
        }
        let trouble = self.unseen.as_ref().or(self.unfetched.as_ref());
        if trouble != self.told.as_ref() {
            self.told = trouble.cloned();
            self.queued.push_back(trouble.cloned().map_or(Followed::Healed, Followed::Trouble));
        }
    }
}

impl Drop for Follower {
    /// Closing a client waits for its threads.
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            std::thread::spawn(move || drop(client));
        }
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// The callbacks of a follower's client: its log.
#[derive(Debug, Clone, Default)]
struct Quiet(Logged);

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.error(error, reason);
    }
}

impl ConsumerContext for Quiet {}

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
        .set("queued.max.messages.kbytes", PREFETCH_KBYTES);
    Ok(StreamConsumer::from_config_and_context(&config.overlay(client), Quiet::default())?)
}

/// Asks for the partitions of the topic that are not `known`. Blocks.
fn look(client: &Client, topic: &str, known: &[i32]) -> Result<Vec<Seen>, Error> {
    let metadata = client.fetch_metadata(Some(topic), PATIENCE)?;
    let found = metadata.topics().first().map(|topic| topic.partitions()).unwrap_or_default();
    if found.is_empty() {
        let why =
            format!("topic {topic} does not exist, or may not be read; `barid topics create`");
        return Err(Error::Refused(why));
    }
    let new = found.iter().map(|partition| partition.id()).filter(|id| !known.contains(id));
    let bounds = |partition| -> Result<Seen, Error> {
        let (low, high) = client.fetch_watermarks(topic, partition, PATIENCE)?;
        Ok(Seen { partition, low, high })
    };
    new.map(bounds).collect()
}

async fn finished(
    looking: &mut Option<JoinHandle<Result<Vec<Seen>, Error>>>,
) -> Result<Vec<Seen>, Error> {
    match looking {
        Some(looking) => looking
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
