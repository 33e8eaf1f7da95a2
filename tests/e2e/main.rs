//! End-to-end tests of the real binaries with Apache Kafka and redis-server, from a record in Kafka to a device's
//! acknowledgement.
//!
//! They need `cargo build --workspace --bins`, which `make test` does.

mod audiences;
mod balance;
mod binaries;
mod delivery;
mod examples;
mod exit_codes;
mod hops;
mod internal_tls;
mod kick;
mod kills;
mod listener;
mod masters;
mod metrics;
mod outages;
mod planted;
mod repair;
mod resends;
mod restarts;
mod revocations;
mod secrets;
mod sessions;
mod slow;
mod storm;
mod tls;
mod token_check;
mod top;
mod traces;
mod trial;
mod wedges;
