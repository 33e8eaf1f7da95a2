//! The lanes to the Redis masters.

mod away;
mod batch;
mod event;
mod lane;
mod queue;
mod settle;

pub use self::away::Away;
pub use self::event::{Answer, Event, Question};
#[cfg(test)]
pub(crate) use self::lane::tests::record_of;
pub use self::lane::{Lane, Shared};
pub use self::queue::Queue;
pub use self::settle::Outbox;
