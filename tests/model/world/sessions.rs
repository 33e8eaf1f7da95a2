//! Devices and the node: connects, pushes, reads, acknowledgements, re-sends.

use barid_core::Seq;
use barid_mailbox::{AckRequest, ConnectOutcome, DisconnectRequest, DueDevice, Unreached};

use super::calls::place;
use super::{CLIENTS, Checked, World, check, device_id, device_of, session_ref, user_key, user_of};
use crate::mailboxes::{Hello, Route};
use crate::session::{Mark, Next, Out, Session};

/// Why a claim is given back.
const UNREACHED: [Unreached; 4] =
    [Unreached::Down, Unreached::Full, Unreached::Void, Unreached::Away];

impl World<'_> {
    /// A push reaches the node: every session of the user, also those of a device that has left.
    pub(super) async fn push(&mut self, user: usize, nth: usize) -> Checked {
        let Some(entry) = self.pushes[user].remove(nth) else { return Ok(()) };
        let numbers: Vec<u64> = self.sessions.iter().map(|session| session.route.number).collect();
        for number in numbers {
            let Some(index) = self.position(number) else { continue };
            if user_of(self.sessions[index].client) == user {
                let mut out = Vec::new();
                self.sessions[index].push(&entry, &mut out);
                self.tell(number, out).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn connect(&mut self, client: usize, late: bool) -> Checked {
        let state = &mut self.clients[client];
        if late && state.attempts == 0 {
            return Ok(());
        }
        // A call between two attempts that somebody gave up has the odd number.
        state.attempts += if late { 0 } else { 2 };
        let attempt = state.attempts - u64::from(late);
        self.connections += 1;
        let number = self.connections;
        let at = state.position().map(place);
        let route = Route { number, incarnation: self.incarnation, attempt };
        let hello = Hello { device: device_of(client), route, at };
        let outcome = self.call_connect(user_of(client), hello).await?;
        let state = &mut self.clients[client];
        let ConnectOutcome::Connected { cursor, newest, replaced, .. } = outcome else {
            let refused = late || outcome == ConnectOutcome::TooManyDevices;
            check!(refused, "{outcome:?} on a connect");
            state.current = state.current.filter(|_| late);
            return Ok(());
        };
        if let Some(old) = replaced {
            let ours = state.current == Some(old.connection.0);
            check!(!late || !ours, "a late connect replaced the live session");
        }
        self.sessions.push(Session::new(client, route, cursor, newest));
        if late {
            return Ok(()); // nobody listens
        }
        state.current = Some(number);
        if state.is_new() {
            self.begins(client, cursor.seq.0);
        }
        self.clients[client].welcome(cursor)
    }

    /// A session ends: it hands in what it owes, and its route goes if it is still its own.
    pub(super) async fn close(&mut self, index: usize) -> Checked {
        if let Some(owed) = self.sessions[index].owed() {
            self.ack(index, owed).await?;
        }
        let session = self.sessions.remove(index);
        let (client, number) = (session.client, session.route.number);
        let current = &mut self.clients[client].current;
        *current = current.filter(|current| *current != number);
        let request = leaving(&session);
        self.left.push((device_of(client), request.clone()));
        self.call_disconnect(device_of(client), request).await
    }

    pub(super) fn handle(&mut self, client: usize, count: usize) {
        let Some((generation, seq)) = self.clients[client].handle(count) else { return };
        if let Some(index) = self.find(client, false) {
            self.sessions[index].acknowledged(generation, seq);
        }
    }

    /// The fast path does what it can, up to the acks.
    pub(super) async fn serve(&mut self, user: usize) -> Checked {
        while !self.pushes[user].is_empty() {
            self.push(user, 0).await?;
        }
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            self.exhaust(client).await?;
        }
        Ok(())
    }

    /// A client and its session go on until neither has anything to do.
    pub(super) async fn exhaust(&mut self, client: usize) -> Checked {
        for _ in 0..32 {
            self.handle(client, usize::MAX);
            match self.find(client, false) {
                Some(index) if self.turn(index).await? => (),
                _ => break,
            }
        }
        Ok(())
    }

    /// The session does what it wants next. A page comes back a turn later.
    pub(super) async fn turn(&mut self, index: usize) -> Checked<bool> {
        let session = &mut self.sessions[index];
        let number = session.route.number;
        let mut out = Vec::new();
        if let Some(page) = session.page.take() {
            session.page(page, &mut out);
        } else {
            match session.next() {
                Some(Next::Ack(owed)) => out = self.ack(index, owed).await?,
                Some(Next::Read) => self.read(index).await?,
                None => return Ok(false),
            }
        }
        self.tell(number, out).await?;
        Ok(true)
    }

    async fn ack(&mut self, index: usize, owed: Mark) -> Checked<Vec<Out>> {
        let session = &self.sessions[index];
        let name = device_of(session.client);
        let request = AckRequest {
            user: user_key(user_of(session.client)),
            device: device_id(name),
            session: session_ref(session.route.number, session.route.incarnation),
            epoch: session.epoch,
            generation: session.generation,
            seq: Seq(owed.seq),
            chain: owed.chain,
        };
        self.acks.push((name, request.clone()));
        let outcome = self.call_ack(name, request).await?;
        let mut out = Vec::new();
        self.sessions[index].acked(outcome, &mut out);
        Ok(out)
    }

    /// An acknowledgement arrives once more, or for the first time: nobody waits for the answer.
    pub(super) async fn ack_late(&mut self, nth: usize) -> Checked {
        let Some((name, request)) = self.acks.iter().rev().nth(nth).cloned() else {
            return Ok(());
        };
        self.call_ack(name, request).await.map(|_| ())
    }

    /// A node that was told of it long ago says that a session is over.
    pub(super) async fn disconnect_late(&mut self, nth: usize) -> Checked {
        let Some((name, request)) = self.left.iter().rev().nth(nth).cloned() else {
            return Ok(());
        };
        self.call_disconnect(name, request).await
    }

    async fn read(&mut self, index: usize) -> Checked {
        let Session { client, route, at, epoch, .. } = self.sessions[index];
        let page = self.call_read(user_of(client), at.seq).await?;
        if page.epoch == epoch && self.clients[client].current == Some(route.number) {
            self.may_skip(client, at.seq + 1, page.oldest.0)?;
        }
        self.sessions[index].page = Some(page);
        Ok(())
    }

    /// What a session says reaches its device, if the device is still there.
    async fn tell(&mut self, number: u64, out: Vec<Out>) -> Checked {
        for out in out {
            let Some(index) = self.position(number) else { return Ok(()) };
            let client = self.sessions[index].client;
            if matches!(out, Out::Close) {
                self.close(index).await?;
                continue;
            }
            let client = &mut self.clients[client];
            if client.current != Some(number) {
                continue;
            }
            match out {
                Out::Deliver { generation, seq, id } => client.deliver(generation, seq, &id)?,
                Out::Skip { generation, to } => client.skip(generation, to)?,
                Out::Welcome(cursor) => client.welcome(cursor)?,
                Out::Close => (),
            }
        }
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
        let hello = Hello { device: device_of(client), route, at: Some(place(session.position())) };
        let outcome = self.call_confirm(user_of(client), hello).await?;
        let refused = outcome == barid_mailbox::ConfirmOutcome::Superseded;
        let current = self.clients[client].current == Some(route.number);
        check!(!refused || !current, "the newest session of client {client} was superseded");
        let mut out = Vec::new();
        self.sessions[index].confirmed(outcome, &mut out);
        self.tell(route.number, out).await
    }

    /// The delayer claims, and the node hears of it.
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
            self.sessions[index].resend();
            return Ok(());
        }
        let ours = |client: &usize| device_of(*client) == due.device.as_str();
        let Some(client) = (0..CLIENTS).find(ours) else { return Ok(()) }; // a stranger hears nothing
        let request =
            DisconnectRequest { user: user_key(user), device: due.device, session: due.session };
        self.call_disconnect(device_of(client), request).await
    }

    /// A claim is given back, however late, and perhaps once more.
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
