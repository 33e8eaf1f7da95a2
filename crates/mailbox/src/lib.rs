//! Redis: mailboxes, routes, retry timers, leases. Every change of a user's state is one atomic
//! script on one hash slot; callers never see a key.
//!
//! ```text
//! Mailbox ── Topology: shard -> Lane (one a master) ── Batcher a script ── Link: one connection
//!    └─ operations/*: what a script is asked and answers        scripts/*.lua: what it does
//! ```

mod batcher;
mod config;
mod error;
mod keys;
mod link;
mod mailbox;
mod metrics;
mod operations;
mod redis_clock;
mod reply;
mod scripts;
mod topology;
mod types;

pub use config::{Limits, RedisConfig};
pub use error::Error;
pub use mailbox::Mailbox;
pub use types::*;
