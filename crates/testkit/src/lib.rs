//! The tools of tests: Apache Kafka and Redis on private ports, Barid's binaries as processes that a test can
//! signal, a whole cluster of them, devices, and an audit of what users were shown.
//!
//! Every process started here ends with the test process, however that ends, and leaves no files.

pub mod audit;
pub mod browser;
pub mod certificates;
pub mod cluster;
pub mod device;
pub mod grpc;
pub mod http;
pub mod kafka;
mod measuring;
pub mod paths;
pub mod ports;
pub mod process;
pub mod raw;
pub mod records;
pub mod redis;
pub mod relay;
mod spawner;
pub mod token;

pub use browser::Browser;
pub use cluster::{Cluster, Role};
pub use device::Device;
pub use kafka::Kafka;
pub use measuring::alone;
pub use redis::{Redis, RedisCluster, Sentinel};
pub use relay::Relay;
