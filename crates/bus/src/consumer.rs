//! A member of the consumers' group, as a typestate: [`Consuming`] takes records, [`Draining`] only
//! commits and gives back, [`Done`] has left the group.
//!
//! librdkafka asks before it takes a partition away, and waits for the answer: [`Event::Revoked`] is
//! the question, [`Consumer::release`] the answer, and what lies between is draining. Nothing blocks:
//! the callbacks only leave a note. Each partition has a queue of its own, so a partition whose
//! records cannot be taken is simply not asked, and bulk never stands before what is urgent.

use std::collections::{HashMap, VecDeque};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::TopicPartitionList;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer as _, RebalanceProtocol};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::topic_partition_list::Offset;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;

use crate::context::{Callbacks, Told};
use crate::stuck::{Next, Stuck};
use crate::{Error, GroupProtocol, KafkaConfig, Memory, Metadata, TopicSource, ffi};

/// How long to wait for an answer of Kafka's before it counts as away.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a commit may take before it counts as failed. It may have been made: the next one repeats it.
const COMMIT_PATIENCE: Duration = Duration::from_secs(30);
/// Metadata of one commit: the broker writes all of its partitions as one batch, of 1 MiB at most.
const METADATA_BATCH_BYTES_MAX: usize = 256 * 1024;

/// A partition of a topic of the group.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition.
    pub number: i32,
}

/// A record as it was taken, copied out of librdkafka's memory.
#[derive(Debug, Clone)]
pub struct Record {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// The epoch of the leader that wrote it; -1 where the broker does not tell.
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
    /// The first header of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| &**value)
    }

    /// Bytes that it takes in memory, about: headers are a sender's, too, and there may be thousands.
    pub fn bytes(&self) -> usize {
        let header = |(name, value): &(String, Bytes)| 64 + name.len() + value.len();
        let headers: usize = self.headers.iter().map(header).sum();
        headers + self.key.as_ref().map_or(0, Bytes::len) + self.value.len()
    }
}

/// An event of the group or the broker.
#[derive(Debug)]
pub enum Event {
    /// These partitions are for this member; answer with [`Consumer::assign`].
    Assigned(Vec<Partition>),
    /// These are to be given back; answer with [`Consumer::release`] once they are drained.
    Revoked {
        /// Which.
        partitions: Vec<Partition>,
        /// Somebody else already has them: there is nothing to drain or commit.
        lost: bool,
    },
    /// A commit was answered: how many shards of how many partitions its metadata had no room for.
    Committed(Result<usize, Error>),
    /// An error that librdkafka retries by itself: no broker, an unknown topic, a lost coordinator.
    Trouble(Error),
    /// This member cannot go on (fenced by another with its name, not allowed): end the process.
    Fatal(String),
}

/// Takes records.
#[derive(Debug)]
pub struct Consuming;
/// Takes nothing more; commits and gives back.
#[derive(Debug)]
pub struct Draining;
/// Has left the group.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Done {
    /// In order.
    Left,
    /// librdkafka did not finish in time, or could not; the group will notice by itself.
    Abandoned,
}

/// What to commit of a partition.
#[derive(Debug, Clone)]
pub struct Commit {
    /// The partition.
    pub partition: Partition,
    /// The next offset to read.
    pub offset: i64,
    /// Kept beside the offset: an offset of another life of the topic is void.
    pub metadata: Metadata,
}

/// Where reading of an assigned partition begins.
#[derive(Debug, Clone)]
pub struct Assigned {
    /// The partition.
    pub partition: Partition,
    /// Which life of the topic it is.
    pub source: TopicSource,
    /// The topic's id, where it is known.
    pub id: Option<Arc<str>>,
    /// The committed offset; `None`: from the log's start.
    pub start: Option<i64>,
    /// State that the partition's former owner committed.
    pub memory: Memory,
}

