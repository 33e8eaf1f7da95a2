//! Real gRPC: servers that misbehave as told, and a dispatcher's stream to a real node.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use barid_core::{Chain, Epoch, Seq};
use barid_wire::envelope::{Header, encode_body, set_payload};
use barid_wire::internal::access_client::AccessClient;
use barid_wire::internal::dispatcher_server::{Dispatcher, DispatcherServer};
use barid_wire::internal::{DispatchBatch, DispatchReply, NodeBatch, NodeFanout, NodeReply};
use barid_wire::v1::{BodyKind, Envelope};
use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::body::Body;
use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse};
use tonic::codegen::{Service, StdError};
use tonic::server::NamedService;
use tonic::{Request, Response, Status, Streaming};

/// A gRPC server on a port of its own. Killed on drop.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: String,
    // Its own runtime, so that a kill takes every connection along.
    runtime: Option<Runtime>,
}

impl Server {
    /// Serves `service`.
    ///
    /// # Errors
    /// No port can be bound.
    pub async fn start<S>(service: S) -> Result<Self>
    where
        S: Service<HttpRequest<Body>, Response = HttpResponse<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
        StdError: From<S::Error>,
    {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.spawn(TcpListener::bind("127.0.0.1:0")).await??;
        let address = listener.local_addr()?.to_string();
        let incoming = TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(incoming));
        Ok(Self { address, runtime: Some(runtime) })
    }

    /// Ends it with all its connections.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The replies of a stream.
pub type Replies<R> = ReceiverStream<Result<R, Status>>;

/// Reads a caller's batches to the end; `answer` notes each and answers it, or keeps silent.
pub fn answer_each<B, R, F>(
    mut batches: Streaming<B>,
    answer: impl Fn(B) -> F + Send + 'static,
) -> Response<Replies<R>>
where
    B: Send + 'static,
    R: Send + 'static,
    F: Future<Output = Option<R>> + Send,
{
    let (replies, outbound) = mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok(Some(batch)) = batches.message().await {
            if let Some(reply) = answer(batch).await {
                drop(replies.send(Ok(reply)).await);
            }
        }
    });
    Response::new(ReceiverStream::new(outbound))
}

/// What a [`FakeDispatcher`] does with a batch; nothing: it does not answer.
pub type Answer = dyn Fn(DispatchBatch) -> Option<DispatchReply> + Send + Sync;

/// A dispatcher that answers as told.
#[derive(Clone)]
pub struct FakeDispatcher {
    answer: Arc<Answer>,
}

impl FakeDispatcher {
    /// Serves one that gives each batch to `answer`, which must not block.
    ///
    /// # Errors
    /// No port can be bound.
    pub async fn start(
        answer: impl Fn(DispatchBatch) -> Option<DispatchReply> + Send + Sync + 'static,
    ) -> Result<Server> {
        Server::start(DispatcherServer::new(Self { answer: Arc::new(answer) })).await
    }
}

#[tonic::async_trait]
impl Dispatcher for FakeDispatcher {
    type DispatchStream = Replies<DispatchReply>;

    async fn dispatch(
        &self,
        request: Request<Streaming<DispatchBatch>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let answer = Arc::clone(&self.answer);
        Ok(answer_each(request.into_inner(), move |batch| std::future::ready(answer(batch))))
    }
}

/// A dispatcher's stream to one access node; each batch is answered before the next.
#[derive(Debug)]
pub struct NodeStream {
    batches: mpsc::Sender<NodeBatch>,
    replies: Streaming<NodeReply>,
    batch: u64,
}

impl NodeStream {
    /// To the node that listens there for dispatchers.
    ///
    /// # Errors
    /// It does not.
    pub async fn connect(node: SocketAddr) -> Result<Self> {
        let mut client = AccessClient::connect(format!("http://{node}")).await?;
        let (batches, sent) = mpsc::channel(1);
        let replies = client.deliver(ReceiverStream::new(sent)).await?.into_inner();
        Ok(Self { batches, replies, batch: 0 })
    }

    /// Hands a batch over; its number is given here.
    ///
    /// # Errors
    /// The node ends the stream, or answers another batch.
    pub async fn send(&mut self, batch: NodeBatch) -> Result<NodeReply> {
        self.batch += 1;
        self.batches.send(NodeBatch { batch: self.batch, ..batch }).await?;
        let reply = self.replies.message().await?.context("the node ended the stream")?;
        ensure!(reply.batch == self.batch, "batch {} was answered", reply.batch);
        Ok(reply)
    }

    /// Hands entries over, all at once, that are for a group of an app; `group` empty: for everyone.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn fan_out(&mut self, app: &str, group: &str, entries: Vec<Bytes>) -> Result<()> {
        let fanout = |envelope| NodeFanout {
            app: app.into(),
            group: group.into(),
            envelope,
            ..NodeFanout::default()
        };
        let fanouts = entries.into_iter().map(fanout).collect();
        let reply = self.send(NodeBatch { fanouts, ..NodeBatch::default() }).await?;
        ensure!(reply.gone.is_empty(), "nobody in particular was meant");
        Ok(())
    }
}

/// An entry of an audience's mailbox, whose body is `payload` as it is; `change` says what else is in it.
pub fn audience_entry(
    seq: u64,
    id: &str,
    payload: Bytes,
    change: impl FnOnce(&mut Envelope),
) -> Bytes {
    let (epoch, seq, chain) = (Epoch(1), Seq(seq), Chain(0));
    let header = Header { epoch, seq, prev_chain: chain, chain, accepted_at_us: 0 };
    let mut envelope = Envelope { id: id.into(), ..Envelope::default() };
    envelope.set_kind(BodyKind::Data);
    set_payload(&mut envelope, payload, usize::MAX, 0);
    change(&mut envelope);
    [&header.encode()[..], &encode_body(envelope)].concat().into()
}
