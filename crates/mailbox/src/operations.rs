//! The operations that [`crate::batcher`] batches: how an item is encoded for its script, and its reply decoded. The
//! topology has a queue for each of them in front of every master.

mod ack;
mod audiences;
mod sessions;

pub(crate) use self::ack::{Ack, Read};
pub(crate) use self::audiences::{Join, ReadAudience, ReadJournal};
pub(crate) use self::sessions::{Confirm, Connect, Disconnect};
