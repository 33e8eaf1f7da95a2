//! A node, as its lease describes it.

use barid_core::{Incarnation, NodeId};

/// Bytes of a text in a lease's record: a copy of it stands beside every shard.
const TEXT_BYTES_MAX: usize = 256;

/// What kind of node it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// Holds sockets.
    Access,
    /// Resolves audiences.
    Dispatcher,
}

impl NodeRole {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Dispatcher => "dispatcher",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Access, Self::Dispatcher].into_iter().find(|role| role.as_str() == word)
    }
}

/// A node's record in its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its name; one living node has it.
    pub id: NodeId,
    /// Its role.
    pub role: NodeRole,
    /// Its gRPC `host:port`.
    pub address: String,
    /// Its life: a restart makes a new one, and a lapse for longer than half of the time for which
    /// others keep the routes of a node that is gone. A later one is greater.
    pub incarnation: Incarnation,
    /// Sessions it holds.
    pub load: u64,
    /// It is leaving: nothing new is given to it if there is another.
    pub draining: bool,
    /// Where it stands, free text; empty: not told.
    pub zone: String,
    /// The `host:port` of its admin endpoint; empty: not told.
    pub admin: String,
    /// The URL at which devices connect; empty: not told, or they do not.
    pub devices: String,
    /// All routes of earlier lives of this node are void: each session that lived on into this life has
    /// written its route anew. True from the start in a process that has just started.
    pub confirmed: bool,
}

impl NodeRecord {
    /// Notes that the sessions of this life are confirmed; whether that is news.
    pub(crate) fn set_confirmed(&mut self, incarnation: Incarnation) -> bool {
        let news = self.incarnation == incarnation && !self.confirmed;
        self.confirmed |= news;
        news
    }
}

/// Checks a text of a lease's record. NUL separates the fields of a copy; other control characters
/// would reach logs and terminals.
///
/// # Errors
/// It is too long, or has a control character; names the key.
pub fn check_text(key: &str, text: &str) -> Result<(), String> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("{key} has {} bytes, the limit is {TEXT_BYTES_MAX}", text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(bad) => Err(format!("{key} contains {bad:?}; write it without control characters")),
        None => Ok(()),
    }
}
