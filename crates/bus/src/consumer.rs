//! A member of the consumer group, as a typestate: [`Consuming`] takes records, [`Draining`] only commits and gives
//! partitions back, [`Done`] has left the group.
//!
//! librdkafka reports that a partition is revoked ([`Event::Revoked`]) and waits until the application answers
//! ([`Consumer::release`]); in between, the partition is drained. Nothing blocks: the callbacks only queue an event.
//! Each partition has its own queue, so that a partition without room is not read, and bulk records never delay
//! urgent ones.

use std::collections::{HashMap, VecDeque};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::TopicPartitionList;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer as _, RebalanceProtocol};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::topic_partition_list::Offset;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;

use crate::context::{Callback, Callbacks};
use crate::stuck::{Next, Stuck};
use crate::{Error, GroupProtocol, KafkaConfig, Memory, Metadata, TopicSource, ffi};

/// How long to wait for an answer of Kafka before it counts as unavailable.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a commit may take before it counts as failed. It may have succeeded; the next commit repeats it.
const COMMIT_PATIENCE: Duration = Duration::from_secs(30);
/// Bound of the metadata of one commit: the broker writes all its partitions as one batch, of at most 1 MiB.
const METADATA_BATCH_BYTES_MAX: usize = 256 * 1024;

/// A partition of a topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition.
    pub number: i32,
}

/// A record, copied out of librdkafka's memory.
#[derive(Debug, Clone)]
pub struct Record {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// The epoch of the leader that wrote it; -1 if the broker does not report it.
    pub leader_epoch: i32,
    /// When the business produced it (or the broker appended it), ms since the Unix epoch.
    pub timestamp_ms: Option<i64>,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value; empty for a tombstone.
    pub value: Bytes,
    /// Its headers.
    pub headers: Vec<(String, Bytes)>,
}

impl Record {
    /// The first header of this name, ignoring case.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| &**value)
    }

    /// Approximate size in memory, bytes, with the headers, of which a producer may send thousands.
    pub fn bytes(&self) -> usize {
        let header = |(name, value): &(String, Bytes)| 64 + name.len() + value.len();
        let headers: usize = self.headers.iter().map(header).sum();
        headers + self.key.as_ref().map_or(0, Bytes::len) + self.value.len()
    }
}

/// An event of the group or the broker.
#[derive(Debug)]
pub enum Event {
    /// Partitions were assigned; answer with [`Consumer::take_up`].
    Assigned(Vec<Partition>),
    /// Partitions were revoked; answer with [`Consumer::release`] once they are drained.
    Revoked {
        /// The partitions.
        partitions: Vec<Partition>,
        /// Another member already has them: nothing can be committed.
        lost: bool,
    },
    /// A commit was answered, with the number of shards that did not fit into its metadata.
    Committed(Result<usize, Error>),
    /// An error that librdkafka retries by itself: no broker, an unknown topic, a lost coordinator.
    Trouble(Error),
    /// This member cannot continue (fenced by another one of its name, or not authorized): end the process.
    Fatal(String),
}

/// Takes records.
#[derive(Debug)]
pub struct Consuming;
/// Takes no records; commits and gives partitions back.
#[derive(Debug)]
pub struct Draining;
/// Has left the group.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Done {
    /// The group has answered.
    Left,
    /// librdkafka did not finish in time, or failed. The group removes the member after its session timeout.
    Abandoned,
}

/// The commit of a partition.
#[derive(Debug, Clone)]
pub struct Commit {
    /// The partition.
    pub partition: Partition,
    /// The next offset to read.
    pub offset: i64,
    /// Stored beside the offset. It identifies the topic, because an offset of a topic that was deleted is void.
    pub metadata: Metadata,
}

/// An assigned partition, and where to begin reading it.
#[derive(Debug, Clone)]
pub struct Assigned {
    /// The partition.
    pub partition: Partition,
    /// The topic that the offset belongs to.
    pub source: TopicSource,
    /// The topic's id, if known.
    pub id: Option<Arc<str>>,
    /// The committed offset; `None`: from the log's start.
    pub start: Option<i64>,
    /// State that the partition's last owner committed.
    pub memory: Memory,
}

