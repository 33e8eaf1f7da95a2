//! The task of a client: connects, passes frames between the connection and the inbox, and reconnects.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{Chain, Clock as _, CloseCode, Generation, GroupId, Position, Seq, SystemClock};
use barid_wire::v1::{self, ServerFrame, client_frame, server_frame};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::http::Uri;
use tokio_util::sync::CancellationToken;

use crate::connection::Connection;
use crate::delivery::{AckHandle, Delivery, Finished};
use crate::event::{Closed, Disconnect, Event, SkipReason};
use crate::inbox::{Inbox, Ticket};
use crate::live::Live;
use crate::message::{Message, unpack};
use crate::reconnect::{Reconnect, next_attempt};
use crate::settings::Settings;

/// After a connection of this duration, the wait before a reconnect is short again.
const HELD: Duration = Duration::from_secs(5);
/// An acknowledgement for this many positions is sent without delay.
const UNACKED_MAX: u64 = 64;
/// Upper bound of the ack interval that a server may ask for.
const ACK_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Pause between attempts to get a fresh token while the old one is still valid.
const TOKEN_RETRY: Duration = Duration::from_secs(5);
/// Time beyond the ping interval after which a silent connection is closed. Nodes send something in every interval.
const SILENCE_SLACK: Duration = Duration::from_secs(15);
/// Upper bound of a server's ping interval; a longer one is a mistake.
const PING_INTERVAL_MAX: Duration = Duration::from_secs(600);

pub(crate) struct Driver {
    settings: Arc<Settings>,
    work: Work,
    attempt: u64,
    reconnect: Reconnect,
    stop: CancellationToken,
    /// The node of the last connection.
    last: Option<Uri>,
    /// The last connection failed: another node is preferred.
    avoid: bool,
    /// Consecutive connections that were refused because the server knows a higher attempt.
    overtaken: u32,
    /// The groups that the application is subscribed to.
    groups: watch::Receiver<BTreeSet<GroupId>>,
}

/// The inbox, and its channels to the application.
struct Work {
    settings: Arc<Settings>,
    inbox: Inbox,
    live: Live,
    /// Whether a group's message has its turn, if there is one.
    live_next: bool,
    deliver: mpsc::Sender<Delivery>,
    finish: mpsc::Sender<Finished>,
    finished: mpsc::Receiver<Finished>,
    /// Number of messages that the application has.
    out: usize,
    /// Whether no further messages are given to the application.
    stopping: bool,
}

/// The state of a connected session, beside the inbox.
struct Session {
    connection: Connection,
    silence: Duration,
    unacked_max: u64,
    /// The interval between acks that the server asks for.
    ack_interval: Duration,
    acked_at: Option<Instant>,
    heard_at: Instant,
    ack_at: Option<Instant>,
    leave_at: Option<Instant>,
    /// The groups that this connection has subscribed to.
    groups: BTreeSet<GroupId>,
    /// A higher attempt of this device that the server knows; otherwise 0.
    known_attempt: u64,
}

/// How one connection ended.
enum Ended {
    Stopped,
    Lost(Disconnect),
    Leaving { since: Instant, after: Duration },
}

impl Driver {
    pub(crate) fn new(
        settings: Arc<Settings>,
        inbox: Inbox,
        attempt: u64,
        stop: CancellationToken,
        deliver: mpsc::Sender<Delivery>,
        (finish, finished): (mpsc::Sender<Finished>, mpsc::Receiver<Finished>),
        groups: watch::Receiver<BTreeSet<GroupId>>,
    ) -> Self {
        let timing = &settings.timing;
        let reconnect = Reconnect::new(timing.reconnect_min, timing.reconnect_max);
        let work = Work {
            settings: settings.clone(),
            inbox,
            live: Live::default(),
            live_next: false,
            deliver,
            finish,
            finished,
            out: 0,
            stopping: false,
        };
        Self {
            settings,
            work,
            attempt,
            reconnect,
            stop,
            last: None,
            avoid: false,
            overtaken: 0,
            groups,
        }
    }

