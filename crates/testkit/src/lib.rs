//! What tests need and users never run: Apache Kafka and Redis on private ports, Barid's binaries
//! as processes with verbs (term, kill, stop, cont), and a whole cluster of them.
//!
//! Everything started here dies with the test process, however that ends, and leaves no files.

pub mod kafka;
pub mod paths;
pub mod ports;
pub mod process;
mod spawner;

pub use kafka::Kafka;