impl Assigned {
    /// Decides where to begin. Only a different id proves that the topic was recreated. An absent id proves
    /// nothing. An id that is new, for an offset that was committed under the topic's name, belongs to the same
    /// topic, whose positions Redis stores under the name.
    fn of(partition: &Partition, now: Option<&str>, committed: Option<(i64, Metadata)>) -> Self {
        let fresh = |memory, start| {
            let source = match now {
                Some(id) => TopicSource::Id(id.into()),
                None => TopicSource::Name(Arc::clone(&partition.topic)),
            };
            let (partition, id) = (partition.clone(), now.map(Arc::from));
            Self { partition, source, id, start, memory }
        };
        let Some((offset, Metadata { source, id, memory })) = committed else {
            return fresh(Memory::default(), None);
        };
        if let (Some(before), Some(now)) = (&id, now)
            && **before != *now
        {
            tracing::warn!(
                topic = &*partition.topic,
                partition = partition.number,
                "topic was recreated, starting at its beginning"
            );
            return fresh(Memory::default(), None);
        }
        match source {
            Some(source) => {
                let id = now.map(Arc::from).or(id);
                Self { partition: partition.clone(), source, id, start: Some(offset), memory }
            }
            None => fresh(memory, Some(offset)),
        }
    }
}

/// The bounds of a partition's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The first offset in the log.
    pub low: i64,
    /// One past the last offset.
    pub high: i64,
    /// The first offset at or after the requested time, or `high` if no record is that recent.
    pub since: i64,
}

/// A future answer of Kafka, which may take seconds. Does not borrow the consumer.
pub type Pending<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// Topics' ids by name.
pub type TopicIds = Pending<HashMap<String, String>>;

/// Names of topics that do not exist.
pub type MissingTopics = Pending<Vec<String>>;

/// A member of the consumer group.
pub struct Consumer<State = Consuming> {
    core: Core,
    state: PhantomData<State>,
}

struct Core {
    config: KafkaConfig,
    topics: Vec<Arc<str>>,
    queues: HashMap<Partition, PartitionQueue<Callbacks>>,
    member: Member,
    /// The order in which partitions of a topic are read; it rotates.
    order: Vec<VecDeque<Partition>>,
    bell: Arc<Notify>,
    protocol: Protocol,
    was_assigned: bool,
    /// Partitions that cannot be fetched.
    stuck: HashMap<Partition, Stuck>,
    /// Whether the broker has reported topic ids.
    gives_ids: Arc<AtomicBool>,
    /// Bytes of metadata that the broker accepts beside an offset, as far as known.
    metadata_bytes_max: Arc<AtomicUsize>,
}

/// How the group balances, from the preferred protocol to the one that every broker supports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// KIP-848 with the assignor that distributes each topic evenly. The default (`uniform`) balances the sum over
    /// all topics, so that one of two members may get all partitions of the only busy topic.
    Range,
    /// KIP-848 with the broker's default assignor.
    Any,
    /// The classic protocol, with the range assignor.
    Classic,
}

/// librdkafka's consumer. Dropping it leaves the group and waits until that is done, unless a request under way still
/// holds it; [`Member::leave`] leaves in any case.
struct Member {
    inner: Arc<BaseConsumer<Callbacks>>,
    callbacks: Callbacks,
}

impl Member {
    /// Drops a partition's prefetched records, and librdkafka's record of its last failure.
    fn fetch_afresh(&self, partition: &Partition) {
        let mut list = TopicPartitionList::new();
        list.add_partition(&partition.topic, partition.number);
        let afresh = self.inner.pause(&list).and_then(|()| self.inner.resume(&list));
        if let Err(error) = afresh {
            tracing::debug!(%error, topic = &*partition.topic, "cannot restart fetching");
        }
    }

    /// The offset of the next record of a partition; `None`: unknown.
    fn position(&self, partition: &Partition) -> Option<i64> {
        let of = |list: Result<TopicPartitionList, KafkaError>| {
            let list = list.ok()?;
            match list.find_partition(&partition.topic, partition.number)?.offset() {
                Offset::Offset(offset) => Some(offset),
                Offset::Beginning => Some(0),
                _ => None,
            }
        };
        of(self.inner.position()).or_else(|| of(self.inner.assignment()))
    }

    /// Leaves the group, and waits until that is done, even if a request under way holds librdkafka's consumer.
    /// Returns false if librdkafka cannot close it.
    fn leave(self) -> bool {
        let shared = Arc::clone(&self.inner);
        drop(self);
        match Arc::try_unwrap(shared) {
            // Dropping it closes it.
            Ok(only) => drop(only),
            Err(shared) => {
                if shared.close_queue().is_err() {
                    return shared.closed();
                }
                while !shared.closed() {
                    shared.poll(Duration::from_millis(100));
                }
            }
        }
        true
    }
}

