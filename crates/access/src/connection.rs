//! A device's connection: one task. It reads frames, hands them to the session, and does what the
//! session wants: frames out, calls to Redis. What waits for the socket goes out in one flush.
//!
//! | of | what |
//! |---|---|
//! | `opening` | the first frame, the mailbox's answer |
//! | `inbox` | what the node has for the session |
//! | `incoming`, `outgoing` | what the device sends, what it is sent |
//! | `calls` | what the session asks of its mailbox |

mod calls;
mod inbox;
mod incoming;
mod opening;
mod outgoing;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use barid_core::CloseCode;
use barid_mailbox::DisconnectRequest;
use barid_runtime::Sighting;
use barid_wire::envelope::Envelope;
use barid_wire::frames::{ClientFrame, Encoding, Heard, ServerFrame, decode_client, encode_server};
use barid_wire::v1;
use bytes::Bytes;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::error::CapacityError;

use self::calls::{Call, Confirming, Refreshing, ack_request};
use self::opening::identify;
use self::outgoing::Out;
use crate::admission::Admitted;
use crate::fanout::Listener;
use crate::handle::Handle;
use crate::handshake::{self, Accepted, Arrival};
use crate::node::Node;
use crate::session::{Close, Closing, Connected, Effect, Heartbeat};
use crate::socket::{self, Message, Socket};
use crate::upstream::Spent;

/// Devices that are closed with 4006 are told to reconnect within this time, at random, ms.
const RETURN_SPREAD_MS: u32 = 10_000;

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
            return Some((Connection::begin(&node, accepted, session, handle, codec), admitted));
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

/// How a session's frames are written.
#[derive(Debug, Clone, Copy)]
struct Codec {
    encoding: Encoding,
    zstd: bool,
    visible_pings: bool,
    /// Seconds.
    ping_interval: u16,
}

/// How a connection ended: what to close with, or `None` if the device is gone.
type End = Option<Close>;

struct Connection {
    node: Arc<Node>,
    socket: Socket,
    handle: Arc<Handle>,
    session: Connected,
    codec: Codec,
    /// What it hears beside its user's messages.
    listener: Listener,
    /// There may be something to read for it.
    fanned_out: bool,
    beat: Heartbeat,
    spent: Spent,
    out: VecDeque<Out>,
    /// Bytes in `out`: of frames, and of the payloads of entries.
    out_bytes: usize,
    /// Redis: at most one read, one acknowledgement and one confirmation.
    calls: Vec<Call>,
    /// Acknowledgements are cumulative: the next one waits until then, unless it is urgent.
    next_ack_ms: u32,
    ack_waits: bool,
    confirming: Confirming,
    refreshing: Option<Refreshing>,
    effects: Vec<Effect>,
    end: Option<End>,
    /// The device has been told once that something it sent was ignored.
    told_ignored: bool,
}

impl Connection {
    fn begin(
        node: &Arc<Node>,
        accepted: Accepted,
        session: Connected,
        handle: Arc<Handle>,
        codec: Codec,
    ) -> Box<Self> {
        let mut beat = Heartbeat::new(
            codec.ping_interval,
            node.heartbeat.timeout_seconds,
            node.seconds(),
            node.seconds_at(accepted.claims.expires_s),
        );
        beat.used(node.seconds(), node.heartbeat.idle_seconds);
        let mut connection = Box::new(Self {
            node: Arc::clone(node),
            socket: accepted.socket,
            listener: Listener::new(&node.fanout, &handle, accepted.claims.groups),
            fanned_out: false,
            handle,
            session,
            codec,
            beat,
            spent: Spent::default(),
            out: VecDeque::new(),
            out_bytes: 0,
            calls: Vec::new(),
            next_ack_ms: node.uptime_ms(),
            ack_waits: false,
            confirming: Confirming::No,
            refreshing: None,
            effects: Vec::new(),
            end: None,
            told_ignored: false,
        });
        node.metrics.sessions.inc();
        connection.welcome();
        node.set_due(&connection.handle, connection.beat.due());
        connection
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        for _ in 0..TURNS_MAX {
            let mut busy = self.poll_inbox(cx);
            busy |= self.poll_calls(cx);
            busy |= self.poll_read(cx);
            busy |= self.start_calls();
            busy |= self.poll_write(cx);
            self.poll_fanout(cx);
            self.tell_queued();
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

    /// What held something once and holds nothing now takes no memory: most sessions idle.
    fn give_back(&mut self) {
        if self.out.is_empty() {
            self.out = VecDeque::new();
        }
        if self.calls.is_empty() {
            self.calls = Vec::new();
        }
    }

    /// Whether everything written so far has left.
    fn is_flushed(&self) -> bool {
        self.socket.fed() == 0 && self.out.is_empty()
    }

    fn end(&mut self, close: End) {
        self.end.get_or_insert(close);
    }

    /// Does what the session wants.
    fn apply(&mut self) {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Deliver(entries) => {
                    self.node.metrics.delivered_sync.inc_by(entries.len() as u64);
                    let sampled = entries.iter().filter(|entry| !entry.traceparent.is_empty());
                    for entry in sampled {
                        let now_us = self.node.mailbox_now_us(self.handle.user());
                        wrote(&self.node, &self.handle, entry, "sync", now_us);
                    }
                    self.entries(entries);
                }
                Effect::Skip { to, why } => {
                    self.node.metrics.skip(why);
                    self.control(&ServerFrame::Skip(v1::Skip {
                        mailbox: String::new(),
                        to: to.seq.0,
                        why: why.into(),
                        chain: to.chain.0,
                        generation: self.session.generation().0,
                    }));
                }
                Effect::Welcome => self.welcome(),
                Effect::Receipt(receipt) => {
                    if let Some(receipts) = &self.node.receipts {
                        receipts.offer(&receipt);
                    }
                }
                Effect::Close(close) => self.end(Some(close)),
            }
        }
    }

