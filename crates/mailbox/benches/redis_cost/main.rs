//! Measures what accepting and acknowledging messages costs a Redis.
//!
//! The *floor* is the barest pair of scripts that leaves the same state (`floor_accept.lua`,
//! `floor_ack.lua`; the comment at the top of each lists what it leaves out). Two private
//! redis-servers, one with Barid's mailbox and one with the floor, get the same messages in turn,
//! round by round, so that other load on the machine affects both. A ratio compares two
//! neighbouring rounds.
//!
//! `replicas.rs` measures how long an accept round waits for replicas.

mod barid;
mod floor;
mod options;
mod replicas;
mod report;
mod rounds;
mod server;
mod workload;

use std::process::ExitCode;

use clap::Parser as _;

use options::{Options, Part};
use report::Report;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let mut report = Report::new(&options);
    if options.only != Some(Part::Replicas) {
        for batch in &options.batches {
            rounds::run(&options, *batch as usize, &mut report).await?;
        }
    }
    if options.only != Some(Part::Scripts) {
        for batch in &options.wait_batches {
            replicas::run(&options, *batch as usize, &mut report).await?;
        }
    }
    report.print(options.json)?;
    Ok(if report.is_met() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
