//! The operations that [`crate::batcher`] batches: how an item is encoded for its script, and its reply decoded. The
//! topology has a queue for each of them in front of every master.

mod ack;
mod sessions;

pub(crate) use self::ack::{Ack, Read};
pub(crate) use self::sessions::{Confirm, Connect, Disconnect};
