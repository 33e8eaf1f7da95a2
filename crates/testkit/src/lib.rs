//! What tests need and users never run: Apache Kafka and Redis on private ports, Barid's binaries
//! as processes with verbs (term, kill, stop, cont), a whole cluster of them, and a checker of what
//! its users were shown.
//!
//! Everything started here dies with the test process, however that ends, and leaves no files.

pub mod certificates;
pub mod checker;
pub mod cluster;
pub mod device;
pub mod grpc;
pub mod http;
pub mod kafka;
pub mod paths;
pub mod ports;
pub mod process;
pub mod raw;
pub mod redis;
pub mod relay;
mod spawner;
pub mod token;

pub use cluster::{Cluster, Role};
pub use device::Device;
pub use kafka::Kafka;
pub use redis::{Redis, RedisCluster, Sentinel};
pub use relay::Relay;