impl Drop for Member {
    /// Lets the callbacks answer the pending rebalance and later ones: without an answer, leaving would wait for ever.
    fn drop(&mut self) {
        self.callbacks.close();
        let held = self.inner.assignment();
        let _ = match self.inner.rebalance_protocol() {
            RebalanceProtocol::Cooperative => {
                held.and_then(|l| self.inner.incremental_unassign(&l))
            }
            _ => self.inner.unassign(),
        };
    }
}

impl Consumer<Consuming> {
    /// Joins the group for these topics, the most urgent first. Brokers need not be available yet.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn start(config: &KafkaConfig, topics: &[&str]) -> Result<Self, Error> {
        let protocol = match config.group_protocol {
            GroupProtocol::Classic => Protocol::Classic,
            GroupProtocol::Auto | GroupProtocol::Consumer => Protocol::Range,
        };
        let bell = Arc::new(Notify::new());
        let member = create(config, topics, protocol, &bell)?;
        let core = Core {
            config: config.clone(),
            topics: topics.iter().map(|topic| Arc::from(*topic)).collect(),
            queues: HashMap::new(),
            member,
            order: vec![VecDeque::new(); topics.len()],
            bell,
            protocol,
            was_assigned: false,
            stuck: HashMap::new(),
            gives_ids: Arc::default(),
            metadata_bytes_max: Arc::new(AtomicUsize::new(config.metadata_bytes_max as usize)),
        };
        Ok(Self { core, state: PhantomData })
    }

    /// Takes up to `max` records of a topic (by its index in the list given at start) into `out`, from the partitions
    /// that `wanted` selects, in turn. Never waits. Returns how many.
    pub fn take(
        &mut self,
        topic: usize,
        max: usize,
        mut wanted: impl FnMut(&Partition) -> bool,
        out: &mut Vec<Record>,
    ) -> usize {
        let (before, mut failed) = (out.len(), Vec::new());
        let Some(order) = self.core.order.get_mut(topic) else { return 0 };
        for _ in 0..order.len() {
            let Some(partition) = order.pop_front() else { break };
            if let Some(queue) = self.core.queues.get(&partition).filter(|_| wanted(&partition)) {
                while out.len() - before < max {
                    match queue.poll(Duration::ZERO) {
                        Some(Ok(message)) => {
                            out.push(copy(&partition.topic, &message));
                            if !self.core.stuck.is_empty() {
                                self.core.stuck.remove(&partition);
                            }
                        }
                        Some(Err(error)) => {
                            failed.push((partition.clone(), error));
                            break;
                        }
                        None => break,
                    }
                }
            }
            order.push_back(partition);
            if out.len() - before >= max {
                break;
            }
        }
        failed
            .into_iter()
            .for_each(|(partition, error)| self.core.cannot_fetch(&partition, &error));
        out.len() - before
    }

    /// Stops taking records.
    pub fn drain(self) -> Consumer<Draining> {
        Consumer { core: self.core, state: PhantomData }
    }
}

impl Consumer<Draining> {
    /// Leaves the group, within `timeout`. Partitions that are still assigned are given back.
    pub async fn finish(self, timeout: Duration) -> Done {
        let Core { queues, member, .. } = self.core;
        drop(queues);
        match tokio::time::timeout(timeout, spawn_blocking(move || member.leave())).await {
            Ok(Ok(true)) => Done::Left,
            _ => Done::Abandoned,
        }
    }
}

impl<State> Consumer<State> {
    /// Returns the next event, if there is one. Never waits. Call it at least every few minutes, or the group revokes
    /// the partitions.
    pub fn poll(&mut self) -> Option<Event> {
        loop {
            if let Some(callback) = self.core.member.callbacks.next() {
                return Some(self.core.event(callback));
            }
            match self.core.member.inner.poll(Duration::ZERO) {
                Some(Err(error)) => {
                    if let Some(event) = self.core.trouble(error) {
                        return Some(event);
                    }
                }
                // Every partition got its own queue before it was assigned, so no record can be here.
                Some(Ok(message)) => {
                    let (topic, partition) = (message.topic().to_owned(), message.partition());
                    tracing::error!(topic, partition, "unexpected record in the common queue");
                    let error = Error::Refused(format!("{topic}/{partition}: queue was not split"));
                    return Some(Event::Trouble(error));
                }
                None => break,
            }
        }
        let callback = self.core.member.callbacks.next();
        callback.map(|callback| self.core.event(callback)).or_else(|| {
            let down = self.core.member.callbacks.take_all_down();
            down.then(|| Event::Trouble(Error::Away("no broker can be reached".into())))
        })
    }

