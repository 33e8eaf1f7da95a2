//! Calls each script, and compares its answer and the content of Redis with the model.

use barid_core::{Position, Seq};
use barid_mailbox::{
    AcceptOutcome, AckOutcome, AckRequest, ConfirmOutcome, ConfirmRequest, ConnectOutcome,
    ConnectRequest, DeferRequest, DeferWaits, DisconnectRequest, DueUser, GroupOutcome, Page,
    ReadRequest, Unreached, UserKey,
};
use barid_session::ReadFrom;

use super::{Checked, USERS, World, accept_group, check, device_id, text, user_key};
use crate::mailboxes::{Acked, Connected, DEFER_BASE, DEFER_FULL, Expected, Hello, Life, Place};
use crate::purger::Group;

impl World<'_> {
    /// Returns the position that the shard knows if there was a gap.
    pub(super) async fn accept(
        &mut self,
        source: usize,
        group: &Group,
    ) -> Checked<Option<Option<i64>>> {
        let online = |user: usize| !self.now.boxes[user].routes.is_empty();
        let online: Vec<bool> = (0..USERS).map(online).collect();
        let expected = self.now.accept(source, group.prev, &group.messages, self.clock);
        let request = accept_group(self.store.mailbox.shard_of(&user_key(0)), source, group);
        let outcome = self.store.mailbox.accept(&[request]).await.remove(0).map_err(text)?;
        let (outcomes, expected) = match (outcome, expected) {
            (GroupOutcome::Done(outcomes), Ok(expected)) => (outcomes, expected),
            (GroupOutcome::Gap(at), Err(known)) if at.map(|at| at.offset) == known => {
                self.look().await?;
                return Ok(Some(known));
            }
            (outcome, expected) => {
                return Err(format!("{outcome:?} where {expected:?} is right: {group:?}"));
            }
        };
        let mut evicted = [(0, 0); USERS];
        for ((message, outcome), expected) in group.messages.iter().zip(outcomes).zip(expected) {
            let user = message.1.user;
            let (told, gone) = self.accepted(user, online[user], outcome, expected)?;
            evicted[user].0 += told;
            evicted[user].1 += gone;
        }
        let right = evicted.iter().all(|(told, gone)| told == gone);
        check!(right, "evicted, as told and expected for each user: {evicted:?}");
        self.look().await?;
        Ok(None)
    }

    /// Returns the number of evictions that the answer reports, with any message of the user, and the expected number.
    fn accepted(
        &mut self,
        user: usize,
        routed: bool,
        outcome: AcceptOutcome,
        expected: Expected,
    ) -> Checked<(usize, usize)> {
        match (outcome, expected) {
            (
                AcceptOutcome::Accepted { seq, envelope, online, evicted, .. },
                Expected::Accepted { seq: place, evicted: gone, voided },
            ) if seq == Seq(place) => {
                check!(online == routed, "online: {online}, routed: {routed}");
                if online {
                    self.pushes[user].push_back(envelope);
                }
                self.missed(user, &gone);
                self.missed(user, voided.as_slice());
                Ok((evicted as usize, gone.len()))
            }
            (AcceptOutcome::AcceptedBefore, Expected::Before)
            | (AcceptOutcome::Duplicate, Expected::Duplicate) => Ok((0, 0)),
            (outcome, expected) => Err(format!("{outcome:?} where {expected:?} is right")),
        }
    }

    pub(super) async fn call_connect(
        &mut self,
        user: usize,
        hello: Hello,
        request: ConnectRequest,
    ) -> Checked<ConnectOutcome> {
        let expected = self.now.boxes[user].connect(&hello, self.clock);
        let outcome = self.store.mailbox.connect(request).await.map_err(text)?;
        self.look().await?;
        let answer = match &outcome {
            ConnectOutcome::Superseded { .. } => Connected::Superseded,
            ConnectOutcome::TooManyDevices => Connected::TooMany,
            ConnectOutcome::Connected { cursor, newest, replaced, reset, .. } => {
                self.is_of(user, cursor)?;
                check!(newest.0 == self.now.boxes[user].newest(), "another newest: {outcome:?}");
                check!(cursor.chain.is_some(), "a cursor without a chain: {outcome:?}");
                Connected::At {
                    seq: cursor.seq.0,
                    chain: self.kept_chain(user, cursor),
                    generation: cursor.generation.0,
                    reset: *reset,
                    replaced: replaced.as_ref().map(|session| session.connection.0),
                }
            }
            ConnectOutcome::TooLate | ConnectOutcome::NotCreated => return Err("too late".into()),
        };
        check!(answer == expected, "{answer:?} where {expected:?} is right: {hello:?}");
        Ok(outcome)
    }

    pub(super) async fn call_confirm(
        &mut self,
        user: usize,
        hello: Hello,
        request: ConfirmRequest,
    ) -> Checked<ConfirmOutcome> {
        let expected = self.now.boxes[user].confirm(&hello, self.clock);
        let outcome = self.store.mailbox.confirm(request).await.map_err(text)?;
        self.look().await?;
        let mailbox = &self.now.boxes[user];
        let answer = match outcome {
            ConfirmOutcome::Superseded => None,
            ConfirmOutcome::Confirmed { restored, epoch, newest } => {
                let right = (Life::Known(epoch), newest.0) == (mailbox.life, mailbox.newest());
                check!(right, "{outcome:?} of {mailbox:?}");
                Some(restored)
            }
        };
        check!(answer == expected, "{answer:?} where {expected:?} is right: {hello:?}");
        Ok(outcome)
    }

    pub(super) async fn call_ack(
        &mut self,
        name: &'static str,
        request: AckRequest,
    ) -> Checked<AckOutcome> {
        let user = index(&request.user)?;
        let place = Place {
            epoch: request.epoch.0,
            generation: request.generation.0,
            seq: request.seq.0,
            chain: Some(request.chain),
        };
        let route = (request.session.connection.0, request.session.incarnation.0);
        let mailbox = &mut self.now.boxes[user];
        let oldest = mailbox.oldest;
        let expected = mailbox.ack(name, route, place, self.clock);
        let gone = mailbox.between(oldest, mailbox.oldest);
        let outcome = self.store.mailbox.ack(request).await.map_err(text)?;
        self.look().await?;
        let answer = match outcome {
            AckOutcome::Stale => Acked::Stale,
            AckOutcome::Advanced { cursor } => Acked::Advanced(cursor.0),
            AckOutcome::Reset { cursor } => {
                self.is_of(user, &cursor)?;
                check!(cursor.chain.is_some(), "a cursor without a chain: {outcome:?}");
                let chain = self.kept_chain(user, &cursor);
                Acked::Reset { generation: cursor.generation.0, seq: cursor.seq.0, chain }
            }
        };
        check!(answer == expected, "{answer:?} where {expected:?} is right: {place:?}");
        self.left_behind(user, &gone)?;
        Ok(outcome)
    }

    /// The route is removed if it is still this session's.
    pub(super) async fn call_disconnect(
        &mut self,
        name: &'static str,
        request: DisconnectRequest,
    ) -> Checked {
        let route = (request.session.connection.0, request.session.incarnation.0);
        self.now.boxes[index(&request.user)?].disconnect(name, route);
        self.store.mailbox.disconnect(request).await.map_err(text)?;
        self.look().await
    }

    /// A page after a position.
    pub(super) async fn call_read(
        &mut self,
        user: usize,
        device: &str,
        read: ReadFrom,
    ) -> Checked<Page> {
        let (after, entries) = (read.after.0, u64::from(read.entries_max));
        let request = ReadRequest {
            user: user_key(user),
            after: read.after,
            entries_max: read.entries_max,
            bytes_max: read.bytes_max,
            device: Some(device_id(device)),
        };
        let page = self.store.mailbox.read(request).await.map_err(text)?;
        let mailbox = &self.now.boxes[user];
        let epoch = match mailbox.life {
            Life::Known(epoch) => epoch.0,
            _ => 0,
        };
        let place = (page.epoch.0, page.oldest.0, page.newest.0);
        let expected = (epoch, mailbox.oldest, mailbox.newest());
        check!(place == expected, "read {page:?} of {mailbox:?}");
        let before = mailbox.chain_at(mailbox.oldest - 1);
        check!(Some(page.chain_before_oldest) == before, "read {page:?} of {mailbox:?}");
        let from = mailbox.oldest.max(after + 1);
        let expected = mailbox.contents(from, (from + entries).min(mailbox.newest() + 1));
        let ids: Vec<_> = page.entries.iter().map(|e| crate::session::parse(e).1).collect();
        check!(ids == expected, "read {ids:?}, not {expected:?}");
        let known = mailbox.device(device).filter(|_| after + 1 < mailbox.oldest);
        let expected =
            known.map(|device| (device.seq, device.generation, mailbox.kept_chain_at(device.seq)));
        let cursor = page
            .cursor
            .as_ref()
            .map(|cursor| (cursor.seq.0, cursor.generation.0, self.kept_chain(user, cursor)));
        check!(cursor == expected, "read a cursor {cursor:?}, not {expected:?}");
        Ok(page)
    }

    /// The retries of a user's devices are due, or only that of one.
    pub(super) async fn call_fire(
        &mut self,
        user: usize,
        only: Option<&str>,
    ) -> Checked<Vec<DueUser>> {
        self.store.make_due(&user_key(user), only).await;
        self.now.boxes[user].make_due(only);
        let expected = self.now.boxes[user].fire();
        let retry = self.store.config.retry().map_err(|error| error.to_string())?;
        let shard = self.store.mailbox.shard_of(&user_key(user));
        let due = self.store.mailbox.fire(&[shard], 100, &retry).await.map_err(text)?;
        self.look().await?;
        let devices = due.iter().flat_map(|due| &due.devices);
        let devices: Vec<_> = devices
            .map(|due| (due.device.as_str(), due.session.connection.0, due.resends))
            .collect();
        check!(devices == expected, "fired for {devices:?}, not for {expected:?}");
        for claim in &due {
            let timer = self.held[user].timer;
            check!(timer == Some(claim.claimed_score), "claimed {claim:?}, armed for {timer:?}");
        }
        Ok(due)
    }

    pub(super) async fn call_defer(&mut self, claim: DueUser, why: Unreached) -> Checked {
        let names: Vec<String> =
            claim.devices.iter().map(|due| due.device.as_str().to_owned()).collect();
        let mailbox = &mut self.now.boxes[index(&claim.user)?];
        mailbox.defer(claim.claimed_score, &names, why);
        let request = DeferRequest {
            user: claim.user,
            claimed_score: claim.claimed_score,
            devices: claim.devices.into_iter().map(|due| (due.device, why)).collect(),
        };
        let waits = DeferWaits { base_ms: DEFER_BASE as u32, full_ms: DEFER_FULL as u32 };
        let retry = self.store.config.retry().map_err(|error| error.to_string())?;
        self.store.mailbox.defer(&[request], waits, &retry).await.map_err(text)?;
        self.look().await
    }

    /// A cursor's chain, if the mailbox still has it.
    fn kept_chain(&self, user: usize, cursor: &Position) -> Option<barid_core::Chain> {
        cursor.chain.filter(|_| cursor.seq.0 + 1 >= self.now.boxes[user].oldest)
    }

    fn is_of(&self, user: usize, cursor: &Position) -> Checked {
        let life = self.now.boxes[user].life;
        check!(Life::Known(cursor.epoch) == life, "{cursor:?} of a mailbox that is {life:?}");
        Ok(())
    }
}

fn index(user: &UserKey) -> Checked<usize> {
    (0..USERS).find(|index| user_key(*index) == *user).ok_or_else(|| format!("nobody: {user:?}"))
}

pub(super) fn position(place: Place) -> Position {
    Position {
        epoch: barid_core::Epoch(place.epoch),
        generation: barid_core::Generation(place.generation),
        seq: Seq(place.seq),
        chain: place.chain,
    }
}

pub(super) fn place(position: Position) -> Place {
    Place {
        epoch: position.epoch.0,
        generation: position.generation.0,
        seq: position.seq.0,
        chain: position.chain,
    }
}
