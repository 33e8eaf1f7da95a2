//! A link: one stream of batches to one peer, with a bounded queue, a task, a bidirectional gRPC stream and a window of
//! unanswered batches.
//!
//! A batch is sent as soon as the last one is sent and the window has room, so that batches grow only under load.
//! Items keep their order. When a stream breaks, unanswered batches and queued items fail at once, through the
//! callbacks of the protocol.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barid_core::Backoff;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use crate::dial::reason;
use crate::{Credentials, LinkConfig, LinkMetrics, Party, dial};

/// The items of a link, and callbacks for their outcomes. Callbacks run on the link's task and must not block.
pub trait Protocol: Send + 'static {
    /// An item to send.
    type Item: Send + 'static;
    /// A batch on the wire.
    type Batch: Send + 'static;
    /// The answer to a batch.
    type Reply: Send + 'static;
    /// State of a batch, kept until it is answered.
    type Sealed: Send + 'static;
    /// The role of the peer, which its certificate must name.
    const PEER: Party;

    /// The item's approximate size on the wire, bytes.
    fn bytes(item: &Self::Item) -> usize;
    /// Creates a batch. Batches are numbered from 1 on each stream.
    fn seal(&mut self, number: u64, items: Vec<Self::Item>) -> (Self::Batch, Self::Sealed);
    /// Opens the stream.
    fn call(
        channel: Channel,
        batches: ReceiverStream<Self::Batch>,
    ) -> impl Future<Output = Result<Streaming<Self::Reply>, Status>> + Send;
    /// The number of the batch that a reply answers.
    fn number(reply: &Self::Reply) -> u64;
    /// Called when a batch is answered, or its stream has broken.
    fn settle(&mut self, sealed: Self::Sealed, outcome: Result<Self::Reply, Broken>);
    /// Called with queued items that will not be sent.
    fn fail(&mut self, items: Vec<Self::Item>);
    /// Called after the link's state has changed.
    fn changed(&mut self, _state: LinkState) {}
}

/// The stream broke. It is unknown whether its unanswered batches were handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream broke")]
pub struct Broken;

/// The state of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// Not connected yet; items are queued until the first connection.
    Connecting,
    /// The stream is open.
    Up,
    /// The stream broke or could not be opened, and is being reopened. Items are refused.
    Down,
}

/// Why a link refused an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is full.
    Full,
    /// There is no connection.
    Down,
}

/// A refused item.
#[derive(Debug)]
pub struct Refused<I> {
    /// The item.
    pub item: I,
    /// Why.
    pub why: Refusal,
}

/// The sending end. Cheap to clone. When the last clone is dropped, the link sends its queue, waits for the answers,
/// and ends.
pub struct Link<P: Protocol> {
    queue: mpsc::Sender<Queued<P::Item>>,
    room: Arc<Semaphore>,
    shared: Arc<Shared>,
}

impl<P: Protocol> Clone for Link<P> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            room: Arc::clone(&self.room),
            shared: Arc::clone(&self.shared),
        }
    }
}

struct Queued<I> {
    item: I,
    bytes: usize,
    // Returns the item's bytes to the queue's bound when the item leaves the queue.
    _room: OwnedSemaphorePermit,
}

struct Shared {
    state: watch::Sender<LinkState>,
    /// Why the last stream ended or could not be opened; empty: none has.
    failure: Mutex<String>,
    pending: AtomicUsize,
    bytes_max: usize,
    metrics: LinkMetrics,
}

impl Shared {
    fn taken(&self) {
        self.pending.fetch_add(1, Ordering::SeqCst);
        self.metrics.pending.inc();
    }

    fn done(&self, items: usize) {
        self.pending.fetch_sub(items, Ordering::SeqCst);
        self.metrics.pending.sub(items as i64);
    }
}

impl<P: Protocol> Link<P> {
    /// Starts the link's task. `address` is the peer's gRPC `host:port`. Call within a runtime.
    ///
    /// # Errors
    /// Returns the first invalid bound of `config`.
    pub fn open(
        address: &str,
        credentials: Credentials,
        config: LinkConfig,
        metrics: LinkMetrics,
        protocol: P,
    ) -> Result<Self, String> {
        config.check()?;
        let (queue, queued) = mpsc::channel(config.queue_items_max);
        let shared = Arc::new(Shared {
            state: watch::Sender::new(LinkState::Connecting),
            failure: Mutex::default(),
            pending: AtomicUsize::new(0),
            bytes_max: config.queue_bytes_max,
            metrics,
        });
        let room = Arc::new(Semaphore::new(config.queue_bytes_max));
        let task = Task {
            address: address.to_owned(),
            credentials,
            reconnect: config.reconnect()?,
            config,
            protocol,
            queued,
            held: None,
            shared: Arc::clone(&shared),
        };
        tokio::spawn(task.run().in_current_span());
        Ok(Self { queue, room, shared })
    }

    /// The current state.
    pub fn state(&self) -> LinkState {
        *self.shared.state.borrow()
    }

    /// Why the last stream ended or could not be opened; empty: none has.
    pub fn failure(&self) -> String {
        self.shared.failure.lock().clone()
    }

