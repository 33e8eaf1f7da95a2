//! Barid's vocabulary: the terms of docs/protocol.md and ARCHITECTURE.md as types. No I/O, no protocol encoding, no
//! Redis, no Kafka.

mod audience;
mod backoff;
mod clock;
mod close;
mod history;
mod ids;
pub mod limits;
pub mod mailbox;
pub mod pem;
mod receipts;
mod secret;
mod shard;
mod trace;

pub use audience::{Audience, AudienceKey, Owner};
pub use backoff::{Backoff, InvalidBackoff};
pub use clock::{Clock, ManualClock, SystemClock};
pub use close::CloseCode;
pub use history::{Chain, Epoch, Generation, IdHash, LogPosition, Position, Seq};
pub use ids::{
    AppId, Attempt, ConnectionId, DeviceId, GroupId, Incarnation, InvalidName, MessageId, NodeId,
    SessionRef, UserId,
};
pub use receipts::{ReceiptSet, UnknownReceipt};
pub use secret::Secret;
pub use shard::{InvalidShardCount, Shard, ShardCount};
pub use trace::TraceParent;
