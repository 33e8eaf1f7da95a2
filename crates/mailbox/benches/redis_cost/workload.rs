//! The messages and acknowledgements that both sides get, and the cases they are measured in.

use anyhow::Result;
use barid_wire::envelope::{self, Envelope, Header};
use bytes::Bytes;

use crate::options::Options;

/// The state of the users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// No device is connected; messages wait.
    Offline,
    /// As `Offline`, with full mailboxes: each message evicts one.
    OfflineFull,
    /// Each device acknowledges a message before the next one arrives.
    Online,
    /// Each acknowledgement leaves one message unacknowledged.
    Behind,
}

impl Case {
    pub const ALL: [Self; 4] = [Self::Offline, Self::OfflineFull, Self::Online, Self::Behind];

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

/// A message to acknowledge, together with all earlier ones.
#[derive(Debug, Clone)]
pub struct Acked {
    pub user: usize,
    pub header: Header,
}

/// An implementation that is measured: Barid or the floor. Each method is one call per batch.
pub trait Side {
    async fn accept(&mut self, case: Case, batch: &[Message]) -> Result<Vec<Header>>;
    async fn ack(&mut self, case: Case, batch: &[Acked]) -> Result<()>;
}

/// Generates rounds of messages.
pub struct Plan {
    case: Case,
    users: usize,
    offset: i64,
    payload: Bytes,
    round: usize,
}

impl Plan {
    pub fn new(options: &Options, case: Case, users: usize) -> Self {
        let payload = Bytes::from(vec![b'x'; options.payload_bytes as usize]);
        Self { case, users, offset: 0, payload, round: 0 }
    }

    /// One message for each user, in an order that differs from round to round. Whole batches only,
    /// and no user twice in a batch. [`Case::Behind`] gets every message twice.
    pub fn round(&mut self, batch: usize) -> Vec<Message> {
        self.round += 1;
        let count = self.users / batch * batch;
        // A stride that shares no factor with the number of users visits all of them.
        let mut stride = (7_919 + 2 * self.round) % self.users;
        while gcd(stride.max(1), self.users) != 1 {
            stride += 1;
        }
        let times = if self.case == Case::Behind { 2 } else { 1 };
        let users = (0..times).flat_map(|_| 0..count).map(|i| (i * stride.max(1)) % self.users);
        users.collect::<Vec<_>>().into_iter().map(|user| self.message(user)).collect()
    }

    fn message(&mut self, user: usize) -> Message {
        self.offset += 1;
        let id = format!("message-{:08}", self.offset);
        let payload = self.payload.clone();
        let body =
            envelope::encode_body(Envelope { id: id.clone(), payload, ..Default::default() });
        Message { user, offset: self.offset, id, body }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
