//! The gRPC services for dispatchers (batches of deliveries) and for other access nodes (closing a replaced session).

use std::sync::Arc;

use barid_core::{
    AppId, Audience, CloseCode, ConnectionId, DeviceId, Incarnation, SessionRef, UserId,
};
use barid_mailbox::{DisconnectRequest, UserKey};
use barid_session::Close;
use barid_wire::internal::access_peer_server::AccessPeer;
use barid_wire::internal::access_server::Access;
use barid_wire::internal::{
    CloseReply, CloseRequest, Gone, NodeBatch, NodeFanout, NodePush, NodeReply, NodeResend,
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::fanout::Received;
use crate::handle::{Handle, Push};
use crate::labels::Limit;
use crate::node::Node;

/// Concurrent calls that remove routes of connections that are not on this node.
const FORGETTING_MAX: usize = 256;

/// The gRPC services. Cheap to clone.
#[derive(Clone)]
pub struct AccessService {
    node: Arc<Node>,
    forgetting: Arc<Semaphore>,
}

impl AccessService {
    /// Creates the services of a node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node, forgetting: Arc::new(Semaphore::new(FORGETTING_MAX)) }
    }
}

#[tonic::async_trait]
impl Access for AccessService {
    type DeliverStream = ReceiverStream<Result<NodeReply, Status>>;