    pub(crate) async fn run(mut self) -> Closed {
        let closed = loop {
            let ended = self.connection().await;
            self.avoid = matches!(ended, Ended::Lost(_));
            let (why, wait) = match ended {
                Ended::Stopped => break Closed::Shutdown,
                Ended::Lost(why) if is_final(&why) => {
                    self.work.emit(Event::Disconnected { why: why.clone(), retry_in: None });
                    break Closed::Refused(why);
                }
                // The refusal named the known attempt, and the next one will be higher: reconnect at once.
                Ended::Lost(why) if self.overtaken == 1 => (why, Duration::ZERO),
                Ended::Lost(why) => {
                    let wait = self.reconnect.next_wait();
                    (why.clone(), wait + retry_after(&why))
                }
                Ended::Leaving { since, after } => {
                    (Disconnect::GoAway, after.saturating_sub(since.elapsed()))
                }
            };
            self.work.emit(Event::Disconnected { why, retry_in: Some(wait) });
            tokio::select! {
                () = self.work.until_stopped(&self.stop) => break Closed::Shutdown,
                () = sleep(wait) => {}
            }
        };
        self.stop.cancel();
        self.work.finish_quietly().await;
        self.work.save(self.attempt).await;
        closed
    }

    /// Makes one attempt, and serves the connection.
    async fn connection(&mut self) -> Ended {
        self.attempt = next_attempt(self.attempt, SystemClock.now_ms());
        self.work.emit(Event::Connecting { attempt: self.attempt });
        let settings = self.settings.clone();
        let avoid = self.last.clone().filter(|_| self.avoid);
        let opening = timeout(settings.timing.connect, open(&settings, avoid));
        let opened = tokio::select! {
            () = self.work.until_stopped(&self.stop) => return Ended::Stopped,
            opened = opening => opened,
        };
        let (connection, refresh_in) = match opened {
            Ok((uri, opened)) => {
                self.last = Some(uri);
                match opened {
                    Ok(opened) => opened,
                    Err(why) => return Ended::Lost(why),
                }
            }
            Err(_) => return Ended::Lost(Disconnect::Timeout("connection")),
        };
        let began = Instant::now();
        let mut session = Session::new(connection);
        let ended = match self.session(&mut session, refresh_in).await {
            Err(why) if session.leave_at.is_some() && !is_final(&why) => session.leaving(),
            Err(why) => Ended::Lost(why),
            Ok(ended) => ended,
        };
        self.attempt = self.attempt.max(session.known_attempt);
        self.overtaken = if session.known_attempt > 0 { self.overtaken + 1 } else { 0 };
        if began.elapsed() >= HELD || matches!(ended, Ended::Leaving { .. }) {
            self.reconnect.held();
        }
        if let Ended::Stopped | Ended::Leaving { .. } = ended {
            session.connection.close("").await;
        }
        ended
    }

    /// Serves a connection, from Hello to its end.
    async fn session(
        &mut self,
        session: &mut Session,
        refresh_in: Option<Duration>,
    ) -> Result<Ended, Disconnect> {
        let hello = self.hello();
        session.connection.send(client_frame::Kind::Hello(hello)).await?;
        tokio::select! {
            welcome = timeout(self.settings.timing.connect, self.work.welcome(session)) =>
                welcome.map_err(|_| Disconnect::Timeout("welcome"))??,
            () = self.stop.cancelled() => return Ok(Ended::Stopped),
        }
        self.work.save(self.attempt).await;
        let mut refresh = std::pin::pin!(refresh(self.settings.clone(), refresh_in));
        let deliver = self.work.deliver.clone();
        let mut stop_at = None;
        loop {
            self.work.flush_ack(session, self.attempt).await?;
            self.subscribe(session).await?;
            if self.work.stopping && self.work.out == 0 {
                self.work.send_ack(session, self.attempt).await?;
                return Ok(Ended::Stopped);
            }
            tokio::select! {
                frame = session.connection.receive() => {
                    session.heard_at = Instant::now();
                    if let Some(frame) = frame? {
                        self.work.frame(session, frame).await?;
                    }
                }
                () = self.work.finished() => {}
                () = due(session.ack_at) => {
                    self.work.send_ack(session, self.attempt).await?;
                }
                token = &mut refresh => {
                    let (token, next) = token;
                    session.connection.send(client_frame::Kind::Refresh(v1::Refresh { token })).await?;
                    self.work.emit(Event::TokenRefreshed);
                    refresh.set(self::refresh(self.settings.clone(), next));
                }
                // The application changed its groups. An error (the client was dropped) disables this arm; `stop` ends the loop.
                Ok(()) = self.groups.changed() => {}
                () = sleep_until(session.heard_at + session.silence) => {
                    return Err(Disconnect::Timeout("sign of life"));
                }
                () = due(session.leave_at) => return Ok(session.leaving()),
                () = self.stop.cancelled(), if !self.work.stopping => {
                    self.work.stopping = true;
                    stop_at = Some(Instant::now() + self.settings.timing.shutdown);
                }
                () = deliver.closed(), if !self.work.stopping => self.stop.cancel(),
                () = due(stop_at) => {
                    self.work.send_ack(session, self.attempt).await?;
                    return Ok(Ended::Stopped);
                }
            }
        }
    }