impl Assigned {
    /// Decides where to begin. Only a different id proves that the topic was created anew: an absent id
    /// proves nothing, and an id that appears where the offset was committed under the topic's name
    /// belongs to that same topic, whose positions Redis stores under the name.
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
                "topic was created anew, starting at its beginning"
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
    /// The first offset that it still holds.
    pub low: i64,
    /// One past its last.
    pub high: i64,
    /// The first offset that was written at or after the time asked for; `high` where none was.
    pub since: i64,
}

/// An answer of Kafka's that may take seconds. Does not borrow the consumer.
pub type Pending<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// Topics' ids by name.
pub type TopicIds = Pending<HashMap<String, String>>;

/// Names of topics that do not exist.
pub type MissingTopics = Pending<Vec<String>>;

/// A member of the group.
pub struct Consumer<State = Consuming> {
    core: Core,
    state: PhantomData<State>,
}

struct Core {
    config: KafkaConfig,
    topics: Vec<Arc<str>>,
    queues: HashMap<Partition, PartitionQueue<Callbacks>>,
    member: Member,
    /// The order in which partitions of a topic are asked; rotates.
    order: Vec<VecDeque<Partition>>,
    bell: Arc<Notify>,
    protocol: Protocol,
    was_assigned: bool,
    /// Partitions that cannot be fetched.
    stuck: HashMap<Partition, Stuck>,
    /// The broker has told topics' ids.
    gives_ids: Arc<AtomicBool>,
    /// Bytes of metadata that the broker is known to take beside an offset.
    metadata_bytes_max: Arc<AtomicUsize>,
}

/// How the group balances, from what is asked for first to what every broker has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// KIP-848, each topic's partitions shared out evenly. The broker's own choice (`uniform`) balances
    /// the sum over all topics: one of two members may get every partition of the one with traffic.
    Range,
    /// KIP-848 with whatever assignor the broker prefers.
    Any,
    /// Before KIP-848; range as well.
    Classic,
}

/// librdkafka's consumer. Its drop leaves the group and waits until that is done, unless a request under way
/// still holds it: then [`Member::leave`] does.
struct Member {
    inner: Arc<BaseConsumer<Callbacks>>,
    callbacks: Callbacks,
}

impl Member {
    /// Drops a partition's prefetched records and librdkafka's state of its last failure.
    fn fetch_afresh(&self, partition: &Partition) {
        let mut list = TopicPartitionList::new();
        list.add_partition(&partition.topic, partition.number);
        let afresh = self.inner.pause(&list).and_then(|()| self.inner.resume(&list));
        if let Err(error) = afresh {
            tracing::debug!(%error, topic = &*partition.topic, "cannot fetch afresh");
        }
    }

    /// Where the next record of a partition would be; `None`: not known.
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

