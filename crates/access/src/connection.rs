//! A device's connection: one task. It reads frames, hands them to the session, and does what the
//! session wants: frames out, calls to Redis. What waits for the socket goes out in one flush.
//!
//! | module | what |
//! |---|---|
//! | `state` | what a connection holds |
//! | `opening`, `ending` | the first frame and the mailbox's answer; what is given back |
//! | `inbox` | what the node has for the session |
//! | `incoming`, `outgoing` | what the device sends, what it is sent |
//! | `calls` | what the session asks of its mailbox |
//! | `effects` | what the session wants done |
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

use self::ending::hang_up;
use self::opening::identify;
use self::state::{Connection, End};
use crate::admission::Admitted;
use crate::handshake::{self, Arrival};

/// Turns of the loop before other tasks have theirs.
const TURNS_MAX: usize = 64;

/// Serves one socket to its end. What comes before a session, and after it, lives in boxes of its
/// own: the task of an idle session holds no more than the session.
pub async fn serve(arrival: Box<Arrival>) {
    if let Some((mut connection, _admitted)) = Box::pin(open(arrival)).await {
        let close = poll_fn(|cx| connection.poll(cx)).await;
        Box::pin(connection.finish(close)).await;
    }
}

/// Handshake, Hello, Welcome; `None` if it came to nothing.
async fn open(arrival: Box<Arrival>) -> Option<(Box<Connection>, Admitted)> {
    let node = Arc::clone(&arrival.node);
    let (mut accepted, admitted) = handshake::accept(*arrival).await?;
    node.metrics.connections.inc();
    let refusal = match identify(&node, &mut accepted).await {
        Ok((session, handle, codec)) => {
            let mut connection = Connection::new(&node, accepted, session, handle, codec);
            connection.begin();
            return Some((connection, admitted));
        }
        Err(refusal) => refusal,
    };
    node.metrics.close(refusal.as_ref().map(|refusal| refusal.close.code));
    let attempt = refusal.as_ref().map_or(0, |refusal| refusal.attempt.0);
    let close = refusal.map(|refusal| refusal.close);
    hang_up(&node, accepted.socket, accepted.encoding, close, attempt).await;
    node.metrics.connections.dec();
    None
}

impl Connection {
    fn begin(&mut self) {
        self.node.metrics.sessions.inc();
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
            self.poll_fanout(cx);
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
        assert!(size_of::<Connection>() <= 584, "the connection: {}", size_of::<Connection>());
        assert!(size_of::<Socket>() <= 120, "of it the socket: {}", size_of::<Socket>());
        // With its two counts it takes jemalloc's size class of 224 bytes.
        assert!(size_of::<Handle>() <= 208, "its handle: {}", size_of::<Handle>());
    }
}