    /// Subscribes and unsubscribes, so that the connection has the groups of the application.
    async fn subscribe(&mut self, session: &mut Session) -> Result<(), Disconnect> {
        let wanted = self.groups.borrow_and_update().clone();
        for group in wanted.difference(&session.groups) {
            let group = group.to_string();
            session.connection.send(client_frame::Kind::Subscribe(v1::Subscribe { group })).await?;
        }
        for group in session.groups.difference(&wanted) {
            self.work.live.forget(group.as_str());
            let group = group.to_string();
            let frame = client_frame::Kind::Unsubscribe(v1::Unsubscribe { group });
            session.connection.send(frame).await?;
        }
        session.groups = wanted;
        Ok(())
    }

    fn hello(&self) -> v1::Hello {
        let own = self.work.inbox.position().map(|at| v1::Position::new("", at));
        let groups = self.work.live.positions().map(|(group, at)| v1::Position::new(group, at));
        v1::Hello {
            device: self.settings.device.clone(),
            platform: self.settings.platform.clone(),
            sdk: concat!("barid-rust/", env!("CARGO_PKG_VERSION")).into(),
            attempt: self.attempt,
            positions: own.into_iter().chain(groups).collect(),
            accepts_zstd: true,
            visible_pings: false,
            ping_interval_ms: self.settings.ping_interval_ms,
        }
    }
}

impl Work {
    fn emit(&self, event: Event) {
        tracing::debug!(?event, "event");
        (self.settings.on_event)(event);
    }

    fn emit_all(&self, events: Vec<Event>) {
        events.into_iter().for_each(|event| self.emit(event));
    }

    /// Waits for the first frame that is a welcome.
    async fn welcome(&mut self, session: &mut Session) -> Result<(), Disconnect> {
        loop {
            if let Some(frame) = session.connection.receive().await? {
                let welcomed = matches!(frame.control, Some(server_frame::Control::Welcome(_)));
                self.frame(session, frame).await?;
                if welcomed {
                    return Ok(());
                }
            }
        }
    }

    async fn frame(&mut self, session: &mut Session, frame: ServerFrame) -> Result<(), Disconnect> {
        if !frame.mailbox.is_empty() {
            self.live_messages(&frame.mailbox, frame.deliver)?;
            self.hand_out();
            return Ok(());
        }
        self.messages(Generation(frame.generation), frame.deliver)?;
        match frame.control {
            Some(server_frame::Control::Welcome(welcome)) => self.welcomed(session, welcome),
            Some(server_frame::Control::Skip(skip)) => self.skipped(&skip)?,
            Some(server_frame::Control::GoAway(go_away)) => {
                let reconnect_after = Duration::from_millis(go_away.reconnect_after_ms.into());
                session.leave_at = Some(Instant::now() + reconnect_after);
                self.emit(Event::GoingAway { why: go_away.why, reconnect_after });
            }
            Some(server_frame::Control::Error(error)) => {
                session.known_attempt = error.attempt;
                self.emit(Event::ServerError { code: error.code, text: error.text });
            }
            Some(server_frame::Control::Ping(_)) => {
                session.connection.send(client_frame::Kind::Pong(v1::Pong {})).await?;
            }
            Some(server_frame::Control::Subscribed(subscribed)) => {
                let v1::Subscribed { group, position } = subscribed;
                let missed = self.live.subscribed(&group, position.as_ref().map(Position::from));
                self.emit(Event::Subscribed { group });
                missed.into_iter().for_each(|missed| self.emit(missed));
            }
            Some(server_frame::Control::Unsubscribed(unsubscribed)) => {
                let v1::Unsubscribed { group, code, text } = unsubscribed;
                self.emit(Event::Unsubscribed { group, code, text });
            }
            None => {}
        }
        self.hand_out();
        Ok(())
    }

