//! The state of a connection.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use barid_core::{Audience, AudienceKey, Incarnation, Position, Seq};
use barid_mailbox::{AckOutcome, ConfirmOutcome, Page};
use barid_session::{Claims, Close, Connected, Effect, Heartbeat, Seconds};
use barid_wire::envelope::Envelope;
use bytes::Bytes;

use crate::auth::AuthError;
use crate::connection::codec::Codec;
use crate::fanout::Listener;
use crate::handle::Handle;
use crate::handshake::Accepted;
use crate::metrics::Counted;
use crate::node::Node;
use crate::socket::Socket;
use crate::upstream::Spent;

/// An item of the queue to the device.
pub(super) enum Out {
    Frame(Bytes),
    /// One pushed message, in a frame that it shares with the user's other sessions.
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
    /// The interval between two acknowledgements has passed.
    AckDue,
    Acked(AckOutcome),
    Confirmed(ConfirmOutcome, Incarnation),
    /// Entries of an audience's mailbox after a seq.
    AudiencePage(AudienceKey, Seq, Arc<Page>),
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

/// How a connection ended: the close to send, or `None` if the device is gone.
pub(super) type End = Option<Close>;

pub(super) struct Connection {
    pub node: Arc<Node>,
    pub socket: Socket,
    pub handle: Arc<Handle>,
    pub session: Connected,
    pub codec: Codec,
    /// The audiences that the session reads.
    pub listener: Listener,
    /// `listener` may have messages to read.
    pub fanned_out: bool,
    pub beat: Heartbeat,
    pub spent: Spent,
    pub out: VecDeque<Out>,
    /// Bytes in `out`: of frames, and of the payloads of entries.
    pub out_bytes: usize,
    /// Calls to Redis under way: at most one read, one acknowledgement and one confirmation.
    pub calls: Vec<PendingCall>,
    /// Node uptime before which only an urgent acknowledgement is sent, ms, modulo 2^32.
    pub next_ack_ms: u32,
    /// When it was welcomed, by the coarse clock.
    pub begun: Seconds,
    pub ack_waits: bool,
    pub confirming: Confirming,
    pub refreshing: Option<Refreshing>,
    pub effects: Vec<Effect>,
    pub end: Option<End>,
    /// Where metrics count it, from Welcome on.
    pub counted: Option<Counted>,
    /// The device has been told that something it sent was ignored; that is done once.
    pub reported_ignored: bool,
}

impl Connection {
    /// Creates the connection of a session that is registered and connected to its mailbox. The caller writes Welcome.
    pub(super) fn new(
        node: &Arc<Node>,
        accepted: Accepted,
        session: Connected,
        handle: Arc<Handle>,
        codec: Codec,
        positions: Vec<(Audience, Position)>,
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
            listener: Listener::new(&node.fanout, &handle, accepted.claims.groups, positions),
            fanned_out: false,
            handle,
            session,
            codec,
            beat,
            spent: accepted.spent,
            out: VecDeque::new(),
            out_bytes: 0,
            calls: Vec::new(),
            next_ack_ms: node.clock.uptime_ms(),
            begun: node.clock.seconds(),
            ack_waits: false,
            confirming: Confirming::No,
            refreshing: None,
            effects: Vec::new(),
            end: None,
            counted: None,
            reported_ignored: false,
        })
    }

    /// Whether the queue and the socket's buffer are empty.
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