    async fn deliver(
        &self,
        request: Request<Streaming<NodeBatch>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let mut batches = request.into_inner();
        let (replies, stream) = mpsc::channel(self.node.policy.limits.batches_max);
        let node = Arc::clone(&self.node);
        let forgetting = Arc::clone(&self.forgetting);
        tokio::spawn(async move {
            // Ends with the stream, the only sender. A batch that cannot be read ends it with the reason.
            while let Some(batch) = batches.message().await.transpose() {
                let reply = batch.map(|batch| deliver(&node, &forgetting, batch));
                let last = reply.is_err();
                if replies.send(reply).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

#[tonic::async_trait]
impl AccessPeer for AccessService {
    async fn close(&self, request: Request<CloseRequest>) -> Result<Response<CloseReply>, Status> {
        let CloseRequest { app, user, device, connection, incarnation } = request.into_inner();
        let invalid = || Status::invalid_argument("invalid app or user id");
        let key = user_key(&app, &user).ok_or_else(invalid)?;
        let handle = self.node.sessions.registry.get(&key, ConnectionId(connection));
        let closed = self.node.sessions.includes(Incarnation(incarnation))
            && handle.is_some_and(|handle| {
                let same = handle.device().as_str() == device;
                if same {
                    let text = "a newer connection of this device took over";
                    handle.close(Close::new(CloseCode::Replaced, text));
                }
                same
            });
        Ok(Response::new(CloseReply { closed }))
    }
}

fn deliver(node: &Arc<Node>, forgetting: &Arc<Semaphore>, batch: NodeBatch) -> NodeReply {
    let incarnation = Incarnation(batch.incarnation);
    let mine = node.sessions.includes(incarnation);
    let (mut gone, mut waiting) = (Vec::new(), Vec::new());
    fan_out(node, batch.fanouts);
    for push in batch.pushes {
        deliver_push(node, mine, push, &mut gone, &mut waiting);
    }
    // Only now, so that a session writes everything that the batch has for it in one flush.
    waiting.iter().for_each(|handle| handle.wake());
    for resend in batch.resends {
        deliver_resend(node, mine, resend, &mut gone);
    }
    node.metrics.gone.inc_by(gone.len() as u64);
    if mine && !gone.is_empty() {
        forget(node, forgetting, incarnation, gone.clone());
    }
    NodeReply { batch: batch.batch, gone }
}

/// Stores all messages before members are woken, so that each is woken once.
fn fan_out(node: &Node, fanouts: Vec<NodeFanout>) {
    if fanouts.is_empty() {
        return;
    }
    let (now_ms, now) = (node.clock.now_ms(), node.clock.seconds());
    for NodeFanout { app, mailbox, envelope, dispatched_after_us } in fanouts {
        let names = AppId::new(&app).ok().zip(Audience::new(&mailbox).ok());
        let Some((app, audience)) = names else {
            tracing::warn!(app, mailbox, "dispatcher sent an invalid audience");
            continue;
        };
        let received = Received { now_ms, now, dispatched_after_us };
        match node.fanout.receive(&app, &audience, envelope, received) {
            Ok(result) => node.metrics.fanout(result),
            // The message stays in its mailbox.
            Err(error) => tracing::warn!(%error, "dispatcher sent an invalid envelope"),
        }
    }
    node.fanout.wake();
}

/// Queues a push for its sessions. `waiting` collects the sessions to wake.
fn deliver_push(
    node: &Node,
    mine: bool,
    push: NodePush,
    gone: &mut Vec<Gone>,
    waiting: &mut Vec<Arc<Handle>>,
) {
    let NodePush { app, user, envelope, connections, dispatched_after_us } = push;
    let key = if mine { user_key(&app, &user) } else { None };
    let mut here = Vec::new();
    if let Some(key) = &key {
        match Push::new(envelope, dispatched_after_us) {
            Ok(push) => here = hand_out(node, key, &Arc::new(push), waiting),
            // The message stays in the mailbox, where the session finds it.
            Err(error) => {
                tracing::warn!(%error, "dispatcher sent an invalid envelope");
                node.sessions.registry.each(key, |handle| here.push(handle.connection.0));
            }
        }
    }
    for connection in connections {
        if !here.contains(&connection) {
            gone.push(Gone {
                app: app.clone(),
                user: user.clone(),
                device: String::new(),
                connection,
            });
        }
    }
}

/// Queues an entry for every session of its user; returns their connections.
fn hand_out(
    node: &Node,
    user: &UserKey,
    push: &Arc<Push>,
    waiting: &mut Vec<Arc<Handle>>,
) -> Vec<u64> {
    let mut here = Vec::new();
    let (count_max, bytes_max) =
        (node.policy.limits.unacked_max, node.policy.limits.queued_bytes_max);
    node.sessions.registry.each(user, |handle| {
        here.push(handle.connection.0);
        let queued = handle.push(push, count_max, bytes_max);
        if queued.overflow {
            node.metrics.overflow();
        }
        if queued.first {
            waiting.push(Arc::clone(handle));
        }
    });
    here
}

fn deliver_resend(node: &Node, mine: bool, resend: NodeResend, gone: &mut Vec<Gone>) {
    let NodeResend { app, user, connection, device } = resend;
    let key = if mine { user_key(&app, &user) } else { None };
    match key.and_then(|key| node.sessions.registry.get(&key, ConnectionId(connection))) {
        Some(handle) if handle.device().as_str() == device => {
            handle.notify(|inbox| inbox.resend = true);
        }
        _ => gone.push(Gone { app, user, device, connection }),
    }
}

/// Removes routes that name an incarnation of this process and a connection that it does not have.
fn forget(
    node: &Arc<Node>,
    forgetting: &Arc<Semaphore>,
    incarnation: Incarnation,
    gone: Vec<Gone>,
) {
    // If too many calls are under way: the next push along the route gets here again.
    let Ok(permit) = Arc::clone(forgetting).try_acquire_owned() else {
        return node.metrics.limit(Limit::Forgets);
    };
    let node = Arc::clone(node);
    tokio::spawn(async move {
        let _permit = permit;
        for gone in gone {
            forget_one(&node, incarnation, gone).await;
        }
    });
}

async fn forget_one(node: &Node, incarnation: Incarnation, gone: Gone) {
    let Some(user) = user_key(&gone.app, &gone.user) else { return };
    let connection = ConnectionId(gone.connection);
    let session = SessionRef { node: node.sessions.node.clone(), incarnation, connection };
    let device = match DeviceId::new(&gone.device) {
        Ok(device) => Some(device),
        Err(_) => match node.mailboxes.store().read_routes(&user).await {
            Ok(routes) => {
                let named = routes.into_iter().find(|route| route.session == session);
                named.map(|route| route.device)
            }
            Err(_) => None,
        },
    };
    let Some(device) = device else { return };
    if node.sessions.registry.get(&user, connection).is_none() {
        let limit = node.policy.limits.hello_timeout();
        let request = DisconnectRequest { user, device, session };
        node.mailboxes.disconnect(request, limit).await;
    }
}

fn user_key(app: &str, user: &str) -> Option<UserKey> {
    Some(UserKey { app: AppId::new(app).ok()?, user: UserId::new(user).ok()? })
}
