//! Names of keys. The hash tag is the shard, so everything about a user, or about an audience, is in one hash slot.

use barid_core::{AppId, Audience, AudienceKey, Owner, Shard, UserId};

use crate::UserKey;

/// Shard count and schema version.
pub(crate) const META: &str = "barid:meta";

/// Node ids of processes with layout 2.
pub(crate) const NODES_OF_LAYOUT_2: &str = "barid:nodes";

/// A node's lease.
pub(crate) fn node(id: &str) -> String {
    format!("barid:node:{id}")
}

/// Copies of all leases beside a shard: some can be read as long as any master answers.
pub(crate) fn copies(shard: Shard) -> String {
    format!("{{{shard}}}:n")
}

pub(crate) fn head(shard: Shard, app: &AppId, user: &UserId) -> String {
    format!("{{{shard}}}:h:u:{app}:{user}")
}

pub(crate) fn queue(shard: Shard, app: &AppId, user: &UserId) -> String {
    format!("{{{shard}}}:q:u:{app}:{user}")
}

pub(crate) fn routes(shard: Shard, app: &AppId, user: &UserId) -> String {
    format!("{{{shard}}}:r:{app}:{user}")
}

/// The keys of an owner's mailbox: head, queue, and where its messages go: routes of a user's devices, or nodes with
/// members of an audience.
pub(crate) fn of_owner(shard: Shard, app: &AppId, owner: &Owner) -> [String; 3] {
    match owner {
        Owner::User(user) => {
            [head(shard, app, user), queue(shard, app, user), routes(shard, app, user)]
        }
        Owner::Audience(audience) => [
            audience_head(shard, app, audience),
            audience_queue(shard, app, audience),
            audience_nodes(shard, app, audience),
        ],
    }
}

pub(crate) fn audience_head(shard: Shard, app: &AppId, audience: &Audience) -> String {
    format!("{{{shard}}}:h:g:{app}:{audience}")
}

pub(crate) fn audience_queue(shard: Shard, app: &AppId, audience: &Audience) -> String {
    format!("{{{shard}}}:q:g:{app}:{audience}")
}

pub(crate) fn audience_nodes(shard: Shard, app: &AppId, audience: &Audience) -> String {
    format!("{{{shard}}}:g:{app}:{audience}")
}

pub(crate) fn timers(shard: Shard) -> String {
    format!("{{{shard}}}:t")
}

pub(crate) fn positions(shard: Shard) -> String {
    format!("{{{shard}}}:o")
}

/// The user of a routes key.
pub(crate) fn parse_routes(key: &[u8]) -> Option<UserKey> {
    let (_, rest) = std::str::from_utf8(key).ok()?.split_once(":r:")?;
    let (app, user) = rest.split_once(':')?;
    Some(UserKey { app: AppId::new(app).ok()?, user: UserId::new(user).ok()? })
}

/// A user as a member of the timers. Names contain no NUL.
pub(crate) fn member(app: &AppId, user: &UserId) -> String {
    format!("{app}\0{user}")
}

/// The journal of a shard: which audiences have new messages.
pub(crate) fn journal(shard: Shard) -> String {
    format!("{{{shard}}}:j")
}

/// An audience as a member of the journal.
pub(crate) fn audience_member(app: &AppId, audience: &Audience) -> String {
    format!("{app}\0{audience}")
}

/// The audience of a journal's member.
pub(crate) fn parse_audience_member(member: &str) -> Option<AudienceKey> {
    let (app, audience) = member.split_once('\0')?;
    Some(AudienceKey { app: AppId::new(app).ok()?, audience: Audience::new(audience).ok()? })
}

/// The user of a timer's member.
pub(crate) fn parse_member(member: &str) -> Option<UserKey> {
    let (app, user) = member.split_once('\0')?;
    Some(UserKey { app: AppId::new(app).ok()?, user: UserId::new(user).ok()? })
}

/// The channel on which nodes announce that their lease was taken or released, or that they drain. The message is the
/// node's role.
pub const NODES_CHANGED: &str = "barid:nodes:changed";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colons_in_a_user_do_not_make_it_another_one() {
        let shard = barid_core::ShardCount::new(64).unwrap().shard_of("a", "b:c");
        let (app, user) = (AppId::new("a").unwrap(), UserId::new("b:c").unwrap());
        assert_eq!(head(shard, &app, &user), format!("{{{shard}}}:h:u:a:b:c"));
        assert!(AppId::new("a:b").is_err());
        let key = parse_member(&member(&app, &user)).unwrap();
        assert_eq!((key.app, key.user), (app, user));
    }
}
