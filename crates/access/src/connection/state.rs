//! A connection between turns of its loop: what it holds, and what it waits for.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use barid_core::Incarnation;
use barid_mailbox::{AckOutcome, ConfirmOutcome, Page};
use barid_session::{Claims, Close, Connected, Effect, Heartbeat};
use barid_wire::envelope::Envelope;
use bytes::Bytes;

use crate::auth::AuthError;
use crate::connection::codec::Codec;
use crate::fanout::Listener;
use crate::handle::Handle;
use crate::handshake::Accepted;
use crate::node::Node;
use crate::socket::Socket;
use crate::upstream::Spent;

/// What waits for the socket.
pub(super) enum Out {
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

/// The answer to a call.
pub(super) enum Answer {
    Page(Page),
    /// The time until the next acknowledgement is over.
    AckDue,
    Acked(AckOutcome),
    Confirmed(ConfirmOutcome, Incarnation),
}

pub(super) type PendingCall = Pin<Box<dyn Future<Output = Answer> + Send>>;
pub(super) type Refreshing = Pin<Box<dyn Future<Output = Result<Claims, AuthError>> + Send>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Confirming {
    #[default]
    No,
    Once,
    Again,
}

/// How a connection ended: what to close with, or `None` if the device is gone.
pub(super) type End = Option<Close>;

pub(super) struct Connection {
    pub node: Arc<Node>,
    pub socket: Socket,
    pub handle: Arc<Handle>,
    pub session: Connected,
    pub codec: Codec,
    /// What it hears beside its user's messages.
    pub listener: Listener,
    /// There may be something to read for it.
    pub fanned_out: bool,
    pub beat: Heartbeat,
    pub spent: Spent,
    pub out: VecDeque<Out>,
    /// Bytes in `out`: of frames, and of the payloads of entries.
    pub out_bytes: usize,
    /// Redis: at most one read, one acknowledgement and one confirmation.
    pub calls: Vec<PendingCall>,
    /// Acknowledgements are cumulative: the next one waits until then, unless it is urgent.
    pub next_ack_ms: u32,
    pub ack_waits: bool,
    pub confirming: Confirming,
    pub refreshing: Option<Refreshing>,
    pub effects: Vec<Effect>,
    pub end: Option<End>,
    /// The device has been told once that something it sent was ignored.
    pub reported_ignored: bool,
}

impl Connection {
    /// A session that is registered and known to its mailbox. The caller writes Welcome.
    pub(super) fn new(
        node: &Arc<Node>,
        accepted: Accepted,
        session: Connected,
        handle: Arc<Handle>,
        codec: Codec,
    ) -> Box<Self> {
        let mut beat = Heartbeat::new(
            codec.ping_interval,
            node.policy.heartbeat.timeout_seconds,
            node.clock.seconds(),
            node.clock.seconds_at(accepted.claims.expires_s),
        );
        beat.used(node.clock.seconds(), node.policy.heartbeat.idle_seconds);
        Box::new(Self {
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
            next_ack_ms: node.clock.uptime_ms(),
            ack_waits: false,
            confirming: Confirming::No,
            refreshing: None,
            effects: Vec::new(),
            end: None,
            reported_ignored: false,
        })
    }

    /// Whether everything written so far has left.
    pub(super) fn is_flushed(&self) -> bool {
        self.socket.fed() == 0 && self.out.is_empty()
    }

    /// Ends the connection; the first reason holds.
    pub(super) fn end(&mut self, close: End) {
        self.end.get_or_insert(close);
    }

    /// Frees buffers that are empty: most sessions are idle.
    pub(super) fn give_back(&mut self) {
        if self.out.is_empty() {
            self.out = VecDeque::new();
        }
        if self.calls.is_empty() {
            self.calls = Vec::new();
        }
    }
}
