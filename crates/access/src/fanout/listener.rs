//! The audiences that one session reads: everyone of its app, and the groups that it is subscribed to.

use std::sync::Arc;

use barid_core::limits::EVERYONE;
use barid_core::{AppId, Audience, CloseCode, GroupId, Position, Seq};
use barid_mailbox::Page;
use barid_wire::envelope::Envelope;
use barid_wire::frames::Format;
use tokio::time::Instant;

use crate::fanout::audience::{Begun, Member, Read};
use crate::fanout::catching::Catching;
use crate::fanout::hub::Fanout;
use crate::fanout::place::Point;
use crate::handle::Handle;

/// A session's memberships.
#[derive(Debug)]
pub struct Listener {
    everyone: Member,
    /// Of a session whose token lists groups, or whose Hello names positions of audiences.
    groups: Option<Box<Groups>>,
}

#[derive(Debug, Default)]
struct Groups {
    allowed: Vec<GroupId>,
    subscribed: Vec<Subscription>,
    /// Positions that Hello names, of audiences that are not subscribed to yet.
    positions: Vec<(Audience, Position)>,
    /// Audiences whose mailboxes the session reads, because it is behind their logs.
    catching: Vec<Catching>,
    /// Whether Hello names a position of everyone, and whether the device has not been told where it begins.
    follows_everyone: bool,
    everyone_unconfirmed: bool,
    /// The device was sent everything up to here; `None`: it has not been told where it begins.
    everyone_at: Option<Point>,
    /// Index of the audience to read first; 0 is everyone.
    turn: usize,
}

#[derive(Debug)]
struct Subscription {
    group: GroupId,
    member: Member,
    /// The device has been told.
    confirmed: bool,
    /// The device was sent everything up to here; `None`: it has not been told where it begins.
    at: Option<Point>,
}

/// A page to read for a device.
#[derive(Debug)]
pub struct Wanted {
    /// The audience.
    pub audience: Audience,
    /// The seq before the first entry wanted.
    pub after: Seq,
    /// Since when it must have been asked for; `None`: any page serves.
    pub not_before: Option<Instant>,
}

/// Why a session may not subscribe to a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The token does not list the group.
    NotListed,
    /// The session has as many subscriptions as it may have.
    TooMany,
}

impl Refused {
    /// The code and the text of the `unsubscribed` frame.
    pub fn reply(self) -> (CloseCode, &'static str) {
        match self {
            Self::NotListed => (CloseCode::BadToken, "the token does not list this group"),
            Self::TooMany => (CloseCode::Limit, "the session has too many subscriptions"),
        }
    }
}

impl Listener {
    /// Joins a new session to its app's audience. `allowed` are the groups that its token lists, `positions` those that
    /// its Hello names.
    pub fn new(
        fanout: &Fanout,
        handle: &Arc<Handle>,
        allowed: Vec<GroupId>,
        positions: Vec<(Audience, Position)>,
    ) -> Self {
        let mut listener = Self { everyone: fanout.join(handle), groups: None };
        listener.set_allowed(allowed);
        if !positions.is_empty() {
            let groups = listener.groups.get_or_insert_default();
            groups.positions = positions;
            groups.follows_everyone = groups.resume(Audience::Everyone);
            groups.everyone_unconfirmed = groups.follows_everyone;
        }
        listener
    }

    fn set_allowed(&mut self, allowed: Vec<GroupId>) {
        if self.groups.is_some() || !allowed.is_empty() {
            self.groups.get_or_insert_default().allowed = allowed;
        }
    }

