//! Hand-on of messages for online users to the dispatchers. Each dispatcher has a queue and a task, so that a slow one
//! delays only its own messages.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{NodeId, Shard};
use barid_runtime::Spawner;
use barid_wire::internal::Push;
use futures::future::{BoxFuture, FutureExt as _, join_all};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::timeout;

use crate::metrics::Metrics;
use crate::ports::Handoff;

/// A message and its user's shard.
type Item = (Shard, Push);

/// The queues to the dispatchers. Cheap to clone.
#[derive(Clone)]
pub struct HandOn {
    inner: Arc<Inner>,
}

struct Inner {
    dispatchers: Box<dyn Dispatchers>,
    /// `None`: no dispatcher is known for the shard; [`Handoff::push`] may wait for one.
    queues: Mutex<HashMap<Option<NodeId>, mpsc::Sender<Item>>>,
    tasks: Spawner,
    /// Bound of one dispatcher's queue.
    queue_max: usize,
    /// How long to wait for room in a full queue.
    wait: Duration,
    metrics: Metrics,
}

/// An object-safe [`Handoff`].
trait Dispatchers: Send + Sync {
    fn dispatcher_of(&self, shard: Shard) -> Option<NodeId>;
    /// Pushes the items in order, until the queue is closed.
    fn deliver(&self, items: mpsc::Receiver<Item>) -> BoxFuture<'static, ()>;
}

impl<H: Handoff> Dispatchers for H {
    fn dispatcher_of(&self, shard: Shard) -> Option<NodeId> {
        Handoff::dispatcher_of(self, shard)
    }

    fn deliver(&self, mut items: mpsc::Receiver<Item>) -> BoxFuture<'static, ()> {
        let handoff = self.clone();
        async move {
            while let Some((shard, push)) = items.recv().await {
                handoff.push(shard, push).await;
            }
        }
        .boxed()
    }
}

impl HandOn {
    /// Creates a hand-on without queues. `queue_max` bounds the queue of each dispatcher; [`Self::hand_on`] waits up to
    /// `wait` for room in a full one.
    pub fn new(
        handoff: impl Handoff,
        queue_max: usize,
        wait: Duration,
        metrics: Metrics,
        tasks: Spawner,
    ) -> Self {
        let (dispatchers, queues) = (Box::new(handoff), Mutex::default());
        Self { inner: Arc::new(Inner { dispatchers, queues, tasks, queue_max, wait, metrics }) }
    }

    /// Queues messages for their dispatchers. If a queue stays full, its messages are dropped, and the retry timers
    /// that accept has armed deliver them later.
    pub async fn hand_on(&self, pushes: Vec<Item>) {
        let mut waiting = Vec::new();
        for (dispatcher, pushes) in self.by_dispatcher(pushes) {
            let queue = self.queue(dispatcher);
            let mut pushes = pushes.into_iter();
            while let Some(push) = pushes.next() {
                match queue.try_send(push) {
                    Ok(()) => self.inner.metrics.handed.inc(),
                    Err(TrySendError::Full(push)) => {
                        let pushes = std::iter::once(push).chain(pushes);
                        waiting.push(self.hand_on_patiently(queue, pushes));
                        break;
                    }
                    Err(TrySendError::Closed(_)) => self.inner.metrics.handoff_dropped.inc(),
                }
            }
        }
        join_all(waiting).await;
    }

    /// Queues messages, and waits for room until the first wait times out.
    async fn hand_on_patiently(
        &self,
        queue: mpsc::Sender<Item>,
        pushes: impl Iterator<Item = Item>,
    ) {
        let mut patient = true;
        for push in pushes {
            let handed = match queue.try_send(push) {
                Ok(()) => true,
                Err(TrySendError::Full(push)) if patient => {
                    patient = timeout(self.inner.wait, queue.send(push)).await.is_ok();
                    patient
                }
                Err(_) => false,
            };
            let metrics = &self.inner.metrics;
            if handed { metrics.handed.inc() } else { metrics.handoff_dropped.inc() }
        }
    }

