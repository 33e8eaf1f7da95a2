//! The command line.

use clap::{Parser, ValueEnum, value_parser};

/// Measure the cost of accept and ack in Redis, relative to the barest scripts.
#[derive(Debug, Parser)]
#[command(name = "redis_cost", version)]
pub struct Options {
    /// Users, one device each.
    #[arg(long, default_value_t = 1000, value_parser = value_parser!(u32).range(64..=100_000))]
    pub users: u32,
    /// Payload size in bytes.
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(1..=65_536))]
    pub payload_bytes: u32,
    /// Messages per call, comma-separated.
    #[arg(long, default_values_t = [1, 4, 16, 64], value_delimiter = ',', value_parser = value_parser!(u32).range(1..=64))]
    pub batches: Vec<u32>,
    /// Measured rounds per server, batch size and case.
    #[arg(long, default_value_t = 24, value_parser = value_parser!(u32).range(4..=10_000))]
    pub rounds: u32,
    /// Messages per accept round that waits for replicas, comma-separated.
    #[arg(long, default_values_t = [1, 64, 2_000], value_delimiter = ',', value_parser = value_parser!(u32).range(1..=10_000))]
    pub wait_batches: Vec<u32>,
    /// Measure only this part.
    #[arg(long)]
    pub only: Option<Part>,
    /// Run all servers with an append-only file.
    #[arg(long)]
    pub append_only: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Cargo passes this flag to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Barid's scripts against the floor's.
    Scripts,
    /// Accept with `redis.wait_replicas` at 0, 1 and 2.
    Replicas,
}
