//! Handing messages of online users on to the dispatchers: a queue and a task for each dispatcher, so that one that
//! is slow holds up its own messages only.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{NodeId, Shard};
use barid_wire::internal::Push;
use futures::future::{BoxFuture, FutureExt as _, join_all};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;
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
    queues: Mutex<Queues>,
    /// Messages that wait for one dispatcher.
    queue_max: usize,
    /// How long to wait for room there.
    wait: Duration,
    metrics: Metrics,
}

/// `None`: no dispatcher is known for the shard; [`Handoff::push`] may wait for one.
#[derive(Default)]
struct Queues {
    by_dispatcher: HashMap<Option<NodeId>, mpsc::Sender<Item>>,
    tasks: JoinSet<()>,
}

/// A [`Handoff`] behind a pointer.
trait Dispatchers: Send + Sync {
    fn dispatcher_of(&self, shard: Shard) -> Option<NodeId>;
    /// Hands on in order.
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
    /// No queue yet. `queue_max` messages may wait for one dispatcher; [`Self::hand_on`] waits up to `wait` for
    /// room there.
    pub fn new(handoff: impl Handoff, queue_max: usize, wait: Duration, metrics: Metrics) -> Self {
        let (dispatchers, queues) = (Box::new(handoff), Mutex::default());
        Self { inner: Arc::new(Inner { dispatchers, queues, queue_max, wait, metrics }) }
    }

    /// Queues messages for their dispatchers. One that does not keep up delays this a little, and no more: a
    /// message that finds no room is left to the timer that accept has armed.
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

    /// Waits for room, until it has waited in vain once.
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

    /// The messages of each dispatcher, in order.
    fn by_dispatcher(&self, pushes: Vec<Item>) -> Vec<(Option<NodeId>, Vec<Item>)> {
        let mut by_dispatcher: Vec<(Option<NodeId>, Vec<Item>)> = Vec::new();
        // Messages of one shard mostly follow each other.
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
        if let Some(queue) = queues.by_dispatcher.get(&dispatcher) {
            return queue.clone();
        }
        // A new dispatcher: others may have gone. A queue that is needed again is started again.
        queues.by_dispatcher.retain(|_, queue| queue.capacity() < queue.max_capacity());
        while queues.tasks.try_join_next().is_some() {}
        let (queue, items) = mpsc::channel(self.inner.queue_max);
        queues.tasks.spawn(self.inner.dispatchers.deliver(items));
        queues.by_dispatcher.insert(dispatcher, queue.clone());
        queue
    }

    /// Ends the queues; the tasks that still hand on what is in them. Call it once nobody hands on any more.
    pub fn close(&self) -> JoinSet<()> {
        std::mem::take(&mut *self.inner.queues.lock()).tasks
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use barid_core::ShardCount;
    use prometheus::Registry;
    use tokio::time::{Instant, sleep};

    /// Drops everything.
    #[derive(Clone)]
    pub(crate) struct Nobody;

    impl Handoff for Nobody {
        async fn push(&self, _shard: Shard, _push: Push) {}
        async fn any_available(&self) -> bool {
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
        async fn any_available(&self) -> bool {
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
        let hand_on = HandOn::new(handoff.clone(), 8, wait, metrics.clone());
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
        let mut tasks = hand_on.close();
        while tasks.join_next().await.is_some() {}
        assert_eq!(handoff.0.lock().len(), 209, "what waits is handed on before the end");
    }
}
