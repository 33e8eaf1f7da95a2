//! Invariants.

use barid_core::Epoch;

use super::{CLIENTS, Checked, USERS, World, check, device_of, user_of};
use crate::mailboxes::{Due, Life, Mailbox, Timer};
use crate::session::parse;
use crate::store::Held;

impl World<'_> {
    /// Reads everything and compares it with the model.
    pub(super) async fn look(&mut self) -> Checked {
        let all = self.store.look().await;
        for (user, held) in all.into_iter().enumerate() {
            let since = self.held[user].now;
            let mailbox = &mut self.now.boxes[user];
            same_head(mailbox, &held)?;
            same_entries(mailbox, &held)?;
            same_routes(mailbox, &held)?;
            same_devices(mailbox, &held, since)?;
            same_timer(mailbox, &held)?;
            timers_are_right(mailbox)?;
            self.held[user] = held;
        }
        Ok(())
    }

    /// After an ack: every device that Redis knows has handled the trimmed entries.
    pub(super) fn left_behind(&mut self, user: usize, gone: &[String]) -> Checked {
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            let known = self.now.boxes[user].device(device_of(client)).is_some();
            let state = &mut self.clients[client];
            for id in gone.iter().filter(|id| !state.handled.contains(*id)) {
                let lost = known && !state.missed.contains(id);
                check!(!lost, "an ack trimmed {id}, which client {client} has not handled");
                state.missed.insert(id.clone());
            }
        }
        Ok(())
    }

    /// Ids that devices need not be shown any more.
    pub(super) fn missed(&mut self, user: usize, ids: &[String]) {
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            let state = &mut self.clients[client];
            let unseen = ids.iter().filter(|id| !state.handled.contains(*id)).cloned();
            state.missed.extend(unseen.collect::<Vec<_>>());
        }
    }

    /// A new device need not be shown older messages: it starts at the position of the others.
    pub(super) fn begins(&mut self, client: usize, cursor: u64) {
        let before = self.now.boxes[user_of(client)].between(1, cursor + 1);
        self.clients[client].missed.extend(before);
    }

    /// Whether positions may be skipped for a client.
    pub(super) fn may_skip(&self, client: usize, from: u64, to: u64) -> Checked {
        let state = &self.clients[client];
        let skipped = self.now.boxes[user_of(client)].between(from, to);
        let lost =
            skipped.iter().find(|id| !state.handled.contains(*id) && !state.missed.contains(*id));
        check!(lost.is_none(), "client {client} is told to skip {lost:?}, which was not evicted");
        Ok(())
    }

    /// Checks the end of a run.
    pub(super) fn all_was_shown(&self) -> Checked {
        for record in self.log.iter().flat_map(|partition| &partition.records) {
            let id = &record.id;
            let kept = self.now.boxes[record.user].entries.iter().any(|entry| entry.id == *id);
            let gone = self.expired.contains(id);
            check!(kept || gone, "{id} was committed and is in no mailbox");
        }
        for (index, client) in self.clients.iter().enumerate() {
            for entry in &self.now.boxes[user_of(index)].entries {
                let id = &entry.id;
                let fine = client.handled.contains(id) || client.missed.contains(id);
                check!(fine, "client {index} was never shown {id}, or never again");
            }
        }
        Ok(())
    }

    pub(super) fn is_settled(&self) -> bool {
        let online = self.clients.iter().all(|client| client.current.is_some());
        let kafka = (0..2).all(|source| {
            let executed = self.now.positions[source].map_or(0, |offset| offset as usize + 1);
            executed == self.log[source].records.len()
        });
        let caught_up = (0..USERS).all(|user| {
            let mailbox = &self.now.boxes[user];
            let behind = |client: usize| {
                let device = mailbox.device(device_of(client));
                device.is_none_or(|device| device.seq < mailbox.newest())
            };
            let ours = (0..CLIENTS).filter(|client| user_of(*client) == user);
            mailbox.timer == Timer::None && !ours.into_iter().any(behind)
        });
        online && kafka && caught_up
    }
}