    fn messages(
        &mut self,
        generation: Generation,
        messages: Vec<v1::Message>,
    ) -> Result<(), Disconnect> {
        let mut events = Vec::new();
        for message in messages {
            let seq = message.seq;
            let message = unpack(message, self.settings.body_bytes_max)
                .map_err(|bad| Disconnect::Violation(format!("body of message {seq}: {bad}")))?;
            self.inbox
                .deliver(generation, message, &mut events)
                .map_err(|violation| Disconnect::Violation(violation.to_string()))?;
        }
        self.emit_all(events);
        Ok(())
    }

    fn live_messages(&mut self, group: &str, messages: Vec<v1::Message>) -> Result<(), Disconnect> {
        let mut events = Vec::new();
        for message in messages {
            let seq = message.seq;
            let message = unpack(message, self.settings.body_bytes_max)
                .map_err(|bad| Disconnect::Violation(format!("body of message {seq}: {bad}")))?;
            self.live.deliver(group, message, &mut events);
        }
        self.emit_all(events);
        Ok(())
    }

    fn welcomed(&mut self, session: &mut Session, welcome: v1::Welcome) {
        let position = welcome.positions.iter().find(|p| p.mailbox.is_empty());
        let position = position.map_or_else(Position::default, Position::from);
        let interval = Duration::from_millis(welcome.ping_interval_ms.into());
        if !interval.is_zero() {
            session.silence = interval.min(PING_INTERVAL_MAX) + SILENCE_SLACK;
        }
        let interval = Duration::from_millis(welcome.ack_interval_ms.into());
        session.ack_interval = interval.min(ACK_INTERVAL_MAX);
        session.unacked_max = u64::from(welcome.max_unacked / 2).clamp(1, UNACKED_MAX);
        let mut events = Vec::new();
        self.inbox.welcome(position, &mut events);
        self.emit_all(events);
        if !welcome.session.is_empty() {
            self.emit(Event::Connected { session: welcome.session, position });
        }
    }

    fn skipped(&mut self, skip: &v1::Skip) -> Result<(), Disconnect> {
        if !skip.mailbox.is_empty() {
            return Ok(());
        }
        let mut events = Vec::new();
        let why = SkipReason::from_wire(skip.why);
        self.inbox
            .skip(Generation(skip.generation), Seq(skip.to), Chain(skip.chain), why, &mut events)
            .map_err(|violation| Disconnect::Violation(violation.to_string()))?;
        self.emit_all(events);
        Ok(())
    }

    /// Gives messages to the application, as far as it has room.
    fn hand_out(&mut self) {
        while !self.stopping && self.out < self.deliver.max_capacity() {
            let Some((ticket, message)) = self.next_message() else { return };
            let ack = AckHandle::new(ticket, self.finish.clone());
            self.out += 1;
            // There is room. If the application has gone, dropping the handle gives the message back.
            let _ = self.deliver.try_send(Delivery { message, ack });
        }
    }

    /// The next message. The user's own messages and those of groups take turns.
    fn next_message(&mut self) -> Option<(Option<Ticket>, Message)> {
        let first = if self.live_next { self.live.next() } else { None };
        let own = if first.is_none() { self.inbox.next_message() } else { None };
        self.live_next = own.is_some();
        if let Some((ticket, message)) = own {
            return Some((Some(ticket), message));
        }
        first.or_else(|| self.live.next()).map(|message| (None, message))
    }

    /// Waits until the application has finished a message, and handles that. Cancel-safe.
    async fn finished(&mut self) {
        // `self.finish` keeps the channel open.
        if let Some(Finished { ticket, handled }) = self.finished.recv().await {
            self.out = self.out.saturating_sub(1);
            if let Some(ticket) = ticket {
                let mut events = Vec::new();
                self.inbox.finished(ticket, handled, &mut events);
                self.emit_all(events);
            }
            self.hand_out();
        }
    }

