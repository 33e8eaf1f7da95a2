//! The pool of dispatchers. A shard's work goes to the dispatcher that ranks first for it, so that its L1 is warm,
//! and to the next one as soon as the stream breaks.

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, NodeId, Shard};
use barid_mailbox::{NodeRecord, NodeTable};
use barid_wire::internal::dispatcher_client::DispatcherClient;
use barid_wire::internal::{DispatchBatch, DispatchReply, Push, Resend, Unreachable};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use crate::{
    Broken, Credentials, Link, LinkState, MeshConfig, MeshMetrics, Party, Protocol, rendezvous,
};

/// A dispatcher, as in its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The node's name.
    pub id: NodeId,
    /// The node's incarnation.
    pub incarnation: Incarnation,
    /// Its gRPC `host:port`.
    pub address: String,
    /// Draining: new work goes to other dispatchers, if there are any.
    pub draining: bool,
}

/// No dispatcher accepted the item, or the answer did not arrive. It is unknown whether it was handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no dispatcher answered")]
pub struct Unavailable;

/// Distributes work to dispatchers. Cheap to clone. When the last clone is dropped, its links finish.
#[derive(Clone)]
pub struct DispatchPool {
    inner: Arc<Inner>,
}

struct Inner {
    credentials: Credentials,
    config: MeshConfig,
    metrics: MeshMetrics,
    members: RwLock<Arc<Vec<Member>>>,
    // Incremented when the members or the states of their links change.
    changes: watch::Sender<u64>,
    // Since when no dispatcher is available.
    alone_since: Mutex<Option<Instant>>,
}

struct Member {
    peer: Peer,
    link: Link<Dispatching>,
}

impl DispatchPool {
    /// Follows the dispatchers' leases, with one link to each. Call within a runtime; ends with the
    /// last clone.
    ///
    /// # Errors
    /// Returns the first invalid bound of `config`.
    pub fn new(
        mut nodes: NodeTable,
        credentials: Credentials,
        config: MeshConfig,
        metrics: MeshMetrics,
    ) -> Result<Self, String> {
        let (peers, followed) = watch::channel(peers_of(&nodes));
        let pool = Self::over(followed, credentials, config, metrics)?;
        tokio::spawn(
            async move {
                loop {
                    tokio::select! {
                        () = nodes.changed() => peers.send_replace(peers_of(&nodes)),
                        () = peers.closed() => return,
                    };
                }
            }
            .in_current_span(),
        );
        Ok(pool)
    }

    /// Follows `peers`, with one link to each. Call within a runtime; ends with the last clone or
    /// with the sender of `peers`.
    ///
    /// # Errors
    /// Returns the first invalid bound of `config`.
    pub fn over(
        mut peers: watch::Receiver<Vec<Peer>>,
        credentials: Credentials,
        config: MeshConfig,
        metrics: MeshMetrics,
    ) -> Result<Self, String> {
        config.check()?;
        let inner = Arc::new(Inner {
            credentials,
            config,
            metrics,
            members: RwLock::default(),
            changes: watch::Sender::new(0),
            alone_since: Mutex::default(),
        });
        inner.follow(&peers.borrow_and_update().clone());
        let (weak, alive) = (Arc::downgrade(&inner), inner.changes.subscribe());
        tokio::spawn(
            async move {
                loop {
                    tokio::select! {
                        changed = peers.changed() => if changed.is_err() { return },
                        () = closed(alive.clone()) => return,
                    }
                    let Some(inner) = weak.upgrade() else { return };
                    inner.follow(&peers.borrow_and_update().clone());
                }
            }
            .in_current_span(),
        );
        Ok(Self { inner })
    }

    /// Sends a push. Waits up to `push_wait_ms` while the dispatcher's queue is full or no dispatcher is available,
    /// and not at all once none has been available for that long. Then the push is dropped and counted; its retry
    /// timer is armed. Pushes of a shard keep their order while the dispatchers stay the same.
    pub async fn push(&self, shard: Shard, push: Push) {
        let item = Item::Push { shard, push, moved: false };
        if let Err(outcome) = self.inner.send(shard, item).await {
            self.inner.metrics.pushes.with_label_values(&[outcome]).inc();
        }
    }

    /// Sends a re-send, and waits for the answer. Returns the devices (as indices of `resend.devices`) whose node
    /// could not be reached, with the reasons.
    ///
    /// # Errors
    /// No dispatcher accepted it within `push_wait_ms`, or the stream broke before the answer.
    pub async fn resend(
        &self,
        shard: Shard,
        resend: Resend,
    ) -> Result<Vec<(usize, Unreachable)>, Unavailable> {
        let (answer, answered) = oneshot::channel();
        let item = Item::Resend { parts: split(resend), answer };
        let result = match self.inner.send(shard, item).await {
            Ok(()) => answered.await.map_err(|_| Unavailable),
            Err(_) => Err(Unavailable),
        };
        let outcome = if result.is_ok() { "answered" } else { "unavailable" };
        self.inner.metrics.resends.with_label_values(&[outcome]).inc();
        result
    }

