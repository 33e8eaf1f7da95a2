//! The gRPC streams between roles: batches in a bounded window, sent without lingering and answered by the receiver.
//! [`Link`] is a stream to one peer. [`DispatchPool`] distributes the work of purgers and delayers to the dispatchers.
//!
//! [`Server`] is the port on which a role is called, [`dial`] calls one; both use the [`Credentials`] of the process.
//!
//! Delivery is best-effort: the retry timers repair what a broken stream loses.

mod config;
mod credentials;
mod dial;
mod link;
mod metrics;
mod party;
mod pool;
pub mod rendezvous;
mod server;

pub use config::{LinkConfig, MeshConfig};
pub use credentials::{Credentials, InternalTlsConfig};
pub use dial::dial;
pub use link::{Broken, Link, LinkState, Protocol, Refusal, Refused};
pub use metrics::{LinkMetrics, MeshMetrics};
pub use party::Party;
pub use pool::{DispatchPool, Peer, Unavailable};
pub use server::{BATCH_BYTES_MAX, GrpcConfig, Only, Server};
