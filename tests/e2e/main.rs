//! The real binaries, Apache Kafka and redis-server, as an operator runs them: from a record in
//! Kafka to a device's acknowledgement.
//!
//! `make test` builds the binaries first; by hand: `cargo build --workspace --bins`.

mod balance;
mod binaries;
mod delivery;
mod hops;
mod kick;
mod kills;
mod listener;
mod masters;
mod metrics;
mod outages;
mod planted;
mod python;
mod repair;
mod resends;
mod restarts;
mod sessions;
mod slow;
mod storm;
mod tls;
mod top;
mod traces;
mod trial;
mod wedges;
