//! Contract tests of the mailbox, on a real redis-server and on a real Redis Cluster of three masters.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in #[test] functions; these are their bodies

mod accept;
mod acks;
mod audiences;
mod faults;
mod forgetting;
mod growth;
mod layout;
mod leases;
mod replicas;
mod sentinel;
mod sessions;
mod support;
mod timers;
mod tls;
mod tracked;
mod twins;