    /// Subscribes to a group; at most `groups_max` at once. The device is told once the node receives the group's
    /// messages ([`Self::confirmed`]), and a repeated subscription only has it told again.
    ///
    /// # Errors
    /// The token does not list the group, or the session has too many subscriptions.
    pub fn subscribe(
        &mut self,
        fanout: &Fanout,
        handle: &Arc<Handle>,
        group: &GroupId,
        groups_max: usize,
    ) -> Result<(), Refused> {
        let groups = self.groups.as_mut().ok_or(Refused::NotListed)?;
        if !groups.allowed.contains(group) {
            return Err(Refused::NotListed);
        }
        if let Some(known) = groups.subscribed.iter_mut().find(|known| known.group == *group) {
            known.confirmed = false;
            return Ok(());
        }
        if groups.subscribed.len() >= groups_max {
            return Err(Refused::TooMany);
        }
        groups.resume(Audience::Group(group.clone()));
        let (group, member) = (group.clone(), fanout.subscribe(handle, group));
        groups.subscribed.push(Subscription { group, member, confirmed: false, at: None });
        Ok(())
    }

    /// A subscription that has begun and that the device has not been told of.
    pub fn confirmed(&mut self) -> Option<Begun> {
        let Self { everyone, groups } = self;
        let groups = groups.as_mut()?;
        let (audience, member, at) = if groups.everyone_unconfirmed && everyone.is_live() {
            groups.everyone_unconfirmed = false;
            (Audience::Everyone, &*everyone, &mut groups.everyone_at)
        } else {
            let begun = |known: &&mut Subscription| !known.confirmed && known.member.is_live();
            let subscription = groups.subscribed.iter_mut().find(begun)?;
            subscription.confirmed = true;
            let Subscription { group, member, at, .. } = subscription;
            (Audience::Group(group.clone()), &*member, at)
        };
        let catching = groups.catching.iter().find(|catching| catching.audience == audience);
        let position = catching
            .map_or_else(|| (*at.get_or_insert_with(|| member.point())).into(), Catching::position);
        Some(Begun { audience, position })
    }

    /// Has the session read the logs that it has reached, and returns whether there were any; and a mailbox to read for
    /// the device, if none is being read: the seq before the first entry wanted, and since when the page must have been
    /// asked for.
    pub fn catch_up(&mut self) -> (bool, Option<Wanted>) {
        let Self { everyone, groups: Some(groups) } = self else { return (false, None) };
        let Groups { subscribed, catching, everyone_at, .. } = &mut **groups;
        let (mut reached, mut wanted) = (false, None);
        let mut is_reading = catching.iter().any(Catching::is_reading);
        catching.retain_mut(|catching| {
            let member = match &catching.audience {
                Audience::Everyone => Some((&mut *everyone, &mut *everyone_at)),
                Audience::Group(group) => {
                    let known = subscribed.iter_mut().find(|known| known.group == *group);
                    known.map(|known| (&mut known.member, &mut known.at))
                }
            };
            let Some((member, at)) = member else { return false };
            if !member.is_live() {
                return true;
            }
            if let Some(point) = catching.point().filter(|point| member.enter(*point)) {
                *at = Some(point);
                reached = true;
                return false;
            }
            if !is_reading && let Some((after, not_before)) = catching.read_after() {
                is_reading = true;
                wanted = Some(Wanted { audience: catching.audience.clone(), after, not_before });
            }
            true
        });
        (reached, wanted)
    }

    /// A page was read for the device. Returns the entries to send, and the position if it starts anew.
    pub fn page(
        &mut self,
        audience: &Audience,
        after: Seq,
        page: &Page,
        now_ms: u64,
    ) -> (Vec<Envelope>, Option<Begun>) {
        let Some(catching) = self.catching(audience) else { return (Vec::new(), None) };
        let found = catching.page(after, page, now_ms);
        let begun = || {
            let start = Point::before(page.epoch, page.oldest, page.chain_before_oldest);
            Begun { audience: audience.clone(), position: start.into() }
        };
        let reset = found.reset.then(begun);
        (found.entries, reset)
    }

    /// The node has heard of messages: sessions that wait for some look again.
    pub fn resume(&mut self) {
        if let Some(groups) = &mut self.groups {
            groups.catching.iter_mut().for_each(Catching::resume);
        }
    }

    fn catching(&mut self, audience: &Audience) -> Option<&mut Catching> {
        let groups = self.groups.as_mut()?;
        groups.catching.iter_mut().find(|catching| catching.audience == *audience)
    }

