//! The gRPC streams between roles: batches in a bounded window, sent without lingering and answered by the receiver.
//! [`Link`] is a stream to one peer. [`DispatchPool`] distributes the work of purgers and delayers to the dispatchers.
//!
//! Delivery is best-effort: the retry timers repair what a broken stream loses.

mod config;
mod link;
mod metrics;
mod pool;
pub mod rendezvous;

pub use config::{LinkConfig, MeshConfig};
pub use link::{Broken, Link, LinkState, Protocol, Refusal, Refused};
pub use metrics::{LinkMetrics, MeshMetrics};
pub use pool::{DispatchPool, Peer, Unavailable};
