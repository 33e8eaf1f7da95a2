//! The streams between roles: batches in a bounded window, answered by the receiver, with no
//! lingering. [`Link`] is one such stream to one peer; [`DispatchPool`] is what purgers and
//! delayers hand their work to.
//!
//! Nothing here is a promise: whatever a broken stream loses, the retry timer repairs.

mod config;
mod link;
mod metrics;
mod pool;
pub mod rendezvous;

pub use config::{LinkConfig, MeshConfig};
pub use link::{Broken, Link, LinkState, Protocol, Refusal, Refused};
pub use metrics::{LinkMetrics, MeshMetrics};
pub use pool::{DispatchPool, Peer, Unavailable};