    /// The dispatcher for a shard, now or once its first stream is open; `None`: there is none.
    pub fn dispatcher_of(&self, shard: Shard) -> Option<NodeId> {
        pick(&self.inner.members(), shard).map(|member| member.peer.id.clone())
    }

    /// Whether a dispatcher is available; for readiness.
    pub fn any_available(&self) -> bool {
        self.inner.members().iter().any(|member| member.link.state() == LinkState::Up)
    }

    /// Why none is available, for people: the last failure towards each of up to three.
    pub fn failure(&self) -> String {
        let members = self.inner.members();
        let failed = members.iter().map(|member| (&member.peer.address, member.link.failure()));
        let failed = failed.filter(|(_, why)| !why.is_empty()).take(3);
        let failed: Vec<String> = failed.map(|(at, why)| format!("{at}: {why}")).collect();
        match failed.as_slice() {
            [] if members.is_empty() => "none has a lease in redis".into(),
            [] => "connecting".into(),
            failed => failed.join("; "),
        }
    }

    /// Waits until everything is answered. Returns how many items are not at the deadline.
    pub async fn flush(&self, deadline: Instant) -> usize {
        loop {
            let left = self.inner.members().iter().map(|member| member.link.pending()).sum();
            if left == 0 || Instant::now() >= deadline {
                return left;
            }
            sleep(Duration::from_millis(2)).await;
        }
    }
}

fn peers_of(nodes: &NodeTable) -> Vec<Peer> {
    let peer = |record: &NodeRecord| Peer {
        id: record.id.clone(),
        incarnation: record.incarnation,
        address: record.address.clone(),
        draining: record.draining,
    };
    nodes.snapshot().iter().map(peer).collect()
}

impl Inner {
    fn members(&self) -> Arc<Vec<Member>> {
        Arc::clone(&self.members.read())
    }

    /// Opens links to new peers, and lets the links of removed peers finish.
    fn follow(self: &Arc<Self>, peers: &[Peer]) {
        let old = self.members();
        let mut members = Vec::with_capacity(peers.len());
        for peer in peers {
            let same = old.iter().find(|member| {
                member.peer.incarnation == peer.incarnation && member.peer.address == peer.address
            });
            let link = match same {
                Some(member) => member.link.clone(),
                None => match self.open(peer) {
                    Ok(link) => link,
                    Err(why) => {
                        tracing::error!(dispatcher = %peer.id, why, "cannot open a link");
                        continue;
                    }
                },
            };
            members.push(Member { peer: peer.clone(), link });
        }
        *self.members.write() = Arc::new(members);
        self.changed();
    }

    /// Called when the members or the state of a link have changed.
    fn changed(&self) {
        let alone = self.members().iter().all(|member| member.link.state() == LinkState::Down);
        let mut since = self.alone_since.lock();
        *since = if alone { since.or_else(|| Some(Instant::now())) } else { None };
        drop(since);
        self.changes.send_modify(|count| *count += 1);
    }

    fn open(self: &Arc<Self>, peer: &Peer) -> Result<Link<Dispatching>, String> {
        let protocol = Dispatching { pool: Arc::downgrade(self) };
        let (credentials, config) = (self.credentials.clone(), self.config.link.clone());
        Link::open(&peer.address, credentials, config, self.metrics.link.clone(), protocol)
    }

    fn pick(&self, shard: Shard) -> Option<Link<Dispatching>> {
        pick(&self.members(), shard).map(|member| member.link.clone())
    }

    fn try_send(&self, shard: Shard, item: Item) -> Result<(), Item> {
        match self.pick(shard) {
            Some(link) => link.try_send(item).map_err(|refused| refused.item),
            None => Err(item),
        }
    }

    /// Sends an item; waits up to `push_wait_ms` for room or for a dispatcher. If none has been available for that
    /// long already, it does not wait, so that an outage of the dispatchers does not slow down accepting. The error
    /// is the outcome to count.
    async fn send(&self, shard: Shard, item: Item) -> Result<(), &'static str> {
        let Err(mut item) = self.try_send(shard, item) else { return Ok(()) };
        let deadline = Instant::now() + self.config.push_wait();
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            let Some(link) = self.pick(shard) else {
                let since = *self.alone_since.lock();
                let patience = since.map_or(deadline, |since| since + self.config.push_wait());
                match timeout_at(deadline.min(patience), changes.changed()).await {
                    Ok(Ok(())) => continue,
                    _ => return Err("unavailable"),
                }
            };
            match timeout_at(deadline, link.send(item)).await {
                Ok(Ok(())) => return Ok(()),
                // The link failed meanwhile; the next pick chooses another one.
                Ok(Err(refused)) => item = refused.item,
                Err(_) => return Err("full"),
            }
        }
    }

    /// Moves a push whose stream broke to the next dispatcher, once. If both deliver it, the access node drops the
    /// second.
    fn resend_moved(&self, item: Item) {
        let outcome = match item {
            Item::Push { shard, push, moved: false } => {
                match self.try_send(shard, Item::Push { shard, push, moved: true }) {
                    Ok(()) => "moved",
                    Err(_) => "lost",
                }
            }
            Item::Push { .. } => "lost",
            // Dropping the sender reports the failure to the caller.
            Item::Resend { .. } => return,
        };
        self.metrics.pushes.with_label_values(&[outcome]).inc();
    }
}