    /// Waits until there may be an event or a record.
    pub async fn ready(&self) {
        self.core.bell.notified().await;
    }

    /// The notification that [`Self::ready`] awaits, for waiting while the consumer is borrowed.
    pub fn bell(&self) -> Arc<Notify> {
        Arc::clone(&self.core.bell)
    }

    /// Seeks to an offset: the next record taken is the first one at or after it. Prefetched records are dropped.
    /// Takes up to 5 s (a few ms if the broker answers).
    ///
    /// # Errors
    /// The partition is not assigned, or the seek took too long.
    pub fn seek(&self, partition: &Partition, offset: i64) -> Pending<()> {
        let inner = Arc::clone(&self.core.member.inner);
        let partition = partition.clone();
        let seek = move || {
            let mut list = TopicPartitionList::new();
            let offset = if offset <= 0 { Offset::Beginning } else { Offset::Offset(offset) };
            list.add_partition_offset(&partition.topic, partition.number, offset)?;
            let list = inner.seek_partitions(list, PATIENCE)?;
            list.elements().iter().try_for_each(|element| element.error())
        };
        Box::pin(async move { blocking(seek).await?.map_err(Error::from) })
    }

    /// The bounds of a partition's log, and the first offset that is not older than `since_ms` (ms since
    /// the Unix epoch, by the records' timestamps). Takes up to 15 s (three requests).
    ///
    /// # Errors
    /// The partition's leader did not answer in time.
    pub fn reach(&self, partition: &Partition, since_ms: i64) -> Pending<Reach> {
        let inner = Arc::clone(&self.core.member.inner);
        let partition = partition.clone();
        let reach = move || {
            let Partition { topic, number } = &partition;
            let (low, high) = inner.fetch_watermarks(topic, *number, PATIENCE)?;
            let at = |time_ms| -> Result<Option<i64>, KafkaError> {
                let mut times = TopicPartitionList::new();
                times.add_partition_offset(topic, *number, Offset::Offset(time_ms))?;
                let found = inner.offsets_for_times(times, PATIENCE)?;
                let Some(element) = found.elements().first().map(|e| (e.error(), e.offset()))
                else {
                    return Ok(None);
                };
                element.0?;
                Ok(if let Offset::Offset(offset) = element.1 { Some(offset) } else { None })
            };
            let since = match at(since_ms.max(0))? {
                Some(offset) => offset,
                // The log has no timestamps, or the broker does not look them up.
                None if since_ms > 0 && at(0)?.is_some() => high,
                None => low,
            };
            Ok(Reach { low, high, since: since.clamp(low, high) })
        };
        Box::pin(async move { blocking(reach).await?.map_err(|e: KafkaError| Error::from(e)) })
    }

    /// Finds where to begin reading each of these partitions: at its committed offset, or at the start of the log if
    /// there is none or the topic was recreated. Pass the result to [`Self::take_up`] to answer
    /// [`Event::Assigned`].
    ///
    /// # Errors
    /// The coordinator did not answer in time; try again.
    pub fn plan(&self, partitions: &[Partition]) -> Pending<Vec<Assigned>> {
        let (ids, committed) = (self.topic_ids(), self.committed(partitions));
        let partitions = partitions.to_vec();
        Box::pin(async move {
            let (ids, mut committed) = (ids.await?, committed.await?);
            let planned = |partition: &Partition| {
                let id = ids.get(&*partition.topic).map(String::as_str);
                Assigned::of(partition, id, committed.remove(partition))
            };
            Ok(partitions.iter().map(planned).collect())
        })
    }

