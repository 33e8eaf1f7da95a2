//! The links to access nodes: one for each incarnation of a node, with a bounded queue, so that a slow or stopped node
//! delays no other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{Incarnation, NodeId, SessionRef};
use barid_mesh::{Broken, Credentials, Link, LinkConfig, LinkMetrics, Party, Protocol, Refusal};
use barid_wire::internal::access_client::AccessClient;
use barid_wire::internal::{Gone, NodeBatch, NodeFanout, NodePush, NodeReply, NodeResend};
use parking_lot::RwLock;
use prometheus::IntCounter;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// An access node, as in its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessNode {
    /// The node's name.
    pub id: NodeId,
    /// The node's incarnation. Routes of another one are void.
    pub incarnation: Incarnation,
    /// The node's gRPC `host:port`.
    pub address: String,
}

/// How long an incarnation of a node has been over; `None`: it is not, or that is unknown.
pub type VoidSince = Arc<dyn Fn(&NodeId, Incarnation) -> Option<Duration> + Send + Sync>;

/// Called with a session that its node does not have.
pub type OnGone = Arc<dyn Fn(&NodeId, Incarnation, Gone) + Send + Sync>;

/// Why an item was not queued for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// There is no such incarnation of the node.
    Void,
    /// The link's queue is full.
    Full,
    /// The link has no connection.
    Down,
}

impl Unsent {
    /// The label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Void => "void",
            Self::Full => "full",
            Self::Down => "down",
        }
    }
}

/// An item for a node.
#[derive(Debug)]
pub enum NodeItem {
    /// A message for a user's sessions on the node.
    Push(NodePush),
    /// A session to sync.
    Resend(NodeResend),
    /// A message for the members of an audience on the node.
    Fanout(NodeFanout),
}

/// The table of nodes and the links to them.
pub struct Nodes {
    credentials: Credentials,
    config: LinkConfig,
    metrics: LinkMetrics,
    lost: IntCounter,
    void_since: VoidSince,
    on_gone: OnGone,
    table: RwLock<Arc<HashMap<NodeId, Node>>>,
}

struct Node {
    incarnation: Incarnation,
    address: String,
    link: Link<Delivering>,
}

impl Nodes {
    /// Creates an empty table.
    pub fn new(
        credentials: Credentials,
        config: LinkConfig,
        metrics: LinkMetrics,
        lost: IntCounter,
        void_since: VoidSince,
        on_gone: OnGone,
    ) -> Self {
        let table = RwLock::default();
        Self { credentials, config, metrics, lost, void_since, on_gone, table }
    }

    /// Opens links to new incarnations, and lets the links of incarnations that are over finish.
    pub fn follow(&self, nodes: &[AccessNode]) {
        let old = Arc::clone(&self.table.read());
        let mut table = HashMap::with_capacity(nodes.len());
        for node in nodes {
            let same = old.get(&node.id).filter(|known| {
                known.incarnation == node.incarnation && known.address == node.address
            });
            let link = match same {
                Some(known) => known.link.clone(),
                None => match self.open(node) {
                    Ok(link) => link,
                    Err(why) => {
                        tracing::error!(node = %node.id, why, "cannot open a link");
                        continue;
                    }
                },
            };
            let (incarnation, address) = (node.incarnation, node.address.clone());
            table.insert(node.id.clone(), Node { incarnation, address, link });
        }
        *self.table.write() = Arc::new(table);
    }

    fn open(&self, node: &AccessNode) -> Result<Link<Delivering>, String> {
        let protocol = Delivering {
            node: node.id.clone(),
            incarnation: node.incarnation,
            lost: self.lost.clone(),
            on_gone: Arc::clone(&self.on_gone),
        };
        let (credentials, config) = (self.credentials.clone(), self.config.clone());
        Link::open(&node.address, credentials, config, self.metrics.clone(), protocol)
    }

    /// Queues an item for the node of a session. Never waits.
    ///
    /// # Errors
    /// The node is unknown, or its link does not accept the item.
    pub fn send(&self, session: &SessionRef, item: NodeItem) -> Result<(), Unsent> {
        let table = self.table.read();
        let node = table.get(&session.node).filter(|n| n.incarnation == session.incarnation);
        try_send(node.ok_or(Unsent::Void)?, item)
    }

    /// Queues an item for a node, whatever its incarnation. Never waits.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_to_any(&self, node: &NodeId, item: NodeItem) -> Result<(), Unsent> {
        try_send(self.table.read().get(node).ok_or(Unsent::Void)?, item)
    }

    /// How long the incarnation in a session's route has been over; `None`: it is not, or that is unknown.
    pub fn void_since(&self, session: &SessionRef) -> Option<Duration> {
        (self.void_since)(&session.node, session.incarnation)
    }

    /// Number of items that are queued for nodes or unanswered.
    pub fn pending(&self) -> usize {
        self.table.read().values().map(|node| node.link.pending()).sum()
    }
}

fn try_send(node: &Node, item: NodeItem) -> Result<(), Unsent> {
    node.link.try_send(item).map_err(|refused| match refused.why {
        Refusal::Full => Unsent::Full,
        Refusal::Down => Unsent::Down,
    })
}

/// The protocol of `barid.internal.v1.Access`.
struct Delivering {
    node: NodeId,
    incarnation: Incarnation,
    lost: IntCounter,
    on_gone: OnGone,
}

impl Protocol for Delivering {
    type Item = NodeItem;
    type Batch = NodeBatch;
    type Reply = NodeReply;
    type Sealed = usize;
    const PEER: Party = Party::Access;

    fn bytes(item: &NodeItem) -> usize {
        match item {
            NodeItem::Push(push) => {
                let names = push.app.len() + push.user.len();
                names + push.envelope.len() + 10 * push.connections.len() + 16
            }
            NodeItem::Resend(resend) => {
                resend.app.len() + resend.user.len() + resend.device.len() + 32
            }
            NodeItem::Fanout(fanout) => {
                fanout.app.len() + fanout.mailbox.len() + fanout.envelope.len() + 16
            }
        }
    }

    fn seal(&mut self, number: u64, items: Vec<NodeItem>) -> (NodeBatch, usize) {
        let count = items.len();
        let incarnation = self.incarnation.0;
        let mut batch = NodeBatch { batch: number, incarnation, ..Default::default() };
        for item in items {
            match item {
                NodeItem::Push(push) => batch.pushes.push(push),
                NodeItem::Resend(resend) => batch.resends.push(resend),
                NodeItem::Fanout(fanout) => batch.fanouts.push(fanout),
            }
        }
        (batch, count)
    }

    async fn call(
        channel: Channel,
        batches: ReceiverStream<NodeBatch>,
    ) -> Result<Streaming<NodeReply>, Status> {
        Ok(AccessClient::new(channel).deliver(batches).await?.into_inner())
    }

    fn number(reply: &NodeReply) -> u64 {
        reply.batch
    }

    fn settle(&mut self, count: usize, outcome: Result<NodeReply, Broken>) {
        let Ok(reply) = outcome else {
            self.lost.inc_by(count as u64);
            return;
        };
        for gone in reply.gone {
            (self.on_gone)(&self.node, self.incarnation, gone);
        }
    }

    fn fail(&mut self, items: Vec<NodeItem>) {
        self.lost.inc_by(items.len() as u64);
    }
}