/// The member that ranks first for a shard, among those with an open link, else among new ones, else among draining
/// ones.
fn pick(members: &[Member], shard: Shard) -> Option<&Member> {
    let among = |state: LinkState, draining: bool| {
        let fit = move |member: &&Member| {
            member.peer.draining == draining && member.link.state() == state
        };
        rendezvous::first(members.iter().filter(fit), |m| m.peer.id.as_str(), shard)
    };
    among(LinkState::Up, false)
        .or_else(|| among(LinkState::Connecting, false))
        .or_else(|| among(LinkState::Up, true))
}

/// Waits until the pool is dropped.
async fn closed(mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {}
}

/// One re-send per device, so that a dispatcher answers for each.
fn split(resend: Resend) -> Vec<Resend> {
    let Resend { app, user, devices } = resend;
    let part = |device| Resend { app: app.clone(), user: user.clone(), devices: vec![device] };
    devices.into_iter().map(part).collect()
}

enum Item {
    Push { shard: Shard, push: Push, moved: bool },
    Resend { parts: Vec<Resend>, answer: Answer },
}

/// The protocol of `barid.internal.v1.Dispatcher`.
struct Dispatching {
    pool: Weak<Inner>,
}

/// Receives the devices of a re-send that were not reached, with the reasons.
type Answer = oneshot::Sender<Vec<(usize, Unreachable)>>;

/// State of a batch: its pushes, which may be sent again, and the callers that wait for its re-sends.
struct SealedDispatch {
    pushes: Vec<Item>,
    answers: Vec<(Range<usize>, Answer)>,
}

impl Protocol for Dispatching {
    type Item = Item;
    type Batch = DispatchBatch;
    type Reply = DispatchReply;
    type Sealed = SealedDispatch;
    const PEER: Party = Party::Dispatcher;

    fn bytes(item: &Item) -> usize {
        match item {
            Item::Push { push, .. } => {
                let audience = push.audience.as_ref().map_or(0, |audience| {
                    let nodes: usize = audience.nodes.iter().map(|node| node.len() + 2).sum();
                    audience.mailbox.len() + nodes
                });
                push.app.len() + push.user.len() + audience + push.envelope.len() + 16
            }
            Item::Resend { parts, .. } => {
                parts.iter().map(|part| part.app.len() + part.user.len() + 160).sum()
            }
        }
    }

    fn seal(&mut self, number: u64, items: Vec<Item>) -> (DispatchBatch, SealedDispatch) {
        let mut batch = DispatchBatch { batch: number, ..Default::default() };
        let mut sealed = SealedDispatch { pushes: Vec::new(), answers: Vec::new() };
        for item in items {
            match item {
                Item::Push { shard, push, moved } => {
                    batch.pushes.push(push.clone());
                    sealed.pushes.push(Item::Push { shard, push, moved });
                }
                Item::Resend { parts, answer } => {
                    let from = batch.resends.len();
                    batch.resends.extend(parts);
                    sealed.answers.push((from..batch.resends.len(), answer));
                }
            }
        }
        (batch, sealed)
    }

    async fn call(
        channel: Channel,
        batches: ReceiverStream<DispatchBatch>,
    ) -> Result<Streaming<DispatchReply>, Status> {
        Ok(DispatcherClient::new(channel).dispatch(batches).await?.into_inner())
    }

    fn number(reply: &DispatchReply) -> u64 {
        reply.batch
    }

    fn settle(&mut self, sealed: SealedDispatch, outcome: Result<DispatchReply, Broken>) {
        let Ok(reply) = outcome else { return self.fail(sealed.pushes) };
        if let Some(pool) = self.pool.upgrade() {
            let answered = pool.metrics.pushes.with_label_values(&["answered"]);
            answered.inc_by(sealed.pushes.len() as u64);
        }
        for (range, answer) in sealed.answers {
            let unreachable = reply.unreachable.iter().enumerate();
            let unreachable = unreachable.map(|(n, index)| (*index as usize, n));
            let mine = unreachable.filter(|(index, _)| range.contains(index));
            let why = |n: usize| reply.why.get(n).and_then(|why| Unreachable::try_from(*why).ok());
            let mine = mine.map(|(index, n)| (index - range.start, why(n).unwrap_or_default()));
            // Fails if the caller has gone, which does not matter.
            drop(answer.send(mine.collect()));
        }
    }

    fn fail(&mut self, items: Vec<Item>) {
        let Some(pool) = self.pool.upgrade() else { return };
        for item in items {
            pool.resend_moved(item);
        }
    }

    fn changed(&mut self, _state: LinkState) {
        if let Some(pool) = self.pool.upgrade() {
            pool.changed();
        }
    }
}
