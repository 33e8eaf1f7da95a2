//! `barid-purger`: the purger as a process. See `--help`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    barid_runtime::main::<barid_purger::Purger>()
}
