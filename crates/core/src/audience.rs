//! Audiences that share a mailbox, and owners of mailboxes.

use std::fmt;

use crate::limits::EVERYONE;
use crate::{AppId, GroupId, UserId};

/// Devices of an app that receive the same messages from one mailbox. The order groups names by app and audience.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Audience {
    /// All devices of the app.
    Everyone,
    /// The members of a group.
    Group(GroupId),
}

impl Audience {
    /// The audience with this name in frames: a group's name, or `everyone`, which no group can have.
    ///
    /// # Errors
    /// As [`GroupId::new`].
    pub fn new(name: &str) -> Result<Self, crate::InvalidName> {
        if name == EVERYONE { Ok(Self::Everyone) } else { GroupId::new(name).map(Self::Group) }
    }

    /// Its name in frames and in keys.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Everyone => EVERYONE,
            Self::Group(group) => group.as_str(),
        }
    }
}

impl fmt::Display for Audience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Audience {
    type Err = crate::InvalidName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

/// An audience of an app.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AudienceKey {
    /// The tenant.
    pub app: AppId,
    /// The audience within the app.
    pub audience: Audience,
}

impl fmt::Display for AudienceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.app, self.audience)
    }
}

/// Whose mailbox, within an app.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A user.
    User(UserId),
    /// A group, or everyone.
    Audience(Audience),
}

impl Owner {
    /// Its name. With the app it determines the shard; a user and a group may have the same one.
    pub fn as_str(&self) -> &str {
        match self {
            Self::User(user) => user.as_str(),
            Self::Audience(audience) => audience.as_str(),
        }
    }

    /// The user, if it is one.
    pub fn user(&self) -> Option<&UserId> {
        match self {
            Self::User(user) => Some(user),
            Self::Audience(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_is_no_group() {
        assert_eq!(Audience::new("everyone").unwrap(), Audience::Everyone);
        assert_eq!(Audience::new("staff").unwrap().as_str(), "staff");
        assert!(Audience::new("").is_err());
    }
}