    /// Groups messages by dispatcher, in order.
    fn by_dispatcher(&self, pushes: Vec<Item>) -> Vec<(Option<NodeId>, Vec<Item>)> {
        let mut by_dispatcher: Vec<(Option<NodeId>, Vec<Item>)> = Vec::new();
        // Consecutive messages are mostly of one shard.
        let mut last: Option<(Shard, usize)> = None;
        for push in pushes {
            let at = match last.filter(|(shard, _)| *shard == push.0) {
                Some((_, at)) => at,
                None => {
                    let dispatcher = self.inner.dispatchers.dispatcher_of(push.0);
                    let known = by_dispatcher.iter().position(|(of, _)| *of == dispatcher);
                    known.unwrap_or_else(|| {
                        by_dispatcher.push((dispatcher, Vec::new()));
                        by_dispatcher.len() - 1
                    })
                }
            };
            last = Some((push.0, at));
            by_dispatcher[at].1.push(push);
        }
        by_dispatcher
    }

    fn queue(&self, dispatcher: Option<NodeId>) -> mpsc::Sender<Item> {
        let mut queues = self.inner.queues.lock();
        if let Some(queue) = queues.get(&dispatcher) {
            return queue.clone();
        }
        // There is a new dispatcher, so others may have gone: drop empty queues. They are created again when needed.
        queues.retain(|_, queue| queue.capacity() < queue.max_capacity());
        let (queue, items) = mpsc::channel(self.inner.queue_max);
        let deliver = self.inner.dispatchers.deliver(items);
        self.inner.tasks.spawn_finite("the hand-on to a dispatcher", deliver);
        queues.insert(dispatcher, queue.clone());
        queue
    }

    /// Closes the queues: each task ends once its queue is empty. Call it after the last [`Self::hand_on`].
    pub fn close(&self) {
        self.inner.queues.lock().clear();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use barid_core::ShardCount;
    use barid_runtime::{Context, Tasks};
    use prometheus::Registry;
    use tokio::time::{Instant, sleep};

    /// Drops everything.
    #[derive(Clone)]
    pub(crate) struct Nobody;

    impl Handoff for Nobody {
        async fn push(&self, _shard: Shard, _push: Push) {}
        fn any_available(&self) -> bool {
            false
        }
        async fn flush(&self, _deadline: Instant) -> usize {
            0
        }
    }

    /// Two dispatchers: one that takes a message each ten seconds has the even shards, and one that takes them at
    /// once the odd ones.
    #[derive(Clone, Default)]
    struct SlowAndFast(Arc<Mutex<Vec<(u16, String)>>>);

    impl Handoff for SlowAndFast {
        fn dispatcher_of(&self, shard: Shard) -> Option<NodeId> {
            NodeId::new(if shard.get().is_multiple_of(2) { "slow" } else { "fast" }).ok()
        }
        async fn push(&self, shard: Shard, push: Push) {
            if shard.get().is_multiple_of(2) {
                sleep(Duration::from_secs(10)).await;
            }
            self.0.lock().push((shard.get(), push.user));
        }
        fn any_available(&self) -> bool {
            true
        }
        async fn flush(&self, _deadline: Instant) -> usize {
            0
        }
    }

    fn push(number: usize) -> Item {
        let shard = ShardCount::new(4).unwrap().all().nth(number % 4).unwrap();
        (shard, Push { user: number.to_string(), ..Push::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_dispatcher_holds_up_its_own_messages_only() {
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let handoff = SlowAndFast::default();
        let wait = Duration::from_millis(100);
        let tasks = Tasks::new(&Context::new());
        let hand_on = HandOn::new(handoff.clone(), 8, wait, metrics.clone(), tasks.spawner());
        let begun = Instant::now();
        for batch in 0..10 {
            hand_on.hand_on((batch * 40..(batch + 1) * 40).map(push).collect()).await;
        }
        assert!(begun.elapsed() <= 10 * wait, "{:?}", begun.elapsed());
        tokio::task::yield_now().await;
        let handed: Vec<String> = handoff.0.lock().iter().map(|(_, user)| user.clone()).collect();
        let odd: Vec<String> = (0..400).filter(|n| n % 2 == 1).map(|n| n.to_string()).collect();
        assert_eq!(handed, odd, "all of the fast one, in order");
        // One is being pushed, eight wait, the rest was left to the timers.
        assert_eq!((metrics.handed.get(), metrics.handoff_dropped.get()), (200 + 9, 191));
        hand_on.close();
        tasks.finished().await;
        assert_eq!(handoff.0.lock().len(), 209, "what waits is handed on before the end");
    }
}
