//! What tests need and users never run: Apache Kafka and Redis on private ports, Barid's binaries
//!
//! Everything started here dies with the test process, however that ends, and leaves no files.

pub mod device;
pub mod http;
pub mod kafka;
pub mod paths;
pub mod ports;
pub mod process;
pub mod redis;
mod spawner;
pub mod token;

pub use device::Device;
pub use kafka::Kafka;
pub use redis::{Redis, RedisCluster};
