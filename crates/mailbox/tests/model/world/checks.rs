//! What must hold whatever happened.

use barid_mailbox::Inspection;

use super::{
    CLIENTS, Checked, USERS, World, check, device_of, session_ref, text, user_key, user_of,
};
use crate::session::parse;

impl World<'_> {
    /// Looks at everything and compares.
    pub(super) async fn look(&mut self) -> Checked {
        for user in 0..USERS {
            let seen = self.store.mailbox.inspect(&user_key(user)).await.map_err(text)?;
            self.entries_are_as_accepted(user, &seen)?;
            timers_are_right(&seen)?;
            self.routes_are_as_written(user, &seen)?;
            self.seen[user] = seen;
        }
        Ok(())
    }

    fn entries_are_as_accepted(&mut self, user: usize, seen: &Inspection) -> Checked {
        let mailbox = &mut self.now.boxes[user];
        if seen.epoch.0 == 0 {
            check!(mailbox.epoch.is_none(), "the mailbox is gone: {mailbox:?}");
            return Ok(());
        }
        let epoch = *mailbox.epoch.get_or_insert(seen.epoch);
        check!(epoch == seen.epoch, "another epoch: {mailbox:?} {seen:?}");
        check!(seen.newest.0 == mailbox.newest(), "another newest: {mailbox:?} {seen:?}");
        check!(seen.oldest.0 == mailbox.oldest, "another oldest: {mailbox:?} {seen:?}");
        let ids: Vec<_> = seen.entries.iter().map(|entry| parse(entry).1).collect();
        let expected = mailbox.between(mailbox.oldest, mailbox.newest() + 1);
        check!(ids == expected, "other entries: {ids:?}, not {expected:?}");
        for (entry, seq) in seen.entries.iter().zip(mailbox.oldest..) {
            let header = parse(entry).0;
            let chain = mailbox.entries[seq as usize - 1].chain;
            let right = (header.epoch, header.seq.0, header.chain) == (epoch, seq, chain);
            check!(right, "the entry at {seq} has the header {header:?}");
        }
        Ok(())
    }

    fn routes_are_as_written(&self, user: usize, seen: &Inspection) -> Checked {
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            let route = seen.routes.iter().find(|route| route.device == device_of(client));
            let route = route.map(|route| route.session.connection.0);
            let expected = self.now.routes[client];
            check!(route == expected, "client {client} has route {route:?}, not {expected:?}");
        }
        Ok(())
    }

    /// After an ack of a session: what left was shown to every device that Redis knows.
    pub(super) async fn look_after_ack(&mut self, client: usize, number: u64) -> Checked {
        let user = user_of(client);
        let seen = self.store.mailbox.inspect(&user_key(user)).await.map_err(text)?;
        progress_starts_over(client, number, &self.seen[user], &seen)?;
        let mailbox = &mut self.now.boxes[user];
        check!(seen.oldest.0 >= mailbox.oldest, "the oldest entry went back");
        let gone = mailbox.leave(seen.oldest.0);
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            let known = seen.devices.iter().any(|state| state.device == device_of(client));
            let state = &mut self.clients[client];
            for id in gone.iter().filter(|id| !state.shown.contains(*id)) {
                let lost = known && !state.missed.contains(id);
                check!(!lost, "an ack trimmed {id}, which client {client} was not shown");
                state.missed.insert(id.clone());
            }
        }
        self.look().await
    }

    /// Ids that devices need not be shown any more.
    pub(super) fn missed(&mut self, user: usize, ids: &[String]) {
        for client in (0..CLIENTS).filter(|client| user_of(*client) == user) {
            let state = &mut self.clients[client];
            let unseen = ids.iter().filter(|id| !state.shown.contains(*id)).cloned();
            state.missed.extend(unseen.collect::<Vec<_>>());
        }
    }

    /// What was there before a device is not owed to it: it starts where the others are.
    pub(super) fn begins(&mut self, client: usize, cursor: u64) -> Checked {
        let mailbox = &self.now.boxes[user_of(client)];
        let seen = &self.seen[user_of(client)];
        if !seen.devices.iter().any(|state| state.device == device_of(client)) {
            let furthest = seen.devices.iter().map(|state| state.cursor.seq.0).max();
            let start = furthest.unwrap_or(0).max(mailbox.oldest - 1);
            check!(cursor == start, "a new device starts at {cursor}, not at {start}");
        }
        let before = mailbox.between(1, cursor + 1);
        self.clients[client].missed.extend(before);
        Ok(())
    }

    /// Whether client may be told that there is nothing from one position to before another.
    pub(super) fn may_skip(&self, client: usize, from: u64, to: u64) -> Checked {
        let state = &self.clients[client];
        let skipped = self.now.boxes[user_of(client)].between(from, to);
        let lost =
            skipped.iter().find(|id| !state.shown.contains(*id) && !state.missed.contains(*id));
        check!(lost.is_none(), "client {client} is told to skip {lost:?}, which was not evicted");
        Ok(())
    }

    /// Once everything has settled.
    pub(super) fn all_was_shown(&self) -> Checked {
        for partition in &self.log {
            for (user, id) in &partition.records {
                let kept = self.now.boxes[*user].entries.iter().any(|entry| entry.id == *id);
                let gone = self.expired.contains(id);
                check!(kept || gone, "{id} was committed and is in no mailbox");
            }
        }
        for (index, client) in self.clients.iter().enumerate() {
            for entry in &self.now.boxes[user_of(index)].entries {
                let id = &entry.id;
                let fine = client.shown.contains(id) || client.missed.contains(id);
                check!(fine, "client {index} was never shown {id}");
            }
        }
        Ok(())
    }
}

/// Who has a route and is behind is re-sent to; nobody else is.
fn timers_are_right(seen: &Inspection) -> Checked {
    if seen.epoch.0 == 0 {
        return Ok(());
    }
    for state in &seen.devices {
        let routed = seen.routes.iter().any(|route| route.device == state.device);
        let behind = state.cursor.seq < seen.newest;
        check!((state.due_ms > 0) == (routed && behind), "due, or not, without cause: {seen:?}");
        let in_time = state.due_ms == 0 || seen.timer_due_ms.is_some_and(|due| due <= state.due_ms);
        check!(in_time, "the user's timer is later than a device's: {seen:?}");
    }
    for route in &seen.routes {
        let known = seen.devices.iter().any(|state| state.device == route.device);
        check!(known || seen.newest.0 == 0, "a route of an unknown device: {seen:?}");
    }
    Ok(())
}

/// A cursor never goes back, and a device that gets on is not counted against: its retries begin
/// again.
fn progress_starts_over(
    client: usize,
    number: u64,
    before: &Inspection,
    after: &Inspection,
) -> Checked {
    let (device, here) = (device_of(client), session_ref(number));
    let routed = after.routes.iter().any(|r| r.device == device && r.session == here);
    let state = |seen: &Inspection| seen.devices.iter().find(|d| d.device == device).cloned();
    let (Some(before), Some(now)) = (state(before), state(after)) else { return Ok(()) };
    let (old, new) = (before.cursor, now.cursor);
    if (old.epoch, old.generation) != (new.epoch, new.generation) {
        return Ok(());
    }
    check!(new.seq >= old.seq, "an ack moved a cursor back: {before:?} {now:?}");
    let fresh = now.attempt == 0 && (now.due_ms == 0 || now.due_ms > after.now_ms);
    check!(!routed || new.seq == old.seq || fresh, "progress, and the retries go on: {now:?}");
    Ok(())
}
