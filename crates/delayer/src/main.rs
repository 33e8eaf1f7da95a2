//! `barid-delayer`: the delayer as a process. See `--help`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    barid_runtime::main::<barid_delayer::Delayer>()
}
