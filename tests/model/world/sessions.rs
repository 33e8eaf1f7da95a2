//! Steps of devices and the node: connects, pushes, reads, acknowledgements, re-sends.

use barid_core::CloseCode;
use barid_mailbox::{
    AckRequest, ConfirmOutcome, ConfirmRequest, ConnectOutcome, DisconnectRequest, DueDevice,
    Unreached,
};
use barid_session::{AckPoint, Claims, Close, Connecting, ReadFrom, Unidentified};
use barid_wire::frames::ClientFrame;
use barid_wire::v1;

use super::calls::place;
use super::{
    CLIENTS, Checked, PLATFORM, World, check, device_id, device_of, session_ref, user_key, user_of,
};
use crate::mailboxes::{Hello, Route};
use crate::session::{Answer, Next, Out, SETTINGS, Session};

/// Reasons for which a claim is given back.
const UNREACHED: [Unreached; 4] =
    [Unreached::Down, Unreached::Full, Unreached::Void, Unreached::Away];
/// The largest attempt that is accepted, relative to a node's clock, ms.
const AHEAD_MS: u64 = 10_000;
/// The largest number of turns of a session.
const TURNS: usize = 64;
/// During the final repairs every re-send is acknowledged.
const ROUNDS_OF_RESENDS: usize = 3;

