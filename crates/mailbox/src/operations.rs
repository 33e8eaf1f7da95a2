//! The operations that [`crate::batcher`] batches: what an item of each asks of its script, and how its answer
//! reads. They stand below the topology, which has a queue for each of them in front of every master.

mod ack;
mod sessions;

pub(crate) use self::ack::{Ack, Read};
pub(crate) use self::sessions::{Confirm, Connect, Disconnect};
