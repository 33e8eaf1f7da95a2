//! The dispatcher: takes batches from purgers and delayers, finds out which access nodes hold the
//! audience's sockets, and streams to those nodes. It holds nothing that cannot be rebuilt, and it
//! may drop whatever it likes: mailbox, timer and sync keep the promises.

pub mod deliver;
pub mod grpc;
pub mod metrics;
pub mod nodes;
pub mod reap;
pub mod resolve;