impl World<'_> {
    /// A push reaches every session of the user on the node, including those of a device that has left.
    pub(super) async fn push(&mut self, user: usize, nth: usize) -> Checked {
        let Some(entry) = self.pushes[user].remove(nth) else { return Ok(()) };
        let numbers: Vec<u64> = self.sessions.iter().map(|session| session.route.number).collect();
        for number in numbers {
            let Some(index) = self.position(number) else { continue };
            if user_of(self.sessions[index].client) == user {
                let out = self.sessions[index].push(&entry, self.now_us);
                self.tell(number, out).await?;
            }
        }
        Ok(())
    }

    /// The node drops the pushes of a user and notifies the sessions, or the pushes are lost before the node.
    pub(super) fn lose_pushes(&mut self, user: usize, told: bool) {
        self.pushes[user].clear();
        let ours = |session: &&mut Session| told && user_of(session.client) == user;
        self.sessions.iter_mut().filter(ours).for_each(Session::missed);
    }

    pub(super) async fn connect(&mut self, client: usize, late: bool) -> Checked {
        let state = &mut self.clients[client];
        if late && state.attempts == 0 {
            return Ok(());
        }
        // An attempt that was given up between two others has an odd number.
        state.attempts += if late { 0 } else { 2 };
        let attempt = state.attempts - u64::from(late);
        self.connections += 1;
        let number = self.connections;
        let at = state.position().map(place);
        let route = Route { number, incarnation: self.incarnation, attempt };
        let connecting = self.hello(client, attempt)?;
        let hello = Hello { device: device_of(client), route, at };
        let request = connecting.request(session_ref(number, self.incarnation));
        let outcome = self.call_connect(user_of(client), hello, request).await?;
        let state = &mut self.clients[client];
        let (connected, replaced) = match connecting.answered(outcome.clone(), SETTINGS) {
            Ok(connected) => connected,
            Err(refusal) => {
                let refused = late || outcome == ConnectOutcome::TooManyDevices;
                check!(refused, "{outcome:?} on a connect: {refusal:?}");
                state.current = state.current.filter(|_| late);
                return Ok(());
            }
        };
        if let Some(old) = replaced {
            let ours = state.current == Some(old.connection.0);
            check!(!late || !ours, "a late connect replaced the live session");
        }
        let cursor = connected.position();
        self.sessions.push(Session::new(client, route, connected));
        if late {
            return Ok(()); // no session
        }
        state.current = Some(number);
        if state.is_new() {
            self.begins(client, cursor.seq.0);
        }
        self.clients[client].welcome(cursor)
    }

    /// A device says Hello.
    fn hello(&self, client: usize, attempt: u64) -> Checked<Connecting> {
        let device = device_id(device_of(client));
        let position = self.clients[client].position().map(|position| v1::Position {
            mailbox: String::new(),
            epoch: position.epoch.0,
            generation: position.generation.0,
            seq: position.seq.0,
            chain: position.chain.map(|chain| chain.0),
        });
        let hello = v1::Hello {
            device: device.to_string(),
            platform: PLATFORM.into(),
            attempt,
            positions: position.into_iter().collect(),
            ..Default::default()
        };
        let user = user_key(user_of(client));
        let claims = Claims {
            user,
            device: Some(device),
            expires_s: u64::MAX,
            groups: Vec::new(),
            token: Default::default(),
            issued_ahead_s: None,
        };
        let unidentified = Unidentified::new(claims, self.now_us / 1000);
        let connecting = unidentified.frame(ClientFrame::Hello(hello), AHEAD_MS);
        connecting.map_err(|close| format!("a Hello is refused: {close:?}"))
    }

    /// A session ends: it sends its last acknowledgement, and its route is removed if it is still its own.
    pub(super) async fn close(&mut self, index: usize) -> Checked {
        let session = self.sessions.remove(index);
        let (client, number) = (session.client, session.route.number);
        let current = &mut self.clients[client].current;
        *current = current.filter(|current| *current != number);
        let (route, request) = (session.route, leaving(&session));
        if let Some(owed) = session.close().ack {
            let ack = ack_request(client, route, owed);
            self.acks.push((device_of(client), ack.clone()));
            self.call_ack(device_of(client), ack).await?;
        }
        self.left.push((device_of(client), request.clone()));
        self.call_disconnect(device_of(client), request).await
    }

    /// Sends a client's acknowledgement to the node. Returns whether there was one.
    pub(super) fn handle(&mut self, client: usize, count: usize, newest: bool) -> Checked<bool> {
        let handled = self.clients[client].handle(count, newest)?;
        let Some(index) = self.find(client, false) else { return Ok(handled) };
        let Some(ack) = self.clients[client].ack() else { return Ok(handled) };
        self.sessions[index].acks.push_back(ack);
        Ok(true)
    }

    /// All pushes arrive and are acknowledged.
    pub(super) async fn serve(&mut self, user: usize, handled: bool) -> Checked {
        while !self.pushes[user].is_empty() {
            self.push(user, 0).await?;
        }
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            self.exhaust(client, handled).await?;
        }
        Ok(())
    }

    /// A client and its session continue until neither has anything to do. The application is slow, or (unless
    /// `handled`) keeps its messages.
    pub(super) async fn exhaust(&mut self, client: usize, handled: bool) -> Checked {
        for _ in 0..TURNS {
            let busy = match self.find(client, false) {
                Some(index) => self.turn(index, false).await?,
                None => false,
            };
            if !(busy || handled && self.handle(client, usize::MAX, false)?) {
                break;
            }
        }
        Ok(())
    }

    /// The session gets an acknowledgement or an answer, or makes its next call, whose answer arrives a turn later. If
    /// `ahead`, its next call is first, then the newest answer.
    pub(super) async fn turn(&mut self, index: usize, ahead: bool) -> Checked<bool> {
        if !ahead && let Some(ack) = self.sessions[index].acks.pop_front() {
            let session = &mut self.sessions[index];
            let number = session.route.number;
            let out = session.acknowledged(ack, self.now_us);
            self.tell(number, out).await?;
            return Ok(true);
        }
        if !ahead && let Some(answer) = self.sessions[index].answers.pop_front() {
            return self.answer(index, answer).await;
        }
        match self.sessions[index].next() {
            Some(Next::Ack(owed)) => self.ack(index, owed).await?,
            Some(Next::Read(read)) => self.read(index, read).await?,
            None => match self.sessions[index].answers.pop_back() {
                Some(answer) => return self.answer(index, answer).await,
                None => return Ok(false),
            },
        }
        Ok(true)
    }

    async fn answer(&mut self, index: usize, answer: Answer) -> Checked<bool> {
        let number = self.sessions[index].route.number;
        let out = self.sessions[index].answered(answer, self.now_us);
        self.tell(number, out).await?;
        Ok(true)
    }

    async fn ack(&mut self, index: usize, owed: AckPoint) -> Checked {
        let Session { client, route, .. } = self.sessions[index];
        let (name, request) = (device_of(client), ack_request(client, route, owed));
        self.acks.push((name, request.clone()));
        let outcome = self.call_ack(name, request).await?;
        self.sessions[index].answers.push_back(Answer::Acked(outcome));
        Ok(())
    }

    /// An acknowledgement arrives, perhaps again, and its answer is dropped.
    pub(super) async fn ack_late(&mut self, nth: usize) -> Checked {
        let Some((name, request)) = self.acks.iter().rev().nth(nth).cloned() else {
            return Ok(());
        };
        self.call_ack(name, request).await.map(|_| ())
    }

    /// A node reports the end of a session late.
    pub(super) async fn disconnect_late(&mut self, nth: usize) -> Checked {
        let Some((name, request)) = self.left.iter().rev().nth(nth).cloned() else {
            return Ok(());
        };
        self.call_disconnect(name, request).await
    }

    async fn read(&mut self, index: usize, read: ReadFrom) -> Checked {
        let Session { client, route, .. } = self.sessions[index];
        let epoch = self.sessions[index].connected().position().epoch;
        let page = self.call_read(user_of(client), device_of(client), read).await?;
        if page.epoch == epoch && self.clients[client].current == Some(route.number) {
            self.may_skip(client, read.after.0 + 1, page.oldest.0)?;
        }
        self.sessions[index].answers.push_back(Answer::Page(page));
        Ok(())
    }

    /// A session's frames reach its device, if it is still connected.
    async fn tell(&mut self, number: u64, out: Vec<Out>) -> Checked {
        for out in out {
            let Some(index) = self.position(number) else { return Ok(()) };
            let client = self.sessions[index].client;
            if let Out::Close(close) = out {
                self.may_close(index, &close)?;
                self.close(index).await?;
                continue;
            }
            let client = &mut self.clients[client];
            if client.current != Some(number) {
                continue;
            }
            match out {
                Out::Deliver { generation, entries } => {
                    for entry in entries {
                        client.deliver(generation, entry.seq, &entry.id)?;
                    }
                }
                Out::Skip { generation, to, why } => client.skip(generation, to, why)?,
                Out::Welcome(cursor) => client.welcome(cursor)?,
                Out::Close(_) => (),
            }
        }
        Ok(())
    }

    /// The allowed reasons for which a session closes.
    fn may_close(&self, index: usize, close: &Close) -> Checked {
        let session = &self.sessions[index];
        let fine = match close.code {
            _ if self.clients[session.client].current != Some(session.route.number) => true,
            CloseCode::HistoryChanged => true,
            CloseCode::AckTimeout => self.round < ROUNDS_OF_RESENDS,
            _ => false,
        };
        check!(fine, "{session:?} ends with {close:?}");
        Ok(())
    }

    pub(super) async fn confirm(&mut self, index: usize) -> Checked {
        let session = &mut self.sessions[index];
        let client = session.client;
        if session.route.incarnation != self.incarnation {
            self.left.push((device_of(client), leaving(session)));
            session.route.incarnation = self.incarnation;
        }
        let route = session.route;
        let (identity, position) = (session.connected().identity(), session.connected().position());
        let request = ConfirmRequest {
            user: identity.user.clone(),
            device: identity.device.clone(),
            session: session_ref(route.number, route.incarnation),
            attempt: identity.attempt,
            platform: identity.platform.clone(),
            position,
        };
        let hello = Hello { device: device_of(client), route, at: Some(place(position)) };
        let outcome = self.call_confirm(user_of(client), hello, request).await?;
        let refused = outcome == ConfirmOutcome::Superseded;
        let current = self.clients[client].current == Some(route.number);
        check!(!refused || !current, "the newest session of client {client} was superseded");
        let out = self.sessions[index].confirmed(outcome);
        self.tell(route.number, out).await
    }

    /// The delayer claims due timers, and the re-sends reach the node.
    pub(super) async fn fire(
        &mut self,
        user: usize,
        only: Option<&str>,
        away: Option<usize>,
    ) -> Checked {
        let due = self.call_fire(user, only).await?;
        if let Some(why) = away {
            for claim in &due {
                self.call_defer(claim.clone(), UNREACHED[why]).await?;
            }
            return Ok(());
        }
        self.claims.extend(due.iter().cloned());
        for device in due.into_iter().flat_map(|due| due.devices) {
            self.resend(user, device).await?;
        }
        Ok(())
    }

    async fn resend(&mut self, user: usize, due: DueDevice) -> Checked {
        if let Some(index) = self.position(due.session.connection.0) {
            let (number, now_us) = (due.session.connection.0, self.now_us);
            let out = self.sessions[index].resend(now_us);
            return self.tell(number, out).await;
        }
        let ours = |client: &usize| device_of(*client) == due.device.as_str();
        let Some(client) = (0..CLIENTS).find(ours) else { return Ok(()) }; // not one of the clients
        let request =
            DisconnectRequest { user: user_key(user), device: due.device, session: due.session };
        self.call_disconnect(device_of(client), request).await
    }

    /// A claim is given back, late or repeatedly.
    pub(super) async fn defer(&mut self, nth: usize, why: usize) -> Checked {
        match self.claims.iter().rev().nth(nth).cloned() {
            Some(claim) => self.call_defer(claim, UNREACHED[why]).await,
            None => Ok(()),
        }
    }

    /// A client's session: the one that it is connected to, or one that it has left.
    pub(super) fn find(&self, client: usize, ghost: bool) -> Option<usize> {
        let current = self.clients[client].current;
        self.sessions.iter().position(|session| {
            session.client == client && (current == Some(session.route.number)) != ghost
        })
    }

    fn position(&self, number: u64) -> Option<usize> {
        self.sessions.iter().position(|session| session.route.number == number)
    }
}

fn leaving(session: &Session) -> DisconnectRequest {
    DisconnectRequest {
        user: user_key(user_of(session.client)),
        device: device_id(device_of(session.client)),
        session: session_ref(session.route.number, session.route.incarnation),
    }
}

fn ack_request(client: usize, route: Route, owed: AckPoint) -> AckRequest {
    AckRequest {
        user: user_key(user_of(client)),
        device: device_id(device_of(client)),
        session: session_ref(route.number, route.incarnation),
        epoch: owed.epoch,
        generation: owed.generation,
        seq: owed.mark.seq,
        chain: owed.mark.chain,
    }
}