    /// Answers [`Event::Assigned`]: begins to read partitions where [`Self::plan`] has found.
    ///
    /// # Errors
    /// librdkafka refuses, for example because they were revoked meanwhile.
    pub fn take_up(&mut self, planned: &[Assigned]) -> Result<(), Error> {
        let mut list = TopicPartitionList::new();
        let mut partitions = Vec::with_capacity(planned.len());
        for Assigned { partition, start, .. } in planned {
            let offset = start.map_or(Offset::Beginning, Offset::Offset);
            list.add_partition_offset(&partition.topic, partition.number, offset)?;
            partitions.push(partition.clone());
        }
        self.core.split(&partitions);
        match self.core.member.inner.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.core.member.inner.incremental_assign(&list)?,
            _ => self.core.member.inner.assign(&list)?,
        }
        self.core.was_assigned = true;
        Ok(())
    }

    /// Answers an assignment that was revoked before it was taken up. Call [`Self::release`] afterwards; take no
    /// record of the partitions in between.
    ///
    /// # Errors
    /// librdkafka refuses.
    pub fn decline(&mut self, partitions: &[Partition]) -> Result<(), Error> {
        let nowhere = |partition: &Partition| Assigned::of(partition, None, None);
        let planned: Vec<Assigned> = partitions.iter().map(nowhere).collect();
        self.take_up(&planned)
    }

    /// Gives partitions back. Nothing can be committed for them afterwards.
    ///
    /// # Errors
    /// librdkafka refuses, for example because the partitions are not assigned.
    pub fn release(&mut self, partitions: &[Partition]) -> Result<(), Error> {
        for partition in partitions {
            self.core.queues.remove(partition);
            self.core.stuck.remove(partition);
        }
        for order in &mut self.core.order {
            order.retain(|partition| !partitions.contains(partition));
        }
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&partition.topic, partition.number);
        }
        match self.core.member.inner.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.core.member.inner.incremental_unassign(&list)?,
            _ => self.core.member.inner.unassign()?,
        }
        Ok(())
    }

    /// Starts a commit; [`Event::Committed`] is the answer. Make one at a time: each blocks a thread until it is
    /// answered, because the rdkafka crate sets no callback for asynchronous commits.
    pub fn commit(&self, commits: Vec<Commit>) {
        let work = self.committing(commits);
        let (callbacks, bell) = (self.core.member.callbacks.clone(), self.bell());
        std::mem::drop(spawn_blocking(move || {
            callbacks.committed(work());
            bell.notify_one();
        }));
    }

    /// Commits, and waits up to `timeout` for the answer. Returns how many shards did not fit into the metadata.
    ///
    /// # Errors
    /// The commit failed, or its outcome is unknown.
    pub fn commit_and_wait(&self, commits: Vec<Commit>, timeout: Duration) -> Pending<usize> {
        let work = self.committing(commits);
        Box::pin(async move {
            match tokio::time::timeout(timeout, blocking(work)).await {
                Ok(committed) => committed?,
                Err(_) => Err(Error::Away("the commit was not answered in time".into())),
            }
        })
    }

    fn committing(
        &self,
        commits: Vec<Commit>,
    ) -> impl FnOnce() -> Result<usize, Error> + Send + 'static {
        let inner = Arc::clone(&self.core.member.inner);
        let bytes_max = Arc::clone(&self.core.metadata_bytes_max);
        move || commit(&inner, commits, &bytes_max)
    }

    /// Requests the ids of the group's topics; the answer is empty if the broker has none. It also shows that a
    /// broker answers.
    ///
    /// # Errors
    /// No broker answered in time.
    pub fn topic_ids(&self) -> TopicIds {
        let inner = Arc::clone(&self.core.member.inner);
        let topics: Vec<String> = self.core.topics.iter().map(|t| t.to_string()).collect();
        let gives_ids = Arc::clone(&self.core.gives_ids);
        let ask = move || {
            let (client, timeout) = (inner.client(), PATIENCE);
            if !gives_ids.load(Ordering::Relaxed) {
                let topic = topics.first().map(String::as_str);
                if !ffi::has_controller(client, topic, timeout)? {
                    return Ok(HashMap::new());
                }
            }
            let ids = ffi::topic_ids(client, &topics, timeout)?;
            gives_ids.store(true, Ordering::Relaxed);
            Ok(ids)
        };
        Box::pin(async move { blocking(ask).await? })
    }

    /// Whether the group uses the classic protocol.
    pub fn is_classic(&self) -> bool {
        self.core.protocol == Protocol::Classic
    }

    /// Whether each topic's partitions are distributed evenly; otherwise the sum over all topics is.
    pub fn is_range(&self) -> bool {
        self.core.protocol != Protocol::Any
    }

    /// The partitions that cannot be fetched, with the causes. If a cause is no longer reported, the partition is
    /// fetched again, and removed if that succeeds. Call it about once a second.
    pub fn stuck(&mut self) -> &HashMap<Partition, Stuck> {
        let now = Instant::now();
        let member = &self.core.member;
        self.core.stuck.retain(|partition, stuck| match stuck.next(now) {
            Next::Wait => true,
            Next::Ask => {
                member.fetch_afresh(partition);
                true
            }
            Next::Over => false,
        });
        &self.core.stuck
    }

    /// Which of these topics do not exist. Does not borrow the consumer.
    pub fn missing_topics(&self, topics: Vec<String>) -> MissingTopics {
        let inner = Arc::clone(&self.core.member.inner);
        let gives_ids = Arc::clone(&self.core.gives_ids);
        let ask = move || {
            let (client, timeout) = (inner.client(), PATIENCE);
            // A broker with topic ids can describe topics; librdkafka's in-process broker cannot.
            if gives_ids.load(Ordering::Relaxed) {
                return ffi::missing_topics(client, &topics, timeout);
            }
            let metadata = client.fetch_metadata(None, timeout)?;
            let known = |name: &String| metadata.topics().iter().any(|topic| topic.name() == name);
            Ok(topics.into_iter().filter(|name| !known(name)).collect())
        };
        Box::pin(async move { blocking(ask).await? })
    }

    /// The end of a partition's log, for the lag; -1 if unknown.
    pub fn high_watermark(&self, partition: &Partition) -> i64 {
        let inner = &self.core.member.inner;
        ffi::cached_high_watermark(inner.client(), &partition.topic, partition.number)
    }

    /// The committed offsets with their metadata.
    fn committed(&self, partitions: &[Partition]) -> Pending<HashMap<Partition, (i64, Metadata)>> {
        let inner = Arc::clone(&self.core.member.inner);
        let topics = self.core.topics.clone();
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&partition.topic, partition.number);
        }
        Box::pin(async move {
            if list.count() == 0 {
                return Ok(HashMap::new());
            }
            let list = blocking(move || inner.committed_offsets(list, PATIENCE)).await??;
            let mut committed = HashMap::new();
            for (element, metadata) in list.elements().into_iter().zip(ffi::metadata(&list)) {
                element.error()?;
                let topic = named(&topics, element.topic());
                if let Offset::Offset(offset) = element.offset() {
                    let partition = Partition { topic, number: element.partition() };
                    committed.insert(partition, (offset, Metadata::decode(&metadata, offset)));
                }
            }
            Ok(committed)
        })
    }
}

