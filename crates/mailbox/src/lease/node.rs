//! A node's record in its lease.

use barid_core::{Incarnation, NodeId};

/// Maximum bytes of a text in a record, of which every shard has a copy.
const TEXT_BYTES_MAX: usize = 256;

/// The role of a node that has a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// An access node, which holds devices' sockets.
    Access,
    /// A dispatcher, which resolves users to access nodes.
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
    /// The node's name, unique among running nodes.
    pub id: NodeId,
    /// The node's role.
    pub role: NodeRole,
    /// `host:port` of its gRPC server.
    pub address: String,
    /// Changes at a restart, and at a lapse for longer than half of the time for which others keep the routes of a
    /// node that is gone. A later one is greater.
    pub incarnation: Incarnation,
    /// Number of its sessions.
    pub load: u64,
    /// It is draining: new work goes to other nodes, if there are any.
    pub draining: bool,
    /// Its availability zone, free text; may be empty.
    pub zone: String,
    /// `host:port` of its admin endpoint; empty: unknown.
    pub admin: String,
    /// The URL at which devices connect; empty: unknown, or none.
    pub devices: String,
    /// All routes of earlier incarnations are void: each session that continues in this one has written its route
    /// again. A new process starts with true.
    pub confirmed: bool,
}

impl NodeRecord {
    /// The record of a node that has just started: without sessions, not draining, confirmed, the optional texts empty.
    pub fn new(
        role: NodeRole,
        id: NodeId,
        incarnation: Incarnation,
        address: impl Into<String>,
    ) -> Self {
        Self {
            id,
            role,
            address: address.into(),
            incarnation,
            load: 0,
            draining: false,
            zone: String::new(),
            admin: String::new(),
            devices: String::new(),
            confirmed: true,
        }
    }

    /// Notes that the sessions of this incarnation are confirmed. Returns whether this is a change.
    pub(crate) fn set_confirmed(&mut self, incarnation: Incarnation) -> bool {
        let changes = self.incarnation == incarnation && !self.confirmed;
        self.confirmed |= changes;
        changes
    }
}

/// Checks a text of a record. NUL separates the fields of a copy; other control characters would reach logs and
/// terminals.
///
/// # Errors
/// Returns an error that names `key` if the text is too long or contains a control character.
pub fn check_text(key: &str, text: &str) -> Result<(), String> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("{key} has {} bytes, the limit is {TEXT_BYTES_MAX}", text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(bad) => Err(format!("{key} contains {bad:?}; write it without control characters")),
        None => Ok(()),
    }
}
