//! Combines single calls into batches: queued items are sent as soon as the call before is on its way, so batches grow
//! with the load. Only items whose outcome nothing waits for linger.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use barid_core::Shard;
use redis::Value;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tracing::Instrument as _;

use crate::link::Link;
use crate::metrics::Metrics;
use crate::redis_clock::RedisClock;
use crate::reply::{Reply, timed_reply};
use crate::scripts::{Call, Script};
use crate::{Error, RedisConfig};

/// A script that processes a list of independent items.
pub(crate) trait Operation: Send + Sync + 'static {
    /// An item's request.
    type Request: Send + Sync + 'static;
    /// An item's outcome.
    type Outcome: Send + 'static;
    /// Maximum items of one call, whatever the configuration says.
    const ITEMS_MAX: usize = usize::MAX;

    /// How long the first item of a call waits for others, if all of them may linger.
    fn linger(_config: &RedisConfig) -> Duration {
        Duration::ZERO
    }

    fn script() -> &'static Script;
    /// Encodes the arguments before the items.
    fn shared(config: &RedisConfig, call: &mut Call);
    /// Encodes an item's keys and arguments.
    fn item(item: &Item<'_, Self::Request>, call: &mut Call);
    /// Decodes an item's reply.
    fn outcome(reply: Reply) -> Result<Self::Outcome, Error>;
}

/// The masters that batches are sent to. The topology implements it, and owns the batchers in front of each master.
pub(crate) trait Masters: Send + Sync + 'static {
    fn config(&self) -> &RedisConfig;

    fn metrics(&self) -> &Metrics;

    /// The connection to the master of a shard.
    fn link(&self, shard: Shard) -> Arc<Link>;

    /// Runs a script on the master of `shard`, and follows redirections.
    fn run(
        &self,
        shard: Shard,
        script: &Script,
        call: &Call,
    ) -> impl Future<Output = Result<Value, Error>> + Send;
}

/// Input of an item's keys and arguments.
pub(crate) struct Item<'a, Request> {
    pub request: &'a Request,
    pub shard: Shard,
    /// When the caller stops waiting.
    pub deadline: Instant,
    pub clock: &'a RedisClock,
}

/// The queue in front of one script on one master. Cheap to clone.
pub(crate) struct Batcher<O: Operation> {
    queue: mpsc::Sender<Pending<O>>,
    /// Ends the linger of the current batch.
    send_now: Arc<Notify>,
    timeout: Duration,
}

struct Pending<O: Operation> {
    request: O::Request,
    shard: Shard,
    deadline: Instant,
    answer: oneshot::Sender<Result<O::Outcome, Error>>,
}

impl<O: Operation> Batcher<O> {
    /// Starts the task that sends the batches; it ends when the batcher is dropped.
    pub fn start(masters: Weak<impl Masters>, config: &RedisConfig) -> Self {
        let (queue, receiver) = mpsc::channel(config.queue_max);
        let items_max = config.batch_max.min(O::ITEMS_MAX);
        let send_now = Arc::new(Notify::new());
        let linger = Linger { time: O::linger(config), send_now: Arc::clone(&send_now) };
        let working = work(receiver, masters, config.window, items_max, linger);
        tokio::spawn(working.in_current_span());
        Self { queue, send_now, timeout: config.response_timeout() }
    }

    /// Sends an item, with all that linger, and waits for its outcome, for the response timeout at most.
    pub async fn call(&self, request: O::Request, shard: Shard) -> Result<O::Outcome, Error> {
        self.queued(request, shard, || self.send_now.notify_one()).await
    }

    /// As [`Self::call`], for an item that may linger ([`Operation::linger`]).
    pub async fn call_soon(&self, request: O::Request, shard: Shard) -> Result<O::Outcome, Error> {
        self.queued(request, shard, || ()).await
    }

