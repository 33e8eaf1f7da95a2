//! A device's connection: one task. It reads frames, hands them to the session, and does what the
//! session wants: frames out, calls to Redis. What waits for the socket goes out in one flush.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use barid_core::{CloseCode, GroupId};
use barid_mailbox::{
    AckOutcome, AckRequest, ConfirmOutcome, ConfirmRequest, DisconnectRequest, Page, ReadRequest,
};
use barid_runtime::{Hop, Sighting};
use barid_wire::envelope::Envelope;
use barid_wire::frames::{
    ClientFrame, Encoding, ServerFrame, decode_client, encode_deliver, encode_server, join_delivers,
};
use barid_wire::v1;
use bytes::Bytes;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::error::CapacityError;

use crate::admission::Admitted;
use crate::auth::Claims;
use crate::fanout::{Kind, Listener, Read, Refused};
use crate::handle::{Handle, Inbox};
use crate::handshake::{self, Accepted, Arrival};
use crate::node::Node;
use crate::session::{
    AckPoint, AckUrgency, Beat, Close, Closing, Connected, Connecting, Effect, Heartbeat, Pushed,
    Unidentified,
};
use crate::socket::{self, Message, Socket, WRITE_BUFFER_BYTES};
use crate::upstream::Spent;

/// Turns of the loop before other tasks have theirs.
const TURNS_MAX: usize = 64;

/// Bytes of pushed messages that share a frame; one alone may be larger.
const JOINED_BYTES_MAX: usize = 16 << 10;

/// How long a device that was told to go may still acknowledge, seconds.
const LEAVE_SECONDS: u32 = 2;

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
    let close = match identify(&node, &mut accepted).await {
        Ok((session, handle, codec)) => {
            return Some((Connection::begin(&node, accepted, session, handle, codec), admitted));
        }
        Err(close) => close,
    };
    node.metrics.close(close.as_ref().map(|close| close.code));
    hang_up(&node, accepted.socket, accepted.encoding, close).await;
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

/// From the first frame to a welcomed session. The error is what to close with; `None`: it left.
async fn identify(
    node: &Arc<Node>,
    accepted: &mut Accepted,
) -> Result<(Connected, Arc<Handle>, Codec), Option<Close>> {
    let limit = Duration::from_millis(node.limits.hello_timeout_ms);
    let hello = timeout(limit, first_frame(node, accepted)).await;
    let late = || Close::new(CloseCode::Heartbeat, "no hello came in time");
    let connecting = hello.unwrap_or_else(|_| Err(Some(late())))?;
    let codec = Codec {
        encoding: accepted.encoding,
        zstd: connecting.accepts_zstd,
        visible_pings: connecting.visible_pings,
        ping_interval: node.heartbeat.interval(connecting.ping_interval_ms),
    };
    let identity = &connecting.identity;
    let connection = node.next_connection();
    let handle = Arc::new(Handle::new(
        connection,
        identity.attempt,
        identity.user.clone(),
        identity.device.clone(),
    ));
    // Before the route is written: a push must find the session that its route names.
    if !node.registry.insert(Arc::clone(&handle), node.limits.user_connections_max) {
        node.metrics.limit("user_connections");
        let text = "this user has as many devices connected here as it may have";
        return Err(Some(Close::new(CloseCode::Limit, text)));
    }
    match connect(node, connecting, &handle).await {
        Ok(session) => Ok((session, handle, codec)),
        Err(close) => {
            node.registry.remove(handle.user(), connection);
            handle.finish();
            forget(node, &handle).await;
            Err(Some(close))
        }
    }
}

async fn first_frame(node: &Node, accepted: &mut Accepted) -> Result<Connecting, Option<Close>> {
    let unidentified = Unidentified::new(accepted.claims.clone(), accepted.at_ms);
    loop {
        let message = match accepted.socket.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(refusal(node, &error)),
            None => return Err(None),
        };
        if let Some(frame) = decode(node, accepted.encoding, &message).map_err(Some)? {
            return unidentified.frame(frame).map_err(Some);
        }
        if message.is_close() {
            return Err(None);
        }
    }
}

