//! `barid`: the command line of a Barid cluster, and a whole cluster in one process.

mod authority;
mod cli;
mod confirm;
mod dead;
mod dev;
mod inspect;
mod kafka_reader;
mod kick;
mod listen;
mod output;
mod private;
mod receipts;
mod revoke;
mod send;
mod state;
mod token;
mod top;
mod topics;
mod values;

use std::process::ExitCode;

use barid_runtime::exit;
use clap::Parser as _;

use crate::cli::{Cli, Cluster, Command, Inspect, Topics};
use crate::output::{Coded, Output};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let out = Output::new(cli.json);
    let workers = match barid_runtime::Workers::find() {
        Ok(workers) => workers,
        Err(problem) => return out.fail(&anyhow::Error::msg(problem)),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers.count)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return out.fail(&error.into()),
    };
    let result = runtime.block_on(run(cli.command, out));
    runtime.shutdown_background();
    result.unwrap_or_else(|error| out.fail(&error))
}

/// Prints help, or why the arguments are invalid.
fn refuse(error: &clap::Error) -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(hint) = send::dash_hint(&words, error) {
        let is_json = words.iter().any(|word| word == "--json");
        return Output::new(is_json).fail(&Coded::config(hint).into());
    }
    // An error of stderr cannot be reported.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::CONFIG))
}

async fn run(command: Command, out: Output) -> anyhow::Result<ExitCode> {
    match command {
        Command::Dev(args) => dev::run(args, out).await,
        Command::Send(args) => send::run(args, out).await,
        Command::Listen(args) => listen::run(args, out).await,
        Command::Token(args) => token::run(args, out).await,
        Command::Cluster(Cluster::Ca(args)) => authority::run(&args, out),
        Command::Topics(Topics::Create(args)) => topics::create(args, out).await,
        Command::Topics(Topics::Check(args)) => topics::check(args, out).await,
        Command::Kick(args) => kick::run(args, out).await,
        Command::Revoke(action) => revoke::run(action, out).await,
        Command::Top(args) => top::run(args, out).await,
        Command::Inspect(Inspect::User(args)) => inspect::user(args, out).await,
        Command::Inspect(Inspect::Group(args)) => inspect::group(args, out).await,
        Command::Inspect(Inspect::Dead(args)) => dead::run(args, out).await,
        Command::Inspect(Inspect::Receipts(args)) => receipts::run(args, out).await,
    }
}
