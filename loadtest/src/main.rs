//! Measures Barid and checks what its devices are shown while it does.

mod agent;
mod audit;
mod bench;
mod clients;
mod compare;
mod controller;
mod cpu;
mod device;
mod drive;
mod floor;
mod histogram;
mod hops;
mod kafka_hop;
mod live;
mod measure;
mod producer;
mod report;
mod run;
mod sandbox;
mod scale;
mod table;
mod target;
mod usage;

/// Generated from `proto/loadtest.proto`.
#[allow(missing_docs, clippy::all)]
mod rpc {
    tonic::include_proto!("barid.loadtest.v1");
}

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Drive a Barid cluster: Kafka to device and back, checked.
#[derive(Debug, Parser)]
#[command(name = "barid-loadtest", version)]
struct Arguments {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// Measure density, handshakes, storms, throughput and latency, each beside a floor.
    Bench(bench::Options),
    /// Steady sessions, messages and churn for as long as is wanted: nothing is lost, and nothing grows.
    Soak(bench::SoakCommand),
    /// Say what changed between runs of the bench, and whether it is more than noise.
    Compare(compare::Options),
    /// Make the page of a report.json again.
    Report(report::Options),
    /// Hold connections for a controller, which `bench --agents` names.
    Agent(agent::Options),
    /// Be the barest server, for comparison.
    Floor(floor::Options),
    /// Drive a running cluster at a fixed rate, through the Rust SDK, over outages if need be.
    Run(run::Options),
    /// Start a cluster and measure what many connections over several nodes take, messages flowing.
    Scale(scale::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let is_clean = match Arguments::parse().scenario {
        Scenario::Bench(options) => bench::run(&options).await?,
        Scenario::Soak(options) => bench::soak(options).await?,
        Scenario::Compare(options) => compare::run(&options)?,
        Scenario::Report(options) => report::run(&options)?,
        Scenario::Agent(options) => agent::run(&options).await?,
        Scenario::Floor(options) => floor::run(&options).await?,
        Scenario::Run(options) => run::run(&options).await?,
        Scenario::Scale(options) => scale::run(&options).await?,
    };
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn hazard_61_every_number_of_the_command_line_is_bounded() {
        let numbers = barid_runtime::bounds::walk_arguments(&Arguments::command());
        for number in ["run --rate", "scale --linger-ms", "bench --limit-seconds"] {
            assert!(numbers.iter().any(|found| found == number), "{number} of {numbers:?}");
        }
    }
}
