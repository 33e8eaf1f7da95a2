//! Redis: mailboxes, routes, retry timers, leases. Every change of a user's state is one atomic script on one hash
//! slot. Callers never see a key.
//!
//! ```text
//! Mailbox · Lease · NodeTable · TrackedRoutes     what other crates use
//! calls/*                                         calls with many items: accept, fire, defer, inspect
//! Topology: shard -> Lane                         a master's Link, and a queue for each operation
//! operations/* · Batcher                          single items: connect, confirm, read, ack, disconnect
//! Link                                            one connection to one master
//! encoding · reply · scripts · keys               requests and replies; scripts/*.lua is what Redis executes
//! ```
//!
//! Each file stands above those that it uses. `TrackedRoutes` has connections of its own, on which Redis reports
//! changes; `announcements` subscribes to changes of leases.

mod announcements;
mod batcher;
mod calls;
mod cluster;
mod config;
mod dial;
mod encoding;
mod error;
mod keys;
mod layout;
mod lease;
mod link;
mod mailbox;
mod metrics;
mod nodes;
mod operations;
mod other_layouts;
mod probe;
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
pub use probe::probe;
pub use redis_clock::RedisTime;
pub use routes::{Invalidation, TrackedRoutes};
pub use types::*;
