//! The steps.

use barid_core::Seq;
use barid_mailbox::{
    AcceptOutcome, AckRequest, ConfirmRequest, ConnectOutcome, ConnectRequest, DeferRequest,
    DisconnectRequest, GroupOutcome, ReadRequest,
};

use super::{
    CLIENTS, Checked, USERS, World, accept_group, attempt, check, device_of, session_ref, text,
    user_key, user_of,
};
use crate::Step;
use crate::mailboxes::Expected;
use crate::purger::Group;
use crate::session::{Mark, Next, Out, Session};

/// Rounds of repairs in which everything has to settle.
const ROUNDS: usize = 12;

impl World<'_> {
    pub async fn step(&mut self, step: &Step) -> Checked {
        match *step {
            Step::Produce { source, user, repeat } => self.produce(source, user, repeat),
            Step::Send { source, user } => {
                self.produce(source, user, false);
                self.pump(source, 0, 3).await?;
            }
            Step::Accept { source, purger, count } => self.pump(source, purger, count).await?,
            Step::Rebalance { source } => self.rebalance(source).await?,
            Step::Redeliver { source } => self.redeliver(source).await?,
            Step::Push { user, nth } => self.push(user, nth).await?,
            Step::Serve { user } => self.serve(user).await?,
            Step::LosePushes { user } => self.pushes[user].clear(),
            Step::Connect { client } => self.connect(client, false).await?,
            Step::ConnectLate { client } => self.connect(client, true).await?,
            Step::Disconnect { client, ghost } => {
                if let Some(index) = self.find(client, ghost) {
                    self.close(index).await?;
                }
            }
            Step::Vanish { client } => {
                if let Some(index) = self.find(client, false) {
                    self.sessions.remove(index);
                    self.clients[client].current = None;
                }
            }
            Step::Handle { client, count } => self.handle(client, count),
            Step::Turn { client, ghost } => {
                if let Some(index) = self.find(client, ghost) {
                    self.turn(index).await?;
                }
            }
            Step::Confirm { client, ghost } => {
                if let Some(index) = self.find(client, ghost) {
                    self.confirm(index).await?;
                }
            }
            Step::Fire { user } => self.fire(user).await?,
            Step::Defer => self.defer().await?,
            Step::AckLate { nth } => self.ack_late(nth).await?,
            Step::Expire { user } => self.expire(user).await,
            Step::Replicate => {
                self.store.replicate().await;
                self.replica = self.now.clone();
            }
            Step::FailOver => self.fail_over().await,
        }
        self.look().await
    }

    fn produce(&mut self, source: usize, user: usize, repeat: bool) {
        let records = &mut self.log[source].records;
        let last = records.iter().rev().find(|(whose, _)| *whose == user).cloned();
        let fresh = (user, format!("{source}-{}", records.len()));
        records.push(if repeat { last.unwrap_or(fresh) } else { fresh });
    }

    async fn pump(&mut self, source: usize, purger: usize, count: usize) -> Checked {
        let group = self.log[source].group(purger, count);
        match self.accept(source, &group).await? {
            Some(known) => self.log[source].gap(purger, known),
            None => {
                self.log[source].done(purger, &group);
                self.log[source].last = Some(group);
            }
        }
        Ok(())
    }

    /// The second purger is given the partition, and begins at the commit. The first does not know
    /// that yet. (Where Redis has forgotten what is committed, it needs the first one's memory:
    /// HAZARDS 5 is another test's.)
    async fn rebalance(&mut self, source: usize) -> Checked {
        let partition = &mut self.log[source];
        let executed = self.now.positions[source].map_or(0, |offset| offset as usize + 1);
        if executed < partition.committed || partition.committed == partition.records.len() {
            return Ok(());
        }
        partition.purgers[1] = Default::default();
        partition.purgers[1].next = partition.committed;
        self.pump(source, 1, 2).await
    }

    /// A call that was given up, or a zombie's, arrives.
    async fn redeliver(&mut self, source: usize) -> Checked {
        if let Some(group) = self.log[source].last.clone() {
            self.accept(source, &group).await?;
        }
        Ok(())
    }

    /// Returns what the shard knows, if there was a gap.
    async fn accept(&mut self, source: usize, group: &Group) -> Checked<Option<Option<i64>>> {
        let expected = self.now.accept(source, group.prev, &group.messages);
        let request = accept_group(self.store.mailbox.shard_of(&user_key(0)), source, group);
        let outcome = self.store.mailbox.accept(&[request]).await.remove(0).map_err(text)?;
        let (outcomes, expected) = match (outcome, expected) {
            (GroupOutcome::Done(outcomes), Ok(expected)) => (outcomes, expected),
            (GroupOutcome::Gap(at), Err(known)) if at.map(|at| at.offset) == known => {
                return Ok(Some(known));
            }
            (outcome, expected) => {
                return Err(format!("{outcome:?} where {expected:?} is right: {group:?}"));
            }
        };
        for ((message, outcome), expected) in group.messages.iter().zip(outcomes).zip(expected) {
            self.accepted(message.1, outcome, expected)?;
        }
        self.look().await?;
        Ok(None)
    }

    fn accepted(&mut self, user: usize, outcome: AcceptOutcome, expected: Expected) -> Checked {
        match (outcome, expected) {
            (
                AcceptOutcome::Accepted { seq, envelope, online, evicted },
                Expected::Accepted { seq: place, evicted: gone },
            ) if seq == Seq(place) && evicted as usize == gone.len() => {
                let routed = !self.seen[user].routes.is_empty();
                check!(online == routed, "online: {online}, routed: {routed}");
                if online {
                    self.pushes[user].push_back(envelope);
                }
                self.missed(user, &gone);
                Ok(())
            }
            (AcceptOutcome::AcceptedBefore, Expected::Before)
            | (AcceptOutcome::Duplicate, Expected::Duplicate) => Ok(()),
            (outcome, expected) => Err(format!("{outcome:?} where {expected:?} is right")),
        }
    }

    /// A push reaches the node: every session of the user, also those of a device that has left.
    async fn push(&mut self, user: usize, nth: usize) -> Checked {
        let Some(entry) = self.pushes[user].remove(nth) else { return Ok(()) };
        let numbers: Vec<u64> = self.sessions.iter().map(|session| session.number).collect();
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

    async fn connect(&mut self, client: usize, late: bool) -> Checked {
        self.look().await?;
        let state = &mut self.clients[client];
        if late && state.attempts == 0 {
            return Ok(());
        }
        // A call between two attempts that somebody gave up has the odd number.
        state.attempts += if late { 0 } else { 2 };
        let tried = state.attempts - u64::from(late);
        self.connections += 1;
        let number = self.connections;
        let request = ConnectRequest {
            user: user_key(user_of(client)),
            device: device_of(client),
            session: session_ref(number),
            attempt: attempt(tried),
            platform: "model".into(),
            position: state.position(),
        };
        let outcome = self.store.mailbox.connect(request).await.map_err(text)?;
        let ConnectOutcome::Connected { cursor, newest, replaced, .. } = outcome else {
            check!(late && outcome == ConnectOutcome::Superseded, "{outcome:?} on a connect");
            return Ok(());
        };
        if let Some(old) = replaced {
            let ours = self.clients[client].current == Some(old.connection.0);
            check!(!late || !ours, "a late connect replaced the live session");
        }
        self.now.routes[client] = Some(number);
        self.sessions.push(Session::new(client, number, tried, cursor, newest));
        if late {
            return Ok(()); // nobody listens
        }
        self.clients[client].current = Some(number);
        if self.clients[client].is_new() {
            self.begins(client, cursor.seq.0)?;
        }
        self.clients[client].welcome(cursor)
    }

    /// A session ends: it hands in what it owes, and its route goes if it is still its own.
    async fn close(&mut self, index: usize) -> Checked {
        if let Some(owed) = self.sessions[index].owed() {
            self.ack(index, owed).await?;
        }
        let session = self.sessions.remove(index);
        let request = DisconnectRequest {
            user: user_key(user_of(session.client)),
            device: device_of(session.client),
            session: session_ref(session.number),
        };
        self.store.mailbox.disconnect(request).await.map_err(text)?;
        let current = &mut self.clients[session.client].current;
        if *current == Some(session.number) {
            *current = None;
        }
        self.unrouted(session.client, session.number);
        Ok(())
    }

    /// A route goes if it is still this session's.
    fn unrouted(&mut self, client: usize, number: u64) {
        let route = &mut self.now.routes[client];
        *route = route.filter(|routed| *routed != number);
    }

    fn handle(&mut self, client: usize, count: usize) {
        let Some((generation, seq)) = self.clients[client].handle(count) else { return };
        if let Some(index) = self.find(client, false) {
            self.sessions[index].acknowledged(generation, seq);
        }
    }

    /// The fast path does what it can, up to the acks.
    async fn serve(&mut self, user: usize) -> Checked {
        while !self.pushes[user].is_empty() {
            self.push(user, 0).await?;
        }
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            self.exhaust(client).await?;
        }
        Ok(())
    }

    /// A client and its session go on until neither has anything to do.
    async fn exhaust(&mut self, client: usize) -> Checked {
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
    async fn turn(&mut self, index: usize) -> Checked<bool> {
        let session = &mut self.sessions[index];
        let number = session.number;
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
        let user = user_of(session.client);
        let request = AckRequest {
            user: user_key(user),
            device: device_of(session.client),
            session: session_ref(session.number),
            epoch: session.epoch,
            generation: session.generation,
            seq: Seq(owed.seq),
            chain: owed.chain,
        };
        let (client, number) = (session.client, session.number);
        self.acks.push((client, request.clone()));
        let outcome = self.store.mailbox.ack(request).await.map_err(text)?;
        self.look_after_ack(client, number).await?;
        let mut out = Vec::new();
        self.sessions[index].acked(outcome, &mut out);
        Ok(out)
    }

    /// Nobody waits for the answer any more.
    async fn ack_late(&mut self, nth: usize) -> Checked {
        let Some((client, request)) = self.acks.iter().rev().nth(nth).cloned() else {
            return Ok(());
        };
        let number = request.session.connection.0;
        self.store.mailbox.ack(request).await.map_err(text)?;
        self.look_after_ack(client, number).await
    }

    async fn read(&mut self, index: usize) -> Checked {
        let Session { client, number, at, epoch, .. } = self.sessions[index];
        let request = ReadRequest {
            user: user_key(user_of(client)),
            after: Seq(at.seq),
            entries_max: 3,
            bytes_max: 1 << 20,
        };
        let page = self.store.mailbox.read(request).await.map_err(text)?;
        let mailbox = &self.now.boxes[user_of(client)];
        let from = page.oldest.0.max(at.seq + 1);
        let expected = mailbox.between(from, (from + 3).min(mailbox.newest() + 1));
        let ids: Vec<_> = page.entries.iter().map(|e| crate::session::parse(e).1).collect();
        check!(ids == expected, "read {ids:?}, not {expected:?}");
        if page.epoch == epoch && self.clients[client].current == Some(number) {
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

    async fn confirm(&mut self, index: usize) -> Checked {
        let session = &self.sessions[index];
        let (number, client) = (session.number, session.client);
        let request = ConfirmRequest {
            user: user_key(user_of(client)),
            device: device_of(client),
            session: session_ref(number),
            attempt: attempt(session.attempt),
            platform: "model".into(),
            position: session.position(),
        };
        let outcome = self.store.mailbox.confirm(request).await.map_err(text)?;
        let refused = outcome == barid_mailbox::ConfirmOutcome::Superseded;
        let current = self.clients[client].current == Some(number);
        check!(!refused || !current, "the newest session of client {client} was superseded");
        if !refused {
            self.now.routes[client] = Some(number);
        }
        let mut out = Vec::new();
        self.sessions[index].confirmed(outcome, &mut out);
        self.tell(number, out).await
    }

    /// The delayer claims, and the node hears of it.
    async fn fire(&mut self, user: usize) -> Checked {
        self.store.make_due(&user_key(user)).await;
        let seen = self.store.mailbox.inspect(&user_key(user)).await.map_err(text)?;
        let behind = |device| seen.devices.iter().find(|state| state.device == device);
        let mut expected: Vec<_> = seen
            .routes
            .iter()
            .filter(|route| {
                behind(route.device.clone()).is_some_and(|d| d.cursor.seq < seen.newest)
            })
            .map(|route| (route.device.to_string(), route.session.connection.0))
            .collect();
        let retry = self.store.config.retry().map_err(|error| error.to_string())?;
        let shard = self.store.mailbox.shard_of(&user_key(user));
        let due = self.store.mailbox.fire(&[shard], 100, &retry).await.map_err(text)?;
        let devices = due.iter().flat_map(|due| &due.devices);
        let mut devices: Vec<_> =
            devices.map(|due| (due.device.to_string(), due.session.connection.0)).collect();
        devices.sort();
        expected.sort();
        check!(devices == expected, "fired for {devices:?}, not for {expected:?}");
        self.claims.extend(due);
        for (device, number) in devices {
            self.resend(user, &device, number).await?;
        }
        Ok(())
    }

    async fn resend(&mut self, user: usize, device: &str, number: u64) -> Checked {
        if let Some(index) = self.position(number) {
            self.sessions[index].resend();
            return Ok(());
        }
        let of = |client: &usize| user_of(*client) == user && device_of(*client).as_str() == device;
        let client = (0..CLIENTS).find(of).ok_or("a device of this test")?;
        let request = DisconnectRequest {
            user: user_key(user),
            device: device_of(client),
            session: session_ref(number),
        };
        self.unrouted(client, number);
        self.store.mailbox.disconnect(request).await.map_err(text)
    }

    /// The oldest claim is given back, however late.
    async fn defer(&mut self) -> Checked {
        if self.claims.is_empty() {
            return Ok(());
        }
        let claim = self.claims.remove(0);
        let request = DeferRequest {
            user: claim.user,
            claimed_score: claim.claimed_score,
            devices: claim.devices.into_iter().map(|due| due.device).collect(),
            delay_ms: 1_000,
        };
        let before = self.store.mailbox.inspect(&request.user).await.map_err(text)?;
        let ours = before.timer_due_ms == Some(request.claimed_score);
        self.store.mailbox.defer(std::slice::from_ref(&request)).await.map_err(text)?;
        let after = self.store.mailbox.inspect(&request.user).await.map_err(text)?;
        let same = format!("{:?}", before.devices) == format!("{:?}", after.devices);
        check!(ours || same, "a defer changed what it had not claimed: {before:?} {after:?}");
        Ok(())
    }

    async fn expire(&mut self, user: usize) {
        self.store.expire(&user_key(user)).await;
        let mailbox = std::mem::take(&mut self.now.boxes[user]);
        let ids: Vec<_> = mailbox.entries.into_iter().map(|entry| entry.id).collect();
        self.missed(user, &ids);
        self.expired.extend(ids);
    }

    async fn fail_over(&mut self) {
        self.store.fail_over().await;
        self.now = self.replica.clone();
        for partition in &mut self.log {
            partition.last = None;
        }
    }

    /// Everything that repairs runs until nothing is left to do, and then all must have been shown.
    pub async fn settle(&mut self) -> Checked {
        for client in 0..CLIENTS {
            while let Some(ghost) = self.find(client, true) {
                self.close(ghost).await?;
            }
        }
        self.look().await?;
        for _ in 0..ROUNDS {
            self.round().await?;
            if self.is_settled() {
                return self.all_was_shown();
            }
        }
        Err(format!("it does not settle: {:?} {:?}", self.seen, self.sessions))
    }

    async fn round(&mut self) -> Checked {
        for source in 0..2 {
            for _ in 0..=self.log[source].records.len() {
                self.pump(source, 0, 3).await?;
            }
        }
        for client in 0..CLIENTS {
            match self.find(client, false) {
                Some(index) => self.confirm(index).await?,
                None => self.connect(client, false).await?,
            }
        }
        self.pushes.iter_mut().for_each(|pushes| pushes.clear());
        self.look().await?;
        for user in 0..USERS {
            self.fire(user).await?;
        }
        for client in 0..CLIENTS {
            self.exhaust(client).await?;
        }
        self.look().await
    }

    fn is_settled(&self) -> bool {
        let online = self.clients.iter().all(|client| client.current.is_some());
        let kafka = (0..2).all(|source| {
            let executed = self.now.positions[source].map_or(0, |offset| offset as usize + 1);
            executed == self.log[source].records.len()
        });
        online
            && kafka
            && self.seen.iter().all(|seen| {
                let caught_up = |d: &barid_mailbox::DeviceState| d.cursor.seq == seen.newest;
                seen.timer_due_ms.is_none() && seen.devices.iter().all(caught_up)
            })
    }

    /// A client's session: the one that it is connected to, or one that it has left.
    fn find(&self, client: usize, ghost: bool) -> Option<usize> {
        let current = self.clients[client].current;
        self.sessions.iter().position(|session| {
            session.client == client && (current == Some(session.number)) != ghost
        })
    }

    fn position(&self, number: u64) -> Option<usize> {
        self.sessions.iter().position(|session| session.number == number)
    }
}