impl Core {
    fn event(&mut self, callback: Callback) -> Event {
        match callback {
            Callback::Assign(list) => Event::Assigned(self.partitions(list)),
            Callback::Revoke { partitions, lost } => {
                Event::Revoked { partitions: self.partitions(partitions), lost }
            }
            Callback::Committed(result) => Event::Committed(result),
        }
    }

    fn partitions(&self, list: Vec<(String, i32)>) -> Vec<Partition> {
        let partition = |(topic, number): (String, i32)| Partition {
            topic: named(&self.topics, &topic),
            number,
        };
        list.into_iter().map(partition).collect()
    }

    /// Records that a partition cannot be fetched. Each cause is logged once.
    fn cannot_fetch(&mut self, partition: &Partition, error: &KafkaError) {
        let cause = error
            .rdkafka_error_code()
            .map_or_else(|| error.to_string(), |code| format!("{code:?} ({code})"));
        let now = Instant::now();
        if let Some(stuck) = self.stuck.get_mut(partition)
            && stuck.cause == cause
        {
            return stuck.again(now);
        }
        let offset = self.member.position(partition);
        let (topic, number) = (&*partition.topic, partition.number);
        tracing::error!(topic, partition = number, offset, cause, "cannot fetch a partition");
        self.stuck.insert(partition.clone(), Stuck::new(offset, cause, now));
    }

    /// A broker reports a protocol that it does not support once, as a fatal error: starts again with the next one.
    fn trouble(&mut self, error: KafkaError) -> Option<Event> {
        let fatal = self.member.inner.client().fatal_error();
        let Some((code, reason)) = fatal else {
            return Some(Event::Trouble(error.into()));
        };
        use RDKafkaErrorCode as Code;
        let less = match (code, self.protocol) {
            (Code::UnsupportedAssignor, Protocol::Range) => Some(Protocol::Any),
            (Code::UnsupportedFeature | Code::UnsupportedVersion, protocol)
                if self.config.group_protocol == GroupProtocol::Auto
                    && protocol != Protocol::Classic =>
            {
                Some(Protocol::Classic)
            }
            _ => None,
        };
        let Some(less) = less.filter(|_| !self.was_assigned) else {
            return Some(Event::Fatal(format!("{code}: {reason}")));
        };
        match less {
            Protocol::Classic => {
                tracing::info!(
                    reason,
                    "broker does not support KIP-848 groups, using the classic protocol"
                );
            }
            _ => tracing::warn!(
                reason,
                "the broker offers no range assignor: one purger may get all partitions of a topic; \
                 add org.apache.kafka.coordinator.group.assignor.RangeAssignor to group.consumer.assignors"
            ),
        }
        let topics: Vec<&str> = self.topics.iter().map(|topic| &**topic).collect();
        match create(&self.config, &topics, less, &self.bell) {
            Ok(member) => {
                let old = std::mem::replace(&mut self.member, member);
                self.protocol = less;
                std::mem::drop(spawn_blocking(move || drop(old)));
                None
            }
            Err(error) => Some(Event::Trouble(error)),
        }
    }