    /// Gives everything back: the registry's entry, the device's last acknowledgement, its route.
    async fn finish(self: Box<Self>, close: End) {
        let Self { node, socket, handle, session, codec, out, listener, .. } = *self;
        node.metrics.queued_bytes.add(handle.set_queued_bytes(0));
        node.metrics.close(close.as_ref().map(|close| close.code));
        node.registry.remove(handle.user(), handle.connection);
        listener.leave(&node.fanout, &handle.user().app);
        handle.finish();
        node.wheel.remove(&handle);
        drop(out);
        let closing = session.close(close);
        tracing::debug!(
            session = %node.session(handle.connection),
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

/// Tells the mailbox what it is owed.
async fn settle(node: &Node, handle: &Handle, closing: &Closing) {
    if let Some(point) = closing.ack {
        let request = ack_request(node, handle, point);
        let limit = Duration::from_millis(node.limits.hello_timeout_ms);
        let call = node.until_answered("ack", || node.mailbox.ack(request.clone()));
        // Not told in time: the device is sent again what it has, and drops it.
        let _ = timeout(limit, call).await;
    }
    forget(node, handle).await;
}

/// Ends a socket politely, within a bound.
async fn hang_up(node: &Node, socket: Socket, encoding: Encoding, close: End, attempt: u64) {
    let limit = Duration::from_millis(node.limits.close_timeout_ms);
    let last = close.as_ref().map_or_else(Vec::new, |close| last_frames(close, attempt));
    let last = last.iter().filter_map(|frame| encode_server(encoding, frame).ok());
    let last: Vec<_> = last.map(|frame| message(encoding, frame)).collect();
    if !socket.hang_up(last, close.as_ref(), limit).await {
        node.metrics.limit("close_timeout");
    }
}

async fn forget(node: &Node, handle: &Handle) {
    node.forget(DisconnectRequest {
        user: handle.user().clone(),
        device: handle.device().clone(),
        session: node.session(handle.connection),
    })
    .await;
}

/// A device's frame; `None` for control frames.
fn decode(node: &Node, encoding: Encoding, message: &Message) -> Result<Option<Heard>, Close> {
    let bytes: &[u8] = match (message, encoding) {
        (Message::Text(text), Encoding::Json) => text.as_bytes(),
        (Message::Binary(bytes), Encoding::Proto) => bytes,
        (Message::Text(_) | Message::Binary(_), _) => {
            let text = "barid.v1.json frames are text messages, barid.v1.proto frames binary ones";
            return Err(Close::new(CloseCode::BadFrame, text));
        }
        _ => return Ok(None),
    };
    let heard = decode_client(encoding, bytes)
        .map_err(|error| Close::new(CloseCode::BadFrame, error.to_string()))?;
    let Some(frame) = &heard.frame else { return Ok(Some(heard)) };
    node.metrics.frame_in(match frame {
        ClientFrame::Hello(_) => "hello",
        ClientFrame::Ack(_) => "ack",
        ClientFrame::Refresh(_) => "refresh",
        ClientFrame::Pong(_) => "pong",
        ClientFrame::Subscribe(_) => "subscribe",
        ClientFrame::Unsubscribe(_) => "unsubscribe",
    });
    Ok(Some(heard))
}

/// What a broken socket is closed with; `None`: there is nobody to tell.
fn refusal(node: &Node, error: &socket::Error) -> Option<Close> {
    if let socket::Error::Capacity(CapacityError::MessageTooLong { .. }) = error {
        node.metrics.limit("frame_bytes");
    }
    socket::refusal(error)
}

/// Logs that a sampled message was written.
pub(crate) fn wrote(node: &Node, handle: &Handle, entry: &Envelope, how: &'static str, at_us: u64) {
    if !entry.traceparent.is_empty() {
        let (id, traceparent) = (&*entry.id, &*entry.traceparent);
        let produced_ms = entry.produced_at_ms;
        let seen = Sighting { id, traceparent, produced_ms, ..Default::default() };
        node.tracer.saw(Sighting { hop: "written", how, at_us, ..of(handle, seen) });
    }
}

/// Whose it is.
fn of<'a>(handle: &'a Handle, seen: Sighting<'a>) -> Sighting<'a> {
    let user = handle.user();
    let (app, device) = (user.app.as_str(), handle.device().as_str());
    Sighting { app, user: user.user.as_str(), device, ..seen }
}

/// The frames before a close frame: an error, and GoAway with 4006. None for draining, which GoAway has
/// announced, and none for RFC 6455 violations.
fn last_frames(close: &Close, attempt: u64) -> Vec<ServerFrame> {
    if close.code == CloseCode::Draining || close.code.is_websockets() {
        return Vec::new();
    }
    let (code, text) = (close.code.code().into(), close.text.to_string());
    let error = ServerFrame::Error(v1::Error { code, text, attempt });
    if close.code != CloseCode::HistoryChanged {
        return vec![error];
    }
    // One failover closes thousands of sessions; clients without jitter would all reconnect at once.
    let why = close.code.as_str().to_owned();
    let reconnect_after_ms = rand::random_range(0..=RETURN_SPREAD_MS);
    vec![ServerFrame::GoAway(v1::GoAway { why, reconnect_after_ms }), error]
}

fn message(encoding: Encoding, frame: Bytes) -> Message {
    match encoding {
        Encoding::Proto => Message::Binary(frame),
        Encoding::Json => match frame.try_into() {
            Ok(text) => Message::Text(text),
            // JSON is written from text only.
            Err(_) => Message::Text(Default::default()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