    /// Ends the subscription to a group, if there is one.
    pub fn unsubscribe(&mut self, fanout: &Fanout, app: &AppId, group: &GroupId) {
        let Some(groups) = &mut self.groups else { return };
        let at = groups.subscribed.iter().position(|known| known.group == *group);
        let Some(at) = at else { return };
        let subscription = groups.subscribed.swap_remove(at);
        groups.forget(group);
        fanout.unsubscribe(app, group, &subscription.member);
    }

    /// Replaces the groups of the token. Returns the groups whose subscription this ended.
    pub fn allow(&mut self, fanout: &Fanout, app: &AppId, allowed: Vec<GroupId>) -> Vec<GroupId> {
        self.set_allowed(allowed);
        let Some(groups) = &mut self.groups else { return Vec::new() };
        let names = groups.subscribed.iter().map(|known| &known.group);
        let ended: Vec<_> = names.filter(|name| !groups.allowed.contains(name)).cloned().collect();
        for group in &ended {
            self.unsubscribe(fanout, app, group);
        }
        ended
    }

    /// Reads the next run of messages, from each audience in turn.
    pub fn read(&mut self, format: Format) -> Read {
        let Some(groups) = &mut self.groups else {
            let mut read = self.everyone.read(format);
            if read.restart.is_some() {
                // A device that names no position need not know.
                let missed = read.missed;
                read = self.everyone.read(format);
                read.missed += missed;
            }
            return read;
        };
        let Groups { subscribed, catching, everyone_at, turn, follows_everyone, .. } =
            &mut **groups;
        let (mut missed, audiences) = (0, 1 + subscribed.len());
        for _ in 0..audiences {
            let this = *turn % audiences;
            *turn = this + 1;
            let (group, member, at) = match this.checked_sub(1) {
                None => (None, &mut self.everyone, &mut *everyone_at),
                Some(index) => {
                    let Subscription { group, member, at, .. } = &mut subscribed[index];
                    (Some(&*group), member, at)
                }
            };
            let name = group.map_or(EVERYONE, GroupId::as_str);
            if catching.iter().any(|catching| catching.audience.as_str() == name) {
                continue;
            }
            let audience = || group.map_or(Audience::Everyone, |of| Audience::Group(of.clone()));
            let read = member.read(format);
            let before = read.run.as_ref().map(|run| run.before);
            let lacks = |at: &mut Point| read.missed > 0 || before.is_some_and(|it| it != *at);
            if let Some(at) = at.take_if(lacks) {
                // What was read of the log comes once more, behind what the mailbox has.
                catching.push(Catching::behind(audience(), at));
                return Read { missed, behind: true, ..Read::default() };
            }
            missed += read.missed;
            if let Some(restart) = read.restart {
                *turn = this;
                // A device that names no position of everyone need not know.
                let begun = (group.is_some() || *follows_everyone).then(|| {
                    *at = Some(restart);
                    Begun { audience: audience(), position: restart.into() }
                });
                return Read { missed, begun, ..read };
            }
            if let Some(run) = &read.run {
                at.iter_mut().for_each(|at| *at = run.last);
                return Read { missed, ..read };
            }
        }
        Read { missed, ..Read::default() }
    }

    /// Leaves all audiences.
    pub fn leave(self, fanout: &Fanout, app: &AppId) {
        for known in self.groups.into_iter().flat_map(|groups| groups.subscribed) {
            fanout.unsubscribe(app, &known.group, &known.member);
        }
        fanout.leave(app, &self.everyone);
    }
}

impl Groups {
    /// Has the audience caught up with, if Hello names a position of it. Returns whether it does.
    fn resume(&mut self, audience: Audience) -> bool {
        let at = self.positions.iter().position(|(of, _)| *of == audience);
        let Some(at) = at else { return false };
        let (audience, position) = self.positions.swap_remove(at);
        self.catching.push(Catching::new(audience, position));
        true
    }

    fn forget(&mut self, group: &GroupId) {
        let of = |audience: &Audience| matches!(audience, Audience::Group(name) if name == group);
        self.catching.retain(|catching| !of(&catching.audience));
    }
}