fn same_head(mailbox: &mut Mailbox, held: &Held) -> Checked {
    let Some(state) = &held.state else {
        check!(mailbox.life == Life::None, "the mailbox is gone: {mailbox:?}");
        check!(held.expires == [None, None], "something of it is left: {held:?}");
        return Ok(());
    };
    let [epoch, oldest, before, newest, last, expires, _, lowest_key, known, ..] = state[..] else {
        return Err(format!("the head's state is {state:?}"));
    };
    let epoch = Epoch(epoch);
    match mailbox.life {
        Life::None => return Err(format!("a mailbox where there is none: {held:?}")),
        Life::New => mailbox.life = Life::Known(epoch),
        Life::Known(ours) => check!(ours == epoch, "another epoch: {mailbox:?} {held:?}"),
    }
    let chain = |seq| mailbox.chain_at(seq).map(|chain| u64::from(chain.0));
    check!(newest == mailbox.newest(), "another newest: {mailbox:?} {held:?}");
    check!(oldest == mailbox.oldest, "another oldest: {mailbox:?} {held:?}");
    check!(held.keeps_all == mailbox.keeps_all, "keeps all, or not: {mailbox:?} {held:?}");
    let chains = [chain(oldest - 1), chain(newest)];
    check!(chains == [Some(before), Some(last)], "other chains: {mailbox:?} {held:?}");
    check!(known as usize == held.devices.len(), "not so many devices: {held:?}");
    let (kept, left): (Vec<_>, Vec<_>) = held.keys.iter().partition(|(_, seq)| **seq >= oldest);
    let expected: Vec<_> = mailbox.keys.iter().collect();
    check!(kept == expected, "other collapse keys: {mailbox:?} {held:?}");
    let few = left.iter().all(|(_, seq)| oldest <= newest && **seq + 64 > oldest);
    check!(few, "collapse keys of entries that are long gone: {mailbox:?} {held:?}");
    let bound = held.keys.values().all(|seq| lowest_key != 0 && lowest_key <= *seq);
    check!(bound, "a collapse key below the lowest: {held:?}");
    let together = [Some(expires), held.expires[1].map(|_| expires)];
    check!(held.expires == together, "head and queue expire apart: {held:?}");
    Ok(())
}

fn same_entries(mailbox: &Mailbox, held: &Held) -> Checked {
    let ids: Vec<_> = held.entries.iter().map(|entry| parse(entry).1).collect();
    let expected = mailbox.contents(mailbox.oldest, mailbox.newest() + 1);
    check!(ids == expected, "other entries: {ids:?}, not {expected:?}");
    for (entry, seq) in held.entries.iter().zip(mailbox.oldest..) {
        let header = parse(entry).0;
        let right = Life::Known(header.epoch) == mailbox.life
            && header.seq.0 == seq
            && Some(header.prev_chain) == mailbox.chain_at(seq - 1)
            && Some(header.chain) == mailbox.chain_at(seq);
        check!(right, "the entry at {seq} has the header {header:?}");
    }
    let Some([.., bytes_before, bytes_after]) = held.state.as_deref() else { return Ok(()) };
    let mut bytes = *bytes_before;
    for (index, (entry, after)) in held.entries.iter().zip(&held.bytes).enumerate() {
        let voided = ids[index].is_empty();
        let right = bytes + entry.len() as u64 == *after || voided && bytes < *after;
        check!(right, "bytes of entry {index}: {:?}", held.bytes);
        bytes = *after;
    }
    check!(bytes == *bytes_after, "bytes of all entries: {:?}", held.state);
    Ok(())
}

