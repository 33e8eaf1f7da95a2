//! What both sides are asked, and in which cases.

use anyhow::Result;
use barid_wire::envelope::Header;
use bytes::Bytes;

/// In what state the users are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// Nobody is connected; messages wait.
    Offline,
    /// The same, and every mailbox is full: each message evicts one.
    OfflineFull,
    /// Everybody is connected and acknowledges each message before the next one comes.
    Online,
    /// Everybody is connected and one message behind with each acknowledgement.
    Behind,
}

impl Case {
    pub fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::OfflineFull => "full",
            Self::Online => "online",
            Self::Behind => "behind",
        }
    }

    pub fn is_online(self) -> bool {
        matches!(self, Self::Online | Self::Behind)
    }
}

/// A message to accept.
pub struct Message {
    pub user: usize,
    pub offset: i64,
    pub id: String,
    pub body: Bytes,
}

/// A message to acknowledge, with all before it.
#[derive(Debug, Clone)]
pub struct Acked {
    pub user: usize,
    pub header: Header,
}

/// Who does the work.
pub trait Side {
    /// One call.
    async fn accept(&mut self, case: Case, batch: &[Message]) -> Result<Vec<Header>>;
    /// One call.
    async fn ack(&mut self, case: Case, batch: &[Acked]) -> Result<()>;
}
