//! Measures a Barid cluster, and checks every delivery while it does.

mod agent;
mod attacker;
mod audit;
mod bench;
mod compare;
mod controller;
mod device;
mod drive;
mod floor;
mod histogram;
mod hops;
mod kafka_hop;
mod live;
mod measure;
mod process;
mod producer;
mod report;
mod run;
mod sandbox;
mod table;
mod target;
mod token;
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

/// Measure a Barid cluster and check every delivery.
#[derive(Debug, Parser)]
#[command(name = "barid-loadtest", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure memory, handshakes, throughput and latency against a floor.
    // An option that `make` sets can be set again in ARGS.
    #[command(args_override_self = true)]
    Bench(bench::Options),
    /// Check deliveries and the growth of memory over a long time.
    Soak(bench::SoakCommand),
    /// Show what changed between runs of `bench` by more than noise.
    Compare(compare::Options),
    /// Create the HTML page of a report.json.
    Report(report::Options),
    /// Hold connections for the controller that names it with `bench --agents`.
    Agent(agent::Options),
    /// Run the barest server, for comparison.
    Floor(floor::Options),
    /// Attack a server, as `bench --only attack` does.
    Attacker(attacker::Options),
    /// Run the barest server that can be attacked, for comparison.
    Hold,
    /// Drive a running cluster at a fixed rate through the Rust SDK.
    Run(run::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let is_clean = match Arguments::parse().command {
        Command::Bench(options) => bench::run(&options).await?,
        Command::Soak(options) => bench::soak(options).await?,
        Command::Compare(options) => compare::run(&options)?,
        Command::Report(options) => report::run(&options)?,
        Command::Agent(options) => agent::run(&options).await?,
        Command::Floor(options) => floor::run(&options).await?,
        Command::Attacker(options) => attacker::run(&options).await?,
        Command::Hold => attacker::hold().await?,
        Command::Run(options) => run::run(&options).await?,
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
        for number in ["run --rate", "bench --push-linger-ms", "bench --limit-seconds"] {
            assert!(numbers.iter().any(|found| found == number), "{number} of {numbers:?}");
        }
    }
}
