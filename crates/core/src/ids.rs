//! Names and numbers of apps, users, devices and nodes. Names are cheap to clone and valid by construction.

use std::fmt;
use std::sync::Arc;

/// An invalid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {problem}")]
pub struct InvalidName {
    /// The kind of name: `app`, `user`, `device` and so on.
    pub kind: &'static str,
    /// The reason; follows the kind in the error's text.
    pub problem: String,
}

fn check(
    kind: &'static str,
    name: &str,
    max_bytes: usize,
    allowed: impl Fn(char) -> bool,
    what: &str,
) -> Result<Arc<str>, InvalidName> {
    let invalid = |problem| Err(InvalidName { kind, problem });
    if name.is_empty() {
        return invalid("is empty".into());
    }
    if name.len() > max_bytes {
        return invalid(format!("has {} bytes, the limit is {max_bytes}", name.len()));
    }
    match name.chars().find(|c| !allowed(*c)) {
        Some(bad) => invalid(format!("contains {bad:?}; allowed are {what}")),
        None => Ok(Arc::from(name)),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $max:expr, $allowed:expr, $what:literal
        $(, but $reserved:expr)?) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and wraps a name.
            ///
            /// # Errors
            /// The name is empty, too long, reserved, or has a character that is not allowed.
            pub fn new(name: &str) -> Result<Self, InvalidName> {
                $(if name == $reserved {
                    let problem = format!("{name:?} is a reserved name");
                    return Err(InvalidName { kind: $kind, problem });
                })?
                check($kind, name, $max, $allowed, $what).map(Self)
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl std::str::FromStr for $type {
            type Err = InvalidName;
            fn from_str(name: &str) -> Result<Self, InvalidName> {
                Self::new(name)
            }
        }
    };
}

fn token_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn printable(c: char) -> bool {
    !c.is_control()
}

name!(
    /// A tenant. 1 to 64 bytes of `A-Z a-z 0-9 . _ -`: no `:`, which separates parts of Redis keys.
    AppId, "app", crate::limits::APP_BYTES_MAX, token_char, "A-Z a-z 0-9 . _ -"
);
name!(
    /// A user of an app. 1 to 128 bytes, any printable text; NUL (a control character) separates
    /// it from the app in timer members.
    UserId, "user", crate::limits::USER_BYTES_MAX, printable, "characters that are not control characters"
);
name!(
    /// A device of a user. 1 to 64 bytes, any printable text.
    DeviceId, "device", crate::limits::DEVICE_BYTES_MAX, printable, "characters that are not control characters"
);
name!(
    /// A group of an app's sessions. 1 to 64 bytes, any printable text but `everyone`.
    GroupId, "group", crate::limits::GROUP_BYTES_MAX, printable, "characters that are not control characters",
    but crate::limits::EVERYONE
);
name!(
    /// The id of a message, chosen by the business. 1 to 128 bytes, any printable text.
    MessageId, "id", crate::limits::MESSAGE_ID_BYTES_MAX, printable, "characters that are not control characters"
);
name!(
    /// An access node or a dispatcher. 1 to 64 bytes of `A-Z a-z 0-9 . _ -`.
    NodeId, "node", crate::limits::NODE_BYTES_MAX, token_char, "A-Z a-z 0-9 . _ -"
);

macro_rules! number {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $type(pub u64);

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// The incarnation of a node. It changes when the node restarts and when its lease has lapsed. Below 2^53.
    Incarnation
);
number!(
    /// The number of a connection of a node, from 1.
    ConnectionId
);
number!(
    /// The number of a device's connection attempt. A higher one replaces a lower one. Below 2^53. If the device does
    /// not count its attempts, it is the time in ms since the Unix epoch.
    Attempt
);

/// A connection, as stored in a route.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionRef {
    /// The access node that holds the socket.
    pub node: NodeId,
    /// The node's incarnation.
    pub incarnation: Incarnation,
    /// The connection's number.
    pub connection: ConnectionId,
}

impl fmt::Display for SessionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:x}/{}", self.node, self.incarnation.0, self.connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_say_why() {
        assert_eq!(AppId::new("shop").unwrap().as_str(), "shop");
        assert_eq!(
            AppId::new("a:b").unwrap_err().to_string(),
            "app contains ':'; allowed are A-Z a-z 0-9 . _ -"
        );
        assert_eq!(UserId::new("").unwrap_err().to_string(), "user is empty");
        assert_eq!(UserId::new("b:c و").unwrap().as_str(), "b:c و");
        assert!(UserId::new("a\0b").is_err());
        assert_eq!(GroupId::new("eng: ö").unwrap().as_str(), "eng: ö");
        let reserved = GroupId::new("everyone").unwrap_err().to_string();
        assert_eq!(reserved, "group \"everyone\" is a reserved name");
        assert!(GroupId::new(&"g".repeat(65)).is_err());
        assert_eq!(
            DeviceId::new(&"d".repeat(65)).unwrap_err().to_string(),
            "device has 65 bytes, the limit is 64"
        );
    }
}
