//! The end of a connection: the session is removed from the node and from Redis, and the socket is closed.

use barid_mailbox::DisconnectRequest;
use barid_session::Closing;
use barid_wire::frames::{Encoding, ServerFrame, encode_server};
use tokio::time::timeout;

use crate::connection::calls::ack_request;
use crate::connection::codec::{last_frames, message};
use crate::connection::state::{Connection, End};
use crate::handle::Handle;
use crate::labels::{Call, Limit};
use crate::node::Node;
use crate::socket::Socket;

impl Connection {
    /// Removes the session from the registry, stores the device's last acknowledgement, and removes its route.
    pub(super) async fn finish(self: Box<Self>, close: End) {
        let Self { node, socket, handle, session, codec, out, listener, begun, counted, .. } =
            *self;
        node.metrics.queued_bytes.add(handle.set_queued_bytes(0));
        let code = close.as_ref().map(|close| close.code);
        node.metrics.close(code);
        node.metrics.session_ended(code, node.clock.seconds().saturating_sub(begun));
        if let Some(counted) = counted {
            node.metrics.leave(counted);
        }
        node.sessions.registry.remove(handle.user(), handle.connection);
        listener.leave(&node.fanout, &handle.user().app);
        handle.finish();
        node.sessions.wheel.remove(&handle);
        drop(out);
        let closing = session.close(close);
        tracing::debug!(
            session = %node.sessions.reference(handle.connection),
            code = closing.close.as_ref().map_or("device", |close| close.code.as_str()),
            "session closed"
        );
        let settled = async {
            settle(&node, &handle, &closing).await;
            node.metrics.sessions.dec();
        };
        tokio::join!(settled, hang_up(&node, socket, codec.encoding, closing.close.clone(), 0));
        node.metrics.connections.dec();
    }
}

/// Stores the last acknowledgement, and removes the route.
async fn settle(node: &Node, handle: &Handle, closing: &Closing) {
    if let Some(point) = closing.ack {
        let request = ack_request(node, handle, point);
        let limit = node.policy.limits.hello_timeout();
        let call = node
            .mailboxes
            .until_answered(Call::Ack, || node.mailboxes.store().ack(request.clone()));
        // If this times out, the device is sent the messages again, and drops them.
        let _ = timeout(limit, call).await;
    }
    forget(node, handle).await;
}

/// Sends the close and waits for the device's, up to `limits.close_timeout_ms`.
pub(super) async fn hang_up(
    node: &Node,
    socket: Socket,
    encoding: Encoding,
    close: End,
    attempt: u64,
) {
    let last = close.as_ref().map_or_else(Vec::new, |close| last_frames(close, attempt));
    hang_up_with(node, socket, encoding, close, last).await;
}

/// As [`hang_up`], with other frames before the close.
pub(super) async fn hang_up_with(
    node: &Node,
    socket: Socket,
    encoding: Encoding,
    close: End,
    last: Vec<ServerFrame>,
) {
    let limit = node.policy.limits.close_timeout();
    let last = last.iter().filter_map(|frame| encode_server(encoding, frame).ok());
    let last: Vec<_> = last.map(|frame| message(encoding, frame)).collect();
    if !socket.hang_up(last, close.as_ref(), limit).await {
        node.metrics.limit(Limit::CloseTimeout);
    }
}

/// Removes the session's route.
pub(super) async fn forget(node: &Node, handle: &Handle) {
    let limit = node.policy.limits.hello_timeout();
    let request = DisconnectRequest {
        user: handle.user().clone(),
        device: handle.device().clone(),
        session: node.sessions.reference(handle.connection),
    };
    node.mailboxes.disconnect(request, limit).await;
}
