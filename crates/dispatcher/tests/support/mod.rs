//! Access nodes as real tonic servers that misbehave as told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barid_core::{Chain, Epoch, Seq};
use barid_testkit::grpc::{Replies, Server, answer_each};
use barid_wire::envelope::Header;
use barid_wire::internal::access_server::{Access, AccessServer};
use barid_wire::internal::dispatcher_client::DispatcherClient;
use barid_wire::internal::{
    DispatchBatch, DispatchReply, Gone, NodeBatch, NodePush, NodeReply, NodeResend, Push,
};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Long enough for anything on a busy machine.
pub const SOON: Duration = Duration::from_secs(10);

/// An access node.
pub struct FakeNode {
    pub address: String,
    pub fake: Fake,
    _server: Server,
}

/// A fake access node: its scripted answers, and the pushes it received.
#[derive(Clone)]
pub struct Fake {
    seen: watch::Sender<(Vec<NodePush>, Vec<NodeResend>)>,
    /// False: it answers nothing, and reads nothing more.
    pub reads: Arc<AtomicBool>,
    /// Answered as gone when pushed to or re-sent to.
    pub gone: Arc<Mutex<Vec<Gone>>>,
}

#[tonic::async_trait]
impl Access for Fake {
    type DeliverStream = Replies<NodeReply>;

    async fn deliver(
        &self,
        request: Request<Streaming<NodeBatch>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let fake = self.clone();
        Ok(answer_each(request.into_inner(), move |batch: NodeBatch| {
            let fake = fake.clone();
            async move {
                while !fake.reads.load(Ordering::SeqCst) {
                    sleep(Duration::from_millis(1)).await;
                }
                let gone = fake.gone.lock().clone();
                fake.seen.send_modify(|(pushes, resends)| {
                    pushes.extend(batch.pushes);
                    resends.extend(batch.resends);
                });
                Some(NodeReply { batch: batch.batch, gone })
            }
        }))
    }
}

impl FakeNode {
    /// Starts one on a port of its own.
    pub async fn start() -> Self {
        let fake = Fake {
            seen: watch::Sender::default(),
            reads: Arc::new(AtomicBool::new(true)),
            gone: Arc::default(),
        };
        let server = Server::start(AccessServer::new(fake.clone())).await.unwrap();
        Self { address: server.address.clone(), fake, _server: server }
    }

    /// Waits until it got so many pushes, and returns them.
    pub async fn pushes(&self, count: usize) -> Vec<NodePush> {
        let mut seen = self.fake.seen.subscribe();
        let enough = timeout(SOON, seen.wait_for(|(pushes, _)| pushes.len() >= count)).await;
        enough.expect("the node got too few pushes").unwrap().0.clone()
    }

    /// Waits until it got so many re-sends, and returns them.
    pub async fn resends(&self, count: usize) -> Vec<NodeResend> {
        let mut seen = self.fake.seen.subscribe();
        let enough = timeout(SOON, seen.wait_for(|(_, resends)| resends.len() >= count)).await;
        enough.expect("the node got too few re-sends").unwrap().1.clone()
    }
}

/// A caller of the dispatcher.
pub struct Caller {
    batches: mpsc::Sender<DispatchBatch>,
    replies: Streaming<DispatchReply>,
    number: u64,
}

impl Caller {
    /// Connects to a dispatcher.
    pub async fn connect(address: &str) -> Self {
        let (batches, outbound) = mpsc::channel(64);
        let mut client = DispatcherClient::connect(format!("http://{address}")).await.unwrap();
        let replies = client.dispatch(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        Self { batches, replies, number: 0 }
    }

    /// Sends a batch; nobody reads its answer.
    pub fn send(&mut self, mut batch: DispatchBatch) {
        self.number += 1;
        batch.batch = self.number;
        self.batches.try_send(batch).unwrap();
    }

    /// The next answer, as the stream gives it.
    pub async fn reply(&mut self) -> Result<Option<DispatchReply>, Status> {
        timeout(SOON, self.replies.message()).await.expect("no reply in time")
    }

    /// Sends a batch and waits for its answer.
    pub async fn dispatch(&mut self, batch: DispatchBatch) -> DispatchReply {
        self.send(batch);
        let reply = self.reply().await.unwrap().expect("the dispatcher ended the stream");
        assert_eq!(reply.batch, self.number);
        reply
    }

    /// Sends pushes and waits for the answer.
    pub async fn push(&mut self, pushes: Vec<Push>) {
        self.dispatch(DispatchBatch { pushes, ..Default::default() }).await;
    }
}

/// A push of an envelope with this seq.
pub fn push(user: &str, seq: u64) -> Push {
    let header = Header {
        epoch: Epoch(1),
        seq: Seq(seq),
        prev_chain: Chain::START,
        chain: Chain::START,
        accepted_at_us: 1,
    };
    let envelope = Bytes::copy_from_slice(&header.encode());
    Push { app: "demo".into(), user: user.into(), envelope, ..Push::default() }
}

/// The seq in an envelope.
pub fn seq(envelope: &Bytes) -> u64 {
    Header::parse(envelope).unwrap().seq.0
}
