//! Redis: mailboxes, routes, retry timers, leases. Every change of a user's state is one atomic
//! script on one hash slot; callers never see a key.
//!
//! ```text
//! Mailbox ── Topology: shard -> Lane (one a master) ── Batcher a script ── Link: one connection
//!    ├─ operations/*: what a script is asked and answers        scripts/*.lua: what it does
//!    └─ Lease, NodeTable: who is alive      announcements: hears of changes at once
//! TrackedRoutes: routes read on a connection on which Redis reports their changes
//! ```

mod announcements;
mod batcher;
mod cluster;
mod config;
mod error;
mod keys;
mod layout;
mod lease;
mod link;
mod mailbox;
mod metrics;
mod nodes;
mod operations;
mod redis_clock;
mod reply;
mod routes;
mod scripts;
mod tls;
mod topology;
mod types;

pub use config::RedisConfig;
pub use error::Error;
pub use lease::{
    Confirming, Lease, LeaseConfig, LeaseEvent, LiveSession, LiveSessions, NodeRecord, NodeRole,
    check_text,
};
pub use mailbox::Mailbox;
pub use nodes::{NodeTable, Standing};
pub use redis_clock::RedisTime;
pub use routes::{Invalidation, TrackedRoutes};
pub use types::*;
