//! The audiences that one session reads: everyone of its app, and the groups that it is subscribed to.

use std::sync::Arc;

use barid_core::{AppId, CloseCode, GroupId};
use barid_wire::frames::Format;

use crate::fanout::audience::{Member, Read};
use crate::fanout::hub::Fanout;
use crate::handle::Handle;

/// A session's memberships.
#[derive(Debug)]
pub struct Listener {
    everyone: Member,
    /// The groups that the session's token lists.
    groups: Option<Box<Groups>>,
}

#[derive(Debug, Default)]
struct Groups {
    allowed: Vec<GroupId>,
    subscribed: Vec<(GroupId, Member)>,
    /// Index of the audience to read first; 0 is everyone.
    turn: usize,
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
    /// Joins a new session to its app's audience. `allowed` are the groups that its token lists.
    pub fn new(fanout: &Fanout, handle: &Arc<Handle>, allowed: Vec<GroupId>) -> Self {
        let mut listener = Self { everyone: fanout.join(handle), groups: None };
        listener.set_allowed(allowed);
        listener
    }

    fn set_allowed(&mut self, allowed: Vec<GroupId>) {
        if self.groups.is_some() || !allowed.is_empty() {
            self.groups.get_or_insert_default().allowed = allowed;
        }
    }

    /// Subscribes to a group; at most `groups_max` at once. A repeated subscription has no effect.
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
        if groups.subscribed.iter().any(|(name, _)| name == group) {
            return Ok(());
        }
        if groups.subscribed.len() >= groups_max {
            return Err(Refused::TooMany);
        }
        groups.subscribed.push((group.clone(), fanout.subscribe(handle, group)));
        Ok(())
    }

    /// Ends the subscription to a group, if there is one.
    pub fn unsubscribe(&mut self, fanout: &Fanout, app: &AppId, group: &GroupId) {
        let Some(groups) = &mut self.groups else { return };
        let at = groups.subscribed.iter().position(|(name, _)| name == group);
        let Some(at) = at else { return };
        let (_, member) = groups.subscribed.swap_remove(at);
        fanout.unsubscribe(app, group, &member);
    }

    /// Replaces the groups of the token. Returns the groups whose subscription this ended.
    pub fn allow(&mut self, fanout: &Fanout, app: &AppId, allowed: Vec<GroupId>) -> Vec<GroupId> {
        self.set_allowed(allowed);
        let Some(groups) = &mut self.groups else { return Vec::new() };
        let names = groups.subscribed.iter().map(|(name, _)| name);
        let ended: Vec<_> = names.filter(|name| !groups.allowed.contains(name)).cloned().collect();
        for group in &ended {
            self.unsubscribe(fanout, app, group);
        }
        ended
    }

    /// Reads the next run of messages, from each audience in turn.
    pub fn read(&mut self, format: Format) -> Read {
        let Some(groups) = &mut self.groups else { return self.everyone.read(format) };
        let mut missed = 0;
        let audiences = 1 + groups.subscribed.len();
        for _ in 0..audiences {
            let turn = groups.turn % audiences;
            groups.turn = turn + 1;
            let read = match turn {
                0 => self.everyone.read(format),
                _ => groups.subscribed[turn - 1].1.read(format),
            };
            missed += read.missed;
            if read.run.is_some() {
                return Read { missed, ..read };
            }
        }
        Read { missed, ..Read::default() }
    }

    /// Leaves all audiences.
    pub fn leave(self, fanout: &Fanout, app: &AppId) {
        for (group, member) in self.groups.into_iter().flat_map(|groups| groups.subscribed) {
            fanout.unsubscribe(app, &group, &member);
        }
        fanout.leave(app, &self.everyone);
    }
}