    /// Number of items that are queued or unanswered.
    pub fn pending(&self) -> usize {
        self.shared.pending.load(Ordering::SeqCst)
    }

    /// Queues an item without waiting.
    ///
    /// # Errors
    /// The queue is full, or the link is down.
    pub fn try_send(&self, item: P::Item) -> Result<(), Refused<P::Item>> {
        if self.state() == LinkState::Down {
            return Err(Refused { item, why: Refusal::Down });
        }
        let (bytes, permits) = self.size(&item);
        let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(permits) else {
            return Err(Refused { item, why: Refusal::Full });
        };
        match self.queue.try_reserve() {
            Ok(place) => {
                self.shared.taken();
                place.send(Queued { item, bytes, _room: room });
                Ok(())
            }
            Err(mpsc::error::TrySendError::Full(())) => Err(Refused { item, why: Refusal::Full }),
            Err(mpsc::error::TrySendError::Closed(())) => Err(Refused { item, why: Refusal::Down }),
        }
    }

    /// Queues an item; waits for room, first come, first served. Dropping the future drops the item.
    ///
    /// # Errors
    /// The link is down.
    pub async fn send(&self, item: P::Item) -> Result<(), Refused<P::Item>> {
        if self.state() == LinkState::Down {
            return Err(Refused { item, why: Refusal::Down });
        }
        let (bytes, permits) = self.size(&item);
        let Ok(room) = Arc::clone(&self.room).acquire_many_owned(permits).await else {
            return Err(Refused { item, why: Refusal::Down });
        };
        let Ok(place) = self.queue.reserve().await else {
            return Err(Refused { item, why: Refusal::Down });
        };
        self.shared.taken();
        place.send(Queued { item, bytes, _room: room });
        Ok(())
    }

    fn size(&self, item: &P::Item) -> (usize, u32) {
        let bytes = P::bytes(item).max(1);
        // An item larger than the bound takes all of it. `check` keeps the bound within u32.
        (bytes, u32::try_from(bytes.min(self.shared.bytes_max)).unwrap_or(u32::MAX))
    }
}

/// An unanswered batch.
struct Unanswered<S> {
    number: u64,
    items: usize,
    sent: Instant,
    sealed: S,
}

/// Why a stream has ended.
enum End {
    /// All senders are dropped, and everything is answered.
    Finished,
    /// An error, for the log.
    Broke(String),
}

struct Task<P: Protocol> {
    address: String,
    credentials: Credentials,
    config: LinkConfig,
    reconnect: Backoff,
    protocol: P,
    queued: mpsc::Receiver<Queued<P::Item>>,
    // The next item, which did not fit into the last batch.
    held: Option<Queued<P::Item>>,
    shared: Arc<Shared>,
}