    async fn queued(
        &self,
        request: O::Request,
        shard: Shard,
        then: impl FnOnce(),
    ) -> Result<O::Outcome, Error> {
        let (answer, answered) = oneshot::channel();
        let deadline = Instant::now() + self.timeout;
        let pending = Pending { request, shard, deadline, answer };
        let away = |why: &str| Error::Away(why.into());
        let wait = async {
            self.queue.send(pending).await.map_err(|_| away("the mailbox is closed"))?;
            then();
            answered.await.map_err(|_| away("the call was abandoned"))?
        };
        match tokio::time::timeout_at(deadline.into(), wait).await {
            Ok(outcome) => outcome,
            Err(_) => Err(away("no answer in time")),
        }
    }
}

/// How long the first item of a call waits for others, unless one of them may not linger.
struct Linger {
    time: Duration,
    send_now: Arc<Notify>,
}

impl Linger {
    async fn wait(&self) {
        if !self.time.is_zero() {
            let _timed_out = tokio::time::timeout(self.time, self.send_now.notified()).await;
        }
    }
}

async fn work<O: Operation>(
    mut queue: mpsc::Receiver<Pending<O>>,
    masters: Weak<impl Masters>,
    window: usize,
    items_max: usize,
    linger: Linger,
) {
    let window = Arc::new(Semaphore::new(window));
    while let Some(first) = queue.recv().await {
        // A full batch does not linger.
        if queue.len() + 1 < items_max {
            linger.wait().await;
        }
        let Ok(permit) = window.clone().acquire_owned().await else { return };
        let mut batch = vec![first];
        while batch.len() < items_max {
            let Ok(next) = queue.try_recv() else { break };
            batch.push(next);
        }
        batch.retain(|pending| !pending.answer.is_closed());
        let Some(masters) = masters.upgrade() else { return };
        if batch.is_empty() {
            continue;
        }
        tokio::spawn(async move {
            execute(&*masters, batch).await;
            drop(permit);
        });
    }
}

/// Sends a batch in one call, or in a Redis Cluster in one call per shard.
async fn execute<O: Operation>(masters: &impl Masters, mut batch: Vec<Pending<O>>) {
    if !masters.config().cluster {
        return call(masters, batch).await;
    }
    batch.sort_by_key(|pending| pending.shard);
    let mut calls = Vec::new();
    while let Some(last) = batch.last() {
        let shard = last.shard;
        let from = batch.partition_point(|pending| pending.shard < shard);
        calls.push(call(masters, batch.split_off(from)));
    }
    futures::future::join_all(calls).await;
}

async fn call<O: Operation>(masters: &impl Masters, batch: Vec<Pending<O>>) {
    let (script, metrics) = (O::script(), masters.metrics());
    let timer = metrics.timer(script.name, batch.len()).start_timer();
    let replies = send(masters, &batch).await;
    timer.observe_duration();
    let mut replies = match replies {
        Ok(replies) => replies,
        Err(error) => return fail(script, metrics, batch, &error),
    };
    for pending in batch {
        let outcome = replies.item().and_then(O::outcome);
        if let Err(error) = &outcome {
            metrics.failed(script.name, error);
        }
        let _gave_up = pending.answer.send(outcome);
    }
}

fn fail<O: Operation>(script: &Script, metrics: &Metrics, batch: Vec<Pending<O>>, error: &Error) {
    for pending in batch {
        metrics.failed(script.name, error);
        let _gave_up = pending.answer.send(Err(error.clone()));
    }
}

async fn send<O: Operation>(masters: &impl Masters, batch: &[Pending<O>]) -> Result<Reply, Error> {
    let shard = batch[0].shard;
    let link = masters.link(shard);
    link.ready().await?; // from then on its clock is known
    let mut call = Call::default();
    O::shared(masters.config(), &mut call);
    for pending in batch {
        let Pending { request, shard, deadline, .. } = pending;
        let item = Item { request, shard: *shard, deadline: *deadline, clock: link.clock() };
        O::item(&item, &mut call);
    }
    let sent = Instant::now();
    let value = masters.run(shard, O::script(), &call).await?;
    timed_reply(value, link.clock(), sent).map(|(reply, _)| reply)
}
