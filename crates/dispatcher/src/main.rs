//! `barid-dispatcher`: see the library.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    barid_runtime::main::<barid_dispatcher::Dispatcher>()
}