    /// Serves the application while there is no connection.
    async fn until_stopped(&mut self, stop: &CancellationToken) {
        let deliver = self.deliver.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = deliver.closed() => return,
                () = self.finished() => {}
            }
        }
    }

    /// At the end, without a connection: waits for the messages that the application still has.
    async fn finish_quietly(&mut self) {
        self.stopping = true;
        let deadline = Instant::now() + self.settings.timing.shutdown;
        while self.out > 0 {
            tokio::select! {
                () = self.finished() => {}
                () = sleep_until(deadline) => return,
            }
        }
    }

    /// Sends an ack that is due, or delays it: for the interval that the server asks for, and briefly while further
    /// messages are being handled.
    async fn flush_ack(&mut self, session: &mut Session, attempt: u64) -> Result<(), Disconnect> {
        if !self.inbox.ack_due() {
            return Ok(());
        }
        let now = Instant::now();
        let paced = session.acked_at.map_or(now, |at| at + session.ack_interval);
        let at =
            if self.out == 0 { paced } else { paced.max(now + self.settings.timing.ack_delay) };
        if at <= now || self.inbox.unacked() >= session.unacked_max {
            return self.send_ack(session, attempt).await;
        }
        // Once the last message is finished, the ack no longer waits for others.
        session.ack_at = Some(session.ack_at.map_or(at, |earlier| earlier.min(at)));
        Ok(())
    }

    async fn send_ack(&mut self, session: &mut Session, attempt: u64) -> Result<(), Disconnect> {
        session.ack_at = None;
        let Some(ack) = self.inbox.take_ack() else { return Ok(()) };
        session.acked_at = Some(Instant::now());
        self.save(attempt).await;
        let ack =
            v1::Ack { mailbox: String::new(), generation: Some(ack.generation.0), seq: ack.seq.0 };
        session.connection.send(client_frame::Kind::Ack(ack)).await
    }

    /// Saves the checkpoint before an ack is sent. Otherwise a crash in between would show messages again.
    async fn save(&self, attempt: u64) {
        let Some(store) = self.settings.store.clone() else { return };
        let checkpoint = self.inbox.checkpoint(attempt);
        let saved = tokio::task::spawn_blocking(move || store.save(&checkpoint)).await;
        let problem = match saved {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        self.emit(Event::PositionNotSaved { reason: problem });
    }
}

impl Session {
    fn new(connection: Connection) -> Self {
        Self {
            connection,
            silence: PING_INTERVAL_MAX,
            unacked_max: UNACKED_MAX,
            ack_interval: Duration::ZERO,
            acked_at: None,
            heard_at: Instant::now(),
            ack_at: None,
            leave_at: None,
            groups: BTreeSet::new(),
            known_attempt: 0,
        }
    }

    fn leaving(&self) -> Ended {
        let since = Instant::now();
        let leave_at = self.leave_at.unwrap_or(since);
        Ended::Leaving { since, after: leave_at.saturating_duration_since(since) }
    }
}

/// Whether a retry cannot succeed.
fn is_final(why: &Disconnect) -> bool {
    match why {
        Disconnect::Closed { code, .. } => !CloseCode::reconnects(*code),
        Disconnect::Http { status, .. } => matches!(status, 400 | 401 | 403),
        _ => false,
    }
}

/// The wait that the server asks for. The caller adds a jittered wait, which spreads clients.
fn retry_after(why: &Disconnect) -> Duration {
    match why {
        Disconnect::Http { retry_after, .. } => retry_after.unwrap_or_default(),
        _ => Duration::ZERO,
    }
}

/// An open connection, with the time to refresh its token.
type Opened = Result<(Connection, Option<Duration>), Disconnect>;

/// Opens a connection. Also returns the node.
async fn open(settings: &Settings, avoid: Option<Uri>) -> (Uri, Opened) {
    let mut uri = settings.uri.clone();
    let token = match (settings.token)().await {
        Ok(token) => token,
        Err(error) => return (uri, Err(Disconnect::Token(error.to_string()))),
    };
    let refresh_in = token.refresh_in(SystemClock.now_ms());
    if let Some(zone) = &settings.zone {
        uri = crate::nodes::choose(settings, zone, &token, avoid.as_ref()).await;
    }
    let opened = Connection::open(&uri, &token, settings.trust.as_ref()).await;
    (uri, opened.map(|connection| (connection, refresh_in)))
}

/// Gets a fresh token when it is time. Never returns if the token does not expire.
async fn refresh(settings: Arc<Settings>, wait: Option<Duration>) -> (String, Option<Duration>) {
    let Some(wait) = wait else { return std::future::pending().await };
    sleep(wait).await;
    loop {
        match (settings.token)().await {
            Ok(token) => {
                let next = token.refresh_in(SystemClock.now_ms());
                return (token.expose().to_owned(), next.map(|wait| wait.max(TOKEN_RETRY)));
            }
            Err(error) => (settings.on_event)(Event::TokenFailed { reason: error.to_string() }),
        }
        sleep(TOKEN_RETRY).await;
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
