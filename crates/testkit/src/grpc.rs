//! gRPC servers that a test controls, and a dispatcher's stream to a real node.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use barid_core::limits::EVERYONE;
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

/// A gRPC server on its own port. Killed on drop.
#[derive(Debug)]
pub struct Server {
    /// The address that it listens on.
    pub address: String,
    // Its own runtime, so that a kill ends every connection.
    runtime: Option<Runtime>,
}

impl Server {
    /// Serves `service`.
    ///
    /// # Errors
    /// Returns an error if no port can be bound.
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

    /// Ends the server and all its connections.
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

/// Gives each batch of a stream to `answer`, and sends its reply, if it gives one.
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

/// Gives a [`FakeDispatcher`]'s reply to a batch; `None`: no reply.
pub type Answer = dyn Fn(DispatchBatch) -> Option<DispatchReply> + Send + Sync;

/// A dispatcher whose replies a test decides.
#[derive(Clone)]
pub struct FakeDispatcher {
    answer: Arc<Answer>,
}

impl FakeDispatcher {
    /// Serves a dispatcher that gives each batch to `answer`, which must not block.
    ///
    /// # Errors
    /// Returns an error if no port can be bound.
    pub async fn start(
        answer: impl Fn(DispatchBatch) -> Option<DispatchReply> + Send + Sync + 'static,
    ) -> Result<Server> {
        Server::start(DispatcherServer::new(Self::new(answer))).await
    }

    /// A dispatcher that gives each batch to `answer`, which must not block, for a server of the test.
    pub fn new(
        answer: impl Fn(DispatchBatch) -> Option<DispatchReply> + Send + Sync + 'static,
    ) -> Self {
        Self { answer: Arc::new(answer) }
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
    /// Connects to the gRPC listener of a node.
    ///
    /// # Errors
    /// Returns an error if the node does not accept the stream.
    pub async fn connect(node: SocketAddr) -> Result<Self> {
        let mut client = AccessClient::connect(format!("http://{node}")).await?;
        let (batches, sent) = mpsc::channel(1);
        let replies = client.deliver(ReceiverStream::new(sent)).await?.into_inner();
        Ok(Self { batches, replies, batch: 0 })
    }

    /// Sends a batch, after setting its number, and waits for the reply.
    ///
    /// # Errors
    /// Returns an error if the node ends the stream, or answers another batch.
    pub async fn send(&mut self, batch: NodeBatch) -> Result<NodeReply> {
        self.batch += 1;
        self.batches.send(NodeBatch { batch: self.batch, ..batch }).await?;
        let reply = self.replies.message().await?.context("the node ended the stream")?;
        ensure!(reply.batch == self.batch, "batch {} was answered", reply.batch);
        Ok(reply)
    }

    /// Sends entries for a group of an app in one batch; an empty `group` is everyone of the app.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn fan_out(&mut self, app: &str, group: &str, entries: Vec<Bytes>) -> Result<()> {
        let fanout = |envelope| NodeFanout {
            app: app.into(),
            mailbox: if group.is_empty() { EVERYONE } else { group }.into(),
            envelope,
            ..NodeFanout::default()
        };
        let fanouts = entries.into_iter().map(fanout).collect();
        let reply = self.send(NodeBatch { fanouts, ..NodeBatch::default() }).await?;
        ensure!(reply.gone.is_empty(), "nobody in particular was meant");
        Ok(())
    }
}

/// An entry of an audience's mailbox with an uncompressed body, after `change`.
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
