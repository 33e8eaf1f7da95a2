//! What accepted and acknowledged messages cost a Redis, against the barest scripts that leave the
//! same behind. Starts two private redis-servers: one runs Barid's mailbox, the other the floor
//! (`floor_accept.lua`, `floor_ack.lua`: what they leave out is said on top of them). Both are asked
//! the same in turn, round by round, so that what else the machine does strikes both; a ratio is of
//! two neighbouring rounds. And what it costs an accept round to wait for replicas (`replicas.rs`).

mod barid;
mod case;
mod floor;
mod replicas;
mod report;
mod rounds;
mod server;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use report::Report;

/// Cost in Redis of accept and ack, as a ratio to the barest scripts.
#[derive(Debug, Parser)]
#[command(name = "barid-redis-cost", version)]
struct Arguments {
    /// Users, one device each.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(64..=100_000))]
    users: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload_bytes: u32,
    /// Messages in one call.
    #[arg(long, default_values_t = [1, 4, 16, 64], value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    batches: Vec<u32>,
    /// Measured rounds of each side, per batch and case.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(4..=10_000))]
    rounds: u32,
    /// Messages in one accept round that waits for replicas.
    #[arg(long, default_values_t = [1, 64, 2_000], value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000))]
    wait_batches: Vec<u32>,
    /// Measure only this.
    #[arg(long)]
    only: Option<Part>,
    /// All servers write an append-only file.
    #[arg(long)]
    append_only: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Scripts against the barest ones.
    Scripts,
    /// Accept with `redis.wait_replicas` at 0, 1 and 2.
    Replicas,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut report = Report::new(&arguments);
    if arguments.only != Some(Part::Replicas) {
        for batch in &arguments.batches {
            rounds::run(&arguments, *batch as usize, &mut report).await?;
        }
    }
    if arguments.only != Some(Part::Scripts) {
        for batch in &arguments.wait_batches {
            replicas::run(&arguments, *batch as usize, &mut report).await?;
        }
    }
    report.print(arguments.json)?;
    Ok(if report.is_met() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
