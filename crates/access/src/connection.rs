//! A device's connection, one task. It reads frames, hands them to the session, and carries out the session's
//! effects: frames to write, calls to Redis. All frames that are queued are written in one flush.
//!
//! | module | what |
//! |---|---|
//! | `state` | the connection's state |
//! | `opening`, `ending` | from the first frame to Welcome; removal of the session and close of the socket |
//! | `inbox` | pushes, clock ticks and orders from the node |
//! | `incoming`, `outgoing` | frames from the device; the queue of frames to the device |
//! | `calls` | calls to Redis and to the token's verifier |
//! | `effects` | execution of the session's effects |
//! | `codec`, `trace` | frames as WebSocket messages; trace events |

mod calls;
mod codec;
mod effects;
mod ending;
mod inbox;
mod incoming;
mod opening;
mod outgoing;
mod state;
mod trace;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use barid_core::CloseCode;

use self::codec::refusal_frames;
use self::ending::{hang_up, hang_up_with};
use self::opening::{Identified, identify};
use self::state::{Connection, End};
use crate::admission::Admitted;
use crate::handshake::{self, Arrival, Outcome, Refused};
use crate::labels::{Limit, Unknown};
use crate::node::Node;

/// Turns of the loop before the task yields.
const TURNS_MAX: usize = 64;

/// Serves one socket until it is closed. Opening and ending are boxed futures, so that the task of an idle session
/// takes no memory for them.
pub async fn serve(arrival: Box<Arrival>) {
    if let Some((mut connection, _admitted)) = Box::pin(open(arrival)).await {
        let close = poll_fn(|cx| connection.poll(cx)).await;
        Box::pin(connection.finish(close)).await;
    }
}

/// Handshake, Hello and Welcome; `None` if one of them failed.
async fn open(arrival: Box<Arrival>) -> Option<(Box<Connection>, Admitted)> {
    let node = Arc::clone(&arrival.node);
    let (mut accepted, mut admitted) = match handshake::accept(*arrival).await? {
        Outcome::Accepted(accepted, admitted) => (accepted, admitted),
        Outcome::Refused(refused) => {
            refuse(&node, refused).await;
            return None;
        }
    };
    node.metrics.connections.inc();
    let refusal = match identify(&node, &mut accepted).await {
        Ok(Identified { session, handle, codec, sdk, positions, ignored }) => {
            let mut connection =
                Connection::new(&node, accepted, session, handle, codec, positions);
            connection.begin(&sdk);
            admitted.welcomed();
            if let Some(field) = ignored {
                connection.ignored(Unknown::Field, &field);
            }
            return Some((connection, admitted));
        }
        Err(refusal) => refusal,
    };
    let code = refusal.as_ref().map(|refusal| refusal.close.code);
    node.metrics.close(code);
    if code.is_some_and(is_blamed) {
        node.policy.count_refusal(&node.metrics, accepted.address);
    }
    let attempt = refusal.as_ref().map_or(0, |refusal| refusal.attempt.0);
    let close = refusal.map(|refusal| refusal.close);
    hang_up(&node, accepted.socket, accepted.encoding, close, attempt).await;
    node.metrics.connections.dec();
    None
}

/// Whether a close before Welcome counts towards a block of the client's address.
fn is_blamed(code: CloseCode) -> bool {
    matches!(
        code,
        CloseCode::BadFrame
            | CloseCode::Heartbeat
            | CloseCode::InvalidPayload
            | CloseCode::Limit
            | CloseCode::ProtocolError
    )
}

/// Closes a WebSocket that was opened only to be refused with a code.
async fn refuse(node: &Node, refused: Refused) {
    let Refused { socket, encoding, close, after, evicted, .. } = refused;
    node.metrics.connections.inc();
    node.metrics.close(Some(close.code));
    let last = refusal_frames(&close, after);
    tokio::select! {
        () = hang_up_with(node, socket, encoding, Some(close), last) => (),
        _ = evicted => node.metrics.limit(Limit::Evicted),
    }
    node.metrics.connections.dec();
}

impl Connection {
    fn begin(&mut self, sdk: &str) {
        let metrics = &self.node.metrics;
        metrics.sessions.inc();
        let identity = self.session.identity();
        self.counted = Some(metrics.enter(&identity.user.app, &identity.platform, sdk));
        self.welcome();
        self.node.sessions.set_due(&self.handle, self.beat.due());
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        for _ in 0..TURNS_MAX {
            let mut busy = self.poll_inbox(cx);
            busy |= self.poll_calls(cx);
            busy |= self.poll_read(cx);
            busy |= self.start_calls();
            busy |= self.poll_write(cx);
            busy |= self.poll_fanout(cx);
            self.report_queued();
            if let Some(end) = self.end.take() {
                return Poll::Ready(end);
            }
            if !busy {
                self.give_back();
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::Handle;
    use crate::socket::Socket;

    fn future_bytes<A, F>(_: fn(A) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn an_idle_session_is_small() {
        // Beside these: tokio's task and registration, the names; the WebSocket has no buffer.
        assert!(future_bytes(serve) <= 120, "the task: {}", future_bytes(serve));
        // Within jemalloc's size class of 640 bytes.
        assert!(size_of::<Connection>() <= 640, "the connection: {}", size_of::<Connection>());
        assert!(size_of::<Socket>() <= 120, "of it the socket: {}", size_of::<Socket>());
        // With its two counts it takes jemalloc's size class of 224 bytes.
        assert!(size_of::<Handle>() <= 208, "its handle: {}", size_of::<Handle>());
    }
}
