//! The gRPC service: purgers and delayers stream batches, and get one reply per batch, in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use barid_wire::internal::dispatcher_server::Dispatcher;
use barid_wire::internal::{DispatchBatch, DispatchReply};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use prometheus::IntGauge;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::deliver::Delivery;
use crate::resolve::Routes;

/// The gRPC service. Cheap to clone.
pub struct BatchService<R> {
    delivery: Arc<Delivery<R>>,
    window_batches: usize,
    stop: CancellationToken,
    streams: TaskTracker,
    unanswered: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
}

impl<R> Clone for BatchService<R> {
    fn clone(&self) -> Self {
        Self {
            delivery: Arc::clone(&self.delivery),
            window_batches: self.window_batches,
            stop: self.stop.clone(),
            streams: self.streams.clone(),
            unanswered: Arc::clone(&self.unanswered),
            answered: Arc::clone(&self.answered),
        }
    }
}

impl<R: Routes> BatchService<R> {
    /// Creates the service. Up to `window_batches` batches of a stream are looked up concurrently. Further ones stay
    /// in the stream, which slows down the caller.
    pub fn new(delivery: Arc<Delivery<R>>, window_batches: usize) -> Self {
        Self {
            delivery,
            window_batches,
            stop: CancellationToken::new(),
            streams: TaskTracker::new(),
            unanswered: Arc::default(),
            answered: Arc::default(),
        }
    }

    /// Stops reading batches, answers those that were read, and ends the streams.
    pub async fn finish(&self) {
        self.stop.cancel();
        self.streams.close();
        self.streams.wait().await;
    }

    /// Number of batches that were read and not answered.
    pub fn unanswered(&self) -> u64 {
        self.unanswered.load(Ordering::SeqCst)
    }

    /// Number of answered batches.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    async fn serve(self, batches: Batches, replies: mpsc::Sender<Result<DispatchReply, Status>>) {
        let _open = Open::new(&self.delivery.metrics.callers);
        let resolved = batches
            .take_until(self.stop.clone().cancelled_owned())
            .map(|batch| {
                let delivery = Arc::clone(&self.delivery);
                let unanswered = Unanswered::new(&self.unanswered);
                async move { (delivery.resolve(batch).await, unanswered) }
            })
            // In order, so that a user's messages keep theirs.
            .buffered(self.window_batches);
        let mut resolved = std::pin::pin!(resolved);
        while let Some((batch, unanswered)) = resolved.next().await {
            let reply = self.delivery.hand_on(batch);
            if replies.send(Ok(reply)).await.is_err() {
                return;
            }
            self.answered.fetch_add(1, Ordering::SeqCst);
            drop(unanswered);
        }
    }
}

type Batches = BoxStream<'static, DispatchBatch>;

#[tonic::async_trait]
impl<R: Routes> Dispatcher for BatchService<R> {
    type DispatchStream = ReceiverStream<Result<DispatchReply, Status>>;

    async fn dispatch(
        &self,
        request: Request<Streaming<DispatchBatch>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        if self.stop.is_cancelled() {
            return Err(Status::unavailable("draining"));
        }
        let (replies, outbound) = mpsc::channel(self.window_batches);
        // A batch that cannot be read ends the stream with the reason, or the caller has gone. It knows which batches
        // were not answered.
        let from = (request.into_inner(), replies.clone());
        let batches = stream::unfold(from, |(mut inbound, replies)| async move {
            match inbound.message().await {
                Ok(batch) => batch.map(|batch| (batch, (inbound, replies))),
                Err(status) => {
                    tracing::debug!(%status, "a caller's stream broke");
                    drop(replies.try_send(Err(status)));
                    None
                }
            }
        });
        self.streams.spawn(self.clone().serve(batches.boxed(), replies));
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

/// Counts an open stream.
struct Open(IntGauge);

impl Open {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts a batch between reading and reply.
struct Unanswered(Arc<AtomicU64>);

impl Unanswered {
    fn new(count: &Arc<AtomicU64>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