    /// Leaves the group, and waits until that is done, whoever else holds librdkafka's consumer: a request
    /// under way does, for as long as its answer takes. False: librdkafka cannot close it.
    fn leave(self) -> bool {
        let shared = Arc::clone(&self.inner);
        drop(self);
        match Arc::try_unwrap(shared) {
            // Its drop closes it.
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
    /// Nobody will answer rebalances any more, neither those to come nor one that is pending:
    /// without an answer, leaving would wait for ever.
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
    /// Joins the group for these topics, most urgent first. Brokers that are away are found later.
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

    /// Takes up to `max` records of a topic (by its place in the list given at start) into `out`,
    /// partition by partition in turn, from those that `wanted` names. Never waits; how many.
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

    /// Takes no more records from now on.
    pub fn drain(self) -> Consumer<Draining> {
        Consumer { core: self.core, state: PhantomData }
    }
}

impl Consumer<Draining> {
    /// Leaves the group, for at most `timeout`; what is still assigned is given back as it is.
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
    /// The next event, if there is one. Call it at least every few minutes, or the group takes the
    /// partitions away. Never waits.
    pub fn poll(&mut self) -> Option<Event> {
        loop {
            if let Some(told) = self.core.member.callbacks.next() {
                return Some(self.core.event(told));
            }
            match self.core.member.inner.poll(Duration::ZERO) {
                Some(Err(error)) => {
                    if let Some(event) = self.core.trouble(error) {
                        return Some(event);
                    }
                }
                // Every partition was split off before it was assigned, so none can be here.
                Some(Ok(message)) => {
                    let (topic, partition) = (message.topic().to_owned(), message.partition());
                    tracing::error!(topic, partition, "record in the common queue");
                    let error = Error::Refused(format!("{topic}/{partition}: queue was not split"));
                    return Some(Event::Trouble(error));
                }
                None => break,
            }
        }
        let told = self.core.member.callbacks.next();
        told.map(|told| self.core.event(told)).or_else(|| {
            let down = self.core.member.callbacks.take_all_down();
            down.then(|| Event::Trouble(Error::Away("no broker can be reached".into())))
        })
    }

    /// Waits until there may be something to poll or to take.
    pub async fn ready(&self) {
        self.core.bell.notified().await;
    }

    /// A handle for waiting while the consumer itself is in use: what [`Self::ready`] awaits.
    pub fn bell(&self) -> Arc<Notify> {
        Arc::clone(&self.core.bell)
    }

    /// Goes back, or on, to an offset: the next record taken is the first at or after it. What was
    /// prefetched is dropped. Takes up to 5 s (a few ms where the broker answers).
    ///
    /// # Errors
    /// The partition is not assigned, or it took too long.
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
                // A log without timestamps, or a broker that does not look at them, tells nothing.
                None if since_ms > 0 && at(0)?.is_some() => high,
                None => low,
            };
            Ok(Reach { low, high, since: since.clamp(low, high) })
        };
        Box::pin(async move { blocking(reach).await?.map_err(|e: KafkaError| Error::from(e)) })
    }

    /// Where to begin reading each of these partitions: at its committed offset, or at the log's start if
    /// there is no commit or the topic was created anew since. Pass the result to [`Self::take_up`] to
    /// answer [`Event::Assigned`].
    ///
    /// # Errors
    /// The coordinator did not answer in time; ask again.
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

    /// Accepts partitions as planned.
    ///
    /// # Errors
    /// librdkafka refuses, as where they have been taken away meanwhile.
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

    /// Answers an assignment that is revoked before it was taken up; call [`Self::release`] afterwards.
    /// No record of the partitions may be taken in between.
    ///
    /// # Errors
    /// librdkafka refuses.
    pub fn decline(&mut self, partitions: &[Partition]) -> Result<(), Error> {
        let nowhere = |partition: &Partition| Assigned::of(partition, None, None);
        let planned: Vec<Assigned> = partitions.iter().map(nowhere).collect();
        self.take_up(&planned)
    }

    /// Gives partitions back. Their records and commits are over.
    ///
    /// # Errors
    /// librdkafka refuses, as where the partitions are not assigned.
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

    /// Asks to commit; [`Event::Committed`] is the answer. One at a time: each holds a thread until
    /// it is answered, because librdkafka tells of an asynchronous commit only to those who have set
    /// a callback for it, and the binding sets none.
    pub fn commit(&self, commits: Vec<Commit>) {
        let work = self.committing(commits);
        let (callbacks, bell) = (self.core.member.callbacks.clone(), self.bell());
        std::mem::drop(spawn_blocking(move || {
            callbacks.committed(work());
            bell.notify_one();
        }));
    }

    /// Commits and waits for the answer, for at most `timeout`; how many shards the metadata had no
    /// room for.
    ///
    /// # Errors
    /// It was not committed, or it is not known.
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

    /// The ids of the group's topics; empty where the broker gives none. Shows that a broker answers.
    ///
    /// # Errors
    /// None answered in time.
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

    /// Whether the group balances by the classic protocol.
    pub fn is_classic(&self) -> bool {
        self.core.protocol == Protocol::Classic
    }

    /// Whether each topic's partitions are shared out evenly; else the broker balances the sum.
    pub fn is_range(&self) -> bool {
        self.core.protocol != Protocol::Any
    }

    /// The partitions that cannot be fetched, and why. One whose cause is no longer reported is fetched
    /// again, and removed if that reports nothing. Call it about once a second.
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
            // Brokers that give ids can describe topics; librdkafka's in-process broker cannot.
            if gives_ids.load(Ordering::Relaxed) {
                return ffi::missing_topics(client, &topics, timeout);
            }
            let metadata = client.fetch_metadata(None, timeout)?;
            let known = |name: &String| metadata.topics().iter().any(|topic| topic.name() == name);
            Ok(topics.into_iter().filter(|name| !known(name)).collect())
        };
        Box::pin(async move { blocking(ask).await? })
    }

    /// How far each partition has been written, for the lag; -1 where it is not known yet.
    pub fn high_watermark(&self, partition: &Partition) -> i64 {
        let inner = &self.core.member.inner;
        ffi::cached_high_watermark(inner.client(), &partition.topic, partition.number)
    }

    /// The committed offsets, each with what was kept beside it.
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
    fn event(&mut self, told: Told) -> Event {
        match told {
            Told::Assign(list) => Event::Assigned(self.partitions(list)),
            Told::Revoke { partitions, lost } => {
                Event::Revoked { partitions: self.partitions(partitions), lost }
            }
            Told::Committed(result) => Event::Committed(result),
        }
    }

    fn partitions(&self, list: Vec<(String, i32)>) -> Vec<Partition> {
        let partition = |(topic, number): (String, i32)| Partition {
            topic: named(&self.topics, &topic),
            number,
        };
        list.into_iter().map(partition).collect()
    }

    /// Notes that a record or a batch cannot be fetched. Logs each cause once.
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
        tracing::error!(topic, partition = number, offset, cause, "a partition cannot be fetched");
        self.stuck.insert(partition.clone(), Stuck::new(offset, cause, now));
    }

    /// A broker that does not offer what is asked for says so once, fatally: start over with less.
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
                tracing::info!(reason, "the broker has no KIP-848 groups: classic protocol");
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

    /// Gives each partition a queue of its own. Before it is assigned: so no record ever goes to the
    /// common queue.
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
    let mut client = config.client();
    client
        .set("group.id", &config.group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", config.fetch_wait_max_ms.to_string())
        // How long a full queue rests before it fetches again; the default adds up to a second.
        .set("fetch.queue.backoff.ms", "5")
        .set("fetch.error.backoff.ms", "100")
        .set("queued.max.messages.kbytes", config.prefetch_kbytes_max.to_string())
        // A topic that is created later is seen as soon.
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
    let callbacks = Callbacks::default();
    let client = config.overlay(client);
    let mut inner: BaseConsumer<Callbacks> =
        BaseConsumer::from_config_and_context(&client, callbacks.clone())?;
    let ring = Arc::clone(bell);
    inner.set_nonempty_callback(move || ring.notify_one());
    inner.subscribe(topics)?;
    Ok(Member { inner: Arc::new(inner), callbacks })
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

/// The topic of this name, without a copy of the name where the group has the topic.
fn named(topics: &[Arc<str>], name: &str) -> Arc<str> {
    let known = topics.iter().find(|topic| ***topic == *name);
    known.map_or_else(|| Arc::from(name), Arc::clone)
}

/// Commits; returns how many shards the metadata had no room for. A commit never fails for its metadata:
/// if the broker refuses its size, this and all later commits carry less.
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
            tracing::warn!(bytes, less, "the broker takes less metadata beside an offset");
            bytes_max.fetch_min(less, Ordering::Relaxed);
        }
    }
    Ok(left_out)
}

/// The commits as librdkafka takes them, each with at most `bytes_max` of metadata, and how many
/// shards each leaves out.
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

    /// What becomes of a partition whose topic's id is now `id`.
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
