//! One stream of batches to one peer: a bounded queue, one task, one bidirectional gRPC stream, a
//! window of unanswered batches.
//!
//! A batch leaves as soon as the one before is on its way and the window has room, so batches grow
//! only under load. Items keep their order. A stream that breaks fails what was unanswered and what
//! was queued, at once, to the protocol, which knows whom to tell.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barid_core::Backoff;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::{LinkConfig, LinkMetrics};

/// What a link carries, and what becomes of it. All callbacks run on the link's task: they must
/// not wait.
pub trait Protocol: Send + 'static {
    /// One thing to send.
    type Item: Send + 'static;
    /// What goes over the wire.
    type Batch: Send + 'static;
    /// What comes back.
    type Reply: Send + 'static;
    /// What is kept of a batch until it is answered.
    type Sealed: Send + 'static;

    /// The item's size on the wire, about, in bytes.
    fn bytes(item: &Self::Item) -> usize;
    /// Makes a batch, numbered from 1 on each stream.
    fn seal(&mut self, number: u64, items: Vec<Self::Item>) -> (Self::Batch, Self::Sealed);
    /// Opens the stream.
    fn call(
        channel: Channel,
        batches: ReceiverStream<Self::Batch>,
    ) -> impl Future<Output = Result<Streaming<Self::Reply>, Status>> + Send;
    /// Which batch a reply answers.
    fn number(reply: &Self::Reply) -> u64;
    /// A batch was answered, or its stream broke before it was.
    fn settle(&mut self, sealed: Self::Sealed, outcome: Result<Self::Reply, Broken>);
    /// Queued items that will not be sent.
    fn fail(&mut self, items: Vec<Self::Item>);
    /// The link's state changed; [`Link::state`] shows it already.
    fn changed(&mut self, _state: LinkState) {}
}

/// The stream broke, so nothing is known of what was unanswered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream broke")]
pub struct Broken;

/// How a link stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// New: what is queued waits for the first connection.
    Connecting,
    /// The stream is open.
    Up,
    /// It broke or could not be opened; it is being tried again. Takes nothing.
    Down,
}

/// Why a link took nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its queue is full.
    Full,
    /// It has no connection.
    Down,
}

/// An item that was not taken.
#[derive(Debug)]
pub struct Refused<I> {
    /// The item.
    pub item: I,
    /// Why.
    pub why: Refusal,
}

/// The sending end, cheap to clone. When the last clone is dropped, the link sends what is queued,
/// waits for the answers, and ends.
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
    // Gives its bytes back to the queue when the item leaves it.
    _room: OwnedSemaphorePermit,
}

struct Shared {
    state: watch::Sender<LinkState>,
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
    /// The bounds in `config` make no sense.
    pub fn open(
        address: &str,
        config: LinkConfig,
        metrics: LinkMetrics,
        protocol: P,
    ) -> Result<Self, String> {
        config.check()?;
        let (queue, queued) = mpsc::channel(config.queue_items_max);
        let shared = Arc::new(Shared {
            state: watch::Sender::new(LinkState::Connecting),
            pending: AtomicUsize::new(0),
            bytes_max: config.queue_bytes_max,
            metrics,
        });
        let room = Arc::new(Semaphore::new(config.queue_bytes_max));
        let task = Task {
            address: address.to_owned(),
            reconnect: config.reconnect()?,
            config,
            protocol,
            queued,
            held: None,
            shared: Arc::clone(&shared),
        };
        tokio::spawn(task.run());
        Ok(Self { queue, room, shared })
    }

    /// How the link stands now.
    pub fn state(&self) -> LinkState {
        *self.shared.state.borrow()
    }

    /// Follows the link's state.
    pub fn states(&self) -> watch::Receiver<LinkState> {
        self.shared.state.subscribe()
    }

    /// Items queued or unanswered.
    pub fn pending(&self) -> usize {
        self.shared.pending.load(Ordering::SeqCst)
    }

    /// Queues an item, or gives it back at once.
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

    /// Queues an item, waiting for room. Those who wait get in in their order. Dropping the future
    /// drops the item.
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
        // An item above the whole bound takes all of it; `check` keeps the bound within u32.
        (bytes, u32::try_from(bytes.min(self.shared.bytes_max)).unwrap_or(u32::MAX))
    }
}

/// A batch on its way.
struct Unanswered<S> {
    number: u64,
    items: usize,
    sent: Instant,
    sealed: S,
}

/// Why a stream is over.
enum End {
    /// Every sender is gone and everything is answered.
    Finished,
    /// For the log.
    Broke(String),
}

struct Task<P: Protocol> {
    address: String,
    config: LinkConfig,
    reconnect: Backoff,
    protocol: P,
    queued: mpsc::Receiver<Queued<P::Item>>,
    // Taken from the queue, and did not fit into the batch.
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
                    tracing::debug!(peer = self.address, "stream is open");
                    match self.stream(batches, replies).await {
                        End::Finished => return self.turn(LinkState::Down),
                        End::Broke(why) => why,
                    }
                }
                Some(Err(why)) => why,
            };
            self.shared.metrics.breaks.inc();
            if failures == 0 {
                tracing::warn!(peer = self.address, why, "stream is down");
            }
            self.turn(LinkState::Down);
            let wait = tokio::time::sleep(self.reconnect.delay(failures));
            if self.refuse_during(wait).await.is_none() {
                return;
            }
            failures = failures.saturating_add(1);
        }
    }

    /// Sets the state and tells the protocol if it is another one.
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

    /// Connects; `None`: every sender is gone. What is queued waits for the first connection, and
    /// is refused during later ones.
    async fn connect(&mut self) -> Option<Result<Open<P>, String>> {
        let connecting = connect::<P>(self.address.clone(), self.config.clone());
        let state = *self.shared.state.borrow();
        if state != LinkState::Down {
            return Some(connecting.await);
        }
        self.refuse_during(connecting).await
    }

    /// Fails what is queued and what still comes while `work` goes on. `None`: every sender is gone.
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
        // Whoever is told now picks another link: the state must say so before.
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

    /// Sends `first` and what else is queued and fits.
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
        let reply = reply.map_err(|e| e.to_string())?.ok_or("the peer ended the stream")?;
        let number = P::number(&reply);
        match window.front().map(|oldest| oldest.number) {
            Some(expected) if expected == number => {}
            expected => return Err(format!("reply to batch {number} instead of {expected:?}")),
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

async fn connect<P: Protocol>(address: String, config: LinkConfig) -> Result<Open<P>, String> {
    let limit = config.connect_timeout();
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| format!("address: {e}"))?
        .connect_timeout(limit)
        .tcp_nodelay(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .http2_keep_alive_interval(Duration::from_millis(config.keepalive_interval_ms))
        .keep_alive_timeout(Duration::from_millis(config.keepalive_timeout_ms))
        .keep_alive_while_idle(true);
    // The window's batches always find a place, so sending one never waits.
    let (batches, outbound) = mpsc::channel(config.window_batches);
    let open = async {
        let channel = endpoint.connect().await.map_err(|e| describe(&e))?;
        P::call(channel, ReceiverStream::new(outbound)).await.map_err(|e| e.to_string())
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

/// tonic says "transport error"; what it was stands in the sources.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
