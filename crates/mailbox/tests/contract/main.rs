//! What the mailbox promises, on a real redis-server and on a real Redis Cluster of three masters.

mod accept;
mod acks;
mod faults;
mod leases;
mod sessions;
mod support;
mod timers;
mod tracked;