async fn connect(
    node: &Arc<Node>,
    connecting: Connecting,
    handle: &Arc<Handle>,
) -> Result<Connected, Close> {
    let request = connecting.request(node.session(handle.connection));
    let limit = Duration::from_millis(node.limits.hello_timeout_ms);
    let call = node.until_answered("connect", || node.mailbox.connect(request.clone()));
    let away = |_| Close::new(CloseCode::Overloaded, "the mailbox did not answer in time");
    let outcome = timeout(limit, call).await.map_err(away)?;
    let (session, replaced) = connecting.answered(outcome, node.settings)?;
    let text = "a newer connection of this device took over";
    node.registry.each(handle.user(), |other| {
        if other.device() == handle.device() && other.attempt < handle.attempt {
            other.close(Close::new(CloseCode::Replaced, text));
        }
    });
    if let Some(replaced) = replaced {
        if replaced.node == node.id {
            if let Some(other) = node.registry.get(handle.user(), replaced.connection)
                && other.device() == handle.device()
                && other.connection != handle.connection
            {
                other.close(Close::new(CloseCode::Replaced, text));
            }
        } else {
            node.peers.close(handle.user(), handle.device(), replaced);
        }
    }
    Ok(session)
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
fn decode(
    node: &Node,
    encoding: Encoding,
    message: &Message,
) -> Result<Option<ClientFrame>, Close> {
    let bytes: &[u8] = match (message, encoding) {
        (Message::Text(text), Encoding::Json) => text.as_bytes(),
        (Message::Binary(bytes), Encoding::Proto) => bytes,
        (Message::Text(_) | Message::Binary(_), _) => {
            let text = "barid.v1.json frames are text messages, barid.v1.proto frames binary ones";
            return Err(Close::new(CloseCode::BadFrame, text));
        }
        _ => return Ok(None),
    };
    let frame = decode_client(encoding, bytes)
        .map_err(|error| Close::new(CloseCode::BadFrame, error.to_string()))?;
    node.metrics.frame_in(match &frame {
        ClientFrame::Hello(_) => "hello",
        ClientFrame::Ack(_) => "ack",
        ClientFrame::Refresh(_) => "refresh",
        ClientFrame::Pong(_) => "pong",
        ClientFrame::Subscribe(_) => "subscribe",
        ClientFrame::Unsubscribe(_) => "unsubscribe",
    });
    Ok(Some(frame))
}

/// What a broken socket is closed with; `None`: there is nobody to tell.
fn refusal(node: &Node, error: &socket::Error) -> Option<Close> {
    if let socket::Error::Capacity(CapacityError::MessageTooLong { .. }) = error {
        node.metrics.limit("frame_bytes");
    }
    socket::refusal(error)
}

/// What waits for the socket.
enum Out {
    Frame(Bytes),
    /// Pushed messages, in a frame for each that its other receivers share.
    Pushed {
        frame: Bytes,
        generation: u32,
    },
    /// Entries of a page, encoded when their turn comes.
    Entries(Vec<Envelope>),
    Ping,
}

enum Answer {
    Page(Page),
    /// The time until the next acknowledgement is over.
    AckDue,
    Acked(AckOutcome),
    Confirmed(ConfirmOutcome),
}

type Call = Pin<Box<dyn Future<Output = Answer> + Send>>;
type Refreshing = Pin<Box<dyn Future<Output = Result<Claims, crate::auth::AuthError>> + Send>>;

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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Confirming {
    #[default]
    No,
    Once,
    Again,
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

    fn poll_inbox(&mut self, cx: &Context<'_>) -> bool {
        let Poll::Ready(inbox) = self.handle.poll_take(cx) else { return false };
        let Inbox { pushes, missed, tick, resend, fanout, confirm, go_away, close, .. } = inbox;
        self.fanned_out |= fanout;
        if let Some(close) = close {
            self.end(Some(close));
            return true;
        }
        let now_us = self.node.mailbox_now_us(self.handle.user());
        for push in pushes {
            self.push(&push, now_us);
        }
        if missed {
            self.session.missed();
        }
        if resend {
            let flushed = self.is_flushed();
            if self.session.resend(flushed, now_us, &mut self.effects) {
                self.node.metrics.resends.inc();
            }
            self.apply();
        }
        if confirm {
            self.confirm();
        }
        if let Some(reconnect_after_ms) = go_away
            && !self.beat.is_leaving()
        {
            let draining = self.node.is_draining();
            let why = if draining { "draining" } else { "balance" }.to_owned();
            self.control(&ServerFrame::GoAway(v1::GoAway { why, reconnect_after_ms }));
            self.beat.leave(self.node.seconds() + LEAVE_SECONDS);
            self.node.set_due(&self.handle, self.beat.due());
        }
        if tick {
            self.tick();
        }
        true
    }

    fn push(&mut self, push: &crate::handle::Push, now_us: u64) {
        let pushed = self.session.push(&push.header, &push.envelope, now_us, &mut self.effects);
        match pushed {
            Pushed::Write => {
                let generation = self.session.generation().0;
                match push.frame(self.codec.encoding, generation, self.codec.zstd) {
                    Ok(frame) => {
                        self.node.metrics.delivered_fast.inc();
                        let hops = &self.node.metrics.hops;
                        hops.observe(Hop::DispatchedWritten, push.dispatched_us, now_us);
                        let produced_us = push.envelope.produced_at_ms * 1000;
                        hops.observe(Hop::ProducedWritten, produced_us, now_us);
                        self.out_bytes += frame.len();
                        self.out.push_back(Out::Pushed { frame, generation });
                        wrote(&self.node, &self.handle, &push.envelope, "fast", now_us);
                    }
                    Err(error) => {
                        tracing::warn!(seq = push.header.seq.0, %error, "entry cannot be delivered");
                        let effect = self.session.undeliverable(push.header.seq);
                        self.effects.push(effect);
                    }
                }
            }
            Pushed::Skipped => (),
            Pushed::Dropped(why) => self.node.metrics.dropped(why),
        }
        self.apply();
        let queued_max = self.node.limits.queued_bytes_max;
        if self.out_bytes + self.socket.fed() > queued_max.max(WRITE_BUFFER_BYTES) {
            let text = "more waits for the device than may wait";
            self.end(Some(Close::new(CloseCode::SlowConsumer, text)));
        }
    }

    fn tick(&mut self) {
        let now = self.node.seconds();
        match self.beat.tick(now) {
            Beat::Nothing => (),
            Beat::Ping if self.codec.visible_pings => self.control(&ServerFrame::Ping(v1::Ping {})),
            Beat::Ping => self.out.push_back(Out::Ping),
            Beat::Dead => {
                let text = "nothing was heard from the device";
                self.end(Some(Close::new(CloseCode::Heartbeat, text)));
            }
            Beat::Idle => {
                self.node.metrics.limit("idle");
                let text = "the device sent nothing but pongs for too long";
                self.end(Some(Close::new(CloseCode::Heartbeat, text)));
            }
            Beat::Expired => {
                let text = "the token has expired";
                self.end(Some(Close::new(CloseCode::TokenExpired, text)));
            }
            Beat::Leave => {
                self.end(Some(Close::new(CloseCode::Draining, "this node asked the device to go")));
            }
        }
        self.node.set_due(&self.handle, self.beat.due());
    }

    fn poll_calls(&mut self, cx: &mut Context<'_>) -> bool {
        let mut busy = self.poll_refresh(cx);
        let mut index = 0;
        while let Some(call) = self.calls.get_mut(index) {
            let Poll::Ready(answer) = call.as_mut().poll(cx) else {
                index += 1;
                continue;
            };
            drop(self.calls.swap_remove(index));
            busy = true;
            match answer {
                Answer::Page(page) => {
                    let now_us = self.node.mailbox_now_us(self.handle.user());
                    self.session.page(page, now_us, &mut self.effects);
                }
                Answer::AckDue => self.ack_waits = false,
                Answer::Acked(outcome) => {
                    let now_us = self.node.mailbox_now_us(self.handle.user());
                    self.session.acked(outcome, now_us, &mut self.effects);
                }
                Answer::Confirmed(outcome) => {
                    self.node.metrics.confirm(match outcome {
                        ConfirmOutcome::Confirmed { restored: false, .. } => "stood",
                        ConfirmOutcome::Confirmed { restored: true, .. } => "restored",
                        ConfirmOutcome::Superseded => "superseded",
                    });
                    self.session.confirmed(outcome, &mut self.effects);
                    if std::mem::take(&mut self.confirming) == Confirming::Again {
                        self.confirm();
                    }
                }
            }
            self.apply();
        }
        busy
    }

    fn poll_refresh(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(refreshing) = &mut self.refreshing else { return false };
        let Poll::Ready(result) = refreshing.as_mut().poll(cx) else { return false };
        self.refreshing = None;
        let checked = result
            .map_err(|e| (e.as_str(), Close::new(CloseCode::BadToken, e.to_string())))
            .and_then(|claims| match self.session.refresh(&claims) {
                Ok(()) => Ok(claims),
                Err(close) => Err(("somebody_else", close)),
            });
        match checked {
            Ok(claims) => {
                self.beat.expires(self.node.seconds_at(claims.expires_s));
                self.node.set_due(&self.handle, self.beat.due());
                let app = &self.handle.user().app;
                for group in self.listener.allow(&self.node.fanout, app, claims.groups) {
                    self.refused(&group, Refused::NotListed);
                }
            }
            Err((why, close)) => {
                self.node.metrics.token_refused(why);
                self.end(Some(close));
            }
        }
        true
    }

    fn start_calls(&mut self) -> bool {
        let before = self.calls.len();
        if let Some(point) = self.next_ack() {
            let request = ack_request(&self.node, &self.handle, point);
            let node = Arc::clone(&self.node);
            self.calls.push(Box::pin(async move {
                let call = || node.mailbox.ack(request.clone());
                Answer::Acked(node.until_answered("ack", call).await)
            }));
        }
        if let Some((read, cause)) = self.session.next_read(self.is_flushed()) {
            self.node.metrics.sync(cause);
            let request = ReadRequest {
                user: self.handle.user().clone(),
                after: read.after,
                entries_max: read.entries_max,
                bytes_max: read.bytes_max,
            };
            let node = Arc::clone(&self.node);
            self.calls.push(Box::pin(async move {
                let call = || node.mailbox.read(request.clone());
                Answer::Page(node.until_answered("read", call).await)
            }));
        }
        self.calls.len() > before
    }

    /// What to acknowledge now; sees to it that what has to wait is looked at again.
    fn next_ack(&mut self) -> Option<AckPoint> {
        let urgency = self.session.ack_urgency()?;
        let (now_ms, interval_ms) = (self.node.uptime_ms(), self.node.settings.ack_interval_ms);
        // The clock wraps: a time that has passed lies further ahead than any interval.
        let early_ms = self.next_ack_ms.wrapping_sub(now_ms);
        if urgency == AckUrgency::Paced && (1..=interval_ms).contains(&early_ms) {
            if !std::mem::replace(&mut self.ack_waits, true) {
                self.calls.push(Box::pin(async move {
                    sleep(Duration::from_millis(early_ms.into())).await;
                    Answer::AckDue
                }));
            }
            return None;
        }
        self.next_ack_ms = now_ms.wrapping_add(interval_ms);
        self.session.next_ack()
    }

    /// One at a time. One that is under way may have begun under another incarnation.
    fn confirm(&mut self) {
        if self.confirming != Confirming::No {
            self.confirming = Confirming::Again;
            return;
        }
        self.confirming = Confirming::Once;
        let identity = self.session.identity();
        let request = ConfirmRequest {
            user: identity.user.clone(),
            device: identity.device.clone(),
            session: self.node.session(self.handle.connection),
            attempt: identity.attempt,
            platform: identity.platform.clone(),
            position: self.session.position(),
        };
        let node = Arc::clone(&self.node);
        self.calls.push(Box::pin(async move {
            let call = || node.mailbox.confirm(request.clone());
            Answer::Confirmed(node.until_answered("confirm", call).await)
        }));
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> bool {
        if self.refreshing.is_some() {
            return false; // its outcome decides on what follows
        }
        let message = match self.socket.poll_next(cx) {
            Poll::Pending => return false,
            Poll::Ready(Some(Ok(message))) => message,
            Poll::Ready(Some(Err(error))) => {
                let close = refusal(&self.node, &error);
                self.end(close);
                return true;
            }
            Poll::Ready(None) => {
                self.end(None);
                return true;
            }
        };
        let now_us = || self.node.uptime_us();
        if let Err(over) = self.node.upstream.frame(&mut self.spent, message.len(), now_us) {
            self.node.metrics.limit(over.limit);
            self.end(Some(Close::new(CloseCode::Limit, over.text)));
            return true;
        }
        self.beat.heard(self.node.seconds());
        self.handle.set_due(self.beat.due());
        match decode(&self.node, self.codec.encoding, &message) {
            Ok(Some(frame)) => self.frame_in(frame),
            Ok(None) if message.is_close() => self.end(None),
            Ok(None) => (),
            Err(close) => self.end(Some(close)),
        }
        true
    }

    fn frame_in(&mut self, frame: ClientFrame) {
        if !matches!(frame, ClientFrame::Pong(_)) {
            self.beat.used(self.node.seconds(), self.node.heartbeat.idle_seconds);
        }
        match frame {
            ClientFrame::Ack(ack) => {
                let now_us = self.node.mailbox_now_us(self.handle.user());
                let hops = &self.node.metrics.hops;
                let before = self.session.unacked();
                let (tracer, handle) = (&self.node.tracer, &self.handle);
                self.session.ack(&ack, now_us, &mut self.effects, |sent| {
                    if let Some(pushed) = sent.pushed {
                        hops.observe(Hop::WrittenAcked, pushed.written_us, now_us);
                        hops.observe(Hop::ProducedAcked, pushed.produced_ms * 1000, now_us);
                    }
                    if let Some(wanted) = &sent.receipt
                        && !wanted.traceparent.is_empty()
                    {
                        let (id, traceparent) = (&*wanted.id, &*wanted.traceparent);
                        let produced_ms = wanted.produced_ms;
                        let seen = Sighting { id, traceparent, produced_ms, ..Default::default() };
                        tracer.saw(Sighting { hop: "acked", at_us: now_us, ..of(handle, seen) });
                    }
                });
                let acked = before.saturating_sub(self.session.unacked());
                self.node.metrics.acked.inc_by(acked as u64);
                self.apply();
            }
            ClientFrame::Refresh(refresh) => {
                let node = Arc::clone(&self.node);
                self.refreshing = Some(Box::pin(async move {
                    node.verifier.verify(&refresh.token, node.now_ms() / 1000).await
                }));
            }
            ClientFrame::Pong(_) => (),
            ClientFrame::Subscribe(subscribe) => self.subscribe(&subscribe.group),
            ClientFrame::Unsubscribe(unsubscribe) => self.unsubscribe(&unsubscribe.group),
            ClientFrame::Hello(_) => {
                self.end(Some(Close::new(CloseCode::BadFrame, "hello came twice")));
            }
        }
    }

    fn subscribe(&mut self, group: &str) {
        let Some(group) = self.group("subscribe", group) else { return };
        let groups_max = self.node.limits.subscriptions_max;
        match self.listener.subscribe(&self.node.fanout, &self.handle, &group, groups_max) {
            Ok(()) => {
                let group = group.to_string();
                self.control(&ServerFrame::Subscribed(v1::Subscribed { group }));
            }
            Err(why) => {
                self.node.metrics.subscription_refused(why);
                self.refused(&group, why);
            }
        }
    }

    fn unsubscribe(&mut self, group: &str) {
        let Some(group) = self.group("unsubscribe", group) else { return };
        self.listener.unsubscribe(&self.node.fanout, &self.handle.user().app, &group);
        let unsubscribed = v1::Unsubscribed { group: group.to_string(), ..Default::default() };
        self.control(&ServerFrame::Unsubscribed(unsubscribed));
    }

    fn group(&mut self, frame: &str, group: &str) -> Option<GroupId> {
        match GroupId::new(group) {
            Ok(group) => Some(group),
            Err(error) => {
                self.end(Some(Close::new(CloseCode::BadFrame, format!("{frame}: {error}"))));
                None
            }
        }
    }

    fn refused(&mut self, group: &GroupId, why: Refused) {
        let (code, text) = why.told();
        self.control(&ServerFrame::Unsubscribed(v1::Unsubscribed {
            group: group.to_string(),
            code: code.code().into(),
            text: text.into(),
        }));
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

    fn welcome(&mut self) {
        let position = self.session.position();
        let limit = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        self.control(&ServerFrame::Welcome(v1::Welcome {
            session: self.node.session(self.handle.connection).to_string(),
            ping_interval_ms: u32::from(self.codec.ping_interval) * 1000,
            max_frame_bytes: limit(self.node.limits.frame_bytes_max),
            max_unacked: limit(self.node.limits.unacked_max),
            positions: vec![v1::Position {
                mailbox: String::new(),
                epoch: position.epoch.0,
                generation: position.generation.0,
                seq: position.seq.0,
                chain: position.chain.map(|chain| chain.0),
            }],
            server_time_ms: self.node.now_ms(),
            ack_interval_ms: self.node.settings.ack_interval_ms,
        }));
    }

    fn control(&mut self, frame: &ServerFrame) {
        // Only bodies can fail to encode, and these frames have none.
        if let Ok(frame) = encode_server(self.codec.encoding, frame) {
            self.frame(frame);
        }
    }

    fn frame(&mut self, frame: Bytes) {
        self.out_bytes += frame.len();
        self.out.push_back(Out::Frame(frame));
    }

    fn entries(&mut self, entries: Vec<Envelope>) {
        self.out_bytes += payload_bytes(&entries);
        self.out.push_back(Out::Entries(entries));
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> bool {
        let mut busy = false;
        loop {
            while self.socket.has_room()
                && let Some(out) = self.out.pop_front()
            {
                if let Err(error) = self.feed(out) {
                    let close = refusal(&self.node, &error);
                    self.end(close);
                    return true;
                }
            }
            if self.socket.fed() == 0 {
                return busy;
            }
            match self.socket.poll_flush(cx) {
                Poll::Pending => return busy,
                Poll::Ready(Ok(())) => {
                    self.beat.written(self.node.seconds());
                    busy = true;
                }
                Poll::Ready(Err(_)) => {
                    self.end(None);
                    return true;
                }
            }
        }
    }

    /// Writes what is for an audience, once everything else has left: what the socket does not take stays
    /// in the audience's log.
    fn poll_fanout(&mut self, cx: &mut Context<'_>) {
        while self.fanned_out && self.end.is_none() && self.is_flushed() {
            if !self.write_fanout(cx) {
                self.end(None);
            }
        }
    }

    /// One run of messages; false if the device is gone.
    fn write_fanout(&mut self, cx: &mut Context<'_>) -> bool {
        let kind = Kind::new(self.codec.encoding, self.codec.zstd);
        let Read { missed, run, sight } = self.listener.read(kind);
        if missed > 0 {
            self.node.metrics.fanout_missed.inc_by(missed.into());
        }
        let Some(run) = run else {
            self.fanned_out = false;
            return true;
        };
        if run.messages == 0 {
            return true;
        }
        self.node.metrics.delivered_fanout.inc_by(run.messages.into());
        self.node.metrics.bytes_out.inc_by(run.frame.len() as u64);
        self.beat.written(self.node.seconds());
        if self.socket.write_shared(cx, &run.frame).is_err() {
            return false;
        }
        if let Some(sight) = sight {
            sight.written(&self.node, &self.handle);
        }
        true
    }

    fn feed(&mut self, out: Out) -> Result<(), socket::Error> {
        let frame = match out {
            Out::Ping => return self.socket.feed(Message::Ping(Bytes::new())),
            Out::Frame(frame) => {
                self.out_bytes -= frame.len();
                frame
            }
            Out::Pushed { frame, generation } => {
                let frames = self.pushed_with(frame, generation);
                self.out_bytes -= frames.iter().map(Bytes::len).sum::<usize>();
                match frames.as_slice() {
                    [alone] => alone.clone(),
                    several => join_delivers(self.codec.encoding, "", generation, several),
                }
            }
            Out::Entries(entries) => {
                self.out_bytes -= payload_bytes(&entries);
                match self.encode(entries) {
                    Some(frame) => frame,
                    None => return Ok(()),
                }
            }
        };
        self.node.metrics.bytes_out.inc_by(frame.len() as u64);
        self.socket.feed(message(self.codec.encoding, frame))
    }

    /// The frames of pushes that wait behind this one and go with it: what arrives together costs the
    /// device one frame.
    fn pushed_with(&mut self, first: Bytes, generation: u32) -> Vec<Bytes> {
        let mut bytes = first.len();
        let mut frames = vec![first];
        while let Some(Out::Pushed { frame, generation: of }) = self.out.front()
            && *of == generation
            && bytes + frame.len() <= JOINED_BYTES_MAX
        {
            bytes += frame.len();
            frames.push(frame.clone());
            self.out.pop_front();
        }
        frames
    }

    /// One frame for all of them; entry by entry if one of them is broken.
    fn encode(&mut self, mut entries: Vec<Envelope>) -> Option<Bytes> {
        let generation = self.session.generation().0;
        let Codec { encoding, zstd, .. } = self.codec;
        let (broken, error) = match encode_deliver(encoding, generation, &entries, zstd) {
            Ok(frame) => return Some(frame),
            Err(broken) => broken,
        };
        let rest = entries.split_off(broken + 1);
        let seq = barid_core::Seq(entries.pop().map_or(0, |entry| entry.seq));
        tracing::warn!(seq = seq.0, %error, "entry cannot be delivered");
        let waiting = std::mem::take(&mut self.out);
        if !entries.is_empty() {
            self.entries(entries);
        }
        let skip = self.session.undeliverable(seq);
        self.effects.push(skip);
        self.apply();
        if !rest.is_empty() {
            self.entries(rest);
        }
        self.out.extend(waiting);
        None
    }

    fn tell_queued(&mut self) {
        let queued = self.out_bytes + self.socket.fed();
        if queued != self.handle.queued_bytes() {
            self.node.metrics.queued_bytes.add(self.handle.set_queued_bytes(queued));
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
        tokio::join!(settled, hang_up(&node, socket, codec.encoding, closing.close.clone()));
        node.metrics.connections.dec();
    }
}

fn payload_bytes(entries: &[Envelope]) -> usize {
    entries.iter().map(|entry| entry.payload.len()).sum()
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

fn ack_request(node: &Node, handle: &Handle, point: AckPoint) -> AckRequest {
    AckRequest {
        user: handle.user().clone(),
        device: handle.device().clone(),
        session: node.session(handle.connection),
        epoch: point.epoch,
        generation: point.generation,
        seq: point.mark.seq,
        chain: point.mark.chain,
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
async fn hang_up(node: &Node, socket: Socket, encoding: Encoding, close: End) {
    let limit = Duration::from_millis(node.limits.close_timeout_ms);
    let error = close.as_ref().and_then(|close| error_frame(encoding, close));
    let error = error.map(|frame| message(encoding, frame));
    if !socket.hang_up(error, close.as_ref(), limit).await {
        node.metrics.limit("close_timeout");
    }
}

/// Draining is told by GoAway, and is no error. What breaks WebSocket is answered with a close alone.
fn error_frame(encoding: Encoding, close: &Close) -> Option<Bytes> {
    if close.code == CloseCode::Draining || close.code.is_websockets() {
        return None;
    }
    let error = v1::Error { code: close.code.code().into(), text: close.text.to_string() };
    encode_server(encoding, &ServerFrame::Error(error)).ok()
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
        assert!(size_of::<Handle>() <= 192, "its handle: {}", size_of::<Handle>());
    }
}