impl<P: Protocol> Task<P> {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let why = match self.connect().await {
                None => return,
                Some(Ok((batches, replies))) => {
                    failures = 0;
                    self.turn(LinkState::Up);
                    tracing::debug!(peer = self.address, "stream opened");
                    match self.stream(batches, replies).await {
                        End::Finished => return self.turn(LinkState::Down),
                        End::Broke(why) => why,
                    }
                }
                Some(Err(why)) => why,
            };
            self.shared.metrics.breaks.inc();
            self.shared.failure.lock().clone_from(&why);
            if failures == 0 {
                tracing::warn!(peer = self.address, why, "stream failed, reconnecting");
            }
            self.turn(LinkState::Down);
            let wait = tokio::time::sleep(self.reconnect.delay(failures));
            if self.refuse_during(wait).await.is_none() {
                return;
            }
            failures = failures.saturating_add(1);
        }
    }

    /// Sets the state, and calls the protocol if it has changed.
    fn turn(&mut self, state: LinkState) {
        let before = self.shared.state.send_replace(state);
        if before == state {
            return;
        }
        match (before, state) {
            (_, LinkState::Up) => self.shared.metrics.up.inc(),
            (LinkState::Up, _) => self.shared.metrics.up.dec(),
            _ => {}
        }
        self.protocol.changed(state);
    }

    /// Connects; `None`: all senders are dropped. Items wait for the first connection, and are refused while a later
    /// one is established.
    async fn connect(&mut self) -> Option<Result<Open<P>, String>> {
        let connecting =
            connect::<P>(self.address.clone(), self.credentials.clone(), self.config.clone());
        let state = *self.shared.state.borrow();
        if state != LinkState::Down {
            return Some(connecting.await);
        }
        self.refuse_during(connecting).await
    }

    /// Fails queued and new items while `work` runs. `None`: all senders are dropped.
    async fn refuse_during<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let first = tokio::select! {
                done = &mut work => return Some(done),
                first = self.queued.recv() => first?,
            };
            let mut items = vec![first.item];
            while let Ok(next) = self.queued.try_recv() {
                items.push(next.item);
            }
            self.fail(items);
        }
    }

    fn fail(&mut self, items: Vec<P::Item>) {
        let count = items.len();
        self.protocol.fail(items);
        self.shared.done(count);
    }

    async fn stream(
        &mut self,
        batches: mpsc::Sender<P::Batch>,
        mut replies: Streaming<P::Reply>,
    ) -> End {
        let mut window = VecDeque::with_capacity(self.config.window_batches);
        let end = self.exchange(&batches, &mut replies, &mut window).await;
        // The state must be set first, because the callbacks pick another link by it.
        self.turn(LinkState::Down);
        for batch in window {
            self.protocol.settle(batch.sealed, Err(Broken));
            self.shared.done(batch.items);
        }
        if let Some(held) = self.held.take() {
            self.fail(vec![held.item]);
        }
        end
    }

    async fn exchange(
        &mut self,
        batches: &mpsc::Sender<P::Batch>,
        replies: &mut Streaming<P::Reply>,
        window: &mut VecDeque<Unanswered<P::Sealed>>,
    ) -> End {
        let mut number = 0;
        let mut open = true;
        loop {
            if !open && self.held.is_none() && window.is_empty() {
                return End::Finished;
            }
            let has_room = window.len() < self.config.window_batches;
            if has_room && let Some(first) = self.held.take() {
                number += 1;
                if let Err(why) = self.send(batches, window, number, first) {
                    return End::Broke(why);
                }
                continue;
            }
            let limit = window.front().map(|oldest| oldest.sent + self.config.reply_timeout());
            tokio::select! {
                biased;
                reply = replies.message() => {
                    if let Err(why) = self.answered(reply, window) {
                        return End::Broke(why);
                    }
                }
                () = until(limit) => return End::Broke("no reply in time".into()),
                first = self.queued.recv(), if open && self.held.is_none() => match first {
                    Some(first) => self.held = Some(first),
                    None => open = false,
                },
            }
        }
    }

    /// Sends `first`, with as many queued items as fit.
    fn send(
        &mut self,
        batches: &mpsc::Sender<P::Batch>,
        window: &mut VecDeque<Unanswered<P::Sealed>>,
        number: u64,
        first: Queued<P::Item>,
    ) -> Result<(), String> {
        let mut bytes = first.bytes;
        let mut items = vec![first.item];
        while items.len() < self.config.batch_items_max {
            let Ok(next) = self.queued.try_recv() else { break };
            if bytes + next.bytes > self.config.batch_bytes_max {
                self.held = Some(next);
                break;
            }
            bytes += next.bytes;
            items.push(next.item);
        }
        let count = items.len();
        let (batch, sealed) = self.protocol.seal(number, items);
        window.push_back(Unanswered { number, items: count, sent: Instant::now(), sealed });
        self.shared.metrics.batches.inc();
        self.shared.metrics.items.inc_by(count as u64);
        batches.try_send(batch).map_err(|_| "the peer stopped reading".to_owned())
    }

    fn answered(
        &mut self,
        reply: Result<Option<P::Reply>, Status>,
        window: &mut VecDeque<Unanswered<P::Sealed>>,
    ) -> Result<(), String> {
        let reply = reply.map_err(|status| reason(&status))?.ok_or("the peer ended the stream")?;
        let number = P::number(&reply);
        match window.front().map(|oldest| oldest.number) {
            Some(expected) if expected == number => {}
            None => return Err(format!("reply to batch {number}, and none is open")),
            Some(expected) => {
                return Err(format!("reply to batch {number} instead of {expected}"));
            }
        }
        if let Some(batch) = window.pop_front() {
            self.shared.metrics.reply_seconds.observe(batch.sent.elapsed().as_secs_f64());
            self.protocol.settle(batch.sealed, Ok(reply));
            self.shared.done(batch.items);
        }
        Ok(())
    }
}

type Open<P> = (mpsc::Sender<<P as Protocol>::Batch>, Streaming<<P as Protocol>::Reply>);

async fn connect<P: Protocol>(
    address: String,
    credentials: Credentials,
    config: LinkConfig,
) -> Result<Open<P>, String> {
    let limit = config.connect_timeout();
    let settings = |endpoint: Endpoint| {
        endpoint
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .http2_keep_alive_interval(Duration::from_millis(config.keepalive_interval_ms))
            .keep_alive_timeout(Duration::from_millis(config.keepalive_timeout_ms))
            .keep_alive_while_idle(true)
    };
    // The channel has room for the whole window, so that sending a batch never waits.
    let (batches, outbound) = mpsc::channel(config.window_batches);
    let open = async {
        let channel = dial(&credentials, P::PEER, &address, limit, settings).await?;
        P::call(channel, ReceiverStream::new(outbound)).await.map_err(|status| {
            // A peer with TLS ends a connection without it before it can say why.
            let hint = match credentials.is_some() {
                true => "",
                false => "; internal_tls is not set here, and the peer may need it",
            };
            reason(&status) + hint
        })
    };
    let replies = timeout(limit, open).await.map_err(|_| "connecting timed out".to_owned())??;
    Ok((batches, replies))
}

async fn until(limit: Option<Instant>) {
    match limit {
        Some(limit) => sleep_until(limit).await,
        None => std::future::pending().await,
    }
}