fn same_routes(mailbox: &Mailbox, held: &Held) -> Checked {
    let text = |(name, route): (&&str, &crate::mailboxes::Route)| {
        let (number, attempt) = (route.number, route.attempt);
        (name.to_string(), format!("node-1 {} {number} {attempt} model", route.incarnation))
    };
    let expected: Vec<_> = mailbox.routes.iter().map(text).collect();
    let routes: Vec<_> = held.routes.clone().into_iter().collect();
    check!(routes == expected, "other routes: {routes:?}, not {expected:?}");
    let expire = routes.is_empty() || held.routes_expire.is_some();
    check!(expire, "routes that never expire: {held:?}");
    Ok(())
}

/// Replaces times that the last call set, which are known to be between before it and now, by the exact ones.
fn same_devices(mailbox: &mut Mailbox, held: &Held, since: u64) -> Checked {
    let place = |name: &str| held.devices.iter().position(|device| device.name == name);
    mailbox.devices.sort_by_key(|device| place(device.name));
    let names = |held: &Held| held.devices.iter().map(|d| d.name.clone()).collect::<Vec<_>>();
    let ours: Vec<_> = mailbox.devices.iter().map(|device| device.name.to_owned()).collect();
    check!(ours == names(held), "other devices: {held:?}, not {ours:?}");
    for index in 0..mailbox.devices.len() {
        let (device, seen) = (&mailbox.devices[index], &held.devices[index]);
        let chain = mailbox.kept_chain_at(device.seq).map(|chain| u64::from(chain.0));
        let same = seen.seq == device.seq
            && chain.is_none_or(|chain| chain == seen.chain)
            && seen.generation == u64::from(device.generation)
            && seen.resends == u64::from(device.resends)
            && seen.fence == device.fence
            && seen.defers == u64::from(device.defers);
        let due = match device.due {
            Due::Never => seen.due == 0,
            Due::At(time) => seen.due == time,
            Due::In(wait) => (since + wait..=held.now + wait).contains(&seen.due),
            Due::Sooner(time, wait) => {
                (time.min(since + wait)..=time.min(held.now + wait)).contains(&seen.due)
            }
        };
        let used = match device.used {
            Some(time) => seen.used == time,
            None => (since..=held.now).contains(&seen.used),
        };
        check!(same && due && used, "another device: {seen:?}, not {device:?}, since {since}");
        let device = &mut mailbox.devices[index];
        device.due = if seen.due == 0 { Due::Never } else { Due::At(seen.due) };
        device.used = Some(seen.used);
    }
    Ok(())
}

fn same_timer(mailbox: &mut Mailbox, held: &Held) -> Checked {
    let armed = || held.devices.iter().filter(|device| device.due > 0);
    let mut earliest = armed().map(|device| device.due).min();
    // A route that expired leaves its device armed. Accept sets the timer by those with a route.
    let routed = armed().filter(|device| held.routes.contains_key(&device.name));
    let of_routed = routed.map(|device| device.due).min();
    if of_routed.is_some() && held.timer == of_routed {
        earliest = of_routed;
    }
    let expected = match mailbox.timer {
        Timer::None => None,
        Timer::At(time) => Some(time),
        Timer::Earliest => earliest,
    };
    check!(held.timer == expected, "another timer, not {expected:?}: {held:?}");
    mailbox.timer = held.timer.map_or(Timer::None, Timer::At);
    Ok(())
}

/// Exactly the devices that have a route and are behind have a retry. This checks the model itself.
fn timers_are_right(mailbox: &Mailbox) -> Checked {
    for device in &mailbox.devices {
        let waits = mailbox.routes.contains_key(device.name) && device.seq < mailbox.newest();
        let lost = mailbox.unrouted.contains(device.name) && !waits;
        check!(
            (device.due != Due::Never) == waits || lost,
            "due, or not, without cause: {mailbox:?}"
        );
        let in_time = match (device.due, mailbox.timer) {
            (Due::At(due), Timer::At(timer)) => timer <= due,
            (due, _) => due == Due::Never,
        };
        check!(in_time || lost, "the user's timer is later than a device's: {mailbox:?}");
    }
    Ok(())
}