    /// Gives each partition its own queue. Done before the assignment, so that no record gets into the common queue.
    fn split(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            let Some(mut queue) =
                self.member.inner.split_partition_queue(&partition.topic, partition.number)
            else {
                continue;
            };
            let bell = Arc::clone(&self.bell);
            queue.set_nonempty_callback(move || bell.notify_one());
            self.queues.insert(partition.clone(), queue);
            let topic = self.topics.iter().position(|topic| *topic == partition.topic);
            if let Some(order) = topic.and_then(|topic| self.order.get_mut(topic))
                && !order.contains(partition)
            {
                order.push_back(partition.clone());
            }
        }
        self.bell.notify_one();
    }
}

fn create(
    config: &KafkaConfig,
    topics: &[&str],
    protocol: Protocol,
    bell: &Arc<Notify>,
) -> Result<Member, Error> {
    let callbacks = Callbacks::default();
    let client = settings(config, protocol);
    let mut inner: BaseConsumer<Callbacks> =
        BaseConsumer::from_config_and_context(&client, callbacks.clone())?;
    let ring = Arc::clone(bell);
    inner.set_nonempty_callback(move || ring.notify_one());
    inner.subscribe(topics)?;
    Ok(Member { inner: Arc::new(inner), callbacks })
}

/// librdkafka's settings of a member of the group.
pub(crate) fn settings(config: &KafkaConfig, protocol: Protocol) -> ClientConfig {
    let mut client = config.client();
    client
        .set("group.id", &config.group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", config.fetch_wait_max_ms.to_string())
        // Pause of a full queue before it fetches again; the default is a second.
        .set("fetch.queue.backoff.ms", "5")
        .set("fetch.error.backoff.ms", "100")
        .set("queued.max.messages.kbytes", config.prefetch_kbytes_max.to_string())
        // How soon a topic that is created later is found.
        .set("topic.metadata.refresh.interval.ms", "5000");
    match protocol {
        Protocol::Classic => client
            .set("group.protocol", "classic")
            .set("partition.assignment.strategy", "range")
            .set("session.timeout.ms", "10000")
            .set("heartbeat.interval.ms", "1000"),
        Protocol::Range => {
            client.set("group.protocol", "consumer").set("group.remote.assignor", "range")
        }
        Protocol::Any => client.set("group.protocol", "consumer"),
    };
    if !config.group_instance_id.is_empty() {
        client.set("group.instance.id", &config.group_instance_id);
    }
    config.overlay(client)
}

fn copy(topic: &Arc<str>, message: &BorrowedMessage<'_>) -> Record {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        let header = |h: rdkafka::message::Header<'_, &[u8]>| {
            (h.key.to_owned(), Bytes::copy_from_slice(h.value.unwrap_or_default()))
        };
        headers.iter().map(header).collect()
    });
    Record {
        topic: Arc::clone(topic),
        partition: message.partition(),
        offset: message.offset(),
        leader_epoch: ffi::leader_epoch(message),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key().map(Bytes::copy_from_slice),
        value: message.payload().map(Bytes::copy_from_slice).unwrap_or_default(),
        headers,
    }
}

/// The shared name of a topic, without a copy if the group has the topic.
fn named(topics: &[Arc<str>], name: &str) -> Arc<str> {
    let known = topics.iter().find(|topic| ***topic == *name);
    known.map_or_else(|| Arc::from(name), Arc::clone)
}

/// Commits. Returns how many shards did not fit into the metadata. If the broker refuses the size of the metadata, it
/// is reduced for this and all later commits, so that no commit fails for it.
fn commit(
    member: &BaseConsumer<Callbacks>,
    mut commits: Vec<Commit>,
    bytes_max: &AtomicUsize,
) -> Result<usize, Error> {
    let mut left_out = 0;
    while !commits.is_empty() {
        let allowed = bytes_max.load(Ordering::Relaxed);
        let bytes = allowed.min(METADATA_BATCH_BYTES_MAX / commits.len());
        let (list, missing) = commit_list(&commits, bytes)?;
        let failed = match ffi::commit(member.client(), &list, COMMIT_PATIENCE) {
            Ok(failed) => failed,
            Err(RDKafkaErrorCode::NoOffset) => Vec::new(),
            Err(code) => return Err(KafkaError::ConsumerCommit(code).into()),
        };
        let too_large = |code| {
            use RDKafkaErrorCode::{InvalidCommitOffsetSize, OffsetMetadataTooLarge};
            matches!(code, OffsetMetadataTooLarge | InvalidCommitOffsetSize)
        };
        if let Some((.., code)) = failed.iter().find(|(.., code)| bytes == 0 || !too_large(*code)) {
            return Err(KafkaError::ConsumerCommit(*code).into());
        }
        let refused = |commit: &Commit| {
            let Partition { topic, number } = &commit.partition;
            failed.iter().any(|(name, partition, _)| **name == **topic && partition == number)
        };
        let (again, done): (Vec<_>, Vec<_>) =
            commits.into_iter().zip(missing).partition(|(commit, _)| refused(commit));
        left_out += done.into_iter().map(|(_, missing)| missing).sum::<usize>();
        commits = again.into_iter().map(|(commit, _)| commit).collect();
        if !commits.is_empty() {
            let less = bytes / 2;
            tracing::warn!(bytes, less, "broker refused the metadata's size, reducing it");
            bytes_max.fetch_min(less, Ordering::Relaxed);
        }
    }
    Ok(left_out)
}

/// The commits in librdkafka's format, each with at most `bytes_max` of metadata, and how many shards each leaves out.
fn commit_list(
    commits: &[Commit],
    bytes_max: usize,
) -> Result<(TopicPartitionList, Vec<usize>), Error> {
    let mut list = TopicPartitionList::with_capacity(commits.len());
    let mut left_out = Vec::with_capacity(commits.len());
    for commit in commits {
        let Partition { topic, number } = &commit.partition;
        let (metadata, missing) = commit.metadata.encode(commit.offset, bytes_max);
        let mut element = list.add_partition(topic, *number);
        element.set_offset(Offset::Offset(commit.offset))?;
        if !metadata.is_empty() {
            element.set_metadata(metadata);
        }
        left_out.push(missing);
    }
    Ok((list, left_out))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    spawn_blocking(work).await.map_err(|e| Error::Away(format!("worker thread: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed(text: &str) -> Option<(i64, Metadata)> {
        Some((7, Metadata::decode(text.as_bytes(), 7)))
    }

    /// The source, start and remembered confirmations of a partition whose topic's id is now `id`.
    fn of(id: Option<&str>, committed: Option<(i64, Metadata)>) -> (String, Option<i64>, bool) {
        let partition = Partition { topic: "push".into(), number: 0 };
        let assigned = Assigned::of(&partition, id, committed);
        let remembers = !assigned.memory.confirmed.is_empty();
        (assigned.source.name().to_string(), assigned.start, remembers)
    }

    fn with_memory(source: TopicSource, id: Option<&str>) -> Option<(i64, Metadata)> {
        let at = barid_core::LogPosition { leader_epoch: 0, offset: 6, index: 0 };
        let memory = Memory { confirmed: [(3, at)].into(), ..Default::default() };
        let metadata = Metadata { source: Some(source), id: id.map(Arc::from), memory };
        let (text, left_out) = metadata.encode(7, 3_000);
        assert_eq!(left_out, 0);
        committed(&text)
    }

    #[test]
    fn hazard_32_only_another_id_is_another_topic() {
        let id = || with_memory(TopicSource::Id("a".into()), None);
        assert_eq!(of(Some("a"), id()), ("a".into(), Some(7), true));
        assert_eq!(of(None, id()), ("a".into(), Some(7), true), "absent is unknown");
        assert_eq!(of(Some("b"), id()), ("b".into(), None, false));
        // Redis knows the positions by the name: the partition keeps it.
        let name = |seen| with_memory(TopicSource::Name("push".into()), seen);
        for (seen, now) in [(None, Some("a")), (None, None), (Some("a"), Some("a"))] {
            assert_eq!(of(now, name(seen)), ("push".into(), Some(7), true));
        }
        assert_eq!(of(Some("b"), name(Some("a"))), ("b".into(), None, false));
        assert_eq!(of(Some("a"), None), ("a".into(), None, false));
        assert_eq!(of(None, None), ("push".into(), None, false));
        // An operator's tool has moved the offset: it stands, and nothing is remembered.
        assert_eq!(of(Some("a"), committed("")), ("a".into(), Some(7), false));
    }
}
